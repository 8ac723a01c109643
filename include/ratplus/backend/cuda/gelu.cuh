#pragma once
#include "ratplus/backend/cuda/detail/rows.cuh"
#include "ratplus/ops/gelu.hpp"

namespace ratplus::cuda {

namespace detail {

/// Φ(x), by the complementary function: 1 + erf(x / √2) would cancel for negative x.
__device__ inline float normal_cdf(float x) { return 0.5f * erfcf(-0.70710678f * x); }

template <class T>
struct gelu_forward_rows {
  view<const T, 2> x;
  view<T, 2> y;

  template <int V>
  __device__ void at(index_t row, index_t column) const {
    float v[V];
    load(x.row(row) + column, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] *= normal_cdf(v[i]);
    store(y.row(row) + column, v);
  }
};

template <class T>
struct gelu_backward_rows {
  view<const T, 2> x, dy;
  view<T, 2> dx;

  template <int V>
  __device__ void at(index_t row, index_t column) const {
    float v[V], g[V];
    load(x.row(row) + column, v);
    load(dy.row(row) + column, g);
#pragma unroll
    for (int i = 0; i < V; ++i) g[i] *= normal_cdf(v[i]) + v[i] * 0.39894228f * __expf(-0.5f * v[i] * v[i]);
    store(dx.row(row) + column, g);
  }
};

}  // namespace detail

template <class T>
void gelu_forward_on(context& ctx, view<const T, 2> x, view<T, 2> y) {
  detail::for_rows<detail::widest<T>>(ctx, "gelu", x.extent(0), x.extent(1), detail::gelu_forward_rows<T>{x, y}, x, y);
}

template <class T>
void gelu_backward_on(context& ctx, view<const T, 2> x, view<const T, 2> dy, view<T, 2> dx) {
  detail::for_rows<detail::widest<T>>(ctx, "gelu backward", x.extent(0), x.extent(1),
                                      detail::gelu_backward_rows<T>{x, dy, dx}, x, dy, dx);
}

}  // namespace ratplus::cuda
