#pragma once
// The second kernel of attention's backward pass (attend_backward_sm90.cuh): tiles of keys walk the queries that see
// them. Writes dk and dv.

#include "ratplus/backend/cuda/detail/attend_tiles.cuh"

namespace ratplus::cuda::detail {

template <class Heads>
struct backward_keys_job {
  CUtensorMap q, dout;
  lattices keys;
  Heads patterns;
  attend_shape shape;
  tile_queue tiles;
  int tiles_of_run[key_runs::count];  // the most that any head has
  view<const row_statistics, 3> statistics;
  view<bfloat16, 4> dk, dv;
};

/// The queries of a tile of keys: of each key, and of each 32 keys.
struct key_tile : tile_place {
  lattice_range queries[tile_rows];  // positions
  struct {
    int first, last_first, first_end, end;  // the least and greatest of the ranges' begins and ends
  } warp[4];
  int position[tile_rows];  // of the keys this tile owns; −1 for others
  int lattice;              // of the keys
  int first_index;          // of the keys, on it
  int sinks;                // that have joined it, as in row_bounds

  [[nodiscard]] __device__ int first(int w0, int w1) const {
    int x = warp[w0].first;
    for (int w = w0 + 1; w < w1; ++w) x = min(x, warp[w].first);
    return x;
  }
  [[nodiscard]] __device__ int end(int w0, int w1) const {
    int x = warp[w0].end;
    for (int w = w0 + 1; w < w1; ++w) x = max(x, warp[w].end);
    return x;
  }
};

template <int D>
struct backward_keys_memory {
  static constexpr int tile = tile_rows * D * 2, step = step_rows * D * 2;  // bytes
  static constexpr int stages = 4, statistics_bytes = step_rows * static_cast<int>(sizeof(row_statistics));
  static constexpr int k = 0, v = tile, q = 2 * tile, dout = q + stages * step, statistics = dout + stages * step,
                       tiles = statistics + stages * statistics_bytes;
  static constexpr int bytes = tiles + static_cast<int>(sizeof(key_tile[2])) + 1024;  // 1024: alignment
};

template <int D, class Heads>
__global__ __launch_bounds__(3 * hopper::group_threads,
                             1) void attend_backward_keys_sm90(const __grid_constant__ backward_keys_job<Heads> job) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  using memory = backward_keys_memory<D>;
  constexpr int k_panel = tile_rows * row_bytes, q_panel = step_rows * row_bytes;
  __shared__ barrier described[2], tile_empty[2], kv_full, kv_empty, q_full[memory::stages], q_empty[memory::stages];
  char* const base = shared_tiles();
  auto& tiles = *reinterpret_cast<key_tile(*)[2]>(base + memory::tiles);
  const attend_shape& shape = job.shape;

  constexpr int describing = 96;  // threads
  if (threadIdx.x == 0) {
    for (barrier& x : described) x.init(describing);
    for (barrier& x : tile_empty) x.init(9);  // the computing warps and the loading thread
    kv_full.init(1);
    kv_empty.init(8);
    for (barrier& x : q_full) x.init(1);
    for (barrier& x : q_empty) x.init(8);
    publish_barriers();
  }
  __syncthreads();

  const int group = static_cast<int>(threadIdx.x) / group_threads - 1;  // −1 copies
  const int thread = static_cast<int>(threadIdx.x) % group_threads, lane = thread % 32;
  ring_place<2> tile;
  ring_place<1> kv;
  ring_place<memory::stages> query;

  if (group < 0) {
    give_registers<40>();
    if (thread >= 32) {
      describe_tiles<describing>(
          job.tiles, shape, tiles, described, tile_empty, thread - 32,
          [&](key_tile& keys, const tile_place& at, int row) {
            int r = 0, number = job.tiles.order.tiles - 1 - at.number;
            while (number >= job.tiles_of_run[r]) number -= job.tiles_of_run[r++];
            int position = -1, first = shape.T, end = 0;
            job.patterns.visit(at.h, [&](const auto& pattern) {
              const int sinks = joined_sinks(pattern);
              if (r == window_run && sees_own_key_alone(pattern)) return;
              if (r == 0 && sinks > 0) return;
              const key_run along = pattern.keys(0)[r];
              const bool joined = r == 1 && sinks > 0;
              if (row == 0) {
                keys.lattice = job.keys.find(along);
                keys.sinks = joined ? sinks : 0;
              }
              const int index = number * tile_rows + row - (joined ? sink_rows : 0);
              const index_t k = index < 0 ? sinks + index : along.begin % along.step + index * along.step;
              if (k < 0) return;
              if (k >= shape.T) return;
              const index_t last = pattern.last_query(k, k < at.used ? at.used : shape.T);
              const key_run owner = pattern.keys(last)[index < 0 ? 0 : r];
              if (!owner.bounds(k) || (k - owner.begin) % owner.step != 0) return;
              position = static_cast<int>(k);
              if (k < at.used) {
                first = position;
                end = static_cast<int>(last) + 1;
              }
            });
            if (row == 0) keys.first_index = number * tile_rows;
            keys.position[row] = position;
            keys.queries[row] = {first, end > first ? end : first};
            const int least = __reduce_min_sync(~0u, first), most = __reduce_max_sync(~0u, first);
            const int least_end = __reduce_min_sync(~0u, end), most_end = __reduce_max_sync(~0u, end);
            if (row % 32 == 0) keys.warp[row / 32] = {least, most, least_end, most_end};
          });
    } else if (thread == 0) {
      for (bool more = true; more; tile.advance()) {
        described[tile.stage].wait(tile.parity);
        const key_tile& keys = tiles[tile.stage];
        const int b = keys.b, h = keys.h;
        more = keys.next < job.tiles.order.count();
        const int q_first = keys.first(0, 4) / step_rows * step_rows, q_end = keys.end(0, 4);
        if (q_first < q_end) {
          const lattice& from = job.keys.at[keys.lattice];
          kv_empty.wait(kv.parity ^ 1);
          kv_full.arrive_expecting(2 * memory::tile);
          load_keys<D, tile_rows>(base + memory::k, from.k, job.keys.k_sinks, keys.sinks, kv_full, keys.first_index, h,
                                  b);
          load_keys<D, tile_rows>(base + memory::v, from.v, job.keys.v_sinks, keys.sinks, kv_full, keys.first_index, h,
                                  b);
          kv.advance();
        }
        for (int q0 = (q_end - 1) / step_rows * step_rows; q_first < q_end && q0 >= q_first;
             q0 -= step_rows, query.advance()) {
          barrier& full = q_full[query.stage];
          q_empty[query.stage].wait(query.parity ^ 1);
          full.arrive_expecting(2 * memory::step + memory::statistics_bytes);
          load_tile<D, step_rows>(base + memory::q + query.stage * memory::step, job.q, full, q0, h, b);
          load_tile<D, step_rows>(base + memory::dout + query.stage * memory::step, job.dout, full, q0, h, b);
          load_bytes(base + memory::statistics + query.stage * memory::statistics_bytes, &job.statistics(b, h, q0),
                     memory::statistics_bytes, full);
        }
        tile_empty[tile.stage].arrive();
      }
    }
  } else {
    take_registers<232>();
    const int row = 64 * group + thread / 32 * 16 + lane / 4, group_id = 4 + group;
    const float scale = shape.scale * log2_e;
    const std::uint64_t k_rows = operand(base + memory::k + 64 * group * row_bytes);
    const std::uint64_t v_rows = operand(base + memory::v + 64 * group * row_bytes);
    const auto release = [&](barrier& empty) {
      if (lane == 0) empty.arrive();
    };

    for (bool more = true; more; tile.advance()) {
      described[tile.stage].wait(tile.parity);
      const key_tile& keys = tiles[tile.stage];
      const int b = keys.b, h = keys.h, used = keys.used;
      more = keys.next < job.tiles.order.count();
      const int all_first = keys.first(0, 4) / step_rows * step_rows, all_end = keys.end(0, 4);
      const int first = keys.first(2 * group, 2 * group + 2), end = keys.end(2 * group, 2 * group + 2);
      const int full_first = max(keys.warp[2 * group].last_first, keys.warp[2 * group + 1].last_first);
      const int full_end = min(keys.warp[2 * group].first_end, keys.warp[2 * group + 1].first_end);
      float dk[D / 2] = {}, dv[D / 2] = {};

      if (all_first < all_end) {
        kv_full.wait(kv.parity);
        kv.advance();
        for (int q0 = (all_end - 1) / step_rows * step_rows; q0 >= all_first; q0 -= step_rows, query.advance()) {
          const int stage = query.stage;
          q_full[stage].wait(query.parity);
          const bool last = q0 == all_first;
          if (q0 + step_rows <= first || q0 >= end) {  // nothing for this group's keys
            if (last) release(kv_empty);
            release(q_empty[stage]);
            continue;
          }
          char* const q = base + memory::q + stage * memory::step;
          char* const dout = base + memory::dout + stage * memory::step;
          if (shape.length && q0 + step_rows > used) {
            zero_rows<D, step_rows>(q, used - q0, thread, group_id);
            zero_rows<D, step_rows>(dout, used - q0, thread, group_id);
          }
          const std::uint64_t q_rows = operand(q, q_panel), dout_rows = operand(dout, q_panel);
          float s[32], dp[32];
          wgmma_fence();
#pragma unroll
          for (int c = 0; c < D / 16; ++c)
            product(s, advanced(k_rows, c / 4 * k_panel + c % 4 * 32), advanced(q_rows, c / 4 * q_panel + c % 4 * 32),
                    c > 0);
          wgmma_commit();
#pragma unroll
          for (int c = 0; c < D / 16; ++c)
            product(dp, advanced(v_rows, c / 4 * k_panel + c % 4 * 32),
                    advanced(dout_rows, c / 4 * q_panel + c % 4 * 32), c > 0);
          wgmma_commit();
          wgmma_wait<1>();
          pin(s);
          if (full_first > q0 || full_end < q0 + step_rows) mask_columns(s, keys.queries, row, q0, lane);
          // Columns 8j + 2(lane % 4) and the next: both rows' statistics lie beside each other.
          const auto* const statistics =
              reinterpret_cast<const float4*>(base + memory::statistics + stage * memory::statistics_bytes) + lane % 4;
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float4 pair = statistics[4 * j];
#pragma unroll
            for (int half = 0; half < 4; half += 2) {
              s[4 * j + half] = exp2_fast(s[4 * j + half] * scale - pair.x);
              s[4 * j + half + 1] = exp2_fast(s[4 * j + half + 1] * scale - pair.z);
            }
          }
          wgmma_wait<0>();
          pin(dp);
          if (last) release(kv_empty);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float4 pair = statistics[4 * j];
#pragma unroll
            for (int half = 0; half < 4; half += 2) {
              dp[4 * j + half] = s[4 * j + half] * (dp[4 * j + half] - pair.y);
              dp[4 * j + half + 1] = s[4 * j + half + 1] * (dp[4 * j + half + 1] - pair.w);
            }
          }
          std::uint32_t prob[4][4], ds[4][4];
          round_fragment(s, prob);
          round_fragment(dp, ds);
          wgmma_fence();
#pragma unroll
          for (int c = 0; c < 4; ++c) product<true>(dv, prob[c], advanced(dout_rows, c * 16 * row_bytes), true);
#pragma unroll
          for (int c = 0; c < 4; ++c) product<true>(dk, ds[c], advanced(q_rows, c * 16 * row_bytes), true);
          wgmma_commit();
          wgmma_wait<0>();
          pin(dv);
          pin(dk);
          release(q_empty[stage]);
        }
      }
      // Neighbouring rows may belong to other tiles, so each row is written by itself.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = keys.position[row + 8 * half];
        if (t < 0) continue;
        const bool keep = t < used;
        bfloat16 *const dk_row = job.dk.row(b, h, t), *const dv_row = job.dv.row(b, h, t);
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          const int c = 8 * j + 2 * (lane % 4), x = 4 * j + 2 * half;
          if (c >= job.dk.extent(3)) continue;
          *reinterpret_cast<std::uint32_t*>(dk_row + c) =
              keep ? rounded_pair(dk[x] * shape.scale, dk[x + 1] * shape.scale) : 0;
          *reinterpret_cast<std::uint32_t*>(dv_row + c) = keep ? rounded_pair(dv[x], dv[x + 1]) : 0;
        }
      }
      __syncwarp();
      release(tile_empty[tile.stage]);
    }
  }
#endif
}

}  // namespace ratplus::cuda::detail
