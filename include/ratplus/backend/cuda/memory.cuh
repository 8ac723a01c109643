#pragma once
#include "ratplus/backend/cuda/detail/rows.cuh"
#include "ratplus/ops/memory.hpp"

namespace ratplus::cuda {

namespace detail {

template <class T>
struct fill_rows {
  view<T, 1> x;
  T value;

  template <int V>
  __device__ void at(index_t, index_t column) const {
    packed<T, V> all;
#pragma unroll
    for (int i = 0; i < V; ++i) all.at[i] = value;
    *reinterpret_cast<packed<T, V>*>(x.data() + column) = all;
  }
};

template <class From, class To, int Rank>
struct copy_rows {
  view<const From, Rank> x;
  view<To, Rank> y;

  template <int V>
  __device__ void at(index_t row, index_t column) const {
    const packed<From, V> from = load<From, V>(flat_row(x, row) + column);
    To* to = flat_row(y, row) + column;
    if constexpr (std::is_same_v<From, To>) {
      *reinterpret_cast<packed<To, V>*>(to) = from;
    } else {
      float values[V];
      widen(from, values);
      store(to, values);
    }
  }
};

}  // namespace detail

template <class T>
void fill_on(context& ctx, view<T, 1> x, T value) {
  detail::for_rows<detail::widest<T>>(ctx, "fill", 1, x.extent(0), detail::fill_rows<T>{x, value}, x);
}

template <class From, class To, int Rank>
void copy_on(context& ctx, view<const From, Rank> x, view<To, Rank> y) {
  constexpr int V = detail::widest<From> < detail::widest<To> ? detail::widest<From> : detail::widest<To>;
  const index_t columns = x.extent(Rank - 1);
  detail::for_rows<V>(ctx, "copy", x.size() / columns, columns, detail::copy_rows<From, To, Rank>{x, y}, x, y);
}

template <class T>
void upload_on(context& ctx, const T* host, view<T, 1> x) {
  const std::size_t bytes = static_cast<std::size_t>(x.size()) * sizeof(T);
  detail::check(cudaMemcpyAsync(x.data(), host, bytes, cudaMemcpyHostToDevice, ctx.stream()), "upload");
  ctx.synchronize();
}

template <class T>
void download_on(context& ctx, view<const T, 1> x, T* host) {
  const std::size_t bytes = static_cast<std::size_t>(x.size()) * sizeof(T);
  detail::check(cudaMemcpyAsync(host, x.data(), bytes, cudaMemcpyDeviceToHost, ctx.stream()), "download");
  ctx.synchronize();
}

}  // namespace ratplus::cuda
