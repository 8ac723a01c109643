#pragma once
// Attention's backward pass (attend_backward_sm90.cuh), tiles of keys: they walk the queries that see them, and write
// dk and dv.

#include "ratplus/backend/cuda/detail/attend_backward_tiles.cuh"

namespace ratplus::cuda::detail {

/// Describes row `row` of a tile of keys; the same warp 32 neighbours at a time.
template <class Heads>
__device__ inline void describe_keys(const backward_job<Heads>& job, key_tile& keys, const tile_place& at, int row) {
  if (row == 0) static_cast<tile_place&>(keys) = at;
  int r = 0, number = at.number - job.tiles.order.query_tiles;
  while (number >= job.tiles_of_run[r]) number -= job.tiles_of_run[r++];
  int position = -1, first = job.shape.T, end = 0;
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
    if (k >= job.shape.T) return;
    const index_t last = pattern.last_query(k, k < at.used ? at.used : job.shape.T);
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
}

/// Waits until tiles of queries are finished, in falling order of their numbers.
class finished_tiles {
 public:
  __device__ finished_tiles(const unsigned* counters, int end) : counters_(counters), first_(end) {}

  /// Returns when all from `tile` on are.
  __device__ void wait(int tile) {
    if (tile >= first_) return;
    while (first_ > tile) {
      constexpr int some = 4;  // at a time: looking takes a while
      unsigned count[some];
#pragma unroll
      for (int i = 0; i < some; ++i) count[i] = hopper::load_counter(counters_ + max(first_ - 1 - i, 0));
#pragma unroll
      for (int i = 0, more = 1; i < some; ++i) {
        more = more && count[i] == 1 && first_ > 0;
        first_ -= more;
      }
    }
    hopper::acquire_counted();
  }

 private:
  const unsigned* counters_;
  int first_;
};

/// A step of a tile of keys.
[[nodiscard]] __device__ inline item step_of(const key_tile& keys, int q0, bool any_unused) {
  item x{};
  for (int group = 0; group < 2; ++group) {
    const auto &one = keys.warp[2 * group], &other = keys.warp[2 * group + 1];
    const bool seen = min(one.first, other.first) < q0 + step_rows && max(one.end, other.end) > q0;
    const bool whole =
        max(one.last_first, other.last_first) <= q0 && min(one.first_end, other.first_end) >= q0 + step_rows;
    x.seen |= static_cast<unsigned>(seen) << group;
    x.masked |= static_cast<unsigned>(!whole) << group;
  }
  x.rows = static_cast<unsigned>(any_unused ? min(keys.used - q0, step_rows) : step_rows);
  x.start = q0;
  return x;
}

/// The order of a tile's items: k and v of each group, then q and dout of each step.
template <int D, class Heads>
__device__ inline void load_keys_and_queries(const backward_job<Heads>& job, const backward_block<D>& block,
                                             const key_tile& keys, slot_pool<D>& pool) {
  using namespace hopper;
  using memory = backward_memory<D>;
  const int b = keys.b, h = keys.h, first = keys.first() / step_rows * step_rows, end = keys.end();
  int left = first < end ? (end - first + step_rows - 1) / step_rows : 0;
  if (left == 0) return block.at.claimable.arrive();
  const lattice& from = job.keys.at[keys.lattice];
  item x{};
  x.left = left;
  for (int start = keys.first_index; start < keys.first_index + tile_rows; start += step_rows)
    pool.load(
        block, x, 0,
        [&](unsigned slot, barrier& full) {
          load_keys<D, step_rows>(block.rows(slot), from.k, job.keys.k_sinks, keys.sinks, full, start, h, b);
        },
        [&](unsigned slot, barrier& full) {
          load_keys<D, step_rows>(block.rows(slot), from.v, job.keys.v_sinks, keys.sinks, full, start, h, b);
        });
  finished_tiles finished(job.finished_of(b, h), (end + tile_rows - 1) / tile_rows);
  if (left < claimed_ahead) block.at.claimable.arrive();
  for (int t = first + (left - 1) * step_rows; left > 0; t -= step_rows, --left) {
    if (left == claimed_ahead) block.at.claimable.arrive();
    x = step_of(keys, t, keys.used < job.shape.T);
    x.left = left - 1;
    finished.wait(t / tile_rows);
    pool.load(
        block, x, memory::statistics_bytes,
        [&](unsigned slot, barrier& full) {
          load_tile<D, step_rows>(block.rows(slot), job.q, full, t, h, b);
          load_bytes(block.statistics(slot), &job.statistics(b, h, t), memory::statistics_bytes, full);
        },
        [&](unsigned slot, barrier& full) { load_tile<D, step_rows>(block.rows(slot), job.dout, full, t, h, b); });
  }
}

template <int D, class Heads>
__device__ inline void compute_keys(const backward_job<Heads>& job, const backward_block<D>& block,
                                    const key_tile& keys, typename backward_block<D>::item_place& items, int group,
                                    int thread) {
  using namespace hopper;
  constexpr int panel = step_rows * row_bytes;
  const attend_shape& shape = job.shape;
  group = computed_here(group), thread = computed_here(thread);
  const int lane = thread % 32, first_row = thread / 32 * 16, row = 64 * group + first_row + lane / 4;
  const int group_id = 4 + group;
  const float scale = shape.scale * log2_e;
  const int b = keys.b, h = keys.h, used = keys.used;
  const bool any = keys.first() < keys.end();
  item step = any ? block.take_of_two(items, group) : item{};
  const unsigned k_slot = step.first, v_slot = step.second;
  float dk[D / 2] = {}, dv[D / 2] = {};

  for (bool more = block.take_step(items, step, group, lane); more;) {
    const item now = step;
    char *const q = block.rows(now.first), *const dout = block.rows(now.second);
    if (now.rows < step_rows) {
      zero_rows<D, step_rows>(q, now.rows, thread, group_id);
      zero_rows<D, step_rows>(dout, now.rows, thread, group_id);
    }
    const std::uint64_t k_rows = operand_of_warp(block.rows(k_slot)), v_rows = operand_of_warp(block.rows(v_slot));
    const std::uint64_t q_rows = operand_of_warp(q, panel), dout_rows = operand_of_warp(dout, panel);
    float s[32], dp[32];
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < D / 16; ++c)
      product(s, advanced(k_rows, c / 4 * panel + c % 4 * 32), advanced(q_rows, c / 4 * panel + c % 4 * 32), c > 0);
    wgmma_commit();
#pragma unroll
    for (int c = 0; c < D / 16; ++c)
      product(dp, advanced(v_rows, c / 4 * panel + c % 4 * 32), advanced(dout_rows, c / 4 * panel + c % 4 * 32), c > 0);
    wgmma_commit();
    more = block.take_step(items, step, group, lane);
    wgmma_wait<1>();
    hopper::pin(s);
    if (now.masked >> group & 1) mask_columns(s, keys.queries, row, now.start, lane);
    // Columns 8j + 2(lane % 4) and the next: both rows' statistics lie beside each other.
    const auto* const statistics = reinterpret_cast<const float4*>(block.statistics(now.first)) + lane % 4;
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
    hopper::pin(dp);
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
    hopper::pin(dv);
    hopper::pin(dk);
    block.release(now.first, lane);
    block.release(now.second, lane);
  }

  // By way of the warp's own rows of k and v. Neighbouring rows may belong to other tiles, so each is written by
  // itself.
  char *const k = block.rows(k_slot), *const v = block.rows(v_slot);
  if (any) {
    const block_rows<step_rows> dk_blocks(k, first_row, lane), dv_blocks(v, first_row, lane);
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      const auto store = [&](std::uint32_t at, const float(&x)[D / 2], float by) {
        store_blocks(
            at, rounded_pair(x[8 * c] * by, x[8 * c + 1] * by), rounded_pair(x[8 * c + 2] * by, x[8 * c + 3] * by),
            rounded_pair(x[8 * c + 4] * by, x[8 * c + 5] * by), rounded_pair(x[8 * c + 6] * by, x[8 * c + 7] * by));
      };
      store(dk_blocks[c], dk, shape.scale);
      store(dv_blocks[c], dv, 1.0f);
    }
    __syncwarp();
  }
  constexpr int chunks = D / 8;
  const int chunk = lane % chunks;
#pragma unroll 2
  for (int i = lane / chunks; i < 16; i += 32 / chunks) {
    const int t = keys.position[64 * group + first_row + i], at = chunk_offset(step_rows, first_row + i, chunk);
    if (t < 0 || 8 * chunk >= job.dk.extent(3)) continue;
    const uint4 none = {0, 0, 0, 0};
    *reinterpret_cast<uint4*>(job.dk.row(b, h, t) + 8 * chunk) =
        any && t < used ? *reinterpret_cast<const uint4*>(k + at) : none;
    *reinterpret_cast<uint4*>(job.dv.row(b, h, t) + 8 * chunk) =
        any && t < used ? *reinterpret_cast<const uint4*>(v + at) : none;
  }
  fence_async_proxy();
  __syncwarp();
  if (any) {
    block.release_own_by_warp(k_slot, lane);
    block.release_own_by_warp(v_slot, lane);
  }
}

}  // namespace ratplus::cuda::detail
