#pragma once
// Attention forward on Hopper, bfloat16, for heads of up to 128 channels:
//
//     S = q kᵀ     P = e^{S/√d − m}     out = P v / Σ P     with running maxima m (softmax in one pass over the keys)
//
// One thread block per multiprocessor works through tiles of 128 queries. Its first warp group copies: three warps work
// out which keys each query of the next tile sees, and one feeds tiles of 128 keys and values into a ring. A run of
// every D-th key is a tensor map whose row stride is D rows, so that sparse and dense tiles are the same to everything
// that follows. Two warp groups compute, 64 queries each: scores of one key tile are multiplied while the values of the
// tile before are, and one group's exponentials overlap the other's products, because the two issue theirs in turns.
// Only tiles that some row sees in part are masked, by the two bounds of each row.

#include "ratplus/backend/cuda/detail/attend_tiles.cuh"

namespace ratplus::cuda::detail {

/// Past: no_past, or past_rows (attend_past.cuh).
template <class Heads, class Past>
struct forward_job {
  CUtensorMap q, out;
  lattices keys;
  Heads patterns;
  Past past;
  attend_shape shape;
  tile_queue tiles;
  view<float, 3> lse;  // (B, H, T), absent: not wanted
};

template <int D, int Runs>
struct forward_memory {
  static constexpr int tile = tile_rows * D * 2;  // bytes of 128 rows
  static constexpr int stages = D == 128 ? 2 : 4;
  static constexpr int q = 0, k = 2 * tile, v = k + stages * tile, bounds = v + stages * tile;
  static constexpr int bytes = bounds + static_cast<int>(sizeof(row_bounds<Runs>[2])) + 1024;  // 1024: alignment
};

template <int Stages>
struct forward_barriers {
  hopper::barrier described[2], q_full[2], q_empty[2], k_full[Stages], k_empty[Stages], v_full[Stages], v_empty[Stages];
};

/// Softmax of two rows of a 64-row fragment, in one pass over the keys.
struct running_softmax {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // sum: of this thread's columns

  /// Replaces scores s by e^{scale s − max}, given log2(e) · scale; returns by how much what was summed before shrinks.
  template <int N>
  __device__ void add(float (&s)[N], float scale, float (&shrink)[2]) {
    float top[2] = {max[0], max[1]}, shift[2];
#pragma unroll
    for (int i = 0; i < N; ++i) top[(i >> 1) & 1] = fmaxf(top[(i >> 1) & 1], s[i]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
      shift[h] = top[h] == -INFINITY ? 0.0f : top[h] * scale;  // no key seen yet
      shrink[h] = hopper::exp2_fast(max[h] * scale - shift[h]);
      max[h] = top[h];
      sum[h] *= shrink[h];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      s[i] = hopper::exp2_fast(s[i] * scale - shift[(i >> 1) & 1]);
      sum[(i >> 1) & 1] += s[i];
    }
  }

  /// The sums of whole rows.
  __device__ void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    }
  }
};

template <int D, class Heads, class Past>
__global__ __launch_bounds__(3 * hopper::group_threads,
                             1) void attend_forward_sm90(const __grid_constant__ forward_job<Heads, Past> job) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  constexpr int runs = Past::runs;
  using memory = forward_memory<D, runs>;
  constexpr int stages = memory::stages, panel_bytes = tile_rows * row_bytes;
  __shared__ forward_barriers<stages> bar;
  char* const base = shared_tiles();
  auto& bounds = *reinterpret_cast<row_bounds<runs>(*)[2]>(base + memory::bounds);
  const attend_shape& shape = job.shape;

  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      bar.described[i].init(1);
      bar.q_full[i].init(1);
      bar.q_empty[i].init(3);  // the computing groups and the loading thread
    }
    for (int i = 0; i < stages; ++i) {
      bar.k_full[i].init(1);
      bar.v_full[i].init(1);
      bar.k_empty[i].init(8);
      bar.v_empty[i].init(8);
    }
    publish_barriers();
  }
  __syncthreads();

  const int group = static_cast<int>(threadIdx.x) / group_threads - 1;  // −1 copies
  const int thread = static_cast<int>(threadIdx.x) % group_threads;
  ring_place<2> tile;
  ring_place<stages> kv;

  if (group < 0) {
    give_registers<40>();
    if (thread >= 32) {
      describe_tiles(job.tiles, shape, bounds, bar.described, bar.q_empty, thread - 32,
                     [&](row_bounds<runs>& rows, const tile_place& at, int row) {
                       find_bounds(rows, job.patterns, job.keys, job.past, at, row);
                     });
    } else if (thread == 0) {
      for (bool more = true; more; tile.advance()) {
        bar.described[tile.stage].wait(tile.parity);
        const row_bounds<runs>& rows = bounds[tile.stage];
        const int b = rows.b, h = rows.h, t0 = rows.number * tile_rows;
        more = rows.next < job.tiles.order.count();
        bar.q_full[tile.stage].arrive_expecting(memory::tile);
        load_tile<D, tile_rows>(base + memory::q + tile.stage * memory::tile, job.q, bar.q_full[tile.stage], t0, h, b);
        for (tile_walk<tile_rows, runs> walk; walk.next(rows); kv.advance()) {
          const lattice& from = job.keys.at[rows.lattice[walk.run]];
          const int joined = walk.run == rows.anchors ? rows.sinks : 0;
          const auto load = [&](barrier& empty, barrier& full, const lattice_rows& of, const CUtensorMap& sinks,
                                int at) {
            empty.wait(kv.parity ^ 1);
            full.arrive_expecting(memory::tile);
            load_keys<D, tile_rows>(base + at + kv.stage * memory::tile, of, sinks, joined, full, walk.start,
                                    from.pooled ? 0 : h, b);
          };
          load(bar.k_empty[kv.stage], bar.k_full[kv.stage], from.k, job.keys.k_sinks, memory::k);
          load(bar.v_empty[kv.stage], bar.v_full[kv.stage], from.v, job.keys.v_sinks, memory::v);
        }
        bar.q_empty[tile.stage].arrive();
      }
    }
  } else {
    take_registers<232>();
    const int lane = thread % 32, first_row = 64 * group + thread / 32 * 16;  // of this warp's 16
    const int row = first_row + lane / 4;
    const float scale = shape.scale * log2_e;
    const int turn = 2 + group, other_turn = 3 - group, group_id = 4 + group;  // named barriers
    if (group == 1) arrive_threads(other_turn, 2 * group_threads);

    stores_under_way stores;

    for (bool more = true; more; tile.advance()) {
      bar.q_full[tile.stage].wait(tile.parity);
      const row_bounds<runs>& rows = bounds[tile.stage];
      char* const q = base + memory::q + tile.stage * memory::tile;
      const std::uint64_t q_rows = operand(q + 64 * group * row_bytes);
      float out[D / 2], s[64];
      std::uint32_t p[8][4];
      running_softmax softmax;

      const auto multiply_keys = [&](int stage) {
        const std::uint64_t k_rows = operand(base + memory::k + stage * memory::tile);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < D / 16; ++c) {
          const int at = c / 4 * panel_bytes + c % 4 * 32;
          product(s, advanced(q_rows, at), advanced(k_rows, at), c > 0);
        }
        wgmma_commit();
      };
      const auto multiply_values = [&](int stage, bool accumulate) {
        const std::uint64_t v_rows = operand(base + memory::v + stage * memory::tile, panel_bytes);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < 8; ++c) product<true>(out, p[c], advanced(v_rows, c * 16 * row_bytes), accumulate || c > 0);
        wgmma_commit();
      };
      const auto release = [&](barrier& empty) {
        if (lane == 0) empty.arrive();
      };
      const auto release_after_reads = [&](barrier& empty) {
        __syncwarp();
        release(empty);
      };
      const auto take_scores = [&](const tile_walk<tile_rows, runs>& walk, float(&shrink)[2]) {
        const auto& seen = rows.at[walk.run];
        // Seen by all of the group's rows when the last begins before the tile and the first ends behind it.
        if (seen[64 * group + 63].begin > walk.start || seen[64 * group].end < walk.start + tile_rows)
          mask_columns(s, seen, row, walk.start, lane);
        softmax.add(s, scale, shrink);
      };
      const auto shrink_sums = [&](const float(&shrink)[2]) {
#pragma unroll
        for (int j = 0; j < D / 2; ++j) out[j] *= shrink[(j >> 1) & 1];
      };
      // `end`: how many of the tile's keys any row may see.
      const auto end_of = [&](const tile_walk<tile_rows, runs>& walk) {
        return rows.at[walk.run][tile_rows - 1].end - walk.start;
      };
      const auto wait_values = [&](int end, int stage, int parity) {
        bar.v_full[stage].wait(parity);
        if (end < tile_rows) zero_rows<D, tile_rows>(base + memory::v + stage * memory::tile, end, thread, group_id);
      };

      // Each row's own key: s = q · k is the maximum so far, 1 the sum, v the result.
      const auto begin_with_own = [&] {
        const char *const k = base + memory::k + kv.stage * memory::tile, *const v = k + memory::v - memory::k;
        bar.k_full[kv.stage].wait(kv.parity);
        const int here = computed_here(lane);
        multiply_own<D, tile_rows, tile_rows>(q, first_row + here / 4, k, first_row + here / 4, here, softmax.max);
        release_after_reads(bar.k_empty[kv.stage]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const lattice_range own = rows.at[rows.window][row + 8 * half];
          if (own.begin == own.end) softmax.max[half] = -INFINITY;
          softmax.sum[half] = own.begin < own.end && lane % 4 == 0 ? 1.0f : 0.0f;
        }
        bar.v_full[kv.stage].wait(kv.parity);
#pragma unroll
        for (int c = 0; c < D / 16; ++c) {
          std::uint32_t pair[4];
          load_blocks(v + chunk_offset(tile_rows, first_row + here % 16, 2 * c + here / 16), pair);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            out[8 * c + 2 * j] = widened(pair[j]).x;
            out[8 * c + 2 * j + 1] = widened(pair[j]).y;
          }
        }
        release_after_reads(bar.v_empty[kv.stage]);
        kv.advance();
      };

      tile_walk<tile_rows, runs> walk;
      bool any = walk.next(rows), accumulate = false;
      if (any && rows.own && walk.run == rows.window) {
        begin_with_own();
        accumulate = true;
        any = walk.next(rows);
      }
      if (any) {
        float shrink[2];
        bar.k_full[kv.stage].wait(kv.parity);
        multiply_keys(kv.stage);
        if (thread == 0) stores.finish(bar.q_empty);
        wgmma_wait<0>();
        pin(s);
        release(bar.k_empty[kv.stage]);
        take_scores(walk, shrink);
        if (accumulate) shrink_sums(shrink);
        round_fragment(s, p);
        ring_place<stages> values = kv;
        int values_end = end_of(walk);
        for (kv.advance(); walk.next(rows); kv.advance()) {
          bar.k_full[kv.stage].wait(kv.parity);
          sync_threads(turn, 2 * group_threads);
          multiply_keys(kv.stage);
          wait_values(values_end, values.stage, values.parity);
          multiply_values(values.stage, accumulate);
          arrive_threads(other_turn, 2 * group_threads);
          wgmma_wait<1>();
          pin(s);
          release(bar.k_empty[kv.stage]);
          take_scores(walk, shrink);
          wgmma_wait<0>();
          pin(out);
          release(bar.v_empty[values.stage]);
          shrink_sums(shrink);
          round_fragment(s, p);
          accumulate = true;
          values = kv;
          values_end = end_of(walk);
        }
        wait_values(values_end, values.stage, values.parity);
        multiply_values(values.stage, accumulate);
        wgmma_wait<0>();
        pin(out);
        release(bar.v_empty[values.stage]);
      }

      if (thread == 0) stores.finish(bar.q_empty);
      softmax.finish();
      const int b = rows.b, h = rows.h, used = rows.used, t0 = rows.number * tile_rows;
      more = rows.next < job.tiles.order.count();
      bool in_use[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = t0 + row + 8 * half;
        in_use[half] = t < used;
        if (job.lse && lane % 4 == 0 && t < shape.T)
          job.lse(b, h, t) = t < used ? softmax.max[half] * shape.scale + logf(softmax.sum[half]) : 0.0f;
      }
      const float inverse[2] = {1.0f / softmax.sum[0], 1.0f / softmax.sum[1]};
      store_rows<D>(out, inverse, in_use, q, job.out, stores, tile.stage, t0, shape.T, h, b, group, thread, group_id);
    }
    if (thread == 0) stores.finish(bar.q_empty);
  }
#endif
}

/// Queues the kernel; p.q, p.out and p.lse are read of p.
template <class Heads, class Past, class Args>
void launch_forward_tiles(context& ctx, const Heads& patterns, const lattices& keys, const Past& past, const Args& p) {
  const forward_job<Heads, Past> job{.q = hopper::tensor_map(rows_of(p.q), tile_rows),
                                     .out = hopper::tensor_map(rows_of(p.out), tile_rows / 2),
                                     .keys = keys,
                                     .patterns = patterns,
                                     .past = past,
                                     .shape = shape_of(p),
                                     .tiles = {order_of(p.q), ctx.counters(1)},
                                     .lse = p.lse};
  const int blocks = blocks_of(ctx, job.tiles.order);
  const auto with = [&](auto kernel, int bytes) {
    launch(ctx, "attend", kernel, blocks, 3 * hopper::group_threads, bytes, job);
  };
  if (p.q.extent(3) <= 64)
    with(attend_forward_sm90<64, Heads, Past>, forward_memory<64, Past::runs>::bytes);
  else
    with(attend_forward_sm90<128, Heads, Past>, forward_memory<128, Past::runs>::bytes);
}

template <class P, class Args>
void attend_forward_tiles(context& ctx, const P& pattern, const Args& p) {
  launch_forward_tiles(ctx, on_device(pattern, p.q.extent(1)), lattices_of(pattern, p.k, p.v, tile_rows), no_past{}, p);
}

}  // namespace ratplus::cuda::detail
