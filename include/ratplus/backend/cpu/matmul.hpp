#pragma once
// Matrix products, by Eigen, or by a BLAS through Eigen's hook in a program compiled with EIGEN_USE_BLAS. C is cut into
// blocks by its shape alone and each block is one single-threaded product, so that results do not depend on the number
// of threads.
//
// Products of few rows (decoding) are bound by reading B once: a block then holds what fits the cache and is multiplied
// row by row.

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

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/ops/matmul.hpp"

namespace ratplus::cpu {

namespace detail {

template <class T>
using matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using const_matrix_map = Eigen::Map<const matrix<float>, 0, Eigen::OuterStride<>>;
using matrix_map = Eigen::Map<matrix<float>, 0, Eigen::OuterStride<>>;

[[nodiscard]] inline const_matrix_map as_matrix(view<const float, 2> x) {
  return {x.data(), x.extent(0), x.extent(1), Eigen::OuterStride<>(x.stride(0))};
}
[[nodiscard]] inline matrix_map as_matrix(view<float, 2> x) {
  return {x.data(), x.extent(0), x.extent(1), Eigen::OuterStride<>(x.stride(0))};
}

/// Keeps Eigen from threads of its own, which would also change its blocking and so the last bits.
class eigen_single_thread {
 public:
  eigen_single_thread() {
    if (before_ != 1) Eigen::setNbThreads(1);
  }
  eigen_single_thread(const eigen_single_thread&) = delete;
  eigen_single_thread& operator=(const eigen_single_thread&) = delete;
  ~eigen_single_thread() {
    if (before_ != 1) Eigen::setNbThreads(before_);
  }

 private:
  int before_ = Eigen::nbThreads();
};

/// Rows [m0, m1) and columns [n0, n1) of C.
inline void matmul_block(const matmul_args<float>& p, index_t m0, index_t m1, index_t n0, index_t n1) {
  const auto a_view = p.transpose_a ? p.a.slice(1, m0, m1) : p.a.slice(0, m0, m1);
  const auto b_view = p.transpose_b ? p.b.slice(0, n0, n1) : p.b.slice(1, n0, n1);
  const const_matrix_map a = as_matrix(a_view), b = as_matrix(b_view);
  matrix_map c = as_matrix(p.c.slice(0, m0, m1).slice(1, n0, n1));
  if (!p.addend)
    c.setZero();
  else if (p.addend.data() != p.c.data())
    c = as_matrix(p.addend.slice(0, m0, m1).slice(1, n0, n1));
  if (p.transpose_a && p.transpose_b)
    c.noalias() += a.transpose() * b.transpose();
  else if (p.transpose_a)
    c.noalias() += a.transpose() * b;
  else if (p.transpose_b)
    c.noalias() += a * b.transpose();
  else
    c.noalias() += a * b;
}

}  // namespace detail

inline void matmul_on(context& ctx, const matmul_args<float>& p) {
  constexpr index_t few_rows = 8, cached_floats = 1 << 16;
  const index_t M = p.c.extent(0), N = p.c.extent(1), K = p.a.extent(p.transpose_a ? 0 : 1);
  const detail::eigen_single_thread guard;
  if (M <= few_rows) {
    const index_t columns = std::clamp<index_t>(cached_floats / std::max<index_t>(K, 1), 16, 256);
    const index_t blocks = (N + columns - 1) / columns;
    ctx.parallel_for(blocks, 2 * M * columns * K, 0, [&](index_t item, float*) {
      const index_t n0 = item * columns, n1 = std::min(N, n0 + columns);
      for (index_t m = 0; m < M; ++m) detail::matmul_block(p, m, m + 1, n0, n1);
    });
    return;
  }
  // Enough blocks to keep a few threads evenly busy, each large enough to pay for Eigen's packing.
  const index_t columns = 1024;
  index_t rows = 512;
  while (rows > 64 && ((M + rows - 1) / rows) * ((N + columns - 1) / columns) < 16) rows /= 2;
  const index_t row_blocks = (M + rows - 1) / rows, column_blocks = (N + columns - 1) / columns;
  ctx.parallel_for(row_blocks * column_blocks, 2 * rows * std::min(N, columns) * K, 0, [&](index_t item, float*) {
    const index_t m0 = item % row_blocks * rows, n0 = item / row_blocks * columns;
    detail::matmul_block(p, m0, std::min(M, m0 + rows), n0, std::min(N, n0 + columns));
  });
}

}  // namespace ratplus::cpu
