#pragma once
// What the tiles of attention's backward pass (attend_backward_sm90.cuh) share: their order, their description, and the
// shared memory and barriers through which a block's loading thread hands them to its computing warps. A block takes
// tiles of both kinds in turn, so both use the same memory.

#include "ratplus/backend/cuda/detail/attend_tiles.cuh"

namespace ratplus::cuda::detail {

/// The order in which tiles of queries and of keys of `heads` heads (all sequences' heads in a row) start. A head's
/// tiles of keys come `lag` heads after its tiles of queries, when what they need of those is finished or nearly. Those
/// of the `last` heads come by themselves, the longest of all these heads first, so that the last ones to finish are
/// short.
struct backward_order {
  int query_tiles, key_tiles;  // of a head
  int heads, lag, last;        // lag + last ≤ heads

  struct place {
    int tile;  // of queries, or, from query_tiles on, of keys
    int head;
  };
  [[nodiscard]] __host__ __device__ int count() const { return (query_tiles + key_tiles) * heads; }
  /// The i-th tile to start. Tiles of queries come with falling numbers, as tiles of keys ask for them.
  [[nodiscard]] __device__ place operator[](int i) const {
    const int both = query_tiles + key_tiles, alone = lag * query_tiles, main = heads - last;
    if (i < alone) return {query_tiles - 1 - i % query_tiles, i / query_tiles};
    i -= alone;
    if (i < (main - lag) * both) {
      const int head = i / both, tile = i % both;
      return tile < query_tiles ? place{query_tiles - 1 - tile, lag + head} : place{tile, head};
    }
    i -= (main - lag) * both;
    if (i < last * query_tiles) return {query_tiles - 1 - i / last, main + i % last};
    i -= last * query_tiles;
    return {query_tiles + i / (lag + last), main - lag + i % (lag + last)};
  }
};

/// The order for heads whose tiles of keys take `steps` steps together, the longest of them `longest`.
[[nodiscard]] inline backward_order backward_order_of(const context& ctx, const view<const bfloat16, 4>& q,
                                                      int key_tiles, index_t steps, index_t longest) {
  const index_t heads = q.extent(0) * q.extent(1), query_tiles = ceil_div(q.extent(2), tile_rows);
  const index_t blocks = ctx.multiprocessors();
  // A block has a tile at work and one begun: what lies two tiles of every block back is finished or nearly.
  const index_t lag = std::min(heads, ceil_div(2 * blocks, query_tiles + key_tiles));
  // As many heads as keep all blocks busy while the longest tile is at work.
  const index_t last = steps > 0 ? std::min(heads - lag, ceil_div(blocks * longest, steps)) : 0;
  return {static_cast<int>(query_tiles), key_tiles, static_cast<int>(heads), static_cast<int>(lag),
          static_cast<int>(last)};
}

template <class Heads>
struct backward_job {
  CUtensorMap q, dout, out, dq, own_dk, own_dv, own_k, own_v;  // boxes of step_rows
  lattices keys;
  Heads patterns;
  attend_shape shape;
  queue_of<backward_order> tiles;
  int tiles_of_run[key_runs::count];  // of keys, the most that any head has
  unsigned* finished;                 // of each tile of queries of each head: 1 when its results are in memory
  view<const float, 3> lse;
  view<row_statistics, 3> statistics;
  view<bfloat16, 4> dk, dv;

  [[nodiscard]] __device__ unsigned* finished_of(int b, int h) const {
    return finished + static_cast<index_t>(b * shape.H + h) * tiles.order.query_tiles;
  }
};

/// A tile of queries and what the forward pass left of its rows.
struct query_tile : row_bounds<no_past::runs> {
  float lse2[tile_rows];
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

  [[nodiscard]] __device__ int first() const {
    return min(min(warp[0].first, warp[1].first), min(warp[2].first, warp[3].first));
  }
  [[nodiscard]] __device__ int end() const { return max(max(warp[0].end, warp[1].end), max(warp[2].end, warp[3].end)); }
};

struct query_or_key_tile {
  enum kind_of_tile { none, of_queries, of_keys } kind;
  union {
    query_tile queries;
    key_tile keys;
  };
};

/// Shared memory is a pool of slots, each for step_rows rows of one tensor: what tiles and steps need is of different
/// kinds and kept for different times, and whatever is free holds loads ahead.
template <int D>
struct backward_memory {
  static constexpr int rows_bytes = step_rows * D * 2,
                       statistics_bytes = step_rows * static_cast<int>(sizeof(row_statistics));
  static constexpr int slots = D == 128 ? 13 : 20;
  // More than can be under way while a computing group is behind: those in all slots, and what the other group alone
  // takes.
  static constexpr int items = 32;
  // Of each group: those of the tile that is being stored and of the two that are described.
  static constexpr int results = 6;
  static constexpr int statistics = slots * rows_bytes, tiles = statistics + slots * statistics_bytes;
  static constexpr int bytes = tiles + static_cast<int>(sizeof(query_or_key_tile[2])) + 1024;  // 1024: alignment
};

struct slot_pair {
  unsigned first, second;
};

/// What the loading thread tells the computing groups of two slots of rows.
struct alignas(16) item {
  unsigned first : 5, second : 5;  // slots
  // Of a step of a tile:
  unsigned run : 2;               // of its keys
  unsigned seen : 2, masked : 2;  // bit g: whether group g sees any of it, and not all of it
  unsigned rows : 7;              // that may be read, the others are to be zeroed
  int start;                      // its first query, or its first key's index on its lattice

  int left;  // the tile's steps after it
};

/// A block's shared memory. The loading thread puts items, two slots of rows each, wherever there is room, in an order
/// that the computing groups know; each group takes them in that order, or passes over those that are the other's.
/// What a group has computed it leaves in slots for the storing thread, which knows the order, and goes on.
template <int D>
struct backward_block {
  using memory = backward_memory<D>;
  using item_place = hopper::ring_place<memory::items>;
  using result_place = hopper::ring_place<memory::results>;
  struct shared {
    hopper::barrier described[2], tile_empty[2], full[memory::items], empty[memory::slots], claimable;
    item items[memory::items];
    hopper::barrier left[memory::results][2];
    slot_pair left_in[memory::results][2];
    int claimed;
  };
  static constexpr int describing = 64;  // threads

  shared& at;
  char* base;

  [[nodiscard]] __device__ query_or_key_tile& tile(int stage) const {
    return reinterpret_cast<query_or_key_tile*>(base + memory::tiles)[stage];
  }
  [[nodiscard]] __device__ char* rows(unsigned slot) const { return base + slot * memory::rows_bytes; }
  [[nodiscard]] __device__ char* statistics(unsigned slot) const {
    return base + memory::statistics + slot * memory::statistics_bytes;
  }

  /// One thread calls it.
  __device__ void init() const {
    for (hopper::barrier& x : at.described) x.init(describing);
    for (hopper::barrier& x : at.tile_empty) x.init(10);  // the computing warps, the loading and the storing thread
    for (hopper::barrier& x : at.full) x.init(1);
    for (hopper::barrier& x : at.empty) x.init(8);  // the computing warps
    at.claimable.init(1);
    for (auto& of_groups : at.left)
      for (hopper::barrier& x : of_groups) x.init(4);  // the group's warps
    hopper::publish_barriers();
  }

  /// A computing warp waits for the next item.
  [[nodiscard]] __device__ item take(item_place& next) const {
    at.full[next.stage].wait(next.parity);
    const item x = at.items[next.stage];
    next.advance();
    return x;
  }
  /// The same for one of two items, of which the other is the other group's.
  [[nodiscard]] __device__ item take_of_two(item_place& next, int group) const {
    if (group == 1) next.advance();
    const item x = take(next);
    if (group == 0) next.advance();
    return x;
  }
  /// And, after `step`, for the tile's next step of which the group sees anything, if there is one; others are given
  /// back unread.
  [[nodiscard]] __device__ bool take_step(item_place& next, item& step, int group, int lane) const {
    while (step.left > 0) {
      step = take(next);
      if (step.seen >> group & 1) return true;
      release(step.first, lane);
      release(step.second, lane);
    }
    return false;
  }
  /// A group that has a slot to itself gives it back: one thread does, or each of its four warps.
  __device__ void release_own(unsigned slot) const { at.empty[slot].arrive(8); }
  __device__ void release_own_by_warp(unsigned slot, int lane) const {
    if (lane == 0) at.empty[slot].arrive(2);
  }
  __device__ void release(unsigned slot, int lane) const {
    if (lane == 0) at.empty[slot].arrive();
  }

  /// The threads of a group, each after its last write to these slots, leave them to the storing thread.
  __device__ void leave(slot_pair slots, result_place& next, int group, int thread) const {
    hopper::fence_async_proxy();
    if (thread == 0) at.left_in[next.stage][group] = slots;
    __syncwarp();
    if (thread % 32 == 0) at.left[next.stage][group].arrive();
    next.advance();
  }
  /// Which waits for them.
  [[nodiscard]] __device__ slot_pair left(const result_place& next, int group) const {
    at.left[next.stage][group].wait(next.parity);
    return at.left_in[next.stage][group];
  }
};

/// What the loading thread knows of the pool.
template <int D>
struct slot_pool {
  using memory = backward_memory<D>;
  typename backward_block<D>::item_place next;
  unsigned used = 0;  // slots: whether an odd number of times
  int last = 0;

  /// Waits for free slots for `x`; load_first(slot, barrier) and load_second fill them.
  template <class First, class Second>
  __device__ void load(const backward_block<D>& block, item x, int more_bytes, First&& load_first,
                       Second&& load_second) {
    hopper::barrier& full = block.at.full[next.stage];
    x.first = take(block);
    full.expect(memory::rows_bytes + more_bytes);
    load_first(x.first, full);
    x.second = take(block);
    block.at.items[next.stage] = x;
    full.arrive_expecting(memory::rows_bytes);
    load_second(x.second, full);
    next.advance();
  }

 private:
  __device__ unsigned take(const backward_block<D>& block) {
    int slot = last;
    do slot = slot + 1 == memory::slots ? 0 : slot + 1;
    while (!block.at.empty[slot].done(~used >> slot & 1));
    used ^= 1u << slot;
    last = slot;
    return static_cast<unsigned>(slot);
  }
};

/// The loading thread lets the block's next tile be claimed when the loads of this many of a tile's steps, or fewer,
/// are still to come: a tile that is claimed and not begun may keep others waiting.
inline constexpr int claimed_ahead = 8;

}  // namespace ratplus::cuda::detail
