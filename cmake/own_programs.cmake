# What our own programs (tests, benchmarks, examples, trainer) get and no consumer ever does: a default build type, ccache, warnings
# as errors, this machine's instructions, sanitizers. They link ratplus_own beside ratplus::….
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_CXX_EXTENSIONS OFF)

find_program(RATPLUS_CCACHE ccache)
if(RATPLUS_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${RATPLUS_CCACHE})
endif()

add_library(ratplus_own INTERFACE)
target_compile_features(ratplus_own INTERFACE cxx_std_20)
set(cxx $<COMPILE_LANGUAGE:CXX>)
target_compile_options(ratplus_own INTERFACE $<${cxx}:-Wall;-Wextra;-Wconversion;-Wshadow;-Werror>)
if(RATPLUS_NATIVE)
  target_compile_options(ratplus_own INTERFACE $<${cxx}:-march=native>)
endif()
if(RATPLUS_SANITIZE)
  string(REPLACE ";" "," sanitize "${RATPLUS_SANITIZE}")
  target_compile_options(ratplus_own INTERFACE
    $<${cxx}:-fsanitize=${sanitize};-fno-sanitize-recover=all;-fno-omit-frame-pointer;-D_GLIBCXX_ASSERTIONS>)
  target_link_options(ratplus_own INTERFACE -fsanitize=${sanitize})
  # g++ with -fsanitize=address suspects std::function and Eigen of reading uninitialised members.
  target_compile_options(ratplus_own INTERFACE $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-maybe-uninitialized>)
endif()

# For programs that train: large matrix products through a BLAS. OpenBLAS by name, because the reference BLAS, which may be found
# as well, is far slower than Eigen.
add_library(ratplus_blas INTERFACE)
if(RATPLUS_BLAS AND NOT RATPLUS_SANITIZE)
  if(NOT BLA_VENDOR)
    set(BLA_VENDOR OpenBLAS)
  endif()
  find_package(BLAS QUIET)
  if(TARGET BLAS::BLAS)
    target_compile_definitions(ratplus_blas INTERFACE EIGEN_USE_BLAS)
    target_link_libraries(ratplus_blas INTERFACE BLAS::BLAS)
  else()
    message(STATUS "ratplus: no ${BLA_VENDOR}; matrix products are Eigen's own")
  endif()
endif()

if(RATPLUS_CUDA)
  # --extended-lambda is not used; relaxed constexpr is: host constexpr arithmetic (patterns) runs in kernels as it is.
  target_compile_options(ratplus_own INTERFACE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-lineinfo;-Xcompiler=-Wall,-Wextra;-Werror=all-warnings>)
  # The level of nvcc's host code alone, a third of the compile time at -O3; kernels come out the same.
  string(REPLACE -O3 -O1 CMAKE_CUDA_FLAGS_RELEASE "${CMAKE_CUDA_FLAGS_RELEASE}")
  add_custom_target(cuda_programs)  # every .cu: tests, benchmarks, examples
  # Each .cu's compile time is printed after its line.
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E time)
endif()
