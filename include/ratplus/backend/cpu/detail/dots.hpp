#pragma once
// Dot products along rows, for products with few rows of A: a decoded token's projections, and its scores. Every number
// of B is then used once or a few times, so B is read as it lies, at the speed of memory, and never packed.

#include "ratplus/backend/cpu/detail/rows.hpp"

namespace ratplus::cpu::detail {

/// Lane i is the sum of the lanes of x[i].
RATPLUS_INLINE pack sum_each(pack (&x)[pack_width]) {
  transpose(x);
  unroll<pack_width - 1>([&](auto i) RATPLUS_INLINE_LAMBDA { x[0] += x[i + 1]; });
  return x[0];
}

/// Lane r · M + m of the result is Σ_c a(m, c) · b(r, c), for M rows of A and pack_width / M rows of B: one register of
/// sums for each, whose lanes are added up by a transposition. Rows of B beyond `rows` repeat the last.
template <int M, class TB>
RATPLUS_INLINE pack dots(index_t channels, const float* a, index_t a_stride, const TB* b, index_t b_stride,
                         index_t rows) {
  constexpr int R = pack_width / M;
  const TB* row[R];
  unroll<R>([&](auto r) RATPLUS_INLINE_LAMBDA { row[r] = b + std::min<index_t>(r, rows - 1) * b_stride; });
  pack sums[pack_width];
  unroll<pack_width>([&](auto i) RATPLUS_INLINE_LAMBDA { sums[i] = pack(0.0f); });
  for_each_pack(channels, [&](index_t c, auto lanes) RATPLUS_INLINE_LAMBDA {
    pack x[M];
    unroll<M>([&](auto m) RATPLUS_INLINE_LAMBDA { x[m] = load(a + m * a_stride + c, lanes); });
    unroll<R>([&](auto r) RATPLUS_INLINE_LAMBDA {
      // A few rows at once are not enough to keep memory busy, so the next are asked for (beyond B this does nothing).
      __builtin_prefetch(row[r] + R * b_stride + c, 0, 2);
      const pack y = load(row[r] + c, lanes);
      unroll<M>([&](auto m) RATPLUS_INLINE_LAMBDA { sums[r * M + m] = multiply_add(x[m], y, sums[r * M + m]); });
    });
  });
  return sum_each(sums);
}

/// Lane r is Σ_c a(r, c) · b(r, c), r < pack_width. Rows beyond `rows` repeat the last.
template <class TB>
RATPLUS_INLINE pack row_dots(index_t channels, const float* a, index_t a_stride, const TB* b, index_t b_stride,
                             index_t rows) {
  pack sums[pack_width];
  unroll<pack_width>([&](auto r) RATPLUS_INLINE_LAMBDA {
    const index_t row = std::min<index_t>(r, rows - 1);
    sums[r] = pack(0.0f);
    for_each_pack(channels, [&](index_t c, auto lanes) RATPLUS_INLINE_LAMBDA {
      sums[r] = multiply_add(load(a + row * a_stride + c, lanes), load(b + row * b_stride + c, lanes), sums[r]);
    });
  });
  return sum_each(sums);
}

/// Rows of A that one call of dots takes at most: with more there would be too few rows of B at once.
inline constexpr int dots_rows = 4;

}  // namespace ratplus::cpu::detail
