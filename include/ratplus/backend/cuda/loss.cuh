#pragma once
// One block per row of logits: log Σ e^z by one reading (partial softmaxes, combined), the gradient by a second. The
// rows' losses are summed afterwards, in an order that never changes.

#include <cub/block/block_reduce.cuh>

#include "ratplus/backend/cuda/step.cuh"
#include "ratplus/core/softmax_state.hpp"
#include "ratplus/ops/loss.hpp"

namespace ratplus::cuda {

namespace detail {

struct combine_softmax {
  __device__ softmax_state<float> operator()(const softmax_state<float>& a, const softmax_state<float>& b) const {
    return combine(a, b).state;
  }
};

template <int V, class T>
__global__ void __launch_bounds__(row_threads) cross_entropy_kernel(cross_entropy_args<T> p, double* losses) {
  const index_t row = blockIdx.x, columns = p.logits.extent(1);
  const T* z = p.logits.row(row);
  const token_t label = p.labels[row];
  softmax_state<float> state;
  for (index_t i = threadIdx.x * V; i < columns; i += row_threads * V) {
    float v[V];
    load(z + i, v);
    float max = v[0];
#pragma unroll
    for (int j = 1; j < V; ++j) max = fmaxf(max, v[j]);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) sum += __expf(v[j] - max);
    state = combine(state, softmax_state<float>{max, sum}).state;
  }
  using reduce = cub::BlockReduce<softmax_state<float>, row_threads>;
  __shared__ typename reduce::TempStorage storage;
  __shared__ float row_lse;
  state = reduce(storage).Reduce(state, combine_softmax{});
  if (threadIdx.x == 0) {
    row_lse = state.log_sum_exp();
    losses[row] = label == ignored_label ? 0.0 : static_cast<double>(row_lse - to_float(z[label]));
  }
  if (!p.dlogits) return;
  __syncthreads();
  const float lse = row_lse, weight = label == ignored_label ? 0.0f : static_cast<float>(p.weight);
  for (index_t i = threadIdx.x * V; i < columns; i += row_threads * V) {
    float v[V];
    load(z + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float probability = __expf(v[j] - lse) - (i + j == label ? 1.0f : 0.0f);
      v[j] = label == ignored_label ? 0.0f : probability * weight;
    }
    store(p.dlogits.row(row) + i, v);
  }
}

}  // namespace detail

template <class T>
void cross_entropy_on(context& ctx, const cross_entropy_args<T>& p) {
  constexpr int V = detail::widest<T>;
  const index_t N = p.logits.extent(0);
  const bool wide = p.logits.extent(1) % V == 0 && detail::aligned(p.logits, V) && detail::aligned(p.dlogits, V);
  auto* losses = static_cast<double*>(ctx.scratch(static_cast<std::size_t>(N) * sizeof(double)));
  detail::launch(ctx, "cross entropy", wide ? detail::cross_entropy_kernel<V, T> : detail::cross_entropy_kernel<1, T>,
                 dim3(static_cast<unsigned>(N)), dim3(detail::row_threads), 0, p, losses);
  detail::launch(ctx, "cross entropy", detail::add_total<>, dim3(1), dim3(1024), 0, static_cast<const double*>(losses),
                 N, p.weight, p.loss.data());
}

}  // namespace ratplus::cuda
