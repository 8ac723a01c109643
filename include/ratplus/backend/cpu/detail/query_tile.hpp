#pragma once
// A tile of consecutive queries laid across the lanes of packs, and the walk over the keys they see.
//
// Queries are lanes, so that scores come out as rows of lanes, one row per key: the softmax needs no sum across lanes,
// keys and values are used row by row as they come (any stride, any precision that widens to float), and only the
// queries are transposed. Each lane has the bounds of its own run as its only mask; a stretch of keys is cut where a
// whole pack of queries begins or ceases to see them, so what is computed beyond the visible keys is at most a pack's
// width of queries at the borders of a run.

#include <algorithm>

#include "ratplus/backend/cpu/detail/product.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"
#include "ratplus/pattern/residency.hpp"
#include "ratplus/pattern/tiles.hpp"

namespace ratplus::cpu::detail {

/// Queries of a tile.
inline constexpr index_t tile_queries = block_columns;
/// Keys whose scores are held at once.
inline constexpr index_t tile_keys = 96;

/// Consecutive elements [begin, end) of a tile's run, as rows of keys and values: element j lies at k + (j − begin) ·
/// k_stride.
template <class KV>
struct key_rows {
  const KV *k, *v;
  index_t k_stride, v_stride;
  index_t begin, end;
};

/// Keys [begin, end) of a tile's run, seen by some lane of each of the packs [first_pack, last_pack).
struct key_stretch {
  index_t begin, end;
  index_t first_pack, last_pack;
  bool masked;  // some lane of these packs does not see some of these keys

  [[nodiscard]] index_t keys() const { return end - begin; }
  [[nodiscard]] index_t packs() const { return last_pack - first_pack; }
};

/// The elements of a tile's run that each lane sees: lane q sees [begin[q], end[q]).
struct lane_bounds {
  std::int32_t begin[tile_queries], end[tile_queries];

  /// Run r of the queries at positions first, …, first + n − 1, of which `tile` is the union; lanes beyond n repeat the
  /// last query.
  template <Pattern P>
  void set(const P& pattern, int r, index_t first, index_t n, const key_run& tile) {
    key_run last = tile;  // bounds mostly stay from query to query, and divisions are slow
    std::int32_t from = 0, to = 0;
    for (index_t q = 0; q < tile_queries; ++q) {
      if (q < n) {
        const key_run run = pattern.keys(first + q)[r];
        if (run.begin != last.begin) from = static_cast<std::int32_t>((run.begin - tile.begin) / tile.step);
        if (q == 0 || run.begin != last.begin || run.end != last.end)
          to = from + static_cast<std::int32_t>(run.count());
        last = run;
      }
      begin[q] = from;
      end[q] = to;
    }
  }

  /// Lanes of pack v that see element j.
  RATPLUS_INLINE mask sees(index_t v, index_t j) const {
    const pack::ints at = static_cast<std::int32_t>(j) - pack::ints{};
    return (load(begin + v * pack_width) <= at) & (at < load(end + v * pack_width));
  }

  /// Calls f(stretch) for all of [from, to), in pieces of at most `most` keys.
  template <class F>
  void for_each_stretch(index_t packs, index_t from, index_t to, index_t most, F&& f) const {
    index_t v0 = 0, v1 = 0;
    for (index_t j = from; j < to;) {
      while (v0 < packs && end[v0 * pack_width + pack_width - 1] <= j) ++v0;
      if (v0 == packs) return;
      if (begin[v0 * pack_width] > j) {
        j = begin[v0 * pack_width];
        continue;
      }
      v1 = std::max(v1, v0 + 1);
      while (v1 < packs && begin[v1 * pack_width] <= j) ++v1;
      index_t stop = std::min({to, j + most, static_cast<index_t>(end[v0 * pack_width + pack_width - 1])});
      if (v1 < packs) stop = std::min(stop, static_cast<index_t>(begin[v1 * pack_width]));
      f(key_stretch{j, stop, v0, v1, begin[v1 * pack_width - 1] > j || end[v0 * pack_width] < stop});
      j = stop;
    }
  }
};

/// (rows × channels), rows `stride` apart, times `scale`, transposed into (channels × tile_queries); missing rows are
/// zeros.
inline void transpose_in(const float* x, index_t stride, index_t rows, index_t channels, float scale, float* to) {
  for (index_t q = 0; q < tile_queries; q += pack_width)
    for_each_pack(channels, [&](index_t c, auto lanes) {
      pack block[pack_width];
      for (index_t i = 0; i < pack_width; ++i)
        block[i] = q + i < rows ? load(x + (q + i) * stride + c, lanes) * pack(scale) : pack(0.0f);
      transpose(block);
      for (index_t i = 0; i < lanes; ++i) store(to + (c + i) * tile_queries + q, block[i]);
    });
}

/// The way back: column q of (channels × tile_queries) times scale[q] becomes row q.
inline void transpose_out(const float* x, index_t rows, index_t channels, const float* scale, float* to,
                          index_t stride) {
  for (index_t q = 0; q < rows; q += pack_width)
    for_each_pack(channels, [&](index_t c, auto lanes) {
      pack block[pack_width];
      for (index_t i = 0; i < pack_width; ++i)
        block[i] = i < lanes ? load(x + (c + i) * tile_queries + q) * load(scale + q) : pack(0.0f);
      transpose(block);
      for (index_t i = 0; i < pack_width && q + i < rows; ++i) store(to + (q + i) * stride + c, block[i], lanes);
    });
}

}  // namespace ratplus::cpu::detail
