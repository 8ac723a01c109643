#pragma once
// Failures of the CUDA runtime and of its libraries, turned into exceptions that say what was asked, what went wrong
// and what would work.

#include <cuda_runtime.h>

#include "ratplus/core/error.hpp"
#include "ratplus/core/index.hpp"

namespace ratplus::cuda {

/// There is no usable device, the program has no code for it, its memory is spent, or it refused an operation.
struct cuda_error : error {
  using error::error;
};

namespace detail {

/// What would work, for the failures that have an answer.
inline const char* remedy(cudaError_t status) {
  switch (status) {
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorInitializationError:
    case cudaErrorSystemNotReady:
    case cudaErrorSystemDriverMismatch:
      return "; a device of compute capability 8.0 or higher and a driver for this CUDA runtime are needed";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      return "; this program was compiled for another architecture: build it with "
             "-gencode=arch=compute_90a,code=sm_90a for an H100 or H200, or with -arch=native on the machine itself";
    case cudaErrorMisalignedAddress:
      return "; rows must begin at multiples of 16 bytes";
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureImplicit:
    case cudaErrorStreamCaptureInvalidated:
      return "; memory cannot be allocated, and the host cannot wait, while a graph is captured: run the same "
             "operations "
             "once before, so that scratch memory exists";
    default:
      return "";
  }
}

/// Throws cuda_error `what: reason; remedy` unless status is success.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not sticky: the next operation reports its own failures
  throw cuda_error(message(what, ": ", cudaGetErrorString(status), remedy(status)));
}

/// Channels of a head, at most.
inline constexpr int most_channels = 256;

/// Throws shape_error for larger heads.
inline void check_head_size(const char* op, index_t d) {
  if (d > most_channels)
    throw shape_error(message(op, ": head size ", d, ", the CUDA backend takes at most ", most_channels));
}

}  // namespace detail
}  // namespace ratplus::cuda
