#pragma once
// Storing rows in a KV cache. One warp per row: most rows of a sparse pattern have no slot at all and cost nothing.

#include "ratplus/backend/cuda/detail/rows.cuh"
#include "ratplus/ops/attend.hpp"

namespace ratplus::cuda {

namespace detail {

template <int V, class T, class KV>
__global__ void __launch_bounds__(row_threads) cache_append_kernel(cache_append_args<T, KV> p) {
  wait_for_previous();
  const index_t H = p.k.extent(1), rows = p.k.extent(2), d = p.k.extent(3);
  const index_t row = (static_cast<index_t>(blockIdx.x) * row_threads + threadIdx.x) / 32;
  if (row >= p.k.extent(0) * H * rows) return;
  const index_t t = row % rows, h = row / rows % H, b = row / rows / H;
  const index_t length = p.spans.length ? p.spans.length[b] : rows;
  if (t >= length) return;
  const head_slots head = p.heads[h];
  const index_t next = p.spans.first[b] + length, position = p.spans.first[b] + t;
  auto homes = head.where.homes(position);
  // Rows run concurrently: where the ring wraps within this call, only the row that stays may write.
  if (!head.where.in_ring(position, next)) homes.slot[2] = -1;
  for (int i = 0; i < 3; ++i) {
    if (homes.slot[i] < 0) continue;
    const index_t slot = head.offset + homes.slot[i];
    for (index_t c = static_cast<index_t>(threadIdx.x % 32) * V; c < d; c += 32 * V) {
      float k[V], v[V];
      load(p.k.row(b, h, t) + c, k);
      load(p.v.row(b, h, t) + c, v);
      store(p.k_pool.row(b, slot) + c, k);
      store(p.v_pool.row(b, slot) + c, v);
    }
  }
}

template <class = void>
__global__ void __launch_bounds__(row_threads)
    cache_advance_kernel(view<token_t, 1> position, view<const token_t, 1> length, token_t rows) {
  wait_for_previous();
  for (index_t b = threadIdx.x; b < position.extent(0); b += row_threads) position[b] += length ? length[b] : rows;
}

}  // namespace detail

inline void cache_advance_on(context& ctx, view<token_t, 1> position, view<const token_t, 1> length, token_t rows) {
  detail::launch_overlapped(ctx, "cache advance", detail::cache_advance_kernel<>, dim3(1), dim3(detail::row_threads), 0,
                            position, length, rows);
}

template <class T, class KV>
void cache_append_on(context& ctx, const cache_append_args<T, KV>& p) {
  constexpr int V = detail::widest<T> < detail::widest<KV> ? detail::widest<T> : detail::widest<KV>;
  const bool wide = p.k.extent(3) % V == 0 && detail::aligned(p.k, V) && detail::aligned(p.v, V) &&
                    detail::aligned(p.k_pool, V) && detail::aligned(p.v_pool, V);
  const index_t rows = p.k.extent(0) * p.k.extent(1) * p.k.extent(2);
  detail::launch_overlapped(
      ctx, "cache append", wide ? detail::cache_append_kernel<V, T, KV> : detail::cache_append_kernel<1, T, KV>,
      dim3(static_cast<unsigned>(detail::ceil_div(rows, detail::row_threads / 32))), dim3(detail::row_threads), 0, p);
}

}  // namespace ratplus::cuda
