#pragma once
// AdamW and the gradient norm: bound by memory, so one pass each, in float with coefficients rounded once, and in
// double.

#include <cmath>
#include <vector>

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"

namespace ratplus::cpu {

inline void adamw_on(context& ctx, const adamw_args<float>& p, const adamw_coefficients& c) {
  const auto single = [](double x) { return static_cast<float>(x); };
  const double correct1 = 1 - std::pow(c.beta1, static_cast<double>(c.step));
  const double correct2 = 1 - std::pow(c.beta2, static_cast<double>(c.step));
  const float scale = single(c.grad_scale), keep = single(1 - c.lr * c.weight_decay), epsilon = single(c.epsilon);
  const float beta1 = single(c.beta1), beta2 = single(c.beta2), rest1 = single(1 - c.beta1),
              rest2 = single(1 - c.beta2);
  const float rate = single(c.lr / correct1), root2 = single(1 / std::sqrt(correct2));
  float *const parameter = p.parameter.data(), *const m = p.m.data(), *const v = p.v.data();
  const float* const grad = p.grad.data();
  ctx.parallel_ranges(p.parameter.extent(0), detail::piece_channels, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      const float g = grad[i] * scale;
      m[i] = beta1 * m[i] + rest1 * g;
      v[i] = beta2 * v[i] + rest2 * g * g;
      parameter[i] = keep * parameter[i] - rate * m[i] / (std::sqrt(v[i]) * root2 + epsilon);
    }
  });
}

[[nodiscard]] inline double squared_norm_on(context& ctx, view<const float, 1> x) {
  constexpr index_t piece = detail::piece_channels;
  constexpr int lanes = 16;  // partial sums per piece, whatever the target's width
  const index_t N = x.extent(0), pieces = (N + piece - 1) / piece;
  std::vector<double> sums(static_cast<std::size_t>(pieces));
  ctx.parallel_for(pieces, piece, 0, [&](index_t at, float*) {
    const float* const data = x.data() + at * piece;
    const index_t n = std::min(piece, N - at * piece);
    double part[lanes] = {};
    index_t i = 0;
    for (; i + lanes <= n; i += lanes)
      for (int j = 0; j < lanes; ++j) part[j] += static_cast<double>(data[i + j]) * static_cast<double>(data[i + j]);
    for (int j = 0; i + j < n; ++j) part[j] += static_cast<double>(data[i + j]) * static_cast<double>(data[i + j]);
    double total = 0;
    for (const double s : part) total += s;
    sums[static_cast<std::size_t>(at)] = total;
  });
  double total = 0;
  for (const double s : sums) total += s;
  return total;
}

}  // namespace ratplus::cpu
