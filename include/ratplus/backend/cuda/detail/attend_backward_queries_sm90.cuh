#pragma once
// The first kernel of attention's backward pass (attend_backward_sm90.cuh): tiles of queries walk the keys they see.
// Writes dq, the statistics of the rows, and dk and dv of keys that their own query alone sees.

#include "ratplus/backend/cuda/detail/attend_tiles.cuh"

namespace ratplus::cuda::detail {

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

  constexpr int describing = 96;  // threads
  if (threadIdx.x == 0) {
    for (barrier& x : described) x.init(describing);
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
      describe_tiles<describing>(job.tiles, shape, tiles, described, q_empty, thread - 32,
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

}  // namespace ratplus::cuda::detail
