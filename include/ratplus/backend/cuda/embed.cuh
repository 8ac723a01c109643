#pragma once
// Backward: the positions are sorted by token, stably, and one block adds up all rows of a token, in the order of
// positions: no atomics, the same bits every run.

#include <cub/device/device_radix_sort.cuh>

#include "ratplus/backend/cuda/detail/rows.cuh"
#include "ratplus/ops/embed.hpp"

namespace ratplus::cuda {

namespace detail {

template <class T>
struct embed_rows {
  view<const token_t, 1> tokens;
  view<const T, 2> table;
  view<T, 2> x;

  template <int V>
  __device__ void at(index_t row, index_t column) const {
    *reinterpret_cast<packed<T, V>*>(x.row(row) + column) = load<T, V>(table.row(tokens[row]) + column);
  }
};

struct iota_rows {
  token_t* x;

  template <int>
  __device__ void at(index_t, index_t column) const {
    x[column] = static_cast<token_t>(column);
  }
};

/// Block (i, y): when sorted position i begins a token's run, adds the run's rows to that token's row.
template <class T>
__global__ void __launch_bounds__(row_threads)
    embed_backward_kernel(const token_t* sorted, const token_t* order, index_t N, view<const T, 2> dx,
                          view<float, 2> dtable) {
  const index_t begin = blockIdx.x, column = static_cast<index_t>(blockIdx.y) * row_threads + threadIdx.x;
  const token_t token = sorted[begin];
  if ((begin > 0 && sorted[begin - 1] == token) || column >= dx.extent(1)) return;
  float sum = dtable(token, column);
  for (index_t i = begin; i < N && sorted[i] == token; ++i) sum += to_float(dx(order[i], column));
  dtable(token, column) = sum;
}

}  // namespace detail

template <class T>
void embed_forward_on(context& ctx, view<const token_t, 1> tokens, view<const T, 2> table, view<T, 2> x) {
  detail::for_rows<detail::widest<T>>(ctx, "embed", x.extent(0), x.extent(1), detail::embed_rows<T>{tokens, table, x},
                                      table, x);
}

template <class T>
void embed_backward_on(context& ctx, view<const token_t, 1> tokens, view<const T, 2> dx, view<float, 2> dtable) {
  const index_t N = dx.extent(0), d = dx.extent(1);
  int bits = 1;
  while ((dtable.extent(0) - 1) >> bits != 0) ++bits;
  std::size_t sort_bytes = 0;
  const auto sort = [&](void* storage, const token_t* identity, token_t* sorted, token_t* order) {
    detail::check(cub::DeviceRadixSort::SortPairs(storage, sort_bytes, tokens.data(), sorted, identity, order,
                                                  static_cast<int>(N), 0, bits, ctx.stream()),
                  "embed backward: sort");
  };
  sort(nullptr, nullptr, nullptr, nullptr);
  const auto carve = [&](detail::carver c) {
    struct pieces {
      token_t *identity, *sorted, *order;
      char* storage;
      std::size_t bytes;
    } p{};
    p.identity = c.take<token_t>(N);
    p.sorted = c.take<token_t>(N);
    p.order = c.take<token_t>(N);
    p.storage = c.take<char>(static_cast<index_t>(sort_bytes));
    p.bytes = c.bytes();
    return p;
  };
  const auto p = carve(detail::carver(ctx.scratch(carve(detail::carver()).bytes)));
  detail::for_rows<1>(ctx, "embed backward", 1, N, detail::iota_rows{p.identity});
  sort(p.storage, p.identity, p.sorted, p.order);
  const dim3 grid(static_cast<unsigned>(N), static_cast<unsigned>(detail::ceil_div(d, detail::row_threads)));
  detail::launch(ctx, "embed backward", detail::embed_backward_kernel<T>, grid, dim3(detail::row_threads), 0,
                 static_cast<const token_t*>(p.sorted), static_cast<const token_t*>(p.order), N, dx, dtable);
}

}  // namespace ratplus::cuda
