#pragma once
// Attention's backward pass (attend_backward_sm90.cuh), tiles of queries: they walk the keys they see. Each writes dq,
// the statistics of its rows, and dk and dv of keys that their own query alone sees.

#include "ratplus/backend/cuda/detail/attend_backward_tiles.cuh"

namespace ratplus::cuda::detail {

/// Describes row `row` of a tile of queries.
template <class Heads>
__device__ inline void describe_queries(const backward_job<Heads>& job, query_tile& rows, const tile_place& at,
                                        int row) {
  if (row == 0) static_cast<tile_place&>(rows) = at;
  find_bounds(rows, job.patterns, job.keys, no_past{}, at, row);
  const int t = at.number * tile_rows + row;
  rows.lse2[row] = t < at.used ? job.lse(at.b, at.h, t) * log2_e : INFINITY;
}

/// A step of a tile of queries.
[[nodiscard]] __device__ inline item step_of(const query_tile& rows, int run, int start, int T) {
  item x{};
  const auto& seen = rows.at[run];
  for (unsigned group = 0; group < 2; ++group) {
    const lattice_range first = seen[64 * group], last = seen[64 * group + 63];
    x.seen |= static_cast<unsigned>(first.begin < start + step_rows && last.end > start) << group;
    x.masked |= static_cast<unsigned>(last.begin > start || first.end < start + step_rows) << group;
  }
  // Anchors that no query of the tile sees yet are keys like others; other keys that none sees may be no numbers.
  const bool known = run == rows.anchors && rows.used == T;
  x.rows = static_cast<unsigned>(known ? step_rows : min(seen[tile_rows - 1].end - start, step_rows));
  x.run = static_cast<unsigned>(run);
  x.start = start;
  return x;
}

/// The order of a tile's items: q and dout of each group, out of both, if queries have their own keys to themselves
/// these and their values of each group, then keys and values of each step.
template <int D, class Heads>
__device__ inline void load_queries(const backward_job<Heads>& job, const backward_block<D>& block,
                                    const query_tile& rows, slot_pool<D>& pool) {
  using namespace hopper;
  const int b = rows.b, h = rows.h, t0 = rows.number * tile_rows;
  tile_walk<step_rows, no_past::runs> walk;
  if (rows.own) walk.run = rows.window;
  int left = steps_of<step_rows>(rows, walk.run);
  if (left <= claimed_ahead) block.at.claimable.arrive();
  const auto load = [&](const auto& map, int t) {
    return [&, t](unsigned slot, barrier& full) { load_tile<D, step_rows>(block.rows(slot), map, full, t, h, b); };
  };
  constexpr int half = step_rows;
  item x{};
  x.left = left;
  for (int t = t0; t <= t0 + half; t += half) pool.load(block, x, 0, load(job.q, t), load(job.dout, t));
  pool.load(block, x, 0, load(job.out, t0), load(job.out, t0 + half));
  if (rows.own)
    for (int t = t0; t <= t0 + half; t += half) pool.load(block, x, 0, load(job.own_k, t), load(job.own_v, t));
  for (; walk.next(rows); --left) {
    x = step_of(rows, walk.run, walk.start, job.shape.T);
    x.left = left - 1;
    const lattice& from = job.keys.at[rows.lattice[walk.run]];
    const int joined = walk.run == rows.anchors ? rows.sinks : 0;
    pool.load(
        block, x, 0,
        [&](unsigned slot, barrier& full) {
          load_keys<D, step_rows>(block.rows(slot), from.k, job.keys.k_sinks, joined, full, walk.start, h, b);
        },
        [&](unsigned slot, barrier& full) {
          load_keys<D, step_rows>(block.rows(slot), from.v, job.keys.v_sinks, joined, full, walk.start, h, b);
        });
    if (left == claimed_ahead + 1) block.at.claimable.arrive();
  }
}

template <int D, class Heads>
__device__ inline void compute_queries(const backward_job<Heads>& job, const backward_block<D>& block,
                                       const query_tile& rows, typename backward_block<D>::item_place& items,
                                       typename backward_block<D>::result_place& results, int group, int thread) {
  using namespace hopper;
  constexpr int panel = step_rows * row_bytes;
  const attend_shape& shape = job.shape;
  group = computed_here(group), thread = computed_here(thread);
  const int lane = thread % 32, row = thread / 32 * 16 + lane / 4, row_of_tile = 64 * group + row;
  const int group_id = 4 + group;
  const float scale = shape.scale * log2_e;
  const int b = rows.b, h = rows.h, used = rows.used, t0 = rows.number * tile_rows + 64 * group;

  item step = block.take_of_two(items, group);
  const unsigned q_slot = step.first, dout_slot = step.second;
  char *const q = block.rows(q_slot), *const dout = block.rows(dout_slot);
  // Rows that are not in use may hold anything, and their keys' gradients are to be 0.
  if (used < shape.T && used < t0 + step_rows)
    for (char* x : {q, dout}) zero_rows<D, step_rows>(x, max(used - t0, 0), thread, group_id);
  const auto here = static_cast<unsigned>(computed_here(lane));
  const int first_row = thread / 32 * 16;
  const rows_read<D> dout_rows(block_rows<step_rows>(dout, first_row, here));
  row_statistics statistics[2];
  {
    const item out = block.take(items);
    const unsigned slot = group == 0 ? out.first : out.second;
    float delta[2];
    multiply_own<D>(dout_rows, block_rows<step_rows>(block.rows(slot), first_row, here), lane, delta);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = t0 + row + 8 * half;
      statistics[half] = {rows.lse2[row_of_tile + 8 * half], t < used ? delta[half] : 0.0f};
      if (lane % 4 == 0 && t < job.statistics.extent(2)) job.statistics(b, h, t) = statistics[half];
    }
    __syncwarp();
    block.release_own_by_warp(slot, lane);
  }
  float dq[D / 2], s[32], dp[32];
  std::uint32_t ds[4][4];
  bool accumulate = false;

  const auto multiply_rows = [&] {
    char *const k = block.rows(step.first), *const v = block.rows(step.second);
    if (step.rows < step_rows) {
      zero_rows<D, step_rows>(k, step.rows, thread, group_id);
      zero_rows<D, step_rows>(v, step.rows, thread, group_id);
    }
    const std::uint64_t q_rows = operand_of_warp(q), dout_rows = operand_of_warp(dout), k_rows = operand_of_warp(k),
                        v_rows = operand_of_warp(v);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < D / 16; ++c)
      product(s, advanced(q_rows, c / 4 * panel + c % 4 * 32), advanced(k_rows, c / 4 * panel + c % 4 * 32), c > 0);
#pragma unroll
    for (int c = 0; c < D / 16; ++c)
      product(dp, advanced(dout_rows, c / 4 * panel + c % 4 * 32), advanced(v_rows, c / 4 * panel + c % 4 * 32), c > 0);
    wgmma_commit();
  };
  const auto multiply_keys = [&](unsigned slot) {
    const std::uint64_t k_rows = operand_of_warp(block.rows(slot), panel);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < 4; ++c) product<true>(dq, ds[c], advanced(k_rows, c * 16 * row_bytes), accumulate || c > 0);
    wgmma_commit();
    accumulate = true;
  };
  const auto find_gradients = [&](const item& of_step) {
    hopper::pin(s);
    hopper::pin(dp);
    block.release(of_step.second, lane);
    if (of_step.masked >> group & 1) mask_columns(s, rows.at[of_step.run], row_of_tile, of_step.start, lane);
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      const row_statistics& of_row = statistics[(j >> 1) & 1];
      s[j] = exp2_fast(s[j] * scale - of_row.lse2) * (dp[j] - of_row.delta);
    }
  };

  // Each row's own key, which no other query sees unless it is kept: then a tile of keys writes its gradients again.
  // The keys and values become their gradients in place, element by element.
  const auto take_own = [&] {
    const item own = block.take_of_two(items, group);
    const block_rows<step_rows> k(block.rows(own.first), first_row, here), v(block.rows(own.second), first_row, here);
    const rows_read<D> q_rows(block_rows<step_rows>(q, first_row, here)), k_rows(k);
    float s_own[2], dp_own[2], ds_own[2];
    multiply_own<D>(q_rows, k_rows, lane, s_own);
    multiply_own<D>(dout_rows, v, lane, dp_own);
    std::uint32_t p[2], ds_of_query[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const lattice_range seen = rows.at[rows.window][row_of_tile + 8 * half];
      const bool sees = seen.begin < seen.end;
      const float p_own = sees ? exp2_fast(s_own[half] * scale - statistics[half].lse2) : 0.0f;
      ds_own[half] = sees ? p_own * (dp_own[half] - statistics[half].delta) : 0.0f;
      p[half] = rounded_pair(p_own, p_own);
      ds_of_query[half] = rounded_pair(ds_own[half] * shape.scale, ds_own[half] * shape.scale);
    }
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      std::uint32_t dk[4], dv[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = widened(k_rows.block[c][j]);
        dq[8 * c + 2 * j] = ds_own[j & 1] * pair.x;
        dq[8 * c + 2 * j + 1] = ds_own[j & 1] * pair.y;
        dk[j] = product_of_pairs(q_rows.block[c][j], ds_of_query[j & 1]);
        dv[j] = product_of_pairs(dout_rows.block[c][j], p[j & 1]);
      }
      store_blocks(k[c], dk[0], dk[1], dk[2], dk[3]);
      store_blocks(v[c], dv[0], dv[1], dv[2], dv[3]);
    }
    block.leave({own.first, own.second}, results, group, thread);
    accumulate = true;
  };

  if (rows.own) take_own();
  if (block.take_step(items, step, group, lane)) {
    multiply_rows();
    // The next step is taken while products are under way.
    item at = step;
    bool more = block.take_step(items, step, group, lane);
    wgmma_wait<0>();
    find_gradients(at);
    round_fragment(s, ds);
    while (more) {
      multiply_rows();
      const unsigned k_slot = at.first;
      multiply_keys(k_slot);
      at = step;
      more = block.take_step(items, step, group, lane);
      wgmma_wait<1>();
      find_gradients(at);
      wgmma_wait<0>();
      hopper::pin(dq);
      block.release(k_slot, lane);
      round_fragment(s, ds);
    }
    block.release_own_by_warp(dout_slot, lane);
    multiply_keys(at.first);
    wgmma_wait<0>();
    hopper::pin(dq);
    block.release(at.first, lane);
  } else {
    block.release_own_by_warp(dout_slot, lane);
  }

  const block_rows<step_rows> dq_blocks(q, computed_here(first_row), here);
  const bool keep[2] = {accumulate && t0 + row < used, accumulate && t0 + row + 8 < used};
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    std::uint32_t word[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      word[j] = keep[j & 1] ? rounded_pair(dq[8 * c + 2 * j] * shape.scale, dq[8 * c + 2 * j + 1] * shape.scale) : 0;
    store_blocks(dq_blocks[c], word[0], word[1], word[2], word[3]);
  }
  block.leave({q_slot, q_slot}, results, group, thread);
}

/// Stores what the groups leave: dk and dv of their own keys, if queries have these to themselves, and dq. Then it
/// tells those who wait for the results. The description may be overwritten meanwhile: `read` says that it was read.
template <int D, class Heads>
__device__ inline void store_queries(const backward_job<Heads>& job, const backward_block<D>& block,
                                     const query_tile& rows, hopper::barrier& read,
                                     typename backward_block<D>::result_place& results) {
  using namespace hopper;
  const int b = rows.b, h = rows.h, number = rows.number;
  const bool own = rows.own;
  read.arrive();
  slot_pair slots[2];
  const auto store = [&](const CUtensorMap& first, const CUtensorMap* second) {
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      slots[group] = block.left(results, group);
      const int t = number * tile_rows + 64 * group;
      if (t >= job.shape.T) continue;
      store_tile<D, step_rows>(first, block.rows(slots[group].first), t, h, b);
      if (second) store_tile<D, step_rows>(*second, block.rows(slots[group].second), t, h, b);
    }
    results.advance();
    commit_stores();
    wait_stores_read();
#pragma unroll
    for (const auto [one, other] : slots) {
      block.release_own(one);
      if (second) block.release_own(other);
    }
  };
  if (own) store(job.own_dk, &job.own_dv);
  store(job.dq, nullptr);
  wait_stores();
  release_increment(job.finished_of(b, h) + number);
}

}  // namespace ratplus::cuda::detail
