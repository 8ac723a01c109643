#pragma once
// The CUDA backend for the conformance suite; included by support/backends.hpp alone.

#include "ratplus/backend/reference/backend.hpp"
#include "ratplus/cuda.cuh"

namespace ratplus_tests {

/// A context on the first device, and the scalar type it is tested with.
template <class T>
struct cuda_backend {
  using context = ratplus::cuda::context;
  using scalar = T;
  static constexpr double tolerance = tolerance_of<T>;

  context ctx;
};

struct cuda_float : cuda_backend<float> {};
struct cuda_bfloat16 : cuda_backend<bfloat16> {};
#define RATPLUS_TEST_BACKENDS ratplus_tests::cuda_float, ratplus_tests::cuda_bfloat16
/// For whole models in full precision.
#define RATPLUS_TEST_MODEL_BACKENDS ratplus_tests::cuda_float
/// For sizes at which a tuned backend goes another way.
#define RATPLUS_TEST_TUNED_BACKENDS RATPLUS_TEST_BACKENDS

}  // namespace ratplus_tests
