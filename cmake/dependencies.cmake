# What the library needs: Eigen, OpenMP where the compiler has it, nlohmann_json for ratplus::io, the CUDA toolkit for ratplus::cuda.
# An installed package always wins; only when there is none is the source fetched.
include(FetchContent)

# ratplus_fetch(NAME REPOSITORY TAG): the source of a package that is not installed, in ${NAME}_SOURCE_DIR, added to the build when
# its own build is light enough to be a guest (SOURCE_SUBDIR of a folder that does not exist leaves it alone).
macro(ratplus_fetch name repository tag)
  message(STATUS "ratplus: ${name} is not installed, fetching ${tag} from ${repository}")
  FetchContent_Declare(${name} GIT_REPOSITORY ${repository} GIT_TAG ${tag} GIT_SHALLOW ON ${ARGN})
  FetchContent_MakeAvailable(${name})
endmacro()

set(RATPLUS_FETCHED OFF)

find_package(Eigen3 3.4 QUIET NO_MODULE)
if(NOT TARGET Eigen3::Eigen)
  ratplus_fetch(eigen https://gitlab.com/libeigen/eigen.git 3.4.0 SOURCE_SUBDIR none)
  add_library(ratplus_eigen INTERFACE)
  add_library(Eigen3::Eigen ALIAS ratplus_eigen)
  target_include_directories(ratplus_eigen SYSTEM INTERFACE ${eigen_SOURCE_DIR})
  set(RATPLUS_FETCHED ON)
endif()

find_package(OpenMP QUIET COMPONENTS CXX)
if(NOT TARGET OpenMP::OpenMP_CXX)
  message(STATUS "ratplus: the compiler has no OpenMP; the CPU backend will use one thread")
endif()

# Our own programs all read and write files; others ask for ratplus::io by having the JSON library.
find_package(nlohmann_json 3.7 QUIET)
if(NOT TARGET nlohmann_json::nlohmann_json AND PROJECT_IS_TOP_LEVEL)
  ratplus_fetch(nlohmann_json https://github.com/nlohmann/json.git v3.11.2)
  set(RATPLUS_FETCHED ON)
endif()

if(RATPLUS_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80 90a)
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit 12 REQUIRED)
endif()
