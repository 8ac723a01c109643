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

/// The rows of two tensors (keys and values) on one lattice.
struct lattice {
  CUtensorMap k, v;
  int origin, step;
  bool pooled = false;  // all heads of a sequence in one: rows are slots
};

/// The lattices of all runs of all heads of a call: as a rule one or two.
struct lattices {
  static constexpr int most = 16;
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
  const index_t groups = head_groups(pattern);
  for (index_t g = 0; g < groups; ++g)
    visit_head(pattern, g, groups, [&](const auto& p) {
      for (const key_run& run : p.keys(0).run) {
        if (all.find(run) < all.count) continue;
        if (all.count == lattices::most)
          throw value_error(
              message("attend: the heads' patterns have more than ", lattices::most, " different dilations"));
        const index_t origin = run.begin % run.step;
        all.at[all.count++] = {hopper::tensor_map(rows_of(k, origin, run.step), box_rows),
                               hopper::tensor_map(rows_of(v, origin, run.step), box_rows), static_cast<int>(origin),
                               static_cast<int>(run.step)};
      }
    });
  return all;
}

/// For each row of a tile and each run, the lattice indices that the row sees. Neither end falls from row to row.
template <int Runs>
struct row_bounds {
  lattice_range at[Runs][tile_rows];
  int lattice[Runs];  // of each run
};

/// Row 0 of every sequence is position 0.
struct no_past {
  static constexpr int runs = key_runs::count;
};

/// Fills them for queries t0 … t0 + 127, one thread each; a barrier must follow. Rows beyond the last see what it sees:
/// their results are dropped, and the bounds still never fall.
template <class Heads>
__device__ void find_bounds(row_bounds<no_past::runs>& rows, const Heads& heads, const lattices& keys, no_past, int h,
                            int, int t0, int used, int thread) {
  key_runs runs;
  heads.visit(h, [&](const auto& pattern) { runs = pattern.keys(max(min(t0 + thread, used - 1), 0)); });
#pragma unroll
  for (int r = 0; r < key_runs::count; ++r) {
    if (thread == 0) rows.lattice[r] = keys.find(runs[r]);
    rows.at[r][thread] = t0 < used ? on_lattice(runs[r]) : lattice_range{0, 0};
  }
}

/// Walks the tiles of `Keys` lattice indices that any row of a tile of queries sees: the window first, then anchors,
/// then sinks, each from its end (where the mask is).
template <int Keys, int Runs>
struct tile_walk {
  int run = Runs, first = 0, start = 0;

  __device__ bool next(const row_bounds<Runs>& rows) {
    if (start - Keys >= first && run < Runs) {
      start -= Keys;
      return true;
    }
    while (--run >= 0) {
      first = rows.at[run][0].begin;
      const int n = rows.at[run][tile_rows - 1].end - first;
      start = first + (n - 1) / Keys * Keys;
      if (n > 0) return true;
    }
    return false;
  }
};

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

/// Tiles of the rows of x, (B, H, T, d), for kernels that stream two tensors of its heads past each.
[[nodiscard]] inline tile_order order_of(const view<const bfloat16, 4>& x) {
  const index_t heads = x.extent(0) * x.extent(1), bytes = 4 * x.extent(2) * x.extent(3);
  constexpr index_t kept = index_t{24} << 20;  // of the L2 cache
  return {static_cast<int>((x.extent(2) + tile_rows - 1) / tile_rows), static_cast<int>(heads),
          static_cast<int>(std::clamp<index_t>(kept / bytes, 1, heads))};
}

/// Zeroes rows [from, Rows) of a tile of D channels; the warp group calls it together. Rows that no row of the other
/// side sees may hold anything (padding, keys that were dropped), and 0 · NaN is NaN.
template <int D, int Rows>
__device__ inline void zero_rows(char* tile, int from, int thread, int barrier_id) {
  for (int i = thread; i < (Rows - from) * (D / 8); i += hopper::group_threads)
    *reinterpret_cast<uint4*>(tile + hopper::chunk_offset(Rows, from + i / (D / 8), i % (D / 8))) = uint4{0, 0, 0, 0};
  hopper::fence_async_proxy();
  hopper::sync_threads(barrier_id, hopper::group_threads);
}

/// Sets to −∞ the scores of columns outside a row's range. Column j of the fragment is index start + j.
template <int N>
__device__ inline void mask_columns(float (&s)[N], const lattice_range (&rows)[tile_rows], int row, int start,
                                    int lane) {
  const int column = start + 2 * (lane & 3);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const lattice_range seen = rows[row + 8 * h];
    const auto width = static_cast<unsigned>(seen.end - seen.begin);
#pragma unroll
    for (int j = 0; j < N / 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (static_cast<unsigned>(column + 8 * j + e - seen.begin) >= width) s[4 * j + 2 * h + e] = -INFINITY;
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

/// Loads rows [row, row + Rows) of D channels of head h, sequence b, as panels; `full` counts their bytes.
template <int D, int Rows>
__device__ inline void load_tile(char* to, const CUtensorMap& map, hopper::barrier& full, int row, int h, int b) {
  for (int c = 0; c < D; c += hopper::panel_channels) hopper::load_panel(to + c * Rows * 2, map, full, c, row, h, b);
}

/// Stores a warp group's 64 × D fragment, rows scaled by `scale` or zeroed unless `keep`, to rows t0 + 64 group … of
/// head h, sequence b, by way of its half of `tile`, a tile of 128 rows that it has no more use for. `done` hears of it
/// when the half may be written again.
template <int D>
__device__ inline void store_rows(const float (&x)[D / 2], const float (&scale)[2], const bool (&keep)[2], char* tile,
                                  const CUtensorMap& map, hopper::barrier& done, int t0, int T, int h, int b, int group,
                                  int thread, int barrier_id) {
  using namespace hopper;
  const int lane = thread % 32, row = 64 * group + thread / 32 * 16 + lane % 16;
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    std::uint32_t word[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      word[j] = keep[j & 1] ? rounded_pair(x[8 * c + 2 * j] * scale[j & 1], x[8 * c + 2 * j + 1] * scale[j & 1]) : 0;
    store_blocks(tile + chunk_offset(tile_rows, row, 2 * c + lane / 16), word[0], word[1], word[2], word[3]);
  }
  fence_async_proxy();
  sync_threads(barrier_id, group_threads);
  if (thread == 0) {
    if (const int t = t0 + 64 * group; t < T)
      for (int c = 0; c < D; c += panel_channels)
        store_panel(map, tile + c * tile_rows * 2 + 64 * group * row_bytes, c, t, h, b);
    commit_stores();
    wait_stores_read();
    done.arrive();
  }
  __syncwarp();
}

}  // namespace ratplus::cuda::detail
