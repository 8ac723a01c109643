#pragma once
#include "ratplus/backend/cuda/detail/rows.cuh"
#include "ratplus/ops/gate.hpp"

namespace ratplus::cuda {

namespace detail {

template <class T>
struct gate_forward_rows {
  view<const T, 2> a, o;
  view<T, 2> y;

  template <int V>
  __device__ void at(index_t row, index_t column) const {
    float x[V], gate[V];
    load(a.row(row) + column, x);
    load(o.row(row) + column, gate);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] *= fast_sigmoid(gate[i]);
    store(y.row(row) + column, x);
  }
};

template <class T>
struct gate_backward_rows {
  view<const T, 2> a, o, dy;
  view<T, 2> da, d_o;

  template <int V>
  __device__ void at(index_t row, index_t column) const {
    float x[V], gate[V], g[V];
    load(a.row(row) + column, x);
    load(o.row(row) + column, gate);
    load(dy.row(row) + column, g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float s = fast_sigmoid(gate[i]);
      x[i] = g[i] * x[i] * s * (1.0f - s);
      g[i] *= s;
    }
    store(da.row(row) + column, g);
    store(d_o.row(row) + column, x);
  }
};

}  // namespace detail

template <class T>
void gate_forward_on(context& ctx, view<const T, 2> a, view<const T, 2> o, view<T, 2> y) {
  detail::for_rows<detail::widest<T>>(ctx, "gate", a.extent(0), a.extent(1), detail::gate_forward_rows<T>{a, o, y}, a,
                                      o, y);
}

template <class T>
void gate_backward_on(context& ctx, view<const T, 2> a, view<const T, 2> o, view<const T, 2> dy, view<T, 2> da,
                      view<T, 2> d_o) {
  detail::for_rows<detail::widest<T>>(ctx, "gate backward", a.extent(0), a.extent(1),
                                      detail::gate_backward_rows<T>{a, o, dy, da, d_o}, a, o, dy, da, d_o);
}

}  // namespace ratplus::cuda
