#pragma once
// The CPU backend: float32 on the vector unit and OpenMP threads. It derives from the reference backend, so an
// operation or a scalar type missing here is slow, not absent.
//
// Results do not depend on the number of threads: work is cut into items by the shapes alone, each item is computed by
// one thread, and partial results are joined in the order of the items.

#include <algorithm>
#include <vector>

#include "ratplus/backend/reference/backend.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace ratplus::cpu {

/// Owns the number of threads and their scratch memory. One operation at a time may run on a context.
struct context : reference::context {
  int threads;

  /// 0 threads: as many as OpenMP would use (one when compiled without). Throws value_error when negative.
  explicit context(int thread_count = 0) : threads(thread_count) {
    if (thread_count < 0) throw value_error(message("cpu context: ", thread_count, " threads"));
#if defined(_OPENMP)
    if (threads == 0) threads = omp_get_max_threads();
#else
    threads = 1;
#endif
    scratch_.resize(static_cast<std::size_t>(threads));
  }

  /// f(i, scratch) for 0 ≤ i < items, each by one thread, in any order; `scratch` is the thread's own memory of
  /// `floats` floats, aligned and uninitialised. `work` is about how many arithmetic operations an item takes: too few
  /// in all are not worth waking threads.
  template <class F>
  void parallel_for(index_t items, index_t work, index_t floats, F&& f) {
    const int team = items * work < worth_a_team ? 1 : static_cast<int>(std::min<index_t>(threads, items));
    for (int t = 0; t < team; ++t) reserve(scratch_[static_cast<std::size_t>(t)], floats);
#if defined(_OPENMP)
    if (team > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
      for (index_t i = 0; i < items; ++i) f(i, scratch_[static_cast<std::size_t>(omp_get_thread_num())].data());
      return;
    }
#endif
    for (index_t i = 0; i < items; ++i) f(i, scratch_.front().data());
  }

  /// f(begin, end) over [0, n) in pieces of `piece`.
  template <class F>
  void parallel_ranges(index_t n, index_t piece, F&& f) {
    parallel_for((n + piece - 1) / piece, worth_a_team, 0,
                 [&](index_t i, float*) { f(i * piece, std::min(n, (i + 1) * piece)); });
  }

  /// Memory shared by the items of one operation, valid until the next call.
  [[nodiscard]] float* shared_scratch(index_t floats) {
    reserve(shared_, floats);
    return shared_.data();
  }

 private:
  static constexpr index_t worth_a_team = 1 << 17;  // a few microseconds

  static void reserve(tensor<float, 1>& memory, index_t floats) {
    if (memory.size() < floats) memory = make_tensor<float>(floats);
  }

  std::vector<tensor<float, 1>> scratch_;
  tensor<float, 1> shared_;
};

}  // namespace ratplus::cpu
