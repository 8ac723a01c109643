#pragma once
// Attention backward on Hopper, bfloat16, for heads of up to 128 channels. With p and dS recomputed from the statistics
// of the forward pass (attend_statistics.cuh):
//
//     dq = Σ_keys dS k / √d     dv = Σ_queries p dout     dk = Σ_queries dS q / √d
//
// Two kernels, each summing in registers what it writes once: one walks the keys that a tile of queries sees, as the
// forward pass does, the other the queries that see a tile of keys, which are one interval for each key. S and dP are
// computed in both, seven products instead of five; in return nothing is accumulated in memory, so that every run gives
// the same bits and there is no second, deterministic version.
//
// A key belongs to the run in which its last query finds it: keys kept for ever (sinks, anchors) form tiles along their
// own lattice and are walked to the end of the sequence, passing keys form tiles of neighbours and are left after W
// queries. Every key has one owner and is written once.

#include "ratplus/backend/cuda/detail/attend_tiles.cuh"

namespace ratplus::cuda::detail {

/// Rows of the side that is walked, per step.
inline constexpr int step_rows = 64;

template <class Heads>
struct backward_queries_job {
  CUtensorMap q, dout, dq;
  lattices keys;
  Heads patterns;
  attend_shape shape;
  tile_order order;
  view<const row_statistics, 3> statistics;
};

template <int D>
struct backward_queries_memory {
  static constexpr int tile = tile_rows * D * 2, step = step_rows * D * 2;  // bytes
  // A key tile is used twice, in consecutive steps, a value tile once.
  static constexpr int k_stages = D == 128 ? 3 : 6, v_stages = D == 128 ? 2 : 4;
  static constexpr int q = 0, dout = 2 * tile, k = 4 * tile, v = k + k_stages * step, bounds = v + v_stages * step;
  static constexpr int bytes =
      bounds + 2 * static_cast<int>(sizeof(row_bounds<no_past::runs>)) + 1024;  // 1024: alignment
};

template <int D, class Heads>
__global__ __launch_bounds__(3 * hopper::group_threads, 1) void attend_backward_queries_sm90(
    const __grid_constant__ backward_queries_job<Heads> job) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  using memory = backward_queries_memory<D>;
  constexpr int q_panel = tile_rows * row_bytes, k_panel = step_rows * row_bytes;
  __shared__ barrier q_full[2], q_empty[2], k_full[memory::k_stages], k_empty[memory::k_stages],
      v_full[memory::v_stages], v_empty[memory::v_stages];
  char* const base = shared_tiles();
  auto* const bounds = reinterpret_cast<row_bounds<no_past::runs>*>(base + memory::bounds);
  const attend_shape& shape = job.shape;

  if (threadIdx.x == 0) {
    for (barrier& x : q_full) x.init(1);
    for (barrier& x : q_empty) x.init(2);
    for (barrier& x : k_full) x.init(1);
    for (barrier& x : k_empty) x.init(8);
    for (barrier& x : v_full) x.init(1);
    for (barrier& x : v_empty) x.init(8);
    publish_barriers();
  }
  __syncthreads();

  const int group = static_cast<int>(threadIdx.x) / group_threads - 1;  // −1 copies
  const int thread = static_cast<int>(threadIdx.x) % group_threads;
  ring_place<2> tile;
  ring_place<memory::k_stages> key;
  ring_place<memory::v_stages> value;

  if (group < 0) {
    give_registers<40>();
    for (int i = static_cast<int>(blockIdx.x); i < job.order.count();
         i += static_cast<int>(gridDim.x), tile.advance()) {
      const auto [number, head_of_all] = job.order[i];
      const int b = head_of_all / shape.H, h = head_of_all % shape.H;
      const int used = shape.rows_in_use(b), t0 = number * tile_rows;
      q_empty[tile.stage].wait(tile.parity ^ 1);
      row_bounds<no_past::runs>& rows = bounds[tile.stage];
      find_bounds(rows, job.patterns, job.keys, no_past{}, h, b, t0, used, thread);
      sync_threads(1, group_threads);
      if (thread == 0) {
        q_full[tile.stage].arrive_expecting(2 * memory::tile);
        load_tile<D, tile_rows>(base + memory::q + tile.stage * memory::tile, job.q, q_full[tile.stage], t0, h, b);
        load_tile<D, tile_rows>(base + memory::dout + tile.stage * memory::tile, job.dout, q_full[tile.stage], t0, h,
                                b);
        for (tile_walk<step_rows, no_past::runs> walk; walk.next(rows); key.advance(), value.advance()) {
          const lattice& from = job.keys.at[rows.lattice[walk.run]];
          k_empty[key.stage].wait(key.parity ^ 1);
          k_full[key.stage].arrive_expecting(memory::step);
          load_tile<D, step_rows>(base + memory::k + key.stage * memory::step, from.k, k_full[key.stage], walk.start, h,
                                  b);
          v_empty[value.stage].wait(value.parity ^ 1);
          v_full[value.stage].arrive_expecting(memory::step);
          load_tile<D, step_rows>(base + memory::v + value.stage * memory::step, from.v, v_full[value.stage],
                                  walk.start, h, b);
        }
      }
      __syncwarp();
    }
  } else {
    take_registers<232>();
    const int lane = thread % 32, row = 64 * group + thread / 32 * 16 + lane / 4, group_id = 4 + group;
    const float scale = shape.scale * log2_e;
    const auto release = [&](barrier& empty) {
      if (lane == 0) empty.arrive();
    };

    for (int i = static_cast<int>(blockIdx.x); i < job.order.count();
         i += static_cast<int>(gridDim.x), tile.advance()) {
      const auto [number, head_of_all] = job.order[i];
      const int b = head_of_all / shape.H, h = head_of_all % shape.H;
      const int used = shape.rows_in_use(b), t0 = number * tile_rows;
      char* const q = base + memory::q + tile.stage * memory::tile;
      const std::uint64_t q_rows = operand(q + 64 * group * row_bytes);
      const std::uint64_t dout_rows = operand(base + memory::dout + tile.stage * memory::tile + 64 * group * row_bytes);
      const row_bounds<no_past::runs>& rows = bounds[tile.stage];
      row_statistics statistics[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        statistics[half] =
            t0 + 64 * group < shape.T ? job.statistics(b, h, t0 + row + 8 * half) : row_statistics{INFINITY, 0};
      float dq[D / 2], s[32], dp[32];
      std::uint32_t ds[4][4];
      bool accumulate = false;

      // The next tile of which this group sees anything; the others are given back unread.
      tile_walk<step_rows, no_past::runs> walk;
      const auto next = [&] {
        while (walk.next(rows)) {
          const auto& seen = rows.at[walk.run];
          if (seen[64 * group].begin < walk.start + step_rows && seen[64 * group + 63].end > walk.start) return true;
          k_full[key.stage].wait(key.parity);
          v_full[value.stage].wait(value.parity);
          release(k_empty[key.stage]);
          release(v_empty[value.stage]);
          key.advance();
          value.advance();
        }
        return false;
      };
      const auto multiply_rows = [&] {
        char* const k = base + memory::k + key.stage * memory::step;
        char* const v = base + memory::v + value.stage * memory::step;
        k_full[key.stage].wait(key.parity);
        v_full[value.stage].wait(value.parity);
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
        const std::uint64_t k_rows = operand(base + memory::k + stage * memory::step, k_panel);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < 4; ++c) product<true>(dq, ds[c], advanced(k_rows, c * 16 * row_bytes), accumulate || c > 0);
        wgmma_commit();
        accumulate = true;
      };
      const auto find_gradients = [&] {
        pin(s);
        pin(dp);
        release(v_empty[value.stage]);
        const auto& seen = rows.at[walk.run];
        if (seen[64 * group + 63].begin > walk.start || seen[64 * group].end < walk.start + step_rows)
          mask_columns(s, seen, row, walk.start, lane);
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          const row_statistics& of_row = statistics[(j >> 1) & 1];
          s[j] = exp2_fast(s[j] * scale - of_row.lse2) * (dp[j] - of_row.delta);
        }
      };

      q_full[tile.stage].wait(tile.parity);
      if (next()) {
        multiply_rows();
        wgmma_wait<0>();
        find_gradients();
        round_fragment(s, ds);
        int stage = key.stage;
        for (key.advance(), value.advance(); next(); key.advance(), value.advance()) {
          multiply_rows();
          multiply_keys(stage);
          wgmma_wait<1>();
          find_gradients();
          wgmma_wait<0>();
          pin(dq);
          release(k_empty[stage]);
          round_fragment(s, ds);
          stage = key.stage;
        }
        multiply_keys(stage);
        wgmma_wait<0>();
        pin(dq);
        release(k_empty[stage]);
      }
      bool keep[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) keep[half] = accumulate && t0 + row + 8 * half < used;
      store_rows<D>(dq, {shape.scale, shape.scale}, keep, q, job.dq, q_empty[tile.stage], t0, shape.T, h, b, group,
                    thread, group_id);
    }
  }
#endif
}

template <class Heads>
struct backward_keys_job {
  CUtensorMap q, dout;
  lattices keys;
  Heads patterns;
  attend_shape shape;
  tile_order order;
  int tiles_of_run[key_runs::count];  // the most that any head has
  view<const row_statistics, 3> statistics;
  view<bfloat16, 4> dk, dv;
};

/// The queries of a tile of keys: of each key, and of the 32 keys of each copying warp.
struct key_tile {
  lattice_range queries[tile_rows];  // positions
  struct {
    int first, last_first, first_end, end;  // the least and greatest of the ranges' begins and ends
  } warp[4];
  int position[tile_rows];  // of the keys this tile owns; −1 for others
  int lattice;              // of the keys

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
  static constexpr int bytes = tiles + 2 * static_cast<int>(sizeof(key_tile)) + 1024;  // 1024: alignment
};

template <int D, class Heads>
__global__ __launch_bounds__(3 * hopper::group_threads,
                             1) void attend_backward_keys_sm90(const __grid_constant__ backward_keys_job<Heads> job) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  using memory = backward_keys_memory<D>;
  constexpr int k_panel = tile_rows * row_bytes, q_panel = step_rows * row_bytes;
  __shared__ barrier tile_full[2], tile_empty[2], kv_full, kv_empty, q_full[memory::stages], q_empty[memory::stages];
  char* const base = shared_tiles();
  auto* const tiles = reinterpret_cast<key_tile*>(base + memory::tiles);
  const attend_shape& shape = job.shape;

  if (threadIdx.x == 0) {
    for (barrier& x : tile_full) x.init(1);
    for (barrier& x : tile_empty) x.init(8);
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
    for (int i = static_cast<int>(blockIdx.x); i < job.order.count();
         i += static_cast<int>(gridDim.x), tile.advance()) {
      const auto [falling, head_of_all] = job.order[i];
      const int b = head_of_all / shape.H, h = head_of_all % shape.H;
      const int used = shape.rows_in_use(b);
      int r = 0, number = job.order.tiles - 1 - falling;
      while (number >= job.tiles_of_run[r]) number -= job.tiles_of_run[r++];

      tile_empty[tile.stage].wait(tile.parity ^ 1);
      key_tile& keys = tiles[tile.stage];
      int position = -1, first = shape.T, end = 0;
      job.patterns.visit(h, [&](const auto& pattern) {
        const key_run along = pattern.keys(0)[r];
        const index_t k = along.begin % along.step + (static_cast<index_t>(number) * tile_rows + thread) * along.step;
        if (thread == 0) keys.lattice = job.keys.find(along);
        if (k >= shape.T) return;
        const index_t last = pattern.last_query(k, k < used ? used : shape.T);
        const key_run owner = pattern.keys(last)[r];
        if (!owner.bounds(k) || (k - owner.begin) % owner.step != 0) return;
        position = static_cast<int>(k);
        if (k < used) {
          first = position;
          end = static_cast<int>(last) + 1;
        }
      });
      keys.position[thread] = position;
      keys.queries[thread] = {first, end > first ? end : first};
      const int least = __reduce_min_sync(~0u, first), most = __reduce_max_sync(~0u, first);
      const int least_end = __reduce_min_sync(~0u, end), most_end = __reduce_max_sync(~0u, end);
      if (lane == 0) keys.warp[thread / 32] = {least, most, least_end, most_end};
      sync_threads(1, group_threads);

      if (thread == 0) {
        tile_full[tile.stage].arrive();
        const int q_first = keys.first(0, 4) / step_rows * step_rows, q_end = keys.end(0, 4);
        if (q_first < q_end) {
          const lattice& from = job.keys.at[keys.lattice];
          kv_empty.wait(kv.parity ^ 1);
          kv_full.arrive_expecting(2 * memory::tile);
          load_tile<D, tile_rows>(base + memory::k, from.k, kv_full, number * tile_rows, h, b);
          load_tile<D, tile_rows>(base + memory::v, from.v, kv_full, number * tile_rows, h, b);
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
      }
      __syncwarp();
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

    for (int i = static_cast<int>(blockIdx.x); i < job.order.count();
         i += static_cast<int>(gridDim.x), tile.advance()) {
      const auto [falling, head_of_all] = job.order[i];
      const int b = head_of_all / shape.H, h = head_of_all % shape.H;
      const int used = shape.rows_in_use(b);
      const key_tile& keys = tiles[tile.stage];
      tile_full[tile.stage].wait(tile.parity);
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
  const auto statistics = statistics_of(ctx, p);

  const backward_queries_job<heads> queries{.q = hopper::tensor_map(rows_of(p.q), tile_rows),
                                            .dout = hopper::tensor_map(rows_of(p.dout), tile_rows),
                                            .dq = hopper::tensor_map(rows_of(p.dq), tile_rows / 2),
                                            .keys = lattices_of(pattern, p.k, p.v, step_rows),
                                            .patterns = patterns,
                                            .shape = shape_of(p),
                                            .order = order_of(p.q),
                                            .statistics = statistics};
  backward_keys_job<heads> keys{.q = hopper::tensor_map(rows_of(p.q), step_rows),
                                .dout = hopper::tensor_map(rows_of(p.dout), step_rows),
                                .keys = lattices_of(pattern, p.k, p.v, tile_rows),
                                .patterns = patterns,
                                .shape = shape_of(p),
                                .order = order_of(p.q),
                                .tiles_of_run = {},
                                .statistics = statistics,
                                .dk = p.dk,
                                .dv = p.dv};
  // A run's end never falls, so its last query tells how far its lattice is used.
  const index_t groups = head_groups(pattern);
  for (index_t g = 0; g < groups; ++g)
    visit_head(pattern, g, groups, [&](const auto& one) {
      const key_runs last = one.keys(T - 1);
      for (int r = 0; r < key_runs::count; ++r)
        keys.tiles_of_run[r] = std::max(keys.tiles_of_run[r], (on_lattice(last[r]).end + tile_rows - 1) / tile_rows);
    });
  keys.order.tiles = keys.tiles_of_run[0] + keys.tiles_of_run[1] + keys.tiles_of_run[2];

  const auto with = [&](auto kernel, const auto& job, int bytes) {
    const int blocks = std::min(ctx.multiprocessors(), job.order.count());
    launch(ctx, "attend backward", kernel, blocks, 3 * hopper::group_threads, bytes, job);
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
