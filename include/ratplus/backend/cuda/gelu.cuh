#pragma once
// Exact GELU, by the normal tail's ratio to the bell (core/math.hpp): one exponential and one reciprocal an element, a
// quarter of what erfc costs, so that memory is what it waits for.

#include "ratplus/backend/cuda/detail/rows.cuh"
#include "ratplus/core/math.hpp"
#include "ratplus/ops/gelu.hpp"

namespace ratplus::cuda {

namespace detail {

struct normal {
  float cdf, density;
};

/// Φ(x) and φ(x).
__device__ inline normal standard_normal(float x) {
  const float a = fabsf(x), bell = __expf(-0.5f * a * a);
  const float t = __fdividef(1.0f, fmaf(0.3f, a, 1.0f));
  const float ratio = normal_tail_ratio(t, [](float u, float v, float w) { return fmaf(u, v, w); });
  const float tail = __fmul_rn(bell, ratio);  // rounded in the same way wherever it is inlined
  return {x < 0 ? tail : 1.0f - tail, 0.39894228f * bell};
}

template <class T>
struct gelu_forward_rows {
  view<const T, 2> x;
  view<T, 2> y;

  template <int V>
  __device__ void at(index_t row, index_t column) const {
    float v[V];
    load(x.row(row) + column, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] *= standard_normal(v[i]).cdf;
    store(y.row(row) + column, v);
  }
};

template <class T>
struct gelu_backward_rows {
  view<const T, 2> x, dy;
  view<T, 2> dx, y;

  template <int V>
  __device__ void at(index_t row, index_t column) const {
    float v[V], g[V];
    load(x.row(row) + column, v);
    load(dy.row(row) + column, g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const normal f = standard_normal(v[i]);
      g[i] *= fmaf(v[i], f.density, f.cdf);
      v[i] *= f.cdf;
    }
    store(dx.row(row) + column, g);
    if (y) store(y.row(row) + column, v);
  }
};

}  // namespace detail

template <class T>
void gelu_forward_on(context& ctx, view<const T, 2> x, view<T, 2> y) {
  detail::for_rows<detail::widest<T>>(ctx, "gelu", x.extent(0), x.extent(1), detail::gelu_forward_rows<T>{x, y}, x, y);
}

template <class T>
void gelu_backward_on(context& ctx, view<const T, 2> x, view<const T, 2> dy, view<T, 2> dx, view<T, 2> y) {
  detail::for_rows<detail::widest<T>>(ctx, "gelu backward", x.extent(0), x.extent(1),
                                      detail::gelu_backward_rows<T>{x, dy, dx, y}, x, dy, dx, y);
}

}  // namespace ratplus::cuda
