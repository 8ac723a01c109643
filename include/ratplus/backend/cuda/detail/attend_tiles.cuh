#pragma once
// What the tiled attention kernels share: the order in which tiles are given to thread blocks, the bounds of every
// row's run inside a tile, and the walk over the tiles of the other side that any row of a tile needs.

#include <algorithm>
#include <cmath>

#include "ratplus/backend/cuda/context.cuh"
#include "ratplus/backend/cuda/detail/attend_statistics.cuh"
#include "ratplus/backend/cuda/detail/heads.cuh"
#include "ratplus/backend/cuda/detail/hopper.cuh"
#include "ratplus/core/scalar.hpp"
#include "ratplus/core/view.hpp"

namespace ratplus::cuda::detail {

/// Rows of a tile: two groups of 64.
inline constexpr int tile_rows = 128;

/// Rows of the side that the backward kernels walk, per step.
inline constexpr int step_rows = 64;

/// Tiles of `heads` (all sequences' heads in a row), `together` heads at a time so that the rows they share stay in L2,
/// and within those the heaviest first, so that the last ones to finish are light.
struct tile_order {
  int tiles, heads, together;

  struct place {
    int tile, head;
  };
  [[nodiscard]] __host__ __device__ int count() const { return tiles * heads; }
  /// The i-th tile to start; tile numbers fall.
  [[nodiscard]] __device__ place operator[](int i) const {
    const int section = i / (together * tiles), first = section * together, left = heads - first;
    const int width = left < together ? left : together, rest = i - first * tiles;
    return {tiles - 1 - rest / width, first + rest % width};
  }
};

/// Gives tiles out one by one, so that no block waits for another's heavier ones. A block's first tile has its own
/// number; then it takes the next that nobody has taken. count() tickets are taken in all, the last of every block
/// being the one that tells it to stop, after which the counter is zero again.
template <class Order>
struct queue_of {
  Order order;
  unsigned* taken;  // one of the context's counters

  /// count() or more: there are no more tiles. One thread of a block asks.
  [[nodiscard]] __device__ int next() const {
    return static_cast<int>(gridDim.x + atomicInc(taken, static_cast<unsigned>(order.count()) - 1));
  }
};

using tile_queue = queue_of<tile_order>;

/// Blocks that share the tiles of `order`, at least one each.
template <class Order>
[[nodiscard]] int blocks_of(const context& ctx, const Order& order) {
  return std::min(ctx.multiprocessors(), order.count());
}

/// Indices [begin, end) of a run on its lattice: index i is position begin % step + i · step of the run.
struct lattice_range {
  int begin, end;
};
[[nodiscard]] RATPLUS_HD inline lattice_range on_lattice(const key_run& run) {
  const auto step = static_cast<unsigned>(run.step), first = static_cast<unsigned>(run.begin);
  const auto length = run.end > run.begin ? static_cast<unsigned>(run.end - run.begin) : 0u;
  const unsigned begin = step == 1 ? first : first / step, count = step == 1 ? length : (length + step - 1) / step;
  return {static_cast<int>(begin), static_cast<int>(begin + count)};
}

[[nodiscard]] inline hopper::rows_of_heads rows_of(const view<const bfloat16, 4>& x, index_t origin = 0,
                                                   index_t step = 1) {
  return {x.data(),    x.extent(3), x.extent(2), x.extent(1), x.extent(0),
          x.stride(2), x.stride(1), x.stride(0), origin,      step};
}

/// A few sinks would cost a tile of their own. Where there are anchors too they take the first rows of the anchors'
/// first tile instead: the last of `sink_rows` rows, so that what a query sees of both is one range of rows still.
inline constexpr int sink_rows = 8;

/// How many sinks of a pattern join its anchors.
template <class P>
[[nodiscard]] RATPLUS_HD constexpr int joined_sinks(const P& pattern) {
  if constexpr (SparsePattern<P>) {
    const any_sparse p = pattern;
    return p.anchored() && p.sinks() < p.dilation() && p.sinks() <= sink_rows ? static_cast<int>(p.sinks()) : 0;
  } else {
    return 0;
  }
}

/// Rows of a tensor on a lattice: boxes of a whole tile, and of a tile without the rows of sinks.
struct lattice_rows {
  CUtensorMap tile, rest;
};

/// The rows of two tensors (keys and values) on one lattice.
struct lattice {
  lattice_rows k, v;
  int origin, step;
  bool pooled = false;  // all heads of a sequence in one: rows are slots
};

/// The lattices of all runs of all heads of a call: as a rule one or two.
struct lattices {
  static constexpr int most = 16;
  CUtensorMap k_sinks, v_sinks;  // boxes of sink_rows
  lattice at[most];
  int count = 0;

  [[nodiscard]] __host__ __device__ int find(const key_run& run) const {
    const int step = static_cast<int>(run.step), origin = static_cast<int>(run.begin) % step;
    int i = 0;
    while (i < count && (at[i].step != step || at[i].origin != origin)) ++i;
    return i;
  }
};

/// The lattices of a pattern over keys and values. A run's lattice is the same for every query: keys(0) shows it.
template <HeadPattern P>
[[nodiscard]] lattices lattices_of(const P& pattern, const view<const bfloat16, 4>& k, const view<const bfloat16, 4>& v,
                                   int box_rows) {
  lattices all;
  all.k_sinks = hopper::tensor_map(rows_of(k), sink_rows);
  all.v_sinks = hopper::tensor_map(rows_of(v), sink_rows);
  const index_t groups = head_groups(pattern);
  for (index_t g = 0; g < groups; ++g)
    visit_head(pattern, g, groups, [&](const auto& p) {
      for (const key_run& run : p.keys(0).run) {
        if (all.find(run) < all.count) continue;
        if (all.count == lattices::most)
          throw value_error(
              message("attend: the heads' patterns have more than ", lattices::most, " different dilations"));
        const index_t origin = run.begin % run.step;
        const auto boxes = [&](const view<const bfloat16, 4>& x) {
          const hopper::rows_of_heads rows = rows_of(x, origin, run.step);
          return lattice_rows{hopper::tensor_map(rows, box_rows), hopper::tensor_map(rows, box_rows - sink_rows)};
        };
        all.at[all.count++] = {boxes(k), boxes(v), static_cast<int>(origin), static_cast<int>(run.step)};
      }
    });
  return all;
}

/// Where a block is in its work.
struct tile_place {
  int b, h;
  int number;  // tile_order::place::tile
  int used;    // rows in use of the sequence
  int next;    // number of the block's next tile, for the queue
};

/// A tile of queries: for each row and each run, the lattice indices that the row sees. Neither end falls from row to
/// row.
///
/// The last run is the window among the rows of this call. When it holds no key but the row's own (W = 0), a product of
/// tiles would compute 128 scores to use one: `own` says so, the run is one tile whose row i belongs to query i (and is
/// empty when the query finds its own key among the sinks), and the row's own score is taken element by element.
template <int Runs, int Rows = tile_rows>
struct row_bounds : tile_place {
  static constexpr int window = Runs - 1, anchors = 1;

  lattice_range at[Runs][Rows];
  int lattice[Runs];  // of each run
  int sinks;          // that have joined the anchors, whose indices then begin sink_rows later
  bool own;

  /// The first index of a run's first tile.
  [[nodiscard]] __device__ int first(int run) const { return sinks > 0 && run == anchors ? 0 : at[run][0].begin; }
};

/// The window's number among a pattern's runs.
inline constexpr int window_run = key_runs::count - 1;

/// Row 0 of every sequence is position 0.
struct no_past {
  static constexpr int runs = key_runs::count;
};

/// The window of row t when it can hold no key but the row's own.
template <int Runs, int Rows>
__device__ inline void set_own(row_bounds<Runs, Rows>& rows, bool own, bool seen, int t, int used, int row) {
  if (own) rows.at[rows.window][row] = {t, seen && t < used ? t + 1 : t};
  if (row == 0) rows.own = own;
}

/// Fills them for row `row` of the tile at `at`. Rows beyond the last in use see what it sees: their results are
/// dropped, and the bounds still never fall.
template <int Rows, class Heads>
__device__ void find_bounds(row_bounds<no_past::runs, Rows>& rows, const Heads& heads, const lattices& keys, no_past,
                            const tile_place& at, int row) {
  const int t0 = at.number * Rows;
  key_runs runs;
  int sinks = 0;
  bool own = false;
  heads.visit(at.h, [&](const auto& pattern) {
    runs = pattern.keys(max(min(t0 + row, at.used - 1), 0));
    sinks = joined_sinks(pattern);
    own = sees_own_key_alone(pattern);
  });
#pragma unroll
  for (int r = 0; r < key_runs::count; ++r) {
    if (row == 0) rows.lattice[r] = keys.find(runs[r]);
    rows.at[r][row] = t0 < at.used ? on_lattice(runs[r]) : lattice_range{0, 0};
  }
  if (row == 0) rows.sinks = sinks;
  if (sinks > 0 && t0 < at.used) {
    const int begin = sink_rows - sinks, seen = static_cast<int>(runs[0].end), n = rows.at[rows.anchors][row].end;
    rows.at[rows.anchors][row] = {begin, n > 0 ? sink_rows + n : begin + seen};
    rows.at[0][row] = {0, 0};
  }
  set_own(rows, own, !runs[rows.window].empty(), t0 + row, at.used, row);
}

/// Walks the tiles of `Keys` lattice indices that any row of a tile of queries sees: the window first, then anchors,
/// then sinks, each from its end (where the mask is).
template <int Keys, int Runs, int Rows = tile_rows>
struct tile_walk {
  int run = Runs, first = 0, start = 0;

  __device__ bool next(const row_bounds<Runs, Rows>& rows) {
    if (start - Keys >= first && run < Runs) {
      start -= Keys;
      return true;
    }
    while (--run >= 0) {
      first = rows.first(run);
      const int n = rows.at[run][Rows - 1].end - first;
      start = first + (n - 1) / Keys * Keys;
      if (n > 0) return true;
    }
    return false;
  }
};

/// How many tiles that walk has in runs before `end`.
template <int Keys, int Runs>
[[nodiscard]] __device__ inline int steps_of(const row_bounds<Runs>& rows, int end) {
  int steps = 0;
  for (int run = 0; run < end; ++run)
    steps += (max(rows.at[run][tile_rows - 1].end - rows.first(run), 0) + Keys - 1) / Keys;
  return steps;
}

/// Products and positions of one attention call that all its kernels read.
struct attend_shape {
  int B, H, T;
  view<const token_t, 1> length;  // absent: T
  float scale;                    // of q · k

  [[nodiscard]] __device__ int rows_in_use(int b) const { return length ? length[b] : T; }
};

template <class Args>
[[nodiscard]] attend_shape shape_of(const Args& p) {
  return {static_cast<int>(p.q.extent(0)), static_cast<int>(p.q.extent(1)), static_cast<int>(p.q.extent(2)),
          p.spans.length, 1.0f / std::sqrt(static_cast<float>(p.q.extent(3)))};
}

/// Warps of the copying group, thread 0 … Threads − 1, find out ahead of the others, which load, what these are to
/// load: fill(tile, place, row) describes row `row` of a tile, the same warp 32 neighbours at a time. `described`
/// counts all of them.
template <int Threads, int Rows = tile_rows, int Stages, class Tile, class Fill>
__device__ inline void describe_tiles(const tile_queue& queue, const attend_shape& shape, Tile (&tiles)[Stages],
                                      hopper::barrier (&described)[Stages], hopper::barrier (&empty)[Stages],
                                      int thread, Fill&& fill) {
  hopper::ring_place<Stages> at;
  for (int i = static_cast<int>(blockIdx.x); i < queue.order.count(); at.advance()) {
    const auto [number, head] = queue.order[i];
    tile_place place{head / shape.H, head % shape.H, number, shape.rows_in_use(head / shape.H), 0};
    if (thread == 0) place.next = queue.next();
    empty[at.stage].wait(at.parity ^ 1);
    Tile& tile = tiles[at.stage];
    for (int row = thread; row < Rows; row += Threads) fill(tile, place, row);
    if (thread == 0) static_cast<tile_place&>(tile) = place;
    described[at.stage].arrive();
    described[at.stage].wait(at.parity);
    i = tile.next;
  }
}

/// Tiles of the rows of x, (B, H, T, d), for kernels that stream two tensors of its heads past each.
[[nodiscard]] inline tile_order order_of(const view<const bfloat16, 4>& x, int rows = tile_rows) {
  const index_t heads = x.extent(0) * x.extent(1), bytes = 4 * x.extent(2) * x.extent(3);
  constexpr index_t kept = index_t{24} << 20;  // of the L2 cache
  return {static_cast<int>((x.extent(2) + rows - 1) / rows), static_cast<int>(heads),
          static_cast<int>(std::clamp<index_t>(kept / bytes, 1, heads))};
}

/// Zeroes rows [from, to) of a tile of D channels; the warp group calls it together. Rows that no row of the other
/// side sees may hold anything (padding, keys that were dropped), and 0 · NaN is NaN.
template <int D, int Rows>
__device__ inline void zero_rows(char* tile, int from, int thread, int barrier_id, int to = Rows) {
  constexpr int chunks = D / 8;
  const int here = hopper::computed_here(thread), chunk = here % chunks;
#pragma unroll 1
  for (int row = from + here / chunks; row < to; row += hopper::group_threads / chunks)
    *reinterpret_cast<uint4*>(tile + hopper::chunk_offset(Rows, row, chunk)) = uint4{0, 0, 0, 0};
  hopper::fence_async_proxy();
  hopper::sync_threads(barrier_id, hopper::group_threads);
}

/// Sets to −∞ the scores of columns outside a row's range. Column j of the fragment is index start + j.
template <int N, int Rows>
__device__ inline void mask_columns(float (&s)[N], const lattice_range (&rows)[Rows], int row, int start, int lane) {
  const int column = start + 2 * (lane & 3);
  // How many of a row's elements of this thread, of columns 0, 1, 8, 9, 16 … from there, lie before one.
  const auto before = [&](int x) {
    const int columns = min(max(x - column, 0), 2 * N);
    return columns / 8 * 2 + min(columns % 8, 2);
  };
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const lattice_range seen = rows[row + 8 * h];
    const int first = before(seen.begin);
    const std::uint32_t bits = hopper::bits_from(first, before(seen.end) - first);
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      if ((bits >> i & 1) == 0) s[i / 2 * 4 + 2 * h + i % 2] = -INFINITY;
  }
}

/// A fragment of 64 × 2·N rounded to the A operands of the next product, 16 columns each.
template <int N>
__device__ inline void round_fragment(const float (&s)[N], std::uint32_t (&a)[N / 8][4]) {
#pragma unroll
  for (int c = 0; c < N / 8; ++c)
#pragma unroll
    for (int j = 0; j < 4; ++j) a[c][j] = hopper::rounded_pair(s[8 * c + 2 * j], s[8 * c + 2 * j + 1]);
}

/// The two elements of a pair.
[[nodiscard]] __device__ inline float2 widened(std::uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

/// 16 rows of D channels that a warp has read and keeps.
template <int D>
struct rows_read {
  std::uint32_t block[D / 16][4];  // as load_blocks gives them

  template <int Rows>
  __device__ explicit rows_read(const hopper::block_rows<Rows>& rows) {
#pragma unroll
    for (int c = 0; c < D / 16; ++c) hopper::load_blocks(rows[c], block[c]);
  }
};

/// Block c of 16 rows, from shared memory or read before.
template <int Rows>
__device__ inline void load_block(const hopper::block_rows<Rows>& rows, int c, std::uint32_t (&x)[4]) {
  hopper::load_blocks(rows[c], x);
}
template <int D>
__device__ inline void load_block(const rows_read<D>& rows, int c, std::uint32_t (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = rows.block[c][i];
}

/// Products of each of 16 rows of D channels with its fellow of another 16: each lane of a warp gets those of rows
/// lane / 4 and lane / 4 + 8. A product of 16 × 16 blocks has them in its diagonal, and costs less than multiplying
/// elements.
template <int D, class A, class B>
__device__ inline void multiply_own(const A& a, const B& b, int lane, float (&sum)[2]) {
  const auto here = static_cast<unsigned>(lane);
  float low[2][4] = {}, high[2][4] = {};  // with b's first and last 8 rows, of even and of odd blocks
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    std::uint32_t x[4], y[4];
    load_block(a, c, x);
    load_block(b, c, y);
    hopper::product_of_blocks(low[c % 2], x, y[0], y[2]);
    hopper::product_of_blocks(high[c % 2], x, y[1], y[3]);
  }
  // Element (i, i) lies in lane 4 i + i / 2 of the warp.
  const bool odd = here / 4 % 2 == 1;
  const int source = static_cast<int>(here / 4 * 4 + here / 8);
  const auto element = [&](const float(&x)[2][4], int i) {
    return odd ? x[0][i + 1] + x[1][i + 1] : x[0][i] + x[1][i];
  };
  sum[0] = __shfl_sync(~0u, element(low, 0), source);
  sum[1] = __shfl_sync(~0u, element(high, 2), source);
}

/// Loads a box of rows, from row `row` on, of D channels of head h, sequence b, to panels of Rows rows; `full` counts
/// its bytes.
template <int D, int Rows>
__device__ inline void load_tile(char* to, const CUtensorMap& map, hopper::barrier& full, int row, int h, int b) {
  for (int c = 0; c < D; c += hopper::panel_channels) hopper::load_panel(to + c * Rows * 2, map, full, c, row, h, b);
}

/// And stores it.
template <int D, int Rows>
__device__ inline void store_tile(const CUtensorMap& map, const char* from, int row, int h, int b) {
  for (int c = 0; c < D; c += hopper::panel_channels) hopper::store_panel(map, from + c * Rows * 2, c, row, h, b);
}

/// Loads the keys or values from index `start` of a lattice on, which `joined` sinks have joined, a box of `from`, to
/// panels of Rows rows.
template <int D, int Rows>
__device__ inline void load_keys(char* to, const lattice_rows& from, const CUtensorMap& sinks, int joined,
                                 hopper::barrier& full, int start, int h, int b) {
  if (joined == 0 || start > 0) {
    load_tile<D, Rows>(to, from.tile, full, start - (joined > 0 ? sink_rows : 0), h, b);
  } else {
    load_tile<D, Rows>(to, sinks, full, joined - sink_rows, h, b);
    load_tile<D, Rows>(to + sink_rows * hopper::row_bytes, from.rest, full, 0, h, b);
  }
}

}  // namespace ratplus::cuda::detail
