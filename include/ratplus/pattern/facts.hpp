#pragma once
// What a pattern costs, known before anything runs: keys visited, FLOPs, cached keys and bytes. All constexpr; closed
// forms for sparse patterns, so a static_assert at T = 262144 compiles at once.

#include "ratplus/pattern/sparse.hpp"

namespace ratplus {

/// Σ over queries t < T of the number of keys t sees.
template <Pattern P>
[[nodiscard]] constexpr index_t keys_visited(const P& pattern, index_t T) {
  if constexpr (SparsePattern<P>) {
    // Counted by keys: key k is seen by min(W + 1, T − k) queries, and by T − W − 1 − k more if it is a sink or an
    // anchor.
    const any_sparse p(pattern);
    const auto triangle = [](index_t n) { return n > 0 ? n * (n + 1) / 2 : 0; };
    if (p.dense()) return triangle(T);
    const index_t later = T - p.window() - 1;  // queries beyond the window of key 0
    const index_t window = triangle(T) - triangle(later);
    const index_t sinks = triangle(later) - triangle(later - p.sinks());
    index_t anchors = 0;
    if (const index_t first = p.first_anchor(); p.anchored() && first < later) {
      const index_t n = (later - first + p.dilation() - 1) / p.dilation();
      anchors = n * (later - first) - p.dilation() * (n * (n - 1) / 2);
    }
    return window + sinks + anchors;
  } else {
    index_t n = 0;
    for (index_t t = 0; t < T; ++t) n += pattern.keys(t).keys();
    return n;
  }
}

/// FLOPs of attention over T positions, forward: q·k and p·v, a multiplication and an addition per channel each.
template <Pattern P>
[[nodiscard]] constexpr index_t attention_flops(const P& pattern, index_t T, index_t heads, index_t head_size) {
  return 4 * head_size * heads * keys_visited(pattern, T);
}

/// The same for the backward pass: q·k again, dP, dQ, dK and dV.
template <Pattern P>
[[nodiscard]] constexpr index_t attention_backward_flops(const P& pattern, index_t T, index_t heads,
                                                         index_t head_size) {
  return 10 * head_size * heads * keys_visited(pattern, T);
}

}  // namespace ratplus
