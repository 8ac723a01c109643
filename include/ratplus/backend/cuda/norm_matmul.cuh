#pragma once
// Few rows' norm, product and activation in one kernel (detail/few_rows.cuh): every block norms the rows for itself.

#include "ratplus/backend/cuda/detail/few_rows.cuh"
#include "ratplus/backend/cuda/gelu.cuh"
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
};

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
      if (p.activated) return run(ctx, in, activated_out{p.c, p.activated}, p.b, M, true);
    return run(ctx, in, sums_out<TC>{p.c, {}}, p.b, M, true);
  }
  return false;
}

}  // namespace ratplus::cuda
