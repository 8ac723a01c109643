#pragma once
// Matrix products, by Eigen, or by a BLAS through Eigen's hook in a program compiled with EIGEN_USE_BLAS. C is cut into
// blocks by its shape alone and each block is one single-threaded product, so that results do not depend on the number
// of threads.
//
// A few rows against a transposed B (a decoded token against weights) are dot products instead, bound by reading B
// once.
//
// Tried: products of our own on attention's micro-kernel. Alone they are 1.3 to 1.6 times as fast as Eigen's; a whole
// training step took the same processor time either way.

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
#include "ratplus/backend/cpu/detail/dots.hpp"
#include "ratplus/ops/matmul.hpp"

#if defined(EIGEN_USE_BLAS)
// Null with any other BLAS, whose threads are the program's to set.
extern "C" [[gnu::weak]] int openblas_get_num_threads();
extern "C" [[gnu::weak]] void openblas_set_num_threads(int);
#endif

namespace ratplus::cpu {

namespace detail {

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

/// Threads of OpenBLAS. Without it there are none to know of or to set.
inline int blas_threads() {
#if defined(EIGEN_USE_BLAS)
  if (openblas_get_num_threads) return openblas_get_num_threads();
#endif
  return 1;
}
inline void set_blas_threads([[maybe_unused]] int threads) {
#if defined(EIGEN_USE_BLAS)
  if (openblas_set_num_threads) openblas_set_num_threads(threads);
#endif
}

/// Keeps Eigen and OpenBLAS from threads of their own, which would also change their blocking and so the last bits.
class single_threaded_products {
 public:
  single_threaded_products() { set(1, 1); }
  single_threaded_products(const single_threaded_products&) = delete;
  single_threaded_products& operator=(const single_threaded_products&) = delete;
  ~single_threaded_products() { set(eigen_, blas_); }

 private:
  static void set(int eigen, int blas) {
    if (Eigen::nbThreads() != eigen) Eigen::setNbThreads(eigen);
    if (blas_threads() != blas) set_blas_threads(blas);
  }

  int eigen_ = Eigen::nbThreads(), blas_ = blas_threads();
};

/// Rows and columns of the blocks of C (M × N): enough blocks to keep a few threads evenly busy, cut so that as little
/// as possible is packed. A block packs its rows of A and its columns of B, so all of A is packed once for every column
/// of blocks and all of B once for every row of them.
[[nodiscard]] inline std::pair<index_t, index_t> block_shape(index_t M, index_t N) {
  constexpr index_t enough = 8, multiple = 16;
  const auto piece = [](index_t n, index_t pieces) {
    return ((n + pieces - 1) / pieces + multiple - 1) / multiple * multiple;
  };
  index_t row_blocks = enough;
  for (index_t r = enough; r >= 1; r /= 2)
    if (M * (enough / r) + N * r < M * (enough / row_blocks) + N * row_blocks) row_blocks = r;
  return {piece(M, row_blocks), piece(N, enough / row_blocks)};
}

/// Rows [m0, m1) and columns [n0, n1) of C, which begins as the addend, += A · B.
inline void matmul_block(const matmul_args<float>& p, index_t m0, index_t m1, index_t n0, index_t n1) {
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

}  // namespace detail

inline void matmul_on(context& ctx, const matmul_args<float>& p) {
  using namespace detail;
  const index_t M = p.c.extent(0), N = p.c.extent(1), K = p.a.extent(p.transpose_a ? 0 : 1);
  constexpr index_t few_rows = 8;
  if (M <= few_rows && p.transpose_b && !p.transpose_a) {
    const index_t piece = std::max<index_t>(pack_width, padded(piece_channels / std::max<index_t>(1, K)));
    ctx.parallel_for((N + piece - 1) / piece, 2 * M * piece * K, 0, [&](index_t item, float*) {
      matmul_few_rows(p, 0, item * piece, std::min(N, (item + 1) * piece));
    });
    return;
  }
  const auto block = block_shape(M, N);
  const index_t rows = block.first, columns = block.second;
  const index_t row_blocks = (M + rows - 1) / rows, column_blocks = (N + columns - 1) / columns;
  const index_t work = 2 * rows * columns * K;
  const single_threaded_products guard;
  ctx.parallel_for(row_blocks * column_blocks, work, 0, [&](index_t item, float*) {
    const index_t m0 = item % row_blocks * rows, m1 = std::min(M, m0 + rows);
    const index_t n0 = item / row_blocks * columns, n1 = std::min(N, n0 + columns);
    if (!p.addend || p.addend.data() != p.c.data())
      for (index_t m = m0; m < m1; ++m) {
        if (p.addend)
          std::copy_n(p.addend.row(m) + n0, n1 - n0, p.c.row(m) + n0);
        else
          std::fill_n(p.c.row(m) + n0, n1 - n0, 0.0f);
      }
    matmul_block(p, m0, m1, n0, n1);
  });
}

}  // namespace ratplus::cpu
