#pragma once
// What the tiled attention kernels share: the order in which tiles are given to thread blocks, the bounds of every
// row's run inside a tile, and the walk over the tiles of the other side that any row of a tile needs.

#include <algorithm>
#include <cmath>

#include "ratplus/backend/cuda/context.cuh"
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
[[nodiscard]] __device__ inline lattice_range on_lattice(const key_run& run) {
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
struct row_bounds {
  lattice_range at[key_runs::count][tile_rows];
  int lattice[key_runs::count];  // of each run
};

/// Walks the tiles of 128 lattice indices that any row of a tile of queries sees: the window first, then anchors, then
/// sinks, each from its end (where the mask is).
struct tile_walk {
  int run = key_runs::count, first = 0, start = 0;

  __device__ bool next(const row_bounds& rows) {
    if (start - tile_rows >= first && run < key_runs::count) {
      start -= tile_rows;
      return true;
    }
    while (--run >= 0) {
      first = rows.at[run][0].begin;
      const int n = rows.at[run][tile_rows - 1].end - first;
      start = first + (n - 1) / tile_rows * tile_rows;
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

/// Zeroes rows [from, 128) of a tile of D channels; the warp group calls it together. Rows beyond a sequence's length
/// are padding of unknown content, and 0 · NaN is NaN.
template <int D, int Rows>
__device__ inline void zero_rows(char* tile, int from, int thread, int barrier_id) {
  for (int i = thread; i < (Rows - from) * (D / 8); i += hopper::group_threads)
    *reinterpret_cast<uint4*>(tile + hopper::chunk_offset(Rows, from + i / (D / 8), i % (D / 8))) = uint4{0, 0, 0, 0};
  hopper::fence_async_proxy();
  hopper::sync_threads(barrier_id, hopper::group_threads);
}

/// log2(e): exponentials are taken in base 2.
inline constexpr float log2_e = 1.4426950408889634f;

}  // namespace ratplus::cuda::detail
