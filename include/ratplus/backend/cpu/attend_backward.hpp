#pragma once
// Attention backward, over the same runs and stretches as attend.hpp: P is recomputed from lse, stretch by stretch, and
//
//     dV += P dout     dS = P ⊙ (V doutᵀ − Σ dout ⊙ out)     dK += dS Q     dQ = dSᵀ K
//
// with queries as the lanes of P and dS. Gradients of keys and values are summed in the order of the
// query tiles.

#include <array>
#include <cmath>

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/dots.hpp"
#include "ratplus/backend/cpu/detail/gather.hpp"
#include "ratplus/backend/cpu/detail/query_tile.hpp"

namespace ratplus::cpu {

namespace detail {

/// Rows [begin, end) of tensors of one head that are needed soon and lie pages apart, so that nothing foresees them: a
/// few are asked for at a time, between arithmetic that does not wait for memory.
template <std::size_t N>
struct rows_ahead {
  std::array<view<const float, 4>, N> tensors;
  index_t b, h, begin = 0, end = 0;

  RATPLUS_INLINE void ask() {
    constexpr index_t line = 64 / sizeof(float);
    if (begin == end) return;
    for (const auto& x : tensors)
      for (index_t c = 0; c < x.extent(3); c += line) __builtin_prefetch(x.row(b, h, begin) + c, 0, 2);
    ++begin;
  }
  void ask_all() {
    while (begin < end) ask();
  }
};

/// What is asked for while the products of a group of queries are worked on.
struct group_ahead {
  rows_ahead<3> queries;  // q, dout and out of the next group
  rows_ahead<4> own;      // k, v, dk and dv of this group's own keys

  group_ahead(const attend_backward_args<float>& p, index_t b, index_t h)
      : queries{{p.q, p.dout, p.out}, b, h}, own{{p.k, p.v, p.dk, p.dv}, b, h} {}

  RATPLUS_INLINE void ask() {
    queries.ask();
    own.ask();
  }
};

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
             float* scratch, group_ahead& ahead) {
    const index_t n = s.keys(), wide = padded(d), skip = (s.begin - rows.begin) * wide,
                  lane = s.first_pack * pack_width;
    float *const probabilities = scratch, *const dscores = scratch + tile_keys * tile_queries;  // (n, tile_queries)
    product<a_layout::rows>(n, s.packs(), d, rows.k + skip, wide, q + lane, tile_queries, probabilities + lane,
                            tile_queries, from_zero{});
    product<a_layout::rows>(n, s.packs(), d, rows.v + skip, wide, dout + lane, tile_queries, dscores + lane,
                            tile_queries, from_zero{});
    for (index_t j = 0; j < n; ++j) {
      ahead.ask();
      for (index_t i = s.first_pack; i < s.last_pack; ++i) {
        const index_t at = i * pack_width;
        float *const p_at = probabilities + j * tile_queries + at, *const ds_at = dscores + j * tile_queries + at;
        pack p = exp2(load(p_at) - load(lse + at));
        if (s.masked) p = select(bounds.sees(i, s.begin + j), p, pack(0.0f));
        store(p_at, p);
        store(ds_at, p * (load(ds_at) - load(delta + at)));
      }
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

  /// Packs dk_at(c) and dv_at(c) become row t, or are added to it.
  template <class DK, class DV>
  RATPLUS_INLINE void set(index_t t, index_t d, const DK& dk_at, const DV& dv_at) const {
    float *const dk_row = dk + t * dk_stride, *const dv_row = dv + t * dv_stride;
    for_each_pack(d, [&](index_t c, auto lanes) RATPLUS_INLINE_LAMBDA {
      store(dk_row + c, dk_at(c), lanes);
      store(dv_row + c, dv_at(c), lanes);
    });
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
      const auto dk_at = [&](index_t c) RATPLUS_INLINE_LAMBDA { return ds * load(q + r * wide + c); };
      const auto dv_at = [&](index_t c) RATPLUS_INLINE_LAMBDA { return w * load(dout + r * wide + c); };
      if (to.shared(t + r))
        to.sums.add(t + r, d, dk_at, dv_at);
      else
        to.out.set(t + r, d, dk_at, dv_at);
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
                           const key_gradients<P>& to, index_t next, group_ahead& ahead, float* scratch) {
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
  ahead.queries.begin = std::max(ahead.queries.begin, t0);
  ahead.queries.end = t0 + n;
  ahead.queries.ask_all();
  for_each_tile([&](member& m, index_t first, index_t queries) {
    m.tile = backward_tile(p, b, h, first, queries, take(backward_tile::floats(d)));
    for (int r = 0; r < key_runs::count; ++r)
      if (sees_own_keys_alone(pattern, r, first, queries)) m.own_run = r;
    if (m.own_run < 0)
      for (index_t t = first; t < first + queries; ++t)
        if (!to.shared(t)) to.out.zero(t, d);
  });
  ahead.queries.begin = next, ahead.queries.end = std::min(next + n, to.queries);
  if (tiles.front().own_run >= 0) ahead.own.begin = t0, ahead.own.end = t0 + n;
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
          m.tile.visit(m.lanes, {k, v, j}, stretch, dk, dv, scores, ahead);
        });
      });
      for (index_t i = 0; i < end - j; ++i)
        if (const index_t t = run[j + i]; t >= t0 || to.shared(t))  // else seen by none of these queries
          to.add(
              t, [&](index_t c) RATPLUS_INLINE_LAMBDA { return load(dk + i * wide + c); },
              [&](index_t c) RATPLUS_INLINE_LAMBDA { return load(dv + i * wide + c); });
    }
  }
  ahead.own.ask_all();
  for_each_tile([&](member& m, index_t first, index_t queries) {
    transpose_out(m.tile.dq, queries, d, m.tile.dq_scale, p.dq.row(b, h, first), p.dq.stride(2));
    if (m.own_run >= 0) visit_own_keys(m.tile, p, b, h, first, to);
  });
}

}  // namespace detail

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
      group_ahead ahead(p, b, h);
      for (index_t t0 = part * queries; t0 < used; t0 += parts * queries)
        attend_tiles_backward(p, b, h, t0, std::min(queries, used - t0), gradients,
                              std::min(t0 + parts * queries, used), ahead, scratch);
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
