#pragma once
// Attention over the runs of a pattern, a tile of queries at a time, with the online softmax: for every stretch of keys
//
//     S = K Qᵀ · scale · log₂e     m' = max(m, S)     P = 2^(S − m')     l = l 2^(m − m') + Σ P     O = O 2^(m − m') +
//     Vᵀ P
//
// with queries as lanes (detail/query_tile.hpp says why). The backward pass recomputes P from lse, stretch by stretch.
// A query or two alone (decoding) would leave most lanes empty: there scores are dot products along the rows of keys,
// and long runs are cut into splits whose partial softmaxes are combined. Memory is a few tiles per thread; the
// gradients of keys and values are summed in the order of the query tiles.

#include <array>
#include <cmath>

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/dots.hpp"
#include "ratplus/backend/cpu/detail/query_tile.hpp"
#include "ratplus/core/softmax_state.hpp"

namespace ratplus::cpu {

namespace detail {

/// f(rows) for the parts of a tile's run: earlier positions in the slots of the past, then this call's own rows.
template <class KV, class F>
void for_each_part(const attend_forward_args<float, KV>& p, index_t b, index_t h, index_t first, const key_run& run,
                   F&& f) {
  index_t at = 0;
  if (p.past) {
    const head_slots& head = p.past.heads[h];
    for (const slot_run& part : head.where.find(clip(run, 0, first)).part) {
      if (part.count == 0) continue;
      const index_t slot = head.offset + part.slot;
      f(key_rows<KV>{p.past.k.row(b, slot), p.past.v.row(b, slot), part.step * p.past.k.stride(1),
                     part.step * p.past.v.stride(1), at, at + part.count});
      at += part.count;
    }
  }
  const key_run fresh = clip(run, first, run.end);
  if (!fresh.empty())
    f(key_rows<float>{p.k.row(b, h, fresh.begin - first), p.v.row(b, h, fresh.begin - first),
                      fresh.step * p.k.stride(2), fresh.step * p.v.stride(2), at, at + fresh.count()});
}

/// Rows widened to float, scaled and gathered into rows of padded(d): they are read many times, and rows a power of two
/// apart would share a few sets of the caches.
template <class KV>
void gather(const KV* x, index_t stride, index_t rows, index_t d, float scale, float* to) {
  for (index_t i = 0; i < rows; ++i)
    for_each_pack(d, [&](index_t c, auto lanes) {
      store(to + i * padded(d) + c, load(x + i * stride + c, lanes) * pack(scale));
    });
}

/// Tiles of queries that share gathered keys and values: gathering them for one tile takes a fifth of its time.
inline constexpr index_t shared_tiles = 4;

/// Keys and values of a run from element `begin` on, gathered into rows of padded(d).
struct gathered_rows {
  const float *k, *v;
  index_t begin;
};

/// A tile of queries under way: the state of the online softmax of every lane.
struct forward_tile {
  index_t d, packs;
  float *q, *o;                // (d, tile_queries)
  float* scores;               // (tile_keys, tile_queries)
  float *max, *sum, *rescale;  // (tile_queries)

  [[nodiscard]] static index_t floats(index_t d) { return tile_queries * (2 * d + tile_keys + 3); }

  forward_tile() = default;
  forward_tile(index_t head_size, index_t queries, float* memory)
      : d(head_size), packs((queries + pack_width - 1) / pack_width) {
    const auto take = [&](index_t n) { return std::exchange(memory, memory + n); };
    q = take(d * tile_queries);
    o = take(d * tile_queries);
    scores = take(tile_keys * tile_queries);
    max = take(tile_queries);
    sum = take(tile_queries);
    rescale = take(tile_queries);
    std::fill_n(o, d * tile_queries, 0.0f);
    std::fill_n(max, tile_queries, lowest);
    std::fill_n(sum, tile_queries, 0.0f);
  }

  void visit(const lane_bounds& bounds, const gathered_rows& rows, const key_stretch& s) {
    const index_t n = s.keys(), skip = (s.begin - rows.begin) * padded(d), lane = s.first_pack * pack_width;
    product<a_layout::rows>(n, s.packs(), d, rows.k + skip, padded(d), q + lane, tile_queries, scores + lane,
                            tile_queries, from_zero{});
    for (index_t i = s.first_pack; i < s.last_pack; ++i) {
      if (s.masked)
        soften(i, n, [&](index_t j) RATPLUS_INLINE_LAMBDA { return bounds.sees(i, s.begin + j); });
      else
        soften(i, n, [](index_t) RATPLUS_INLINE_LAMBDA { return everything{}; });
    }
    product<a_layout::columns>(d, s.packs(), n, rows.v + skip, padded(d), scores + lane, tile_queries, o + lane,
                               tile_queries, from_scaled_c{rescale + lane});
  }

 private:
  static constexpr float lowest = std::numeric_limits<float>::lowest();

  struct everything {};
  static RATPLUS_INLINE pack select(everything, pack yes, pack) { return yes; }
  static RATPLUS_INLINE pack select(mask chosen, pack yes, pack no) { return detail::select(chosen, yes, no); }

  /// Scores of pack i become probabilities relative to the new maximum.
  template <class Sees>
  RATPLUS_INLINE void soften(index_t i, index_t keys, const Sees& sees) {
    float* const column = scores + i * pack_width;
    const index_t at = i * pack_width;
    const pack before = load(max + at);
    pack top = before;
    for (index_t j = 0; j < keys; ++j) top = maximum(select(sees(j), load(column + j * tile_queries), top), top);
    pack total(0.0f);
    for (index_t j = 0; j < keys; ++j) {
      const pack p = select(sees(j), exp2(load(column + j * tile_queries) - top), pack(0.0f));
      store(column + j * tile_queries, p);
      total += p;
    }
    const pack factor = exp2(before - top);
    store(max + at, top);
    store(sum + at, multiply_add(load(sum + at), factor, total));
    store(rescale + at, factor);
  }
};

/// Queries [t0, t0 + n) of one head, n ≤ shared_tiles · tile_queries.
template <Pattern P, class KV>
void attend_tiles(const P& pattern, const attend_forward_args<float, KV>& p, index_t b, index_t h, index_t t0,
                  index_t n, float* scratch) {
  const index_t d = p.q.extent(3), first = p.past ? p.spans.first[b] : 0, position = first + t0;
  float *const k = scratch, *const v = k + tile_keys * padded(d);
  std::array<forward_tile, shared_tiles> tiles;
  std::array<lane_bounds, shared_tiles> bounds;
  const auto for_each_tile = [&](auto&& f) {
    for (index_t i = 0; i * tile_queries < n; ++i)
      f(tiles[static_cast<std::size_t>(i)], bounds[static_cast<std::size_t>(i)], i * tile_queries,
        std::min(tile_queries, n - i * tile_queries));
  };
  for_each_tile([&](forward_tile& tile, lane_bounds&, index_t at, index_t queries) {
    tile = forward_tile(d, queries, v + tile_keys * padded(d) + at / tile_queries * forward_tile::floats(d));
    transpose_in(p.q.row(b, h, t0 + at), p.q.stride(2), queries, d, log2_e / std::sqrt(static_cast<float>(d)), tile.q);
  });
  for (int r = 0; r < key_runs::count; ++r) {
    const key_run run = tile_run(pattern, r, position, position + n - 1);
    if (run.empty()) continue;
    for_each_tile([&](forward_tile&, lane_bounds& lanes, index_t at, index_t queries) {
      lanes.set(pattern, r, position + at, queries, run);
    });
    for_each_part(p, b, h, first, run, [&](const auto& rows) {
      for (index_t j = rows.begin; j < rows.end; j += tile_keys) {
        const index_t end = std::min(rows.end, j + tile_keys), skip = j - rows.begin;
        gather(rows.k + skip * rows.k_stride, rows.k_stride, end - j, d, 1.0f, k);
        gather(rows.v + skip * rows.v_stride, rows.v_stride, end - j, d, 1.0f, v);
        for_each_tile([&](forward_tile& tile, const lane_bounds& lanes, index_t, index_t) {
          lanes.for_each_stretch(tile.packs, j, end, tile_keys, [&](const key_stretch& stretch) {
            tile.visit(lanes, {k, v, j}, stretch);
          });
        });
      }
    });
  }
  for_each_tile([&](forward_tile& tile, const lane_bounds&, index_t at, index_t queries) {
    if (p.lse)
      for (index_t q = 0; q < queries; ++q) p.lse(b, h, t0 + at + q) = tile.max[q] * ln_2 + std::log(tile.sum[q]);
    for (index_t q = 0; q < tile_queries; ++q) tile.rescale[q] = 1.0f / tile.sum[q];
    transpose_out(tile.o, queries, d, tile.rescale, p.out.row(b, h, t0 + at), p.out.stride(2));
  });
}

/// Asks for rows [t0, t0 + n) of a head, which are needed soon and lie pages apart, so that nothing foresees them.
inline void prefetch(const view<const float, 4>& x, index_t b, index_t h, index_t t0, index_t n) {
  constexpr index_t line = 64 / sizeof(float);
  for (index_t t = t0; t < t0 + n; ++t)
    for (index_t c = 0; c < x.extent(3); c += line) __builtin_prefetch(x.row(b, h, t) + c, 0, 2);
}

/// A tile of queries of the backward pass: adds to gathered rows of dk and dv, yields dq.
struct backward_tile {
  index_t d, queries, packs;
  float scale;
  float *q, *dout, *dq;           // (d, tile_queries); q scaled for scores in base 2, dq not yet scaled
  float *q_rows, *dout_rows;      // (tile_queries, padded(d)); q scaled
  float *lse, *delta, *dq_scale;  // (tile_queries), lse in base 2

  [[nodiscard]] static index_t floats(index_t d) { return tile_queries * (3 * d + 2 * padded(d) + 3); }

  backward_tile() = default;
  backward_tile(const attend_backward_args<float>& p, index_t b, index_t h, index_t t0, index_t n, float* memory)
      : d(p.q.extent(3)),
        queries(n),
        packs((n + pack_width - 1) / pack_width),
        scale(1.0f / std::sqrt(static_cast<float>(d))) {
    const auto take = [&](index_t count) { return std::exchange(memory, memory + count); };
    q = take(d * tile_queries);
    dout = take(d * tile_queries);
    dq = take(d * tile_queries);
    q_rows = take(tile_queries * padded(d));
    dout_rows = take(tile_queries * padded(d));
    lse = take(tile_queries);
    delta = take(tile_queries);
    dq_scale = take(tile_queries);
    for (const auto& x : {p.q, p.dout, p.out}) prefetch(x, b, h, t0, n);
    gather(p.q.row(b, h, t0), p.q.stride(2), n, d, scale, q_rows);
    gather(p.dout.row(b, h, t0), p.dout.stride(2), n, d, 1.0f, dout_rows);
    transpose_in(q_rows, padded(d), n, d, log2_e, q);
    transpose_in(dout_rows, padded(d), n, d, 1.0f, dout);
    std::fill_n(dq, d * tile_queries, 0.0f);
    std::fill_n(lse, tile_queries, 0.0f);
    std::fill_n(delta, tile_queries, 0.0f);
    std::fill_n(dq_scale, tile_queries, scale);
    for (index_t i = 0; i < n; ++i) lse[i] = p.lse(b, h, t0 + i) * log2_e;
    for (index_t i = 0; i < n; i += pack_width)
      store(delta + i,
            row_dots(d, dout_rows + i * padded(d), padded(d), p.out.row(b, h, t0 + i), p.out.stride(2), n - i));
  }

  /// Adds to dk and dv, which lie like `rows`. `scratch` is for 2 · tile_keys · tile_queries floats.
  void visit(const lane_bounds& bounds, const gathered_rows& rows, const key_stretch& s, float* dk, float* dv,
             float* scratch) {
    const index_t n = s.keys(), wide = padded(d), skip = (s.begin - rows.begin) * wide,
                  lane = s.first_pack * pack_width;
    float *const probabilities = scratch, *const dscores = scratch + tile_keys * tile_queries;  // (n, tile_queries)
    product<a_layout::rows>(n, s.packs(), d, rows.k + skip, wide, q + lane, tile_queries, probabilities + lane,
                            tile_queries, from_zero{});
    product<a_layout::rows>(n, s.packs(), d, rows.v + skip, wide, dout + lane, tile_queries, dscores + lane,
                            tile_queries, from_zero{});
    for (index_t j = 0; j < n; ++j)
      for (index_t i = s.first_pack; i < s.last_pack; ++i) {
        const index_t at = i * pack_width;
        float *const p_at = probabilities + j * tile_queries + at, *const ds_at = dscores + j * tile_queries + at;
        pack p = exp2(load(p_at) - load(lse + at));
        if (s.masked) p = select(bounds.sees(i, s.begin + j), p, pack(0.0f));
        store(p_at, p);
        store(ds_at, p * (load(ds_at) - load(delta + at)));
      }
    const index_t lanes = std::min(queries, s.last_pack * pack_width) - lane;
    for (index_t c = 0; c < wide; c += block_columns) {
      const index_t columns = std::min(block_columns, wide - c) / pack_width;
      product<a_layout::rows>(n, columns, lanes, probabilities + lane, tile_queries, dout_rows + lane * wide + c, wide,
                              dv + skip + c, wide, from_c{});
      product<a_layout::rows>(n, columns, lanes, dscores + lane, tile_queries, q_rows + lane * wide + c, wide,
                              dk + skip + c, wide, from_c{});
    }
    product<a_layout::columns>(d, s.packs(), n, rows.k + skip, wide, dscores + lane, tile_queries, dq + lane,
                               tile_queries, from_c{});
  }
};

/// Rows of dk and dv of one head: row t at dk + t · dk_stride.
struct gradient_rows {
  float *dk, *dv;
  index_t dk_stride, dv_stride;

  void zero(index_t t, index_t d) const {
    std::fill_n(dk + t * dk_stride, d, 0.0f);
    std::fill_n(dv + t * dv_stride, d, 0.0f);
  }

  template <class DK, class DV>
  RATPLUS_INLINE void add(index_t t, index_t d, const DK& more_dk, const DV& more_dv) const {
    float *const dk_row = dk + t * dk_stride, *const dv_row = dv + t * dv_stride;
    for_each_pack(d, [&](index_t c, auto lanes) RATPLUS_INLINE_LAMBDA {
      store(dk_row + c, load(dk_row + c, lanes) + more_dk(c), lanes);
      store(dv_row + c, load(dv_row + c, lanes) + more_dv(c), lanes);
    });
  }
};

/// Where one part of the queries of a head adds up gradients of keys and values.
template <Pattern P>
struct key_gradients {
  const P& pattern;
  index_t queries, d;
  gradient_rows out, sums;  // sums: out, or memory of this part

  /// Whether other queries than its own see key t. If not, no other part does, and its gradients need no sums.
  [[nodiscard]] bool shared(index_t t) const { return pattern.last_query(t, queries) > t; }

  /// Adds the packs dk(c) and dv(c) to row t from channel c on.
  template <class DK, class DV>
  RATPLUS_INLINE void add(index_t t, const DK& dk, const DV& dv) const {
    (shared(t) ? sums : out).add(t, d, dk, dv);
  }

  /// Adds this part's sums of row t to the result.
  void add_to_out(index_t t) const {
    const float *const dk = sums.dk + t * sums.dk_stride, *const dv = sums.dv + t * sums.dv_stride;
    out.add(
        t, d, [&](index_t c) RATPLUS_INLINE_LAMBDA { return load(dk + c); },
        [&](index_t c) RATPLUS_INLINE_LAMBDA { return load(dv + c); });
  }
};

/// Whether run r of each of the queries [first, first + n) is its own key and no other.
template <Pattern P>
[[nodiscard]] bool sees_own_keys_alone(const P& pattern, int r, index_t first, index_t n) {
  for (index_t t = first; t < first + n; ++t)
    if (const key_run run = pattern.keys(t)[r]; run.begin != t || run.end != t + 1) return false;
  return true;
}

/// The queries of a tile against their own keys, row by row: what a run of one key for every query needs instead of
/// products of tiles. Adds to dq, which has been written.
template <Pattern P>
void visit_own_keys(const backward_tile& tile, const attend_backward_args<float>& p, index_t b, index_t h, index_t t0,
                    const key_gradients<P>& to) {
  const index_t d = tile.d, wide = padded(d);
  for (index_t i = 0; i < tile.queries; i += pack_width) {
    const index_t rows = std::min<index_t>(pack_width, tile.queries - i), t = t0 + i;
    const float *const q = tile.q_rows + i * wide, *const dout = tile.dout_rows + i * wide;
    const pack scores = row_dots(d, q, wide, p.k.row(b, h, t), p.k.stride(2), rows) * pack(log2_e);
    const pack dp = row_dots(d, dout, wide, p.v.row(b, h, t), p.v.stride(2), rows);
    const pack probabilities = exp2(scores - load(tile.lse + i));
    float weight[pack_width], dscore[pack_width];
    store(weight, probabilities);
    store(dscore, probabilities * (dp - load(tile.delta + i)));
    for (index_t r = 0; r < rows; ++r) {
      const pack w(weight[r]), ds(dscore[r]), dq_factor(dscore[r] * tile.scale);
      const float* const k = p.k.row(b, h, t + r);
      float* const dq = p.dq.row(b, h, t + r);
      if (!to.shared(t + r)) to.out.zero(t + r, d);
      to.add(
          t + r, [&](index_t c) RATPLUS_INLINE_LAMBDA { return ds * load(q + r * wide + c); },
          [&](index_t c) RATPLUS_INLINE_LAMBDA { return w * load(dout + r * wide + c); });
      for_each_pack(d, [&](index_t c, auto lanes) RATPLUS_INLINE_LAMBDA {
        store(dq + c, multiply_add(dq_factor, load(k + c, lanes), load(dq + c, lanes)), lanes);
      });
    }
  }
}

/// Scratch of the function below.
[[nodiscard]] inline index_t backward_floats(index_t d) {
  return tile_keys * (4 * padded(d) + 2 * tile_queries) + shared_tiles * backward_tile::floats(d);
}

/// Queries [t0, t0 + n) of one head, n ≤ shared_tiles · tile_queries: their dq, and their share of dk and dv.
template <Pattern P>
void attend_tiles_backward(const attend_backward_args<float>& p, index_t b, index_t h, index_t t0, index_t n,
                           const key_gradients<P>& to, float* scratch) {
  const P& pattern = to.pattern;
  const index_t d = to.d, wide = padded(d);
  const auto take = [&](index_t count) { return std::exchange(scratch, scratch + count); };
  float *const k = take(tile_keys * wide), *const v = take(tile_keys * wide), *const dk = take(tile_keys * wide),
               *const dv = take(tile_keys * wide), *const scores = take(2 * tile_keys * tile_queries);
  struct member {
    backward_tile tile;
    lane_bounds lanes;
    int own_run = -1;  // the run that is each query's own key and no other
  };
  std::array<member, shared_tiles> tiles;
  const auto for_each_tile = [&](auto&& f) {
    for (index_t i = 0; i * tile_queries < n; ++i)
      f(tiles[static_cast<std::size_t>(i)], t0 + i * tile_queries, std::min(tile_queries, n - i * tile_queries));
  };
  for_each_tile([&](member& m, index_t first, index_t queries) {
    m.tile = backward_tile(p, b, h, first, queries, take(backward_tile::floats(d)));
    for (int r = 0; r < key_runs::count; ++r)
      if (sees_own_keys_alone(pattern, r, first, queries)) m.own_run = r;
    if (m.own_run < 0)
      for (index_t t = first; t < first + queries; ++t)
        if (!to.shared(t)) to.out.zero(t, d);
  });
  for (int r = 0; r < key_runs::count; ++r) {
    const key_run run = tile_run(pattern, r, t0, t0 + n - 1);
    if (run.empty()) continue;
    bool others = false;
    for_each_tile([&](member& m, index_t first, index_t queries) {
      if (m.own_run == r) return;
      m.lanes.set(pattern, r, first, queries, run);
      others = true;
    });
    if (!others) continue;
    for (index_t j = 0; j < run.count(); j += tile_keys) {
      const index_t end = std::min(run.count(), j + tile_keys), first = run[j];
      gather(p.k.row(b, h, first), run.step * p.k.stride(2), end - j, d, 1.0f, k);
      gather(p.v.row(b, h, first), run.step * p.v.stride(2), end - j, d, 1.0f, v);
      std::fill_n(dk, (end - j) * wide, 0.0f);
      std::fill_n(dv, (end - j) * wide, 0.0f);
      for_each_tile([&](member& m, index_t, index_t) {
        if (m.own_run == r) return;
        m.lanes.for_each_stretch(m.tile.packs, j, end, tile_keys, [&](const key_stretch& stretch) {
          m.tile.visit(m.lanes, {k, v, j}, stretch, dk, dv, scores);
        });
      });
      for (index_t i = 0; i < end - j; ++i)
        if (const index_t t = run[j + i]; t >= t0 || to.shared(t))  // else seen by none of these queries
          to.add(
              t, [&](index_t c) RATPLUS_INLINE_LAMBDA { return load(dk + i * wide + c); },
              [&](index_t c) RATPLUS_INLINE_LAMBDA { return load(dv + i * wide + c); });
    }
  }
  for_each_tile([&](member& m, index_t first, index_t queries) {
    if (m.own_run >= 0)
      for (const auto& x : {p.k, p.v}) prefetch(x, b, h, first, queries);
    transpose_out(m.tile.dq, queries, d, m.tile.dq_scale, p.dq.row(b, h, first), p.dq.stride(2));
    if (m.own_run >= 0) visit_own_keys(m.tile, p, b, h, first, to);
  });
}

/// A lone query under way: the state of its softmax and Σ e^{s − max} v.
struct forward_query {
  index_t d;
  softmax_state<float> state;  // of scores in base 2
  float *q, *o;                // (padded(d)); q scaled for scores in base 2
  float* scores;               // (query_keys)

  static constexpr index_t query_keys = 128;
  static_assert(query_keys % pack_width == 0);
  [[nodiscard]] static index_t floats(index_t d) { return 2 * padded(d) + query_keys; }

  forward_query(index_t head_size, const float* query, float* memory)
      : d(head_size), q(memory), o(q + padded(d)), scores(o + padded(d)) {
    std::fill_n(q, 2 * padded(d), 0.0f);
    const float scale = log2_e / std::sqrt(static_cast<float>(d));
    for (index_t c = 0; c < d; ++c) q[c] = query[c] * scale;
  }

  template <class KV>
  void visit(const KV* k, index_t k_stride, const KV* v, index_t v_stride, index_t rows) {
    for (index_t j = 0; j < rows; j += query_keys)
      visit_block(k + j * k_stride, k_stride, v + j * v_stride, v_stride, std::min(query_keys, rows - j));
  }

 private:
  template <class KV>
  void visit_block(const KV* k, index_t k_stride, const KV* v, index_t v_stride, index_t rows) {
    pack top(state.sum > 0 ? state.max : std::numeric_limits<float>::lowest());
    for (index_t j = 0; j < rows; j += pack_width) {
      // Rows that do not exist repeat the last: no new maximum.
      const pack s = row_dots(d, q, 0, k + j * k_stride, k_stride, rows - j);
      store(scores + j, s);
      top = maximum(s, top);
    }
    const float max = maximum(top), factor = state.sum > 0 ? std::exp2(state.max - max) : 0.0f;
    for (index_t j = 0; j < rows; j += pack_width) store(scores + j, exp2(load(scores + j) - pack(max)));
    float total = 0;
    for (index_t j = 0; j < rows; ++j) total += scores[j];
    state = {max, state.sum * factor + total};
    index_t c = 0;
    for (; c + 4 * pack_width <= d; c += 4 * pack_width) add_values<4>(v, v_stride, rows, factor, c);
    for_each_pack(d - c, [&](index_t i, auto lanes) {
      pack sum = load(o + c + i) * pack(factor);
      for (index_t j = 0; j < rows; ++j)
        sum = multiply_add(pack(scores[j]), load(v + j * v_stride + c + i, lanes), sum);
      store(o + c + i, sum);
    });
  }

  template <int N, class KV>
  void add_values(const KV* v, index_t v_stride, index_t rows, float factor, index_t c) {
    pack sum[N];
    unroll<N>([&](auto n) RATPLUS_INLINE_LAMBDA { sum[n] = load(o + c + n * pack_width) * pack(factor); });
    for (index_t j = 0; j < rows; ++j) {
      const pack p(scores[j]);
      const KV* const row = v + j * v_stride + c;
      unroll<N>([&](auto n) RATPLUS_INLINE_LAMBDA { sum[n] = multiply_add(p, load(row + n * pack_width), sum[n]); });
    }
    unroll<N>([&](auto n) RATPLUS_INLINE_LAMBDA { store(o + c + n * pack_width, sum[n]); });
  }
};

/// Query t of one head over its keys number [total · split / splits, total · (split + 1) / splits): max, sum and o.
template <Pattern P, class KV>
void attend_split(const P& pattern, const attend_forward_args<float, KV>& p, index_t b, index_t h, index_t t,
                  index_t split, index_t splits, float* result, float* scratch) {
  const index_t d = p.q.extent(3), first = p.past ? p.spans.first[b] : 0;
  forward_query query(d, p.q.row(b, h, t), scratch);
  const key_runs runs = pattern.keys(first + t);
  const index_t total = runs.keys(), from = total * split / splits, to = total * (split + 1) / splits;
  index_t before = 0;  // keys of the runs so far
  for (const key_run& run : runs.run) {
    if (run.empty()) continue;
    for_each_part(p, b, h, first, run, [&](const auto& rows) {
      const index_t begin = std::max(rows.begin, from - before), end = std::min(rows.end, to - before);
      if (begin >= end) return;
      const index_t skip = begin - rows.begin;
      query.visit(rows.k + skip * rows.k_stride, rows.k_stride, rows.v + skip * rows.v_stride, rows.v_stride,
                  end - begin);
    });
    before += run.count();
  }
  result[0] = query.state.max;
  result[1] = query.state.sum;
  std::copy_n(query.o, d, result + 2);
}

/// Joins the splits of query t, which lie `stride` floats apart.
template <class KV>
void join_splits(const attend_forward_args<float, KV>& p, index_t b, index_t h, index_t t, float* result,
                 index_t splits, index_t stride) {
  const index_t d = p.q.extent(3);
  float max = result[0], sum = 0;
  for (index_t i = 1; i < splits; ++i) max = std::max(max, result[i * stride]);
  float* const out = p.out.row(b, h, t);
  std::fill_n(out, d, 0.0f);
  for (index_t i = 0; i < splits; ++i) {
    const float* const part = result + i * stride;
    const float factor = part[1] > 0 ? std::exp2(part[0] - max) : 0.0f;
    sum += factor * part[1];
    for (index_t c = 0; c < d; ++c) out[c] += factor * part[2 + c];
  }
  for (index_t c = 0; c < d; ++c) out[c] /= sum;
  if (p.lse) p.lse(b, h, t) = max * ln_2 + std::log(sum);
}

/// Few queries, each with dot products along the rows of its keys.
template <class P, class KV>
void attend_few(context& ctx, const P& pattern, const attend_forward_args<float, KV>& p) {
  constexpr index_t enough_items = 8;
  const index_t B = p.q.extent(0), H = p.q.extent(1), T = p.q.extent(2), d = p.q.extent(3);
  const index_t queries = B * H * T, splits = (enough_items + queries - 1) / queries, stride = padded(d + 2);
  float* const results = ctx.shared_scratch(queries * splits * stride);
  const index_t keys = (p.past ? p.past.k.extent(1) / H : 0) + T;
  ctx.parallel_for(queries * splits, 4 * d * keys / splits, forward_query::floats(d),
                   [&](index_t item, float* scratch) {
                     const index_t query = item / splits, b = query / (H * T), h = query / T % H, t = query % T;
                     if (t < reference::rows_in_use(p.spans, b, T))
                       visit_head(pattern, h, H, [&](const auto& one) {
                         attend_split(one, p, b, h, t, item % splits, splits, results + item * stride, scratch);
                       });
                   });
  for (index_t query = 0; query < queries; ++query) {
    const index_t b = query / (H * T), h = query / T % H, t = query % T;
    if (t < reference::rows_in_use(p.spans, b, T)) {
      join_splits(p, b, h, t, results + query * splits * stride, splits, stride);
    } else {
      zero_rows(p.out, b, h, t, t + 1);
      if (p.lse) p.lse(b, h, t) = 0.0f;
    }
  }
}

}  // namespace detail

template <class P, class KV>
void attend_forward_on(context& ctx, const P& pattern, const attend_forward_args<float, KV>& p) {
  using namespace detail;
  const index_t B = p.q.extent(0), H = p.q.extent(1), T = p.q.extent(2), d = p.q.extent(3);
  constexpr index_t few = 2;
  if (T <= few) return attend_few(ctx, pattern, p);
  constexpr index_t queries = shared_tiles * tile_queries;
  const index_t groups = (T + queries - 1) / queries;
  const index_t floats = 2 * tile_keys * padded(d) + shared_tiles * forward_tile::floats(d);
  ctx.parallel_for(B * H * groups, queries * d * T, floats, [&](index_t item, float* scratch) {
    // The last queries see the most keys: first come, first served.
    const index_t group = groups - 1 - item / (B * H), b = item % (B * H) / H, h = item % H;
    const index_t t0 = group * queries, t1 = std::min(T, t0 + queries);
    const index_t used = std::clamp(reference::rows_in_use(p.spans, b, T), t0, t1);
    if (used > t0)
      visit_head(pattern, h, H, [&](const auto& one) { attend_tiles(one, p, b, h, t0, used - t0, scratch); });
    zero_rows(p.out, b, h, used, t1);
    if (p.lse)
      for (index_t t = used; t < t1; ++t) p.lse(b, h, t) = 0.0f;
  });
}

// One item per head adds up dk and dv in place. Where there are few heads, every head has several items with sums of
// their own, group i of query tiles belonging to item i % parts, and the sums are added in the order of the items.
template <class P>
void attend_backward_on(context& ctx, const P& pattern, const attend_backward_args<float>& p) {
  using namespace detail;
  constexpr index_t enough_items = 8;
  const index_t B = p.q.extent(0), H = p.q.extent(1), T = p.q.extent(2), d = p.q.extent(3), wide = padded(d);
  const index_t tiles = (T + tile_queries - 1) / tile_queries;
  const index_t parts = std::min(tiles, (enough_items + B * H - 1) / (B * H));
  const index_t queries = std::min(shared_tiles, tiles / parts) * tile_queries;  // at a time
  float* const shared = parts > 1 ? ctx.shared_scratch(B * H * (parts - 1) * 2 * T * wide) : nullptr;

  // f(gradients) for part `part` of a head, with the head's own pattern.
  const auto with_gradients = [&](index_t head, index_t part, auto&& f) {
    const index_t b = head / H, h = head % H;
    const gradient_rows out{p.dk.row(b, h, 0), p.dv.row(b, h, 0), p.dk.stride(2), p.dv.stride(2)};
    gradient_rows sums = out;
    if (part > 0) {
      float* const memory = shared + (head * (parts - 1) + part - 1) * 2 * T * wide;
      sums = {memory, memory + wide, 2 * wide, 2 * wide};
    }
    visit_head(pattern, h, H, [&]<class One>(const One& one) {
      f(key_gradients<One>{one, reference::rows_in_use(p.spans, b, T), d, out, sums});
    });
  };

  ctx.parallel_for(B * H * parts, T * T / parts * d, backward_floats(d), [&](index_t item, float* scratch) {
    const index_t head = item / parts, part = item % parts, b = head / H, h = head % H;
    with_gradients(head, part, [&](const auto& gradients) {
      const index_t used = gradients.queries;
      for (index_t t = 0; t < used; ++t)
        if (gradients.shared(t)) gradients.sums.zero(t, d);
      for (index_t t0 = part * queries; t0 < used; t0 += parts * queries)
        attend_tiles_backward(p, b, h, t0, std::min(queries, used - t0), gradients, scratch);
      if (part == 0)
        for (const auto& x : {p.dq, p.dk, p.dv}) zero_rows(x, b, h, used, T);
    });
  });
  if (parts > 1)
    ctx.parallel_for(B * H * tiles, parts * tile_queries * d, 0, [&](index_t item, float*) {
      const index_t head = item / tiles, t0 = item % tiles * tile_queries;
      for (index_t part = 1; part < parts; ++part)
        with_gradients(head, part, [&](const auto& gradients) {
          for (index_t t = t0; t < std::min(gradients.queries, t0 + tile_queries); ++t)
            if (gradients.shared(t)) gradients.add_to_out(t);
        });
    });
}

}  // namespace ratplus::cpu
