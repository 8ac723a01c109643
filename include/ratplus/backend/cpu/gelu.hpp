#pragma once
// Exact GELU, by the normal tail's ratio to the bell (core/math.hpp).

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"
#include "ratplus/core/math.hpp"
#include "ratplus/ops/gelu.hpp"

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
  const pack tail = bell * normal_tail_ratio(t, [](pack u, pack v, pack w) { return multiply_add(u, v, w); });
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

inline void gelu_backward_on(context& ctx, view<const float, 2> x, view<const float, 2> dy, view<float, 2> dx,
                             view<float, 2> y) {
  using namespace detail;
  ctx.parallel_ranges(x.extent(0), piece_rows(x.extent(1)), [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n)
      for_each_pack(x.extent(1), [&](index_t i, auto lanes) {
        const pack v = load(x.row(n) + i, lanes);
        const normal f = standard_normal(v);
        store(dx.row(n) + i, load(dy.row(n) + i, lanes) * multiply_add(v, f.density, f.cdf), lanes);
        if (y) store(y.row(n) + i, v * f.cdf, lanes);
      });
  });
}

}  // namespace ratplus::cpu
