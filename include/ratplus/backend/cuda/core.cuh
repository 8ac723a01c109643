#pragma once
// A decoding step's core in one kernel: one row of every sequence through recurrence, RoPE, attention over the cache
// and output gate, and into the cache. A token is a chain of short kernels, most of whose time is one waiting for the
// other. Every block of a head does the row's recurrence by itself, a few hundred operations, and then its share of the
// keys as in detail/decode.cuh; the block that finishes the row keeps key, value and state, which by then every block
// has read.

#include "ratplus/backend/cuda/detail/decode.cuh"
#include "ratplus/backend/cuda/detail/scan_tiles.cuh"
#include "ratplus/ops/core.hpp"

namespace ratplus::cuda {

namespace detail {

/// D elements in shared memory, where nothing may be initialised.
template <class T, int D>
struct uninitialised {
  alignas(16) unsigned char bytes[D * sizeof(T)];

  __device__ operator T*() { return reinterpret_cast<T*>(bytes); }
};

/// What the recurrence makes of one row of a head: query and key rotated.
template <class T, int D>
struct step_row {
  uninitialised<T, D> q, k, v;
  float k_state[D], v_state[D];

  template <class C, class KV>
  __device__ void fill(const C& cell, const core_forward_args<T, KV>& p, index_t b, index_t h, index_t position) {
    const index_t d = p.q.extent(3), half = (d + 1) / 2;
    const core_memory<T, KV>& memory = p.memory;
    for (index_t c = threadIdx.x; c < half; c += decode_threads) {
      const index_t channel[2] = {c, c + half};
      const int count = c + half < d ? 2 : 1;
      float query[2] = {}, key[2] = {}, value[2] = {}, gate[2] = {}, key_state[2] = {}, value_state[2] = {};
      row_angles<1> angle{};
      if (p.rope) angle = {{p.rope(position, c)}, {p.rope(position, c + half)}};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i >= count) break;
        query[i] = to_float(p.q(b, h, 0, channel[i]));
        key[i] = to_float(p.k(b, h, 0, channel[i]));
        value[i] = to_float(p.v(b, h, 0, channel[i]));
        if constexpr (C::gated) gate[i] = to_float(p.gate(b, h, 0, channel[i]));
        if constexpr (!IdentityCell<C>) {
          key_state[i] = memory.k_state(b, h, channel[i]);
          value_state[i] = memory.v_state(b, h, channel[i]);
        }
      }
      if constexpr (!IdentityCell<C>)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          key[i] = key_state[i] = cell.step(lane(key_state[i]), lane(key[i]), lane(gate[i]), position).x;
          value[i] = value_state[i] = cell.step(lane(value_state[i]), lane(value[i]), lane(gate[i]), position).x;
        }
      if (p.rope) {
        angle.template rotate<false>(query);
        angle.template rotate<false>(key);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i >= count) break;
        q[channel[i]] = from_float<T>(query[i]);
        k[channel[i]] = from_float<T>(key[i]);
        v[channel[i]] = from_float<T>(value[i]);
        k_state[channel[i]] = key_state[i];
        v_state[channel[i]] = value_state[i];
      }
    }
  }
};

template <class L, class C, class Heads, class T, class KV>
__global__ void __launch_bounds__(decode_threads)
    core_step_kernel(C cell, Heads heads, core_forward_args<T, KV> p, decode_partials parts) {
  const index_t H = p.q.extent(1), d = p.q.extent(3), h = blockIdx.y, b = blockIdx.z;
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

  const auto everywhere = [&](const T* x) { return view<const T, 4>(x, p.q.shape(), {{0, 0, 0, 1}}); };
  const attend_forward_args<T, KV> attend{.q = everywhere(row.q),
                                          .k = everywhere(row.k),
                                          .v = everywhere(row.v),
                                          .past = {memory.k_pool, memory.v_pool, memory.heads, nullptr},
                                          .spans = memory.spans};
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
  const auto homes = head.where.homes(position);
  for (index_t c = threadIdx.x; c < d; c += decode_threads) {
    for (const index_t home : homes.slot) {
      if (home < 0) continue;
      memory.k_pool(b, head.offset + home, c) = from_float<KV>(to_float(row.k[c]));
      memory.v_pool(b, head.offset + home, c) = from_float<KV>(to_float(row.v[c]));
    }
    if constexpr (!IdentityCell<C>) {
      memory.k_state(b, h, c) = row.k_state[c];
      memory.v_state(b, h, c) = row.v_state[c];
    }
  }
}

}  // namespace detail

template <class C, class P, class T, class KV>
void core_step_on(context& ctx, const C& cell, const P& pattern, const core_forward_args<T, KV>& p) {
  static_assert(std::is_trivially_copyable_v<C>,
                "ratplus: a cell is copied to the device, so it must be trivially copyable");
  const index_t B = p.q.extent(0), H = p.q.extent(1), d = p.q.extent(3);
  constexpr int V = detail::widest<KV>;
  const bool wide = d % V == 0 && detail::aligned(p.memory.k_pool, V) && detail::aligned(p.memory.v_pool, V);
  const auto heads = detail::on_device(pattern, H);
  detail::with_decode_layout<KV>(d, wide, [&](auto layout) {
    using L = decltype(layout);
    const detail::decode_grid<L> grid(ctx, B, H, 1, detail::slots_of_a_head(pattern, p.memory.k_pool.extent(1), H));
    detail::launch_overlapped(ctx, "core", detail::core_step_kernel<L, C, decltype(heads), T, KV>, grid.blocks,
                              dim3(detail::decode_threads), 0, cell, heads, p, grid.parts);
  });
}

}  // namespace ratplus::cuda
