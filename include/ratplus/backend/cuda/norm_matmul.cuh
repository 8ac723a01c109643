#pragma once
// Few rows' norm, product and activation in one kernel (detail/few_rows.cuh): every block norms the rows for itself.
// More rows are too many for that: a kernel norms them while the product's begins to read the weights
// (detail/few_rows_sm90.cuh).

#include "ratplus/backend/cuda/detail/few_rows.cuh"
#include "ratplus/backend/cuda/detail/few_rows_sm90.cuh"
#include "ratplus/backend/cuda/gelu.cuh"
#include "ratplus/backend/cuda/norm.cuh"
#include "ratplus/ops/norm_matmul.hpp"

namespace ratplus::cuda {

namespace detail::few_rows {

/// A = RMSNorm(x; weight).
struct normed_rows {
  view<const float, 2> x;
  view<const float, 1> weight;
  view<float, 1> rstd;

  __device__ void fill(char* rows, const shape& s) const {
    __shared__ float squares[most_rows][warps];
    const int warp = threadIdx.x / 32;
    for (int m = 0; m < s.M; ++m) {
      float sum = 0;
      for (int k = 4 * static_cast<int>(threadIdx.x); k < s.K; k += 4 * threads) {
        float v[4];
        load(x.row(m) + k, v);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += v[i] * v[i];
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      if (threadIdx.x % 32 == 0) squares[m][warp] = sum;
    }
    __syncthreads();
    for (int m = 0; m < s.M; ++m) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < warps; ++w) sum += squares[m][w];
      const float scale = rsqrtf(sum / static_cast<float>(s.K) + static_cast<float>(rms_norm_epsilon));
      for (int k = 4 * static_cast<int>(threadIdx.x); k < s.K; k += 4 * threads) {
        float v[4], w[4];
        load(x.row(m) + k, v);
        load(weight.data() + k, w);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] *= scale * w[i];
        store(reinterpret_cast<bfloat16*>(rows + m * pitch(s.K)) + k, v);
      }
      if (rstd && blockIdx.x == 0 && threadIdx.x == 0) rstd[m] = scale;
    }
  }
};

/// C and GELU(C).
struct activated_out {
  view<bfloat16, 2> c, activated;

  __device__ float before(int, int) const { return 0.0f; }
  __device__ void write(int m, int n, float x) const {
    c(m, n) = from_float<bfloat16>(x);
    const float rounded = to_float(c(m, n));
    activated(m, n) = from_float<bfloat16>(rounded * standard_normal(rounded).cdf);
  }

  [[nodiscard]] bool in_pairs() const { return aligned(c, 2) && aligned(activated, 2); }
  __device__ float2 pair_before(int, int) const { return {}; }
  __device__ void write_pair(int m, int n, float2 x) const {
    float pair[2] = {x.x, x.y};
    const packed<bfloat16, 2> rounded = narrow<bfloat16, 2>(pair);
    *reinterpret_cast<packed<bfloat16, 2>*>(c.row(m) + n) = rounded;
    widen(rounded, pair);
#pragma unroll
    for (float& v : pair) v *= standard_normal(v).cdf;
    store(activated.row(m) + n, pair);
  }
};

/// normed = RMSNorm(x; norm), a block a row of at most 4096 channels, which stay in registers. The product after it may
/// begin at once, while the kernel before this one runs: before its own wait it reads a parameter and nothing else.
template <class T>
__global__ void __launch_bounds__(row_threads) norm_rows_kernel(rms_norm_forward_args<T> p) {
  constexpr int V = widest<float>, most = 4;
  let_next_begin();
  const int d = static_cast<int>(p.x.extent(1));
  float x[most][V], w[most][V];
#pragma unroll
  for (int u = 0; u < most; ++u)
    if (const int i = (u * row_threads + static_cast<int>(threadIdx.x)) * V; i < d) load(p.weight.data() + i, w[u]);
  previous_done();
  float squares = 0;
#pragma unroll
  for (int u = 0; u < most; ++u)
    if (const int i = (u * row_threads + static_cast<int>(threadIdx.x)) * V; i < d) load(p.x.row(blockIdx.x) + i, x[u]);
#pragma unroll
  for (int u = 0; u < most; ++u)
    if (const int i = (u * row_threads + static_cast<int>(threadIdx.x)) * V; i < d)
#pragma unroll
      for (int j = 0; j < V; ++j) squares += x[u][j] * x[u][j];
  const float rstd = rsqrtf(block_sum(squares) / static_cast<float>(d) + static_cast<float>(rms_norm_epsilon));
#pragma unroll
  for (int u = 0; u < most; ++u)
    if (const int i = (u * row_threads + static_cast<int>(threadIdx.x)) * V; i < d) {
#pragma unroll
      for (int j = 0; j < V; ++j) x[u][j] *= rstd * w[u][j];
      store(p.y.row(blockIdx.x) + i, x[u]);
    }
  if (p.rstd && threadIdx.x == 0) p.rstd[blockIdx.x] = rstd;
}

/// Norm and product of more rows; false where they are not served.
template <class T, class TC, class Out>
[[nodiscard]] bool run_normed(context& ctx, const norm_matmul_args<T, TC>& p, const Out& out) {
  const index_t M = p.x.extent(0), d = p.x.extent(1);
  const view<const T, 2> normed = p.normed;
  if (d % 4 != 0 || d > 16 * row_threads || !aligned(normed, 4) || !streams(ctx, normed, out, p.b)) return false;
  launch_overlapped(ctx, "rms_norm", norm_rows_kernel<T>, dim3(static_cast<unsigned>(M)), dim3(row_threads), 0,
                    rms_norm_forward_args<T>{p.x, p.norm, p.normed, p.rstd});
  run_streaming(ctx, normed, out, p.b, true);
  return true;
}

}  // namespace detail::few_rows

/// Whether it was done.
template <class T, class TC>
[[nodiscard]] bool norm_matmul_on(context& ctx, const norm_matmul_args<T, TC>& p) {
  using namespace detail::few_rows;
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (!detail::aligned(p.x, 4) || !detail::aligned(p.norm, 4)) return false;
    const normed_rows in{p.x, p.norm, p.rstd};
    const index_t M = p.x.extent(0);
    if constexpr (std::is_same_v<TC, bfloat16>)
      if (p.activated)
        return run(ctx, in, activated_out{p.c, p.activated}, p.b, M, true) ||
               run_normed(ctx, p, activated_out{p.c, p.activated});
    return run(ctx, in, sums_out<TC>{p.c, {}}, p.b, M, true) || run_normed(ctx, p, sums_out<TC>{p.c, {}});
  }
  return false;
}

}  // namespace ratplus::cuda
