#pragma once
#include <cub/block/block_reduce.cuh>

#include <cmath>

#include "ratplus/backend/cuda/detail/rows.cuh"
#include "ratplus/ops/step.hpp"

namespace ratplus::cuda {

namespace detail {

template <class T>
struct adamw_rows {
  adamw_args<T> p;
  float beta1, beta2, one_minus_beta1, one_minus_beta2, decay, rate, correct2, epsilon, grad_scale;

  template <int V>
  __device__ void at(index_t, index_t i) const {
    float w[V], g[V], m[V], v[V];
    load(p.parameter.data() + i, w);
    load(p.grad.data() + i, g);
    load(p.m.data() + i, m);
    load(p.v.data() + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float grad = g[j] * grad_scale;
      m[j] = beta1 * m[j] + one_minus_beta1 * grad;
      v[j] = beta2 * v[j] + one_minus_beta2 * grad * grad;
      // Decay is subtracted, not multiplied in: 1 − lr · decay in float would lose most digits of lr · decay.
      w[j] = w[j] - (decay * w[j] + rate * m[j] / (sqrtf(v[j] * correct2) + epsilon));
    }
    store(p.parameter.data() + i, w);
    store(p.m.data() + i, m);
    store(p.v.data() + i, v);
  }
};

/// Blocks of the first stage of squared_norm: fixed, so that the order of the sum is.
inline constexpr int norm_blocks = 1024;

template <int V, class T>
__global__ void __launch_bounds__(row_threads) squared_norm_kernel(const T* x, index_t n, double* partial) {
  double sum = 0;
  constexpr index_t stride = index_t{norm_blocks} * row_threads * V;
  for (index_t i = (static_cast<index_t>(blockIdx.x) * row_threads + threadIdx.x) * V; i < n; i += stride) {
    float v[V];
    load(x + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += static_cast<double>(v[j]) * static_cast<double>(v[j]);
  }
  using reduce = cub::BlockReduce<double, row_threads>;
  __shared__ typename reduce::TempStorage storage;
  sum = reduce(storage).Sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/// *total += scale · Σ_i x[i], by one block.
template <class = void>
__global__ void __launch_bounds__(1024) add_total(const double* x, index_t n, double scale, double* total) {
  double sum = 0;
  for (index_t i = threadIdx.x; i < n; i += 1024) sum += x[i];
  using reduce = cub::BlockReduce<double, 1024>;
  __shared__ typename reduce::TempStorage storage;
  sum = reduce(storage).Sum(sum);
  if (threadIdx.x == 0) *total += scale * sum;
}

}  // namespace detail

template <class T>
void adamw_on(context& ctx, const adamw_args<T>& p, const adamw_coefficients& c) {
  const double correct1 = 1 - std::pow(c.beta1, static_cast<double>(c.step));
  const double correct2 = 1 - std::pow(c.beta2, static_cast<double>(c.step));
  const detail::adamw_rows<T> rows{p,
                                   static_cast<float>(c.beta1),
                                   static_cast<float>(c.beta2),
                                   static_cast<float>(1 - c.beta1),
                                   static_cast<float>(1 - c.beta2),
                                   static_cast<float>(c.lr * c.weight_decay),
                                   static_cast<float>(c.lr / correct1),
                                   static_cast<float>(1 / correct2),
                                   static_cast<float>(c.epsilon),
                                   static_cast<float>(c.grad_scale)};
  detail::for_rows<detail::widest<T>>(ctx, "adamw", 1, p.parameter.extent(0), rows, p.parameter, p.grad, p.m, p.v);
}

template <class T>
[[nodiscard]] double squared_norm_on(context& ctx, view<const T, 1> x) {
  constexpr int V = detail::widest<T>;
  const bool wide = x.extent(0) % V == 0 && detail::aligned(x, V);
  auto* partial = static_cast<double*>(ctx.scratch((detail::norm_blocks + 1) * sizeof(double)));
  double* total = partial + detail::norm_blocks;
  detail::check(cudaMemsetAsync(total, 0, sizeof(double), ctx.stream()), "squared_norm");
  detail::launch(ctx, "squared_norm", wide ? detail::squared_norm_kernel<V, T> : detail::squared_norm_kernel<1, T>,
                 dim3(detail::norm_blocks), dim3(detail::row_threads), 0, x.data(), x.extent(0), partial);
  detail::launch(ctx, "squared_norm", detail::add_total<>, dim3(1), dim3(1024), 0, static_cast<const double*>(partial),
                 index_t{detail::norm_blocks}, 1.0, total);
  double result = 0;
  detail::check(cudaMemcpyAsync(&result, total, sizeof(double), cudaMemcpyDeviceToHost, ctx.stream()), "squared_norm");
  ctx.synchronize();
  return result;
}

}  // namespace ratplus::cuda
