#pragma once
// Cross-entropy: one read of a row for its maximum and sum, joined over pieces as partial softmaxes, one for its
// gradient. Row losses are summed in the order of the rows, in double.

#include <cmath>
#include <vector>

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"
#include "ratplus/core/softmax_state.hpp"

namespace ratplus::cpu {

namespace detail {
/// max and Σ e^{z − max} of a row.
inline softmax_state<float> softmax_of(const float* z, index_t V) {
  constexpr index_t piece = 1024;  // stays in the first-level cache between the two reads
  softmax_state<float> state;
  for (index_t begin = 0; begin < V; begin += piece) {
    const index_t n = std::min(piece, V - begin);
    const float* x = z + begin;
    pack top(x[0]);
    index_t i = 0;
    for (; i + pack_width <= n; i += pack_width) top = maximum(top, load(x + i));
    float max = maximum(top);
    for (index_t j = i; j < n; ++j) max = max > x[j] ? max : x[j];
    pack total(0.0f);
    for (index_t j = 0; j < i; j += pack_width) total += exp(load(x + j) - pack(max));
    float part = sum(total);
    for (; i < n; ++i) part += std::exp(x[i] - max);
    state = combine(state, softmax_state<float>{max, part}).state;
  }
  return state;
}
}  // namespace detail

inline void cross_entropy_on(context& ctx, const cross_entropy_args<float>& p) {
  using namespace detail;
  const index_t N = p.logits.extent(0), V = p.logits.extent(1);
  std::vector<double> losses(static_cast<std::size_t>(N));
  ctx.parallel_ranges(N, piece_rows(V), [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n) {
      const token_t label = p.labels[n];
      const bool counts = label != ignored_label;
      const float* z = p.logits.row(n);
      float lse = 0;
      if (counts) {
        lse = softmax_of(z, V).log_sum_exp();
        losses[static_cast<std::size_t>(n)] = p.weight * static_cast<double>(lse - z[label]);
      }
      if (!p.dlogits) continue;
      float* dz = p.dlogits.row(n);
      if (!counts) {
        std::fill(dz, dz + V, 0.0f);
        continue;
      }
      const auto weight = static_cast<float>(p.weight);
      const float at_label = (std::exp(z[label] - lse) - 1.0f) * weight;
      for_each_pack(
          V, [&](index_t i, auto lanes) { store(dz + i, exp(load(z + i, lanes) - pack(lse)) * pack(weight), lanes); });
      dz[label] = at_label;
    }
  });
  for (const double loss : losses) p.loss[0] += loss;
}

}  // namespace ratplus::cpu
