// The main of every test program, for both versions of Catch2. Built a second time with RATPLUS_TEST_GPU for the
// programs made of .cu files: without a GPU they exit with 77, which ctest reports as skipped.

#if __has_include(<catch2/catch_session.hpp>)
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

#ifdef RATPLUS_TEST_GPU
#include <cuda_runtime_api.h>

#include <cstdio>
#endif

int main(int argc, char** argv) {
#ifdef RATPLUS_TEST_GPU
  int devices = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&devices); status != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU (%s)\n", cudaGetErrorString(status));
    return 77;
  }
#endif
  return Catch::Session().run(argc, argv);
}
