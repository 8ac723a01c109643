#pragma once
// Exact GELU. With a = |x| the normal tail Φ(−a) is e^{−a²/2} times a smooth ratio (Mills's), which is t ·
// polynomial(t) in t = 1 / (1 + 0.3 a) to 4e-9 relative for a ≤ 13: accurate in the tail too, where 1 + erf cancels,
// and the density that the derivative needs comes with it.

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"

namespace ratplus::cpu {

namespace detail {

struct normal {
  pack cdf, density;
};

/// Φ(x) and φ(x).
RATPLUS_INLINE normal standard_normal(pack x) {
  const pack a = absolute(x), one(1.0f);
  const pack bell = exp(pack(-0.5f) * a * a);
  const pack t = one / multiply_add(pack(0.3f), a, one);
  const pack tail =
      bell * t *
      polynomial(t, 1.196864526e-01f, 1.195761688e-01f, 1.102012098e-01f, 7.854093595e-02f, 9.574106832e-02f,
                 -7.868540514e-02f, 1.909362622e-01f, -2.276036904e-01f, 1.121861650e-01f, -2.057916899e-02f);
  return {select(x.v < pack::floats{}, tail, one - tail), pack(0.398942280f) * bell};
}

}  // namespace detail

inline void gelu_forward_on(context& ctx, view<const float, 2> x, view<float, 2> y) {
  using namespace detail;
  ctx.parallel_ranges(x.extent(0), piece_rows(x.extent(1)), [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n)
      for_each_pack(x.extent(1), [&](index_t i, auto lanes) {
        const pack v = load(x.row(n) + i, lanes);
        store(y.row(n) + i, v * standard_normal(v).cdf, lanes);
      });
  });
}

inline void gelu_backward_on(context& ctx, view<const float, 2> x, view<const float, 2> dy, view<float, 2> dx) {
  using namespace detail;
  ctx.parallel_ranges(x.extent(0), piece_rows(x.extent(1)), [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n)
      for_each_pack(x.extent(1), [&](index_t i, auto lanes) {
        const pack v = load(x.row(n) + i, lanes);
        const normal f = standard_normal(v);
        store(dx.row(n) + i, load(dy.row(n) + i, lanes) * multiply_add(v, f.density, f.cdf), lanes);
      });
  });
}

}  // namespace ratplus::cpu
