#pragma once
// A decoding step's core in one kernel: one row of every sequence through recurrence, RoPE, attention over the cache
// and output gate, and into the cache. A token is a chain of short kernels, most of whose time is one waiting for the
// other. Every block of a head does the row's recurrence by itself, a few hundred operations, and then its share of the
// keys as in detail/decode.cuh; the block that finishes the row keeps key, value and state, which by then every block
// has read.

#include "ratplus/backend/cuda/detail/core_step.cuh"
#include "ratplus/backend/cuda/detail/core_step_sm90.cuh"
#include "ratplus/ops/core.hpp"

namespace ratplus::cuda {

namespace detail {

template <class L, class C, class Heads, class T, class KV>
__global__ void __launch_bounds__(decode_threads)
    core_step_kernel(C cell, Heads heads, core_forward_args<T, KV> p, decode_partials parts) {
  const index_t d = p.q.extent(3), h = blockIdx.y, b = blockIdx.z;
  const core_memory<T, KV>& memory = p.memory;
  const T* gate = p.out_gate.row(b) + h * d;
  T* y = p.y.row(b) + h * d;
  if (memory.spans.length && memory.spans.length[b] == 0) {
    wait_for_previous();
    if (blockIdx.x == 0)
      for (index_t c = threadIdx.x; c < d; c += decode_threads) y[c] = from_float<T>(0.0f);
    return;
  }
  __shared__ step_row<T, L::size> row;
  const index_t position = memory.spans.first[b];

  const attend_forward_args<T, KV> attend = row.attention(p);
  const auto recur = [&] {
    wait_for_previous();
    row.fill(cell, p, b, h, position);
    __syncthreads();
  };
  const bool finished = decode_row<L>(heads, attend, b, h, 0, parts, recur, [&](index_t c, float x) {
    y[c] = from_float<T>(to_float(from_float<T>(x)) * fast_sigmoid(to_float(gate[c])));
  });
  if (!finished) return;

  const head_slots head = memory.heads[h];
  row.template keep<C>(
      p, b, h, {home_in_pool(head, position, 0), home_in_pool(head, position, 1), home_in_pool(head, position, 2)});
}

}  // namespace detail

template <class C, class P, class T, class KV>
void core_step_on(context& ctx, const C& cell, const P& pattern, const core_forward_args<T, KV>& p) {
  static_assert(std::is_trivially_copyable_v<C>,
                "ratplus: a cell is copied to the device, so it must be trivially copyable");
  const index_t B = p.q.extent(0), H = p.q.extent(1), d = p.q.extent(3);
  constexpr int V = detail::widest<KV>;
  const bool wide = d % V == 0 && detail::aligned(p.memory.k_pool, V) && detail::aligned(p.memory.v_pool, V);
  const auto heads = detail::grouped_on_device(pattern, H);
  detail::with_decode_layout<KV>(d, wide, [&](auto layout) {
    using L = decltype(layout);
    const index_t slots = detail::slots_of_a_head(pattern, p.memory.k_pool.extent(1), H);
    if (detail::run_core_stream<L>(ctx, cell, heads, p, slots)) return;
    const detail::decode_grid<L> grid(ctx, B, H, 1, slots);
    const auto kernel = detail::core_step_kernel<L, C, std::decay_t<decltype(heads)>, T, KV>;
    detail::launch_overlapped(ctx, "core", kernel, grid.blocks, dim3(detail::decode_threads), 0, cell, heads, p,
                              grid.parts);
  });
}

}  // namespace ratplus::cuda
