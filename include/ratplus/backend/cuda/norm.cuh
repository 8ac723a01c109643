#pragma once
// One block per row; the row is read twice, the second time from cache. The weight's gradient is summed per block over
// the block's rows and then over the blocks, in an order that never changes. Accesses are as wide as x and dx allow.

#include <cub/block/block_reduce.cuh>

#include "ratplus/backend/cuda/detail/rows.cuh"
#include "ratplus/ops/norm.hpp"

namespace ratplus::cuda {

namespace detail {

/// Σ over the block, in every thread.
__device__ inline float block_sum(float x) {
  using reduce = cub::BlockReduce<float, row_threads>;
  __shared__ typename reduce::TempStorage storage;
  __shared__ float sum;
  const float total = reduce(storage).Sum(x);
  if (threadIdx.x == 0) sum = total;
  __syncthreads();
  const float result = sum;
  __syncthreads();
  return result;
}

template <int V, class T>
__global__ void __launch_bounds__(row_threads) rms_norm_forward_kernel(rms_norm_forward_args<T> p) {
  wait_for_previous();
  const index_t d = p.x.extent(1), row = blockIdx.x;
  const float* x = p.x.row(row);
  float squares = 0;
  for (index_t i = threadIdx.x * V; i < d; i += row_threads * V) {
    float v[V];
    load(x + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) squares += v[j] * v[j];
  }
  const float rstd = rsqrtf(block_sum(squares) / static_cast<float>(d) + static_cast<float>(rms_norm_epsilon));
  for (index_t i = threadIdx.x * V; i < d; i += row_threads * V) {
    float v[V], w[V];
    load(x + i, v);
    load(p.weight.data() + i, w);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] *= rstd * w[j];
    store(p.y.row(row) + i, v);
  }
  if (p.rstd && threadIdx.x == 0) p.rstd[row] = rstd;
}

/// Writes Σ dy ⊙ x̂ over this block's rows to row blockIdx.x of `partial` (blocks, d).
template <int V, class T>
__global__ void __launch_bounds__(row_threads) rms_norm_backward_kernel(rms_norm_backward_args<T> p, float* partial) {
  extern __shared__ float dweight[];  // (d); each thread touches its own columns only
  const index_t N = p.x.extent(0), d = p.x.extent(1);
  for (index_t i = threadIdx.x * V; i < d; i += row_threads * V)
#pragma unroll
    for (int j = 0; j < V; ++j) dweight[i + j] = 0;
  for (index_t row = blockIdx.x; row < N; row += gridDim.x) {
    const float rstd = p.rstd[row];
    float mean = 0;
    for (index_t i = threadIdx.x * V; i < d; i += row_threads * V) {
      float x[V], dy[V], w[V];
      load(p.x.row(row) + i, x);
      load(p.dy.row(row) + i, dy);
      load(p.weight.data() + i, w);
#pragma unroll
      for (int j = 0; j < V; ++j) mean += w[j] * dy[j] * x[j];
    }
    mean = block_sum(mean) * rstd / static_cast<float>(d);
    for (index_t i = threadIdx.x * V; i < d; i += row_threads * V) {
      float x[V], dy[V], w[V], dx[V];
      load(p.x.row(row) + i, x);
      load(p.dy.row(row) + i, dy);
      load(p.weight.data() + i, w);
      load(p.dx.row(row) + i, dx);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float normed = x[j] * rstd;
        dx[j] += rstd * (w[j] * dy[j] - normed * mean);
        dweight[i + j] += dy[j] * normed;
      }
      store(p.dx.row(row) + i, dx);
    }
  }
  for (index_t i = threadIdx.x * V; i < d; i += row_threads * V)
#pragma unroll
    for (int j = 0; j < V; ++j) partial[blockIdx.x * d + i + j] = dweight[i + j];
}

/// sum[i] += Σ_r partial(r, i).
template <class = void>
__global__ void __launch_bounds__(row_threads)
    sum_partial_rows(const float* partial, index_t rows, view<float, 1> sum) {
  const index_t i = static_cast<index_t>(blockIdx.x) * row_threads + threadIdx.x, d = sum.extent(0);
  if (i >= d) return;
  float total = 0;
#pragma unroll 8
  for (index_t r = 0; r < rows; ++r) total += partial[r * d + i];
  sum[i] += total;
}

}  // namespace detail

template <class T>
void rms_norm_forward_on(context& ctx, const rms_norm_forward_args<T>& p) {
  constexpr int V = detail::widest<float>;
  const bool wide =
      p.x.extent(1) % V == 0 && detail::aligned(p.x, V) && detail::aligned(p.y, V) && detail::aligned(p.weight, V);
  detail::launch_overlapped(ctx, "rms_norm",
                            wide ? detail::rms_norm_forward_kernel<V, T> : detail::rms_norm_forward_kernel<1, T>,
                            dim3(static_cast<unsigned>(p.x.extent(0))), dim3(detail::row_threads), 0, p);
}

template <class T>
void rms_norm_backward_on(context& ctx, const rms_norm_backward_args<T>& p) {
  constexpr int V = detail::widest<float>;
  const index_t N = p.x.extent(0), d = p.x.extent(1);
  const bool wide = d % V == 0 && detail::aligned(p.x, V) && detail::aligned(p.dx, V) && detail::aligned(p.dy, V) &&
                    detail::aligned(p.weight, V);
  const std::size_t shared = static_cast<std::size_t>(d) * sizeof(float);
  if (shared + 4096 > ctx.properties().sharedMemPerBlockOptin)
    throw cuda_error(message("rms_norm: backward takes at most ",
                             (ctx.properties().sharedMemPerBlockOptin - 4096) / sizeof(float), " channels, got ", d));
  const unsigned blocks = detail::grid_for(N, 1, index_t{4} * ctx.multiprocessors());
  auto* partial = static_cast<float*>(ctx.scratch(blocks * shared));
  detail::launch(ctx, "rms_norm backward",
                 wide ? detail::rms_norm_backward_kernel<V, T> : detail::rms_norm_backward_kernel<1, T>, dim3(blocks),
                 dim3(detail::row_threads), shared, p, partial);
  detail::launch(ctx, "rms_norm backward", detail::sum_partial_rows<>,
                 dim3(static_cast<unsigned>(detail::ceil_div(d, detail::row_threads))), dim3(detail::row_threads), 0,
                 static_cast<const float*>(partial), static_cast<index_t>(blocks), p.dweight);
}

}  // namespace ratplus::cuda
