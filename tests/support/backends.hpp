#pragma once
// The backends that the conformance suite runs on. A case is written once, as a TEMPLATE_TEST_CASE over
// RATPLUS_TEST_BACKENDS; compiled by nvcc the list is the CUDA backend's, so the GPU's suite is a .cu file that
// includes the .cpp file of the same name.

#include <type_traits>

#include "support/array.hpp"
#include "support/catch.hpp"

#if !defined(__CUDACC__)
#include "ratplus/backend/cpu/backend.hpp"
#include "ratplus/backend/reference/backend.hpp"
#endif

namespace ratplus_tests {

/// Agreement that SPEC §8 promises for operations on T.
template <class T>
inline constexpr double tolerance_of = std::is_same_v<T, double>  ? 1e-13
                                       : std::is_same_v<T, float> ? 2e-6
                                                                  : 5e-3;

/// A context and the scalar type it is tested with.
template <class Ctx, class T>
struct backend {
  using context = Ctx;
  using scalar = T;
  static constexpr double tolerance = tolerance_of<T>;

  Ctx ctx = make();
  static Ctx make() {
    if constexpr (std::is_constructible_v<Ctx, int>)
      return Ctx(2);  // threads
    else
      return Ctx();
  }
};

#if defined(__CUDACC__)
}  // namespace ratplus_tests
#include "support/backends.cuh"  // cuda_float, cuda_bfloat16 and the lists
namespace ratplus_tests {
#else
struct reference_float : backend<ratplus::reference::context, float> {};
struct reference_double : backend<ratplus::reference::context, double> {};
struct reference_bfloat16 : backend<ratplus::reference::context, bfloat16> {};
struct cpu_float : backend<ratplus::cpu::context, float> {};
#define RATPLUS_TEST_BACKENDS                                                                         \
  ratplus_tests::reference_float, ratplus_tests::reference_double, ratplus_tests::reference_bfloat16, \
      ratplus_tests::cpu_float
/// For whole models in full precision.
#define RATPLUS_TEST_MODEL_BACKENDS ratplus_tests::reference_double, ratplus_tests::cpu_float
/// For sizes at which a tuned backend goes another way; the reference has one.
#define RATPLUS_TEST_TUNED_BACKENDS ratplus_tests::cpu_float
#endif

/// Sizes at and around the tiles that kernels use, and primes.
inline constexpr index_t awkward_sizes[] = {1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129};

}  // namespace ratplus_tests
