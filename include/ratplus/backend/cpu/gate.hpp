#pragma once
#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"

namespace ratplus::cpu {

inline void gate_forward_on(context& ctx, view<const float, 2> a, view<const float, 2> o, view<float, 2> y) {
  using namespace detail;
  ctx.parallel_ranges(a.extent(0), piece_rows(a.extent(1)), [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n)
      for_each_pack(a.extent(1), [&](index_t i, auto lanes) {
        store(y.row(n) + i, load(a.row(n) + i, lanes) * sigmoid(load(o.row(n) + i, lanes)), lanes);
      });
  });
}

inline void gate_backward_on(context& ctx, view<const float, 2> a, view<const float, 2> o, view<const float, 2> dy,
                             view<float, 2> da, view<float, 2> d_o) {
  using namespace detail;
  ctx.parallel_ranges(a.extent(0), piece_rows(a.extent(1)), [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n)
      for_each_pack(a.extent(1), [&](index_t i, auto lanes) {
        const pack s = sigmoid(load(o.row(n) + i, lanes)), g = load(dy.row(n) + i, lanes) * s;
        store(d_o.row(n) + i, g * load(a.row(n) + i, lanes) * (pack(1.0f) - s), lanes);
        store(da.row(n) + i, g, lanes);
      });
  });
}

}  // namespace ratplus::cpu
