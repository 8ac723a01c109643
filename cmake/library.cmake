# The header-only library: ratplus::ratplus, and with what they need ratplus::io and ratplus::cuda. No warning, architecture or
# optimisation flag is ever passed on to a consumer.
add_library(ratplus INTERFACE)
add_library(ratplus::ratplus ALIAS ratplus)
target_include_directories(ratplus INTERFACE $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:include>)
target_compile_features(ratplus INTERFACE cxx_std_20)
target_link_libraries(ratplus INTERFACE Eigen3::Eigen $<TARGET_NAME_IF_EXISTS:OpenMP::OpenMP_CXX>)
set(ratplus_targets ratplus)

if(TARGET nlohmann_json::nlohmann_json)
  add_library(ratplus_io INTERFACE)
  add_library(ratplus::io ALIAS ratplus_io)
  target_link_libraries(ratplus_io INTERFACE ratplus nlohmann_json::nlohmann_json)
  set_target_properties(ratplus_io PROPERTIES EXPORT_NAME io)
  list(APPEND ratplus_targets ratplus_io)
endif()

if(RATPLUS_CUDA)
  add_library(ratplus_cuda INTERFACE)
  add_library(ratplus::cuda ALIAS ratplus_cuda)
  # CMake knows cuda_std_20 for nvcc since 3.25.2 only.
  target_compile_options(ratplus_cuda INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
  target_link_libraries(ratplus_cuda INTERFACE ratplus CUDA::cudart CUDA::cublasLt)
  set_target_properties(ratplus_cuda PROPERTIES EXPORT_NAME cuda)
  list(APPEND ratplus_targets ratplus_cuda)
endif()

# build/<preset>/ratplus_single.hpp: the front door and everything it includes, in one file.
set(ratplus_single_header "${PROJECT_BINARY_DIR}/ratplus_single.hpp")
file(GLOB_RECURSE ratplus_headers CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/include/ratplus/*.hpp")
add_custom_command(
  OUTPUT "${ratplus_single_header}"
  COMMAND ${CMAKE_COMMAND} -DINCLUDE_DIR=${PROJECT_SOURCE_DIR}/include -DVERSION=${PROJECT_VERSION}
          -DOUTPUT=${ratplus_single_header} -P "${PROJECT_SOURCE_DIR}/cmake/single_header.cmake"
  DEPENDS ${ratplus_headers} "${PROJECT_SOURCE_DIR}/cmake/single_header.cmake"
  VERBATIM)
add_custom_target(single_header DEPENDS "${ratplus_single_header}")

if(RATPLUS_INSTALL AND RATPLUS_FETCHED)
  message(STATUS "ratplus: no install rules, because dependencies were fetched and not found")
elseif(RATPLUS_INSTALL)
  include(GNUInstallDirs)
  include(CMakePackageConfigHelpers)
  set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/ratplus")
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/ratplus" DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
  # One export per target: what a consumer does not ask for is not looked for.
  foreach(target IN LISTS ratplus_targets)
    install(TARGETS ${target} EXPORT ${target}_targets)
    install(EXPORT ${target}_targets NAMESPACE ratplus:: DESTINATION ${package_dir})
  endforeach()
  configure_package_config_file(cmake/ratplus-config.cmake.in ratplus-config.cmake INSTALL_DESTINATION ${package_dir})
  write_basic_package_version_file(ratplus-config-version.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
  install(FILES "${PROJECT_BINARY_DIR}/ratplus-config.cmake" "${PROJECT_BINARY_DIR}/ratplus-config-version.cmake"
          DESTINATION ${package_dir})
  configure_file(cmake/ratplus.pc.in ratplus.pc @ONLY)
  install(FILES "${PROJECT_BINARY_DIR}/ratplus.pc" DESTINATION ${CMAKE_INSTALL_DATADIR}/pkgconfig)
endif()
