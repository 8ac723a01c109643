#pragma once
// RMSNorm. Rows are independent; the weight's gradient is summed per piece of rows and the pieces in order.

#include <cmath>

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"

namespace ratplus::cpu {

inline void rms_norm_forward_on(context& ctx, const rms_norm_forward_args<float>& p) {
  using namespace detail;
  const index_t N = p.x.extent(0), d = p.x.extent(1);
  ctx.parallel_ranges(N, piece_rows(d), [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n) {
      const float* x = p.x.row(n);
      pack squares(0.0f);
      for_each_pack(
          d, [&](index_t i, auto lanes) { squares = multiply_add(load(x + i, lanes), load(x + i, lanes), squares); });
      const float mean = sum(squares) / static_cast<float>(d);
      const float rstd = 1.0f / std::sqrt(mean + static_cast<float>(rms_norm_epsilon));
      float* y = p.y.row(n);
      for_each_pack(d, [&](index_t i, auto lanes) {
        store(y + i, load(x + i, lanes) * pack(rstd) * load(p.weight.data() + i, lanes), lanes);
      });
      if (p.rstd) p.rstd[n] = rstd;
    }
  });
}

// With x̂ = x · rstd: dx += rstd (w ⊙ dy − x̂ · mean(w ⊙ dy ⊙ x̂)), dw += Σ_n dy ⊙ x̂.
inline void rms_norm_backward_on(context& ctx, const rms_norm_backward_args<float>& p) {
  using namespace detail;
  const index_t N = p.x.extent(0), d = p.x.extent(1), rows = piece_rows(d), pieces = (N + rows - 1) / rows;
  float* const dweights = ctx.shared_scratch(pieces * d);
  ctx.parallel_for(pieces, 8 * rows * d, 0, [&](index_t piece, float*) {
    float* const dweight = dweights + piece * d;
    std::fill(dweight, dweight + d, 0.0f);
    for (index_t n = piece * rows; n < std::min(N, (piece + 1) * rows); ++n) {
      const float *x = p.x.row(n), *dy = p.dy.row(n), *w = p.weight.data();
      const float rstd = p.rstd[n];
      pack products(0.0f);
      for_each_pack(d, [&](index_t i, auto lanes) {
        products = multiply_add(load(w + i, lanes) * load(dy + i, lanes), load(x + i, lanes), products);
      });
      const pack scale(rstd), mean(sum(products) * rstd / static_cast<float>(d));
      float* dx = p.dx.row(n);
      for_each_pack(d, [&](index_t i, auto lanes) {
        const pack normed = load(x + i, lanes) * scale, g = load(dy + i, lanes);
        store(dx + i, load(dx + i, lanes) + scale * (load(w + i, lanes) * g - normed * mean), lanes);
        store(dweight + i, multiply_add(g, normed, load(dweight + i, lanes)), lanes);
      });
    }
  });
  for (index_t piece = 0; piece < pieces; ++piece)
    for (index_t i = 0; i < d; ++i) p.dweight[i] += dweights[piece * d + i];
}

}  // namespace ratplus::cpu
