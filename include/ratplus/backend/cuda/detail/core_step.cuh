#pragma once
// What the kernels of a decoding step's core share (backend/cuda/core.cuh): one row of a head through the recurrence.

#include "ratplus/backend/cuda/detail/decode.cuh"
#include "ratplus/backend/cuda/detail/scan_tiles.cuh"
#include "ratplus/ops/core.hpp"

namespace ratplus::cuda::detail {

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

  /// Attention of this row, itself among the keys, over what the memory holds.
  template <class KV>
  [[nodiscard]] __device__ attend_forward_args<T, KV> attention(const core_forward_args<T, KV>& p) {
    const core_memory<T, KV>& memory = p.memory;
    const auto everywhere = [&](const T* x) { return view<const T, 4>(x, p.q.shape(), {{0, 0, 0, 1}}); };
    return {.q = everywhere(q),
            .k = everywhere(k),
            .v = everywhere(v),
            .past = {memory.k_pool, memory.v_pool, memory.heads, nullptr},
            .spans = memory.spans};
  }

  /// Leaves key, value and state to later rows. `homes`: slots of the pool that hold the row from now on, or < 0.
  template <class C, class KV>
  __device__ void keep(const core_forward_args<T, KV>& p, index_t b, index_t h, const index_t (&homes)[3]) {
    const index_t d = p.q.extent(3);
    const core_memory<T, KV>& memory = p.memory;
    for (index_t c = threadIdx.x; c < d; c += decode_threads) {
      for (const index_t home : homes) {
        if (home < 0) continue;
        memory.k_pool(b, home, c) = from_float<KV>(to_float(k[c]));
        memory.v_pool(b, home, c) = from_float<KV>(to_float(v[c]));
      }
      if constexpr (!IdentityCell<C>) {
        memory.k_state(b, h, c) = k_state[c];
        memory.v_state(b, h, c) = v_state[c];
      }
    }
  }
};

/// Slot i of the pool, or −1, that holds `position` of a head.
__device__ inline index_t home_in_pool(const head_slots& head, index_t position, int i) {
  const index_t home = head.where.homes(position).slot[i];
  return home < 0 ? home : head.offset + home;
}

}  // namespace ratplus::cuda::detail
