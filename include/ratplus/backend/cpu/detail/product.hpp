#pragma once
// The one micro-kernel: C (M × N packs) = start + A · B with the sums in registers. Elements of A are broadcast, rows
// of B are loaded as packs, so B's rows and C's rows are contiguous and A is read as it lies, by rows or by columns.
// Matrix products, both products of attention and the five of its backward pass are all made of it.

#include "ratplus/backend/cpu/detail/simd.hpp"

namespace ratplus::cpu::detail {

/// Rows and packs of one register block: rows · packs sums, `packs` loaded rows of B and a broadcast must fit.
#if defined(__AVX512F__)
inline constexpr int block_rows = 6, block_packs = 4;
#else
inline constexpr int block_rows = 4, block_packs = 2;
#endif
inline constexpr index_t block_columns = block_packs * pack_width;

/// How element (m, k) of A lies: rows[m * stride + k] or columns[k * stride + m].
enum class a_layout { rows, columns };

/// acc[m][n] += Σ_k A(m, k) · B(k, n)
template <a_layout Layout, int M, int N>
RATPLUS_INLINE void accumulate(pack (&acc)[M][N], index_t K, const float* a, index_t a_stride, const float* b,
                               index_t b_stride) {
  for (index_t k = 0; k < K; ++k) {
    pack row[N];
    unroll<N>([&](auto n) RATPLUS_INLINE_LAMBDA { row[n] = load(b + k * b_stride + n * pack_width); });
    unroll<M>([&](auto m) RATPLUS_INLINE_LAMBDA {
      const pack x(Layout == a_layout::rows ? a[m * a_stride + k] : a[k * a_stride + m]);
      unroll<N>([&](auto n) RATPLUS_INLINE_LAMBDA { acc[m][n] = multiply_add(x, row[n], acc[m][n]); });
    });
  }
}

/// C = start(C) + A · B for `rows` rows and N packs: start(pointer, n) is the value the sums of pack n begin with.
template <a_layout Layout, int N, int M = block_rows, class Start>
RATPLUS_INLINE void product_packs(index_t rows, index_t K, const float* a, index_t a_stride, const float* b,
                                  index_t b_stride, float* c, index_t c_stride, const Start& start) {
  index_t r = 0;
  for (; r + M <= rows; r += M) {
    float* const to = c + r * c_stride;
    pack acc[M][N];
    unroll<M>([&](auto m) RATPLUS_INLINE_LAMBDA {
      unroll<N>([&](auto n) RATPLUS_INLINE_LAMBDA { acc[m][n] = start(to + m * c_stride + n * pack_width, n); });
    });
    accumulate<Layout>(acc, K, Layout == a_layout::rows ? a + r * a_stride : a + r, a_stride, b, b_stride);
    unroll<M>([&](auto m) RATPLUS_INLINE_LAMBDA {
      unroll<N>([&](auto n) RATPLUS_INLINE_LAMBDA { store(to + m * c_stride + n * pack_width, acc[m][n]); });
    });
  }
  if constexpr (M > 1)
    if (r < rows)
      product_packs<Layout, N, M / 2>(rows - r, K, Layout == a_layout::rows ? a + r * a_stride : a + r, a_stride, b,
                                      b_stride, c + r * c_stride, c_stride, start);
}

/// The same for 1 to block_packs packs.
template <a_layout Layout, class Start, int N = block_packs>
void product(index_t rows, index_t packs, index_t K, const float* a, index_t a_stride, const float* b, index_t b_stride,
             float* c, index_t c_stride, const Start& start) {
  if constexpr (N > 0) {
    if (packs == N)
      product_packs<Layout, N>(rows, K, a, a_stride, b, b_stride, c, c_stride, start);
    else
      product<Layout, Start, N - 1>(rows, packs, K, a, a_stride, b, b_stride, c, c_stride, start);
  }
}

struct from_zero {
  RATPLUS_INLINE pack operator()(const float*, int) const { return pack(0.0f); }
};
struct from_c {
  RATPLUS_INLINE pack operator()(const float* c, int) const { return load(c); }
};
/// From C times a factor per column.
struct from_scaled_c {
  const float* factor;
  RATPLUS_INLINE pack operator()(const float* c, int n) const { return load(c) * load(factor + n * pack_width); }
};

}  // namespace ratplus::cpu::detail
