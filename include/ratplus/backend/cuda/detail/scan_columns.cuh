#pragma once
// The forward scan where there are columns enough to fill the device: every warp walks a column of its own, all of its
// rows in order. The state stays in registers, no row is looked at twice and no warp waits for another; half as many
// instructions as tiles take, which leaves memory as the limit. Rows arrive in a ring in shared memory, copied 16
// bytes a lane: keys by the first half of the warp and values by the second, then gates and queries.

#include "ratplus/backend/cuda/detail/scan_forward.cuh"

namespace ratplus::cuda::detail {

/// Warps of a block and blocks of a multiprocessor, rows taken at once, and how many such groups of rows a ring holds.
struct column_walk {
  static constexpr int warps = 4, blocks = 4, rows = 4, groups = 3;
  static constexpr int channels = 4 * column_lanes;  // of a column
  static constexpr int row = channels * 2;           // bytes
  static constexpr int ring = groups * rows * 4 * row;
};

/// Whether columns fill the device: nearly all of its warps in every round, or half of them in one, which keeps memory
/// busy still.
[[nodiscard]] inline bool columns_suffice(index_t columns, int multiprocessors) {
  const index_t slots = index_t{multiprocessors} * column_walk::warps * column_walk::blocks;
  return columns <= slots ? 2 * columns >= slots : 10 * columns >= 9 * slots * ceil_div(columns, slots);
}

/// q, k, v and the angles given, heads of 2 · Half channels, rows aligned to 16 bytes.
template <class C, int Half, class Keys>
__global__ void __launch_bounds__(32 * column_walk::warps, column_walk::blocks)
    scan_forward_columns(C cell, scan_forward_args<bfloat16> p, scan_shape s, const __grid_constant__ Keys wanted) {
  using T = bfloat16;
  constexpr int V = 2, N = 2 * V, U = column_walk::rows, G = column_walk::groups, lanes = Half / V;
  enum { keys, values, gates, queries, streams };
  extern __shared__ __align__(16) unsigned char rings[];
  const int lane_id = static_cast<int>(threadIdx.x) % column_lanes, warp = static_cast<int>(threadIdx.x) / column_lanes;
  unsigned char* const ring = rings + warp * column_walk::ring;
  const index_t column = static_cast<index_t>(blockIdx.x) * column_walk::warps + warp;
  if (column >= s.columns) return;

  const scan_place at(s, column, lane_id, V, std::integral_constant<int, lanes>{});
  const scan_rows span(p.spans, at.b, s.T, at.active);
  // The first lane is never beyond the last head.
  const int used = static_cast<int>(__shfl_sync(~0u, span.used, 0)), first = static_cast<int>(span.first);
  const index_t first_head = __shfl_sync(~0u, at.h, 0);

  // What this lane copies: 8 channels of two streams.
  const bool upper = lane_id >= column_lanes / 2;
  const int chunk = lane_id % (column_lanes / 2), copied_channel = 8 * chunk % (2 * Half);
  const index_t copied_head = first_head + 8 * chunk / (2 * Half);
  const index_t b = __shfl_sync(~0u, at.b, 0);
  const auto source = [&](const view<const T, 4>& x) { return x.row(b, copied_head, 0) + copied_channel; };
  const T *early = source(upper ? p.v : p.k), *late = source(upper ? p.q : p.gate);
  const index_t early_stride = (upper ? p.v : p.k).stride(2), late_stride = (upper ? p.q : p.gate).stride(2);
  const bool copies = copied_head < s.H, copies_late = copies && (C::gated || upper);
  int fetched = 0;  // rows
  const auto place = [&](int group) { return ring + group * (U * streams * column_walk::row); };
  const auto fetch = [&](int group) {
    unsigned char* to = place(group) + (upper ? column_walk::row : 0) + 16 * chunk;
#pragma unroll
    for (int r = 0; r < U; ++r, ++fetched, to += streams * column_walk::row) {
      if (fetched < used) {
        if (copies) copy_async<16>(to, early);
        if (copies_late) copy_async<16>(to + 2 * column_walk::row, late);
      }
      early += early_stride, late += late_stride;
    }
    commit_copies();
  };
#pragma unroll
  for (int g = 0; g + 1 < G; ++g) fetch(g);

  float state[2][N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    state[0][i] = read_state<V>(p.k_first, s, at, i);
    state[1][i] = read_state<V>(p.v_first, s, at, i);
  }
  angle_cursor<V, Half> angles_at(p.rope, s, at, first);
  row_angles<V> ahead[U];
  const auto read_angles = [&](int left) {
#pragma unroll
    for (int r = 0; r < U; ++r, ++angles_at)
      if (r < left) ahead[r] = angles_at.read();
  };
  read_angles(used);
  const thread_rows<T, V, Half> k_out(p.k_out, s, at, 0);
  auto q_row = thread_rows<T, V, Half>(p.q_out, s, at, 0).row(0), k_row = k_out.row(0),
       v_row = thread_rows<T, V, Half>(p.v_out, s, at, 0).row(0);
  const int low = (lane_id / lanes * 2 * lanes + lane_id % lanes) * V * 2, high = low + Half * 2;  // bytes in a row

  unsigned later = 0;
  int group = 0, free = G - 1;
  for (int t = 0; t < used; t += U) {
    if constexpr (Keys::scored)
      if (t % lanes == 0) later = wanted.template later<lanes>(at.h, first + t);
    wait_for_copies<G - 2>();
    __syncwarp();
    fetch(free);
    free = free + 1 == G ? 0 : free + 1;
    row_angles<V> angles[U];
#pragma unroll
    for (int r = 0; r < U; ++r) angles[r] = ahead[r];
    read_angles(used - t - U);
    const unsigned char* const rows = place(group);
    group = group + 1 == G ? 0 : group + 1;
    [[maybe_unused]] std::conditional_t<Keys::scored, lane_sums<lanes, U>, Keys> scores;
    const auto take = [&](auto all) {
#pragma unroll
      for (int r = 0; r < U; ++r) {
        [[maybe_unused]] float score = 0;
        if (all || t + r < used) {
          const auto read = [&](int stream) {
            const unsigned char* const row = rows + (r * streams + stream) * column_walk::row;
            row_pair<T, V> x;
            x.low.word[0] = *reinterpret_cast<const unsigned*>(row + low);
            x.high.word[0] = *reinterpret_cast<const unsigned*>(row + high);
            return x;
          };
          const row_pair<T, V> k = read(keys), v = read(values), gate = read(gates);
          float q[N];
          read(queries).widen(q);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const lane g(C::gated ? gate[i] : 0.0f);
            state[0][i] = cell.step(lane(state[0][i]), lane(k[i]), g, index_t{first} + t + r).x;
            state[1][i] = cell.step(lane(state[1][i]), lane(v[i]), g, index_t{first} + t + r).x;
            if constexpr (Keys::scored) score += q[i] * state[0][i];
          }
          angles[r].template rotate<false>(q);
          if (at.active) {
            q_row.write(q);
            v_row.write(state[1]);
            if (!Keys::scored || __builtin_expect(later >> (t % lanes + r) & 1, 0)) {
              float x[N];
#pragma unroll
              for (int i = 0; i < N; ++i) x[i] = state[0][i];
              angles[r].template rotate<false>(x);
              if constexpr (Keys::scored)
                k_out.row(t + r).write(x);
              else
                k_row.write(x);
            }
          }
          ++q_row, ++v_row;
          if constexpr (!Keys::scored) ++k_row;
        }
        if constexpr (Keys::scored) scores.add(r, score);
      }
    };
    if (t + U <= used)
      take(std::true_type{});
    else
      take(std::false_type{});
    if constexpr (Keys::scored)
      scores.write([&](int r, float score) {
        if (at.active && t + r < used) wanted.scores(at.b, at.h, t + r) = score;
      });
  }
  wait_for_copies();
  if (!at.active) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    write_state<V>(p.k_last, s, at, i, state[0][i]);
    write_state<V>(p.v_last, s, at, i, state[1][i]);
  }
  const float zeros[N] = {};
  for (index_t t = used; t < s.T; ++t) {
    thread_rows<T, V, Half>(p.q_out, s, at, t).row(0).write(zeros);
    thread_rows<T, V, Half>(p.k_out, s, at, t).row(0).write(zeros);
    thread_rows<T, V, Half>(p.v_out, s, at, t).row(0).write(zeros);
  }
}

}  // namespace ratplus::cuda::detail
