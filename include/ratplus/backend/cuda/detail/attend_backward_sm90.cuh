#pragma once
// Attention backward on Hopper, bfloat16, for heads of up to 128 channels. With p and dS recomputed from the statistics
// of the forward pass (attend_statistics.cuh):
//
//     dq = Σ_keys dS k / √d     dv = Σ_queries p dout     dk = Σ_queries dS q / √d
//
// Two kernels, each summing in registers what it writes: one walks the keys that a tile of queries sees, as the forward
// pass does, and finds the statistics of its rows first; the other the queries that see a tile of keys, which are one
// interval for each key. S and dP are computed in both, seven products instead of five; in return nothing is
// accumulated in memory, so that every run gives the same bits and there is no second, deterministic version.
//
// A key belongs to the run in which its last query finds it: keys kept for ever (sinks, anchors) form tiles along their
// own lattice and are walked to the end of the sequence, passing keys form tiles of neighbours and are left after W
// queries. Every key has one owner. Where W = 0, a passing key is seen by its own query alone: the first kernel has all
// that its gradients need and writes them, for whole tiles of rows, and the second then writes those of the kept keys.

#include "ratplus/backend/cuda/detail/attend_tiles.cuh"

namespace ratplus::cuda::detail {

/// Rows of the side that is walked, per step.
inline constexpr int step_rows = 64;

template <class Heads>
struct backward_queries_job {
  CUtensorMap q, dout, out, dq, dk, dv;
  lattices keys;
  Heads patterns;
  attend_shape shape;
  tile_queue tiles;
  view<const float, 3> lse;
  view<row_statistics, 3> statistics;  // written, for the other kernel
};

/// A tile of queries and what the forward pass left of its rows.
struct query_tile : row_bounds<no_past::runs> {
  float lse2[tile_rows];
};

template <int D>
struct backward_queries_memory {
  static constexpr int tile = tile_rows * D * 2, step = step_rows * D * 2;  // bytes
  // One ring for all: a step's values, then its keys, which are given back only in the step after it. While they are
  // held there is room for two steps more.
  static constexpr int stages = D == 128 ? 5 : 10;
  static constexpr int q = 0, dout = 2 * tile, steps = 4 * tile, tiles = steps + stages * step;
  static constexpr int bytes = tiles + static_cast<int>(sizeof(query_tile[2])) + 1024;  // 1024: alignment
};

template <int D, class Heads>
__global__ __launch_bounds__(3 * hopper::group_threads, 1) void attend_backward_queries_sm90(
    const __grid_constant__ backward_queries_job<Heads> job) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  using memory = backward_queries_memory<D>;
  constexpr int q_panel = tile_rows * row_bytes, k_panel = step_rows * row_bytes;
  __shared__ barrier described[2], q_full[2], q_empty[2], full[memory::stages], empty[memory::stages];
  char* const base = shared_tiles();
  auto& tiles = *reinterpret_cast<query_tile(*)[2]>(base + memory::tiles);
  const attend_shape& shape = job.shape;

  if (threadIdx.x == 0) {
    for (barrier& x : described) x.init(1);
    for (barrier& x : q_full) x.init(1);
    for (barrier& x : q_empty) x.init(3);  // the computing groups and the loading thread
    for (barrier& x : full) x.init(1);
    for (barrier& x : empty) x.init(8);
    publish_barriers();
  }
  __syncthreads();

  const int group = static_cast<int>(threadIdx.x) / group_threads - 1;  // −1 copies
  const int thread = static_cast<int>(threadIdx.x) % group_threads;
  ring_place<2> tile;
  ring_place<memory::stages> ring;

  if (group < 0) {
    give_registers<40>();
    if (thread >= 32) {
      describe_tiles(job.tiles, shape, tiles, described, q_empty, thread - 32,
                     [&](query_tile& rows, const tile_place& at, int row) {
                       find_bounds(rows, job.patterns, job.keys, no_past{}, at, row);
                       const int t = at.number * tile_rows + row;
                       rows.lse2[row] = t < at.used ? job.lse(at.b, at.h, t) * log2_e : INFINITY;
                     });
    } else if (thread == 0) {
      for (bool more = true; more; tile.advance()) {
        described[tile.stage].wait(tile.parity);
        const query_tile& rows = tiles[tile.stage];
        const int b = rows.b, h = rows.h, t0 = rows.number * tile_rows;
        more = rows.next < job.tiles.order.count();
        q_full[tile.stage].arrive_expecting(2 * memory::tile);
        load_tile<D, tile_rows>(base + memory::q + tile.stage * memory::tile, job.q, q_full[tile.stage], t0, h, b);
        load_tile<D, tile_rows>(base + memory::dout + tile.stage * memory::tile, job.dout, q_full[tile.stage], t0, h,
                                b);
        const auto load_step = [&](const auto& load) {
          empty[ring.stage].wait(ring.parity ^ 1);
          full[ring.stage].arrive_expecting(memory::step);
          load(base + memory::steps + ring.stage * memory::step, full[ring.stage]);
          ring.advance();
        };
        for (int t = t0; t < t0 + tile_rows; t += step_rows)
          load_step([&](char* to, barrier& done) { load_tile<D, step_rows>(to, job.out, done, t, h, b); });
        for (tile_walk<step_rows, no_past::runs> walk; walk.next(rows);) {
          const lattice& from = job.keys.at[rows.lattice[walk.run]];
          const int joined = walk.run == rows.anchors ? rows.sinks : 0;
          load_step([&](char* to, barrier& done) {
            load_keys<D, step_rows>(to, from.v, job.keys.v_sinks, joined, done, walk.start, h, b);
          });
          load_step([&](char* to, barrier& done) {
            load_keys<D, step_rows>(to, from.k, job.keys.k_sinks, joined, done, walk.start, h, b);
          });
        }
        q_empty[tile.stage].arrive();
      }
    }
  } else {
    take_registers<232>();
    const int lane = thread % 32, row = 64 * group + thread / 32 * 16 + lane / 4, group_id = 4 + group;
    const float scale = shape.scale * log2_e;
    const auto release = [&](barrier& empty) {
      if (lane == 0) empty.arrive();
    };

    stores_under_way stores;

    for (bool more = true; more; tile.advance()) {
      q_full[tile.stage].wait(tile.parity);
      const query_tile& rows = tiles[tile.stage];
      const int b = rows.b, h = rows.h, used = rows.used, t0 = rows.number * tile_rows;
      more = rows.next < job.tiles.order.count();
      char* const q = base + memory::q + tile.stage * memory::tile;
      const std::uint64_t q_rows = operand(q + 64 * group * row_bytes);
      const std::uint64_t dout_rows = operand(base + memory::dout + tile.stage * memory::tile + 64 * group * row_bytes);
      row_statistics statistics[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) statistics[half].lse2 = rows.lse2[row + 8 * half];
      // Of what the forward pass gave, the first step's rows are the first group's and the second's the other's.
      for (int step = 0; step < 2; ++step, ring.advance()) {
        full[ring.stage].wait(ring.parity);
        if (step == group) {
          float delta[2];
          multiply_own<D, tile_rows, step_rows>(q + memory::dout - memory::q, row,
                                                base + memory::steps + ring.stage * memory::step, row - 64 * group,
                                                lane, delta);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int t = t0 + row + 8 * half;
            statistics[half].delta = t < used ? delta[half] : 0.0f;
            if (lane % 4 == 0 && t < job.statistics.extent(2)) job.statistics(b, h, t) = statistics[half];
          }
        }
        __syncwarp();
        release(empty[ring.stage]);
      }
      float dq[D / 2], s[32], dp[32];
      std::uint32_t ds[4][4];
      bool accumulate = false;

      // The next step of which this group sees anything; up to `most` others are given back unread.
      tile_walk<step_rows, no_past::runs> walk;
      ring_place<memory::stages> key, value;
      const auto next = [&](int most) {
        for (; walk.next(rows); --most) {
          value = ring;
          ring.advance();
          key = ring;
          ring.advance();
          const auto& seen = rows.at[walk.run];
          if (most == 0 || (seen[64 * group].begin < walk.start + step_rows && seen[64 * group + 63].end > walk.start))
            return true;
          full[value.stage].wait(value.parity);
          full[key.stage].wait(key.parity);
          release(empty[value.stage]);
          release(empty[key.stage]);
        }
        return false;
      };
      const auto multiply_rows = [&] {
        char* const k = base + memory::steps + key.stage * memory::step;
        char* const v = base + memory::steps + value.stage * memory::step;
        full[key.stage].wait(key.parity);
        full[value.stage].wait(value.parity);
        if (const int end = rows.at[walk.run][tile_rows - 1].end - walk.start; end < step_rows) {
          zero_rows<D, step_rows>(k, end, thread, group_id);
          zero_rows<D, step_rows>(v, end, thread, group_id);
        }
        const std::uint64_t k_rows = operand(k), v_rows = operand(v);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < D / 16; ++c)
          product(s, advanced(q_rows, c / 4 * q_panel + c % 4 * 32), advanced(k_rows, c / 4 * k_panel + c % 4 * 32),
                  c > 0);
#pragma unroll
        for (int c = 0; c < D / 16; ++c)
          product(dp, advanced(dout_rows, c / 4 * q_panel + c % 4 * 32), advanced(v_rows, c / 4 * k_panel + c % 4 * 32),
                  c > 0);
        wgmma_commit();
      };
      const auto multiply_keys = [&](int stage) {
        const std::uint64_t k_rows = operand(base + memory::steps + stage * memory::step, k_panel);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < 4; ++c) product<true>(dq, ds[c], advanced(k_rows, c * 16 * row_bytes), accumulate || c > 0);
        wgmma_commit();
        accumulate = true;
      };
      const auto find_gradients = [&] {
        pin(s);
        pin(dp);
        release(empty[value.stage]);
        const auto& seen = rows.at[walk.run];
        if (seen[64 * group + 63].begin > walk.start || seen[64 * group].end < walk.start + step_rows)
          mask_columns(s, seen, row, walk.start, lane);
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          const row_statistics& of_row = statistics[(j >> 1) & 1];
          s[j] = exp2_fast(s[j] * scale - of_row.lse2) * (dp[j] - of_row.delta);
        }
      };

      // Each row's own key, which no other query sees unless it is kept: then the other kernel writes its gradients
      // again. The step's keys and values become their gradients in place.
      const auto take_own = [&] {
        char* const k = base + memory::steps + key.stage * memory::step;
        char* const v = base + memory::steps + value.stage * memory::step;
        const char* const dout = q + memory::dout - memory::q;
        float s_own[2], dp_own[2], p_own[2], ds_own[2];
        bool seen[2];
        full[key.stage].wait(key.parity);
        full[value.stage].wait(value.parity);
        multiply_own<D, tile_rows, step_rows>(q, row, k, row - 64 * group, lane, s_own);
        multiply_own<D, tile_rows, step_rows>(dout, row, v, row - 64 * group, lane, dp_own);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const lattice_range own = rows.at[rows.window][row + 8 * half];
          seen[half] = own.begin < own.end;
          p_own[half] = seen[half] ? exp2_fast(s_own[half] * scale - statistics[half].lse2) : 0.0f;
          ds_own[half] = seen[half] ? p_own[half] * (dp_own[half] - statistics[half].delta) : 0.0f;
        }
        const int block_row = thread / 32 * 16 + lane % 16;
#pragma unroll
        for (int c = 0; c < D / 16; ++c) {
          const int chunk = 2 * c + lane / 16, at = chunk_offset(step_rows, block_row, chunk);
          const int of_query = chunk_offset(tile_rows, 64 * group + block_row, chunk);
          std::uint32_t k2[4], q2[4], dout2[4];
          load_blocks(k + at, k2);
          load_blocks(q + of_query, q2);
          load_blocks(dout + of_query, dout2);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 of_k = widened(k2[j]), of_q = widened(q2[j]), of_dout = widened(dout2[j]);
            const float ds_scaled = ds_own[j & 1] * shape.scale, p = p_own[j & 1];
            dq[8 * c + 2 * j] = ds_own[j & 1] * of_k.x;
            dq[8 * c + 2 * j + 1] = ds_own[j & 1] * of_k.y;
            q2[j] = seen[j & 1] ? rounded_pair(ds_scaled * of_q.x, ds_scaled * of_q.y) : 0;
            dout2[j] = seen[j & 1] ? rounded_pair(p * of_dout.x, p * of_dout.y) : 0;
          }
          store_blocks(k + at, q2[0], q2[1], q2[2], q2[3]);
          store_blocks(v + at, dout2[0], dout2[1], dout2[2], dout2[3]);
        }
        fence_async_proxy();
        sync_threads(group_id, group_threads);
        if (thread == 0) {
          stores.finish(q_empty);
          if (const int t = t0 + 64 * group; t < shape.T)
            for (int c = 0; c < D; c += panel_channels) {
              store_panel(job.dk, k + c * step_rows * 2, c, t, h, b);
              store_panel(job.dv, v + c * step_rows * 2, c, t, h, b);
            }
          commit_stores();
          wait_stores_read();
        }
        __syncwarp();
        release(empty[key.stage]);
        release(empty[value.stage]);
        accumulate = true;
      };

      constexpr int all = 1 << 30;
      bool any = next(all);
      if (any && rows.own && walk.run == rows.window) {
        take_own();
        any = next(all);
      }
      if (any) {
        multiply_rows();
        if (thread == 0) stores.finish(q_empty);
        wgmma_wait<0>();
        find_gradients();
        round_fragment(s, ds);
        int stage = key.stage;
        while (next(1)) {
          multiply_rows();
          multiply_keys(stage);
          wgmma_wait<1>();
          find_gradients();
          wgmma_wait<0>();
          pin(dq);
          release(empty[stage]);
          round_fragment(s, ds);
          stage = key.stage;
        }
        multiply_keys(stage);
        wgmma_wait<0>();
        pin(dq);
        release(empty[stage]);
      }
      if (thread == 0) stores.finish(q_empty);
      bool keep[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) keep[half] = accumulate && t0 + row + 8 * half < used;
      store_rows<D>(dq, {shape.scale, shape.scale}, keep, q, job.dq, stores, tile.stage, t0, shape.T, h, b, group,
                    thread, group_id);
    }
    if (thread == 0) stores.finish(q_empty);
  }
#endif
}

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

  if (threadIdx.x == 0) {
    for (barrier& x : described) x.init(1);
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
      describe_tiles(job.tiles, shape, tiles, described, tile_empty, thread - 32,
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

template <class P>
void attend_backward_tiles(context& ctx, const P& pattern, const attend_backward_args<bfloat16>& p) {
  const index_t H = p.q.extent(1), T = p.q.extent(2), d = p.q.extent(3);
  const auto patterns = on_device(pattern, H);
  using heads = std::remove_const_t<decltype(patterns)>;
  const auto statistics = room_for_statistics(ctx, p);

  const backward_queries_job<heads> queries{.q = hopper::tensor_map(rows_of(p.q), tile_rows),
                                            .dout = hopper::tensor_map(rows_of(p.dout), tile_rows),
                                            .out = hopper::tensor_map(rows_of(p.out), step_rows),
                                            .dq = hopper::tensor_map(rows_of(p.dq), tile_rows / 2),
                                            .dk = hopper::tensor_map(rows_of(p.dk), step_rows),
                                            .dv = hopper::tensor_map(rows_of(p.dv), step_rows),
                                            .keys = lattices_of(pattern, p.k, p.v, step_rows),
                                            .patterns = patterns,
                                            .shape = shape_of(p),
                                            .tiles = {order_of(p.q), ctx.counters(1)},
                                            .lse = p.lse,
                                            .statistics = statistics};
  backward_keys_job<heads> keys{.q = hopper::tensor_map(rows_of(p.q), step_rows),
                                .dout = hopper::tensor_map(rows_of(p.dout), step_rows),
                                .keys = lattices_of(pattern, p.k, p.v, tile_rows),
                                .patterns = patterns,
                                .shape = shape_of(p),
                                .tiles = {order_of(p.q), ctx.counters(1)},
                                .tiles_of_run = {},
                                .statistics = statistics,
                                .dk = p.dk,
                                .dv = p.dv};
  // A run's end never falls, so its last query tells how far its lattice is used.
  const index_t groups = head_groups(pattern);
  for (index_t g = 0; g < groups; ++g)
    visit_head(pattern, g, groups, [&](const auto& one) {
      const key_runs last = one.keys(T - 1);
      const int joined = joined_sinks(one);
      for (int r = joined > 0 ? 1 : 0; r < (sees_own_key_alone(one) ? window_run : key_runs::count); ++r) {
        const int indices = on_lattice(last[r]).end + (r == 1 && joined > 0 ? sink_rows : 0);
        keys.tiles_of_run[r] = std::max(keys.tiles_of_run[r], (indices + tile_rows - 1) / tile_rows);
      }
    });
  keys.tiles.order.tiles = keys.tiles_of_run[0] + keys.tiles_of_run[1] + keys.tiles_of_run[2];

  const auto with = [&](auto kernel, const auto& job, int bytes) {
    if (job.tiles.order.count() == 0) return;  // no key is seen by others than its own query
    launch(ctx, "attend backward", kernel, blocks_of(ctx, job.tiles.order), 3 * hopper::group_threads, bytes, job);
  };
  if (d <= 64) {
    with(attend_backward_queries_sm90<64, heads>, queries, backward_queries_memory<64>::bytes);
    with(attend_backward_keys_sm90<64, heads>, keys, backward_keys_memory<64>::bytes);
  } else {
    with(attend_backward_queries_sm90<128, heads>, queries, backward_queries_memory<128>::bytes);
    with(attend_backward_keys_sm90<128, heads>, keys, backward_keys_memory<128>::bytes);
  }
}

}  // namespace ratplus::cuda::detail
