# cmake -DWAY=… -DCOMPILER=… -DPREFIX=… -DSOURCE_DIR=… -DBUILD_DIR=… [-DEIGEN=…] -P consume.cmake: builds main.cpp the given way from
# scratch and runs it.
cmake_minimum_required(VERSION 3.22)

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status)
  if(NOT status STREQUAL "0")
    string(REPLACE ";" " " command "${ARGN}")
    message(FATAL_ERROR "${WAY}: '${command}' ended with ${status}")
  endif()
endfunction()

file(REMOVE_RECURSE "${BUILD_DIR}")
file(MAKE_DIRECTORY "${BUILD_DIR}")
set(here "${SOURCE_DIR}/tests/consumers")
set(program "${BUILD_DIR}/consumer")

if(WAY STREQUAL "single_file")
  run(${COMPILER} -std=c++20 -Wall -Wextra -Werror -Wno-unknown-pragmas -DSINGLE_FILE -I${PREFIX} -isystem ${EIGEN}
      ${here}/main.cpp -o ${program})
elseif(WAY STREQUAL "pkg_config")
  find_program(PKG_CONFIG NAMES pkg-config pkgconf REQUIRED)
  set(ENV{PKG_CONFIG_PATH} "${PREFIX}/share/pkgconfig:$ENV{PKG_CONFIG_PATH}")
  execute_process(COMMAND ${PKG_CONFIG} --cflags --libs ratplus OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE
                  COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(flags UNIX_COMMAND "${flags}")
  run(${COMPILER} -std=c++20 ${here}/main.cpp ${flags} -o ${program})
else()
  set(source "${here}/${WAY}")
  set(targets "")
  if(WAY STREQUAL "examples")
    set(source "${SOURCE_DIR}/examples")
    set(targets --target examples)
  endif()
  run(${CMAKE_COMMAND} -S ${source} -B ${BUILD_DIR} -G Ninja -DCMAKE_CXX_COMPILER=${COMPILER} -DCMAKE_PREFIX_PATH=${PREFIX}
      -DRATPLUS_SOURCE_DIR=${SOURCE_DIR} -DCMAKE_EXPORT_COMPILE_COMMANDS=ON)
  run(${CMAKE_COMMAND} --build ${BUILD_DIR} ${targets})
  if(WAY STREQUAL "examples")
    return()
  endif()
  # A consumer chooses its own warnings, processor and optimisation.
  file(READ "${BUILD_DIR}/compile_commands.json" commands)
  if(NOT commands MATCHES "main\\.cpp" OR commands MATCHES " (-W[a-z]|-march|-O[0-9s]|-ffast-math|-g)")
    message(FATAL_ERROR "${WAY}: flags of ours reach the consumer:\n${commands}")
  endif()
endif()
run(${program})
