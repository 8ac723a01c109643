#pragma once
// Copies of whole rows, in pieces. Uploads and downloads are the reference's.

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"

namespace ratplus::cpu {

inline void fill_on(context& ctx, view<float, 1> x, float value) {
  ctx.parallel_ranges(x.extent(0), detail::piece_channels, [&](index_t begin, index_t end) {
    if (x.stride(0) == 1)
      std::fill(x.data() + begin, x.data() + end, value);
    else
      for (index_t i = begin; i < end; ++i) x[i] = value;
  });
}

template <int Rank>
void copy_on(context& ctx, view<const float, Rank> x, view<float, Rank> y) {
  if constexpr (Rank > 2) {
    for (index_t i = 0; i < x.extent(0); ++i) copy_on(ctx, x[i], y[i]);
  } else if constexpr (Rank == 2) {
    const index_t channels = x.extent(1);
    ctx.parallel_ranges(x.extent(0), detail::piece_rows(channels), [&](index_t begin, index_t end) {
      for (index_t n = begin; n < end; ++n) std::copy_n(x.row(n), channels, y.row(n));
    });
  } else {
    ctx.parallel_ranges(x.extent(0), detail::piece_channels, [&](index_t begin, index_t end) {
      std::copy(x.data() + begin, x.data() + end, y.data() + begin);
    });
  }
}

}  // namespace ratplus::cpu
