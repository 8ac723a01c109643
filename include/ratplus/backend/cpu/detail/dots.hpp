#pragma once
// Dot products along rows, for products with few rows of A: a decoded token's projections, and its scores. Every number
// of B is then used once or a few times, so B is read as it lies, at the speed of memory, and never packed.

#include "ratplus/backend/cpu/detail/rows.hpp"

namespace ratplus::cpu::detail {

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
      const pack y = load(row[r] + c, lanes);
      unroll<M>([&](auto m) RATPLUS_INLINE_LAMBDA { sums[r * M + m] = multiply_add(x[m], y, sums[r * M + m]); });
    });
  });
  transpose(sums);
  unroll<pack_width - 1>([&](auto i) RATPLUS_INLINE_LAMBDA { sums[0] += sums[i + 1]; });
  return sums[0];
}

/// Rows of A that one call of dots takes at most.
inline constexpr int dots_rows = pack_width < 8 ? pack_width : 8;

}  // namespace ratplus::cpu::detail
