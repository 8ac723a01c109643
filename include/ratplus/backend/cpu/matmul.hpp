#pragma once
// Matrix products. C is cut into blocks by its shape alone; each block is computed by one thread, over slices of K in
// order. B's slice is packed into panels of block_columns (transposed when B is given transposed); A is read as it
// lies.

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/product.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"

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

/// A block's limits: rows of A and of C, columns of B and of C, depth of a slice of K.
inline constexpr index_t matmul_rows = 192, matmul_columns = 4 * block_columns, matmul_depth = 256;

}  // namespace detail

inline void matmul_on(context& ctx, const matmul_args<float>& p) {
  using namespace detail;
  const index_t M = p.c.extent(0), N = p.c.extent(1), K = p.a.extent(p.transpose_a ? 0 : 1);
  const index_t row_blocks = (M + matmul_rows - 1) / matmul_rows,
                column_blocks = (N + matmul_columns - 1) / matmul_columns;
  const index_t panel_floats = matmul_depth * matmul_columns, tile_floats = matmul_rows * block_columns;
  const index_t work = 2 * std::min(M, matmul_rows) * std::min(N, matmul_columns) * K;
  ctx.parallel_for(row_blocks * column_blocks, work, panel_floats + tile_floats, [&](index_t item, float* scratch) {
    const index_t m0 = item % row_blocks * matmul_rows, n0 = item / row_blocks * matmul_columns;
    const index_t rows = std::min(matmul_rows, M - m0), columns = std::min(matmul_columns, N - n0);
    float *const panel = scratch, *const tile = scratch + panel_floats;
    if (p.addend.data() != p.c.data())
      for (index_t m = m0; m < m0 + rows; ++m) {
        if (p.addend)
          std::copy_n(p.addend.row(m) + n0, columns, p.c.row(m) + n0);
        else
          std::fill_n(p.c.row(m) + n0, columns, 0.0f);
      }
    for (index_t k0 = 0; k0 < K; k0 += matmul_depth) {
      const index_t depth = std::min(matmul_depth, K - k0);
      pack_panel(p.b, p.transpose_b, k0, depth, n0, columns, panel, matmul_columns);
      const float* a = p.transpose_a ? p.a.row(k0) + m0 : p.a.row(m0) + k0;
      for (index_t j = 0; j < columns; j += block_columns) {
        const index_t wide = std::min(block_columns, columns - j), packs = (wide + pack_width - 1) / pack_width;
        const bool whole = packs * pack_width == wide;
        float* const c = p.c.row(m0) + n0 + j;
        // Columns that do not fill their packs are computed beside C and copied.
        float* const to = whole ? c : tile;
        const index_t stride = whole ? p.c.stride(0) : block_columns;
        if (!whole)
          for (index_t m = 0; m < rows; ++m) std::copy_n(c + m * p.c.stride(0), wide, tile + m * stride);
        if (p.transpose_a)
          product<a_layout::columns>(rows, packs, depth, a, p.a.stride(0), panel + j, matmul_columns, to, stride,
                                     from_c{});
        else
          product<a_layout::rows>(rows, packs, depth, a, p.a.stride(0), panel + j, matmul_columns, to, stride,
                                  from_c{});
        if (!whole)
          for (index_t m = 0; m < rows; ++m) std::copy_n(tile + m * stride, wide, c + m * p.c.stride(0));
      }
    }
  });
}

}  // namespace ratplus::cpu
