#pragma once
// Matrix products. C is cut into blocks by its shape alone and each block is computed by one thread, over slices of K
// in order, so that results do not depend on the number of threads. B's slice is packed into rows of whole packs,
// transposed when B is given transposed; A is read as it lies. The micro-kernel is attention's, and reaches 80 to 85 %
// of the peak of multiply-adds where Eigen 3.4's own reaches 50 to 60 % (bench/matmul). In a program compiled with
// EIGEN_USE_BLAS the blocks are products of Eigen's, that is, of the BLAS it is linked with.
//
// A few rows against a transposed B (a decoded token against weights) are dot products instead, bound by reading B
// once.

#if defined(EIGEN_USE_BLAS)
// g++ 12 suspects its own AVX-512 intrinsics, where Eigen calls them, of reading what was never written.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <Eigen/Core>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/dots.hpp"
#include "ratplus/backend/cpu/detail/product.hpp"
#include "ratplus/ops/matmul.hpp"

namespace ratplus::cpu {

namespace detail {

/// (K × n) of B at rows [k0, k0 + K), columns [n0, n0 + n), as rows of whole packs, zeros beyond n.
inline void pack_panel(view<const float, 2> b, bool transposed, index_t k0, index_t K, index_t n0, index_t n,
                       float* panel, index_t stride) {
  if (!transposed) {
    for (index_t k = 0; k < K; ++k)
      for_each_pack(n,
                    [&](index_t i, auto lanes) { store(panel + k * stride + i, load(b.row(k0 + k) + n0 + i, lanes)); });
    return;
  }
  for (index_t j = 0; j < n; j += pack_width)
    for_each_pack(K, [&](index_t k, auto lanes) {
      pack x[pack_width];
      for (index_t i = 0; i < pack_width; ++i) x[i] = j + i < n ? load(b.row(n0 + j + i) + k0 + k, lanes) : pack(0.0f);
      transpose(x);
      for (index_t i = 0; i < lanes; ++i) store(panel + (k + i) * stride + j, x[i]);
    });
}

/// Rows [m0, m0 + M) and columns [n0, n1) of C = A Bᵀ [+ addend].
template <int M>
void matmul_dots(const matmul_args<float>& p, index_t m0, index_t n0, index_t n1) {
  constexpr index_t R = pack_width / M;
  for (index_t n = n0; n < n1; n += R) {
    const index_t rows = std::min(R, n1 - n);
    float sums[pack_width];
    store(sums, dots<M>(p.a.extent(1), p.a.row(m0), p.a.stride(0), p.b.row(n), p.b.stride(0), rows));
    for (index_t r = 0; r < rows; ++r)
      for (index_t m = 0; m < M; ++m)
        p.c(m0 + m, n + r) = sums[r * M + m] + (p.addend ? p.addend(m0 + m, n + r) : 0.0f);
  }
}
template <int M = dots_rows>
void matmul_few_rows(const matmul_args<float>& p, index_t m0, index_t n0, index_t n1) {
  for (; m0 + M <= p.c.extent(0); m0 += M) matmul_dots<M>(p, m0, n0, n1);
  if constexpr (M > 1) matmul_few_rows<M / 2>(p, m0, n0, n1);
}

#if defined(EIGEN_USE_BLAS)

inline constexpr index_t matmul_rows = 512, matmul_columns = 1024;
constexpr index_t matmul_floats() { return 0; }

/// Rows [m0, m1) and columns [n0, n1) of C, which begins as the addend, += A · B.
inline void matmul_block(const matmul_args<float>& p, index_t m0, index_t m1, index_t n0, index_t n1, float*) {
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const auto as_matrix = []<class T>(view<T, 2> x) {
    using map = Eigen::Map<std::conditional_t<std::is_const_v<T>, const matrix, matrix>, 0, Eigen::OuterStride<>>;
    return map(x.data(), x.extent(0), x.extent(1), Eigen::OuterStride<>(x.stride(0)));
  };
  const auto a = as_matrix(p.a.slice(p.transpose_a ? 1 : 0, m0, m1));
  const auto b = as_matrix(p.b.slice(p.transpose_b ? 0 : 1, n0, n1));
  auto c = as_matrix(p.c.slice(0, m0, m1).slice(1, n0, n1));
  if (p.transpose_a && p.transpose_b)
    c.noalias() += a.transpose() * b.transpose();
  else if (p.transpose_a)
    c.noalias() += a.transpose() * b;
  else if (p.transpose_b)
    c.noalias() += a * b.transpose();
  else
    c.noalias() += a * b;
}

#else

inline constexpr index_t matmul_rows = 192, matmul_columns = 4 * block_columns, matmul_depth = 256;
constexpr index_t matmul_floats() { return matmul_depth * matmul_columns + matmul_rows * block_columns; }

/// Rows [m0, m1) and columns [n0, n1) of C, which begins as the addend, += A · B.
inline void matmul_block(const matmul_args<float>& p, index_t m0, index_t m1, index_t n0, index_t n1, float* scratch) {
  const index_t rows = m1 - m0, columns = n1 - n0, K = p.a.extent(p.transpose_a ? 0 : 1);
  float *const panel = scratch, *const tile = scratch + matmul_depth * matmul_columns;
  for (index_t k0 = 0; k0 < K; k0 += matmul_depth) {
    const index_t depth = std::min(matmul_depth, K - k0);
    pack_panel(p.b, p.transpose_b, k0, depth, n0, columns, panel, matmul_columns);
    const float* a = p.transpose_a ? p.a.row(k0) + m0 : p.a.row(m0) + k0;
    for (index_t j = 0; j < columns; j += block_columns) {
      const index_t wide = std::min(block_columns, columns - j), packs = padded(wide) / pack_width;
      const bool whole = padded(wide) == wide;
      float* const c = p.c.row(m0) + n0 + j;
      // Columns that do not fill their packs are computed beside C and copied.
      float* const to = whole ? c : tile;
      const index_t stride = whole ? p.c.stride(0) : block_columns;
      if (!whole) {
        std::fill_n(tile, rows * stride, 0.0f);
        for (index_t m = 0; m < rows; ++m) std::copy_n(c + m * p.c.stride(0), wide, tile + m * stride);
      }
      if (p.transpose_a)
        product<a_layout::columns>(rows, packs, depth, a, p.a.stride(0), panel + j, matmul_columns, to, stride,
                                   from_c{});
      else
        product<a_layout::rows>(rows, packs, depth, a, p.a.stride(0), panel + j, matmul_columns, to, stride, from_c{});
      if (!whole)
        for (index_t m = 0; m < rows; ++m) std::copy_n(tile + m * stride, wide, c + m * p.c.stride(0));
    }
  }
}

#endif

}  // namespace detail

inline void matmul_on(context& ctx, const matmul_args<float>& p) {
  using namespace detail;
  const index_t M = p.c.extent(0), N = p.c.extent(1), K = p.a.extent(p.transpose_a ? 0 : 1);
  if (M <= dots_rows && p.transpose_b && !p.transpose_a) {
    const index_t piece = std::max<index_t>(pack_width, padded(piece_channels / std::max<index_t>(1, K)));
    ctx.parallel_for((N + piece - 1) / piece, 2 * M * piece * K, 0, [&](index_t item, float*) {
      matmul_few_rows(p, 0, item * piece, std::min(N, (item + 1) * piece));
    });
    return;
  }
  const index_t row_blocks = (M + matmul_rows - 1) / matmul_rows;
  const index_t column_blocks = (N + matmul_columns - 1) / matmul_columns;
  const index_t work = 2 * std::min(M, matmul_rows) * std::min(N, matmul_columns) * K;
  ctx.parallel_for(row_blocks * column_blocks, work, matmul_floats(), [&](index_t item, float* scratch) {
    const index_t m0 = item % row_blocks * matmul_rows, m1 = std::min(M, m0 + matmul_rows);
    const index_t n0 = item / row_blocks * matmul_columns, n1 = std::min(N, n0 + matmul_columns);
    if (!p.addend || p.addend.data() != p.c.data())
      for (index_t m = m0; m < m1; ++m) {
        if (p.addend)
          std::copy_n(p.addend.row(m) + n0, n1 - n0, p.c.row(m) + n0);
        else
          std::fill_n(p.c.row(m) + n0, n1 - n0, 0.0f);
      }
    matmul_block(p, m0, m1, n0, n1, scratch);
  });
}

}  // namespace ratplus::cpu
