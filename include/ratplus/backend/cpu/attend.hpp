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

/// Keys or values of a stretch, widened to float and gathered into rows of padded(d): they are read many times, and
/// rows a power of two apart would share a few sets of the caches.
template <class KV>
void gather(const KV* x, index_t stride, index_t rows, index_t d, float* to) {
  for (index_t i = 0; i < rows; ++i)
    for_each_pack(d, [&](index_t c, auto lanes) { store(to + i * padded(d) + c, load(x + i * stride + c, lanes)); });
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
        gather(rows.k + skip * rows.k_stride, rows.k_stride, end - j, d, k);
        gather(rows.v + skip * rows.v_stride, rows.v_stride, end - j, d, v);
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

/// Rows of floats that lie somewhere.
struct float_rows {
  const float* data;
  index_t stride;
};

/// One tile of queries of the backward pass: adds to dk and dv, yields dq.
struct backward_tile {
  index_t d, queries, packs;
  float *q, *dout, *dq;            // (d, tile_queries); q scaled for scores in base 2
  float *probabilities, *dscores;  // (tile_keys, tile_queries)
  float *lse, *delta;              // (tile_queries), lse in base 2
  float *q_copy, *dout_copy;       // (tile_queries, padded(d))
  float_rows q_rows, dout_rows;    // queries and output gradients as rows of whole packs
  float scale;

  [[nodiscard]] static index_t floats(index_t d) { return tile_queries * (3 * d + 2 * tile_keys + 2 + 2 * padded(d)); }

  backward_tile(const attend_backward_args<float>& p, index_t b, index_t h, index_t t0, index_t n, float* memory)
      : d(p.q.extent(3)), queries(n), packs((n + pack_width - 1) / pack_width) {
    const auto take = [&](index_t count) { return std::exchange(memory, memory + count); };
    q = take(d * tile_queries);
    dout = take(d * tile_queries);
    dq = take(d * tile_queries);
    probabilities = take(tile_keys * tile_queries);
    dscores = take(tile_keys * tile_queries);
    lse = take(tile_queries);
    delta = take(tile_queries);
    q_copy = take(tile_queries * padded(d));
    dout_copy = take(tile_queries * padded(d));
    scale = 1.0f / std::sqrt(static_cast<float>(d));
    transpose_in(p.q.row(b, h, t0), p.q.stride(2), n, d, log2_e * scale, q);
    transpose_in(p.dout.row(b, h, t0), p.dout.stride(2), n, d, 1.0f, dout);
    q_rows = whole_packs(p.q.row(b, h, t0), p.q.stride(2), q_copy);
    dout_rows = whole_packs(p.dout.row(b, h, t0), p.dout.stride(2), dout_copy);
    std::fill_n(dq, d * tile_queries, 0.0f);
    std::fill_n(lse, tile_queries, 0.0f);
    std::fill_n(delta, tile_queries, 0.0f);
    for (index_t i = 0; i < n; ++i) {
      lse[i] = p.lse(b, h, t0 + i) * log2_e;
      pack products(0.0f);
      for_each_pack(d, [&](index_t c, auto lanes) {
        products =
            multiply_add(load(p.dout.row(b, h, t0 + i) + c, lanes), load(p.out.row(b, h, t0 + i) + c, lanes), products);
      });
      delta[i] = detail::sum(products);
    }
  }

  /// dk, dv: rows of padded(d) for the keys of this stretch, `stride` apart.
  void visit(const lane_bounds& bounds, const key_rows<float>& rows, const key_stretch& s, float* dk, float* dv,
             index_t stride) {
    const index_t n = s.keys(), skip = s.begin - rows.begin, lane = s.first_pack * pack_width;
    const float *k = rows.k + skip * rows.k_stride, *v = rows.v + skip * rows.v_stride;
    product<a_layout::rows>(n, s.packs(), d, k, rows.k_stride, q + lane, tile_queries, probabilities + lane,
                            tile_queries, from_zero{});
    product<a_layout::rows>(n, s.packs(), d, v, rows.v_stride, dout + lane, tile_queries, dscores + lane, tile_queries,
                            from_zero{});
    for (index_t j = 0; j < n; ++j)
      for (index_t i = s.first_pack; i < s.last_pack; ++i) {
        const index_t at = i * pack_width;
        float *const p_at = probabilities + j * tile_queries + at, *const ds_at = dscores + j * tile_queries + at;
        pack p = exp2(load(p_at) - load(lse + at));
        if (s.masked) p = select(bounds.sees(i, s.begin + j), p, pack(0.0f));
        store(p_at, p);
        store(ds_at, p * (load(ds_at) - load(delta + at)) * pack(scale));
      }
    const index_t lanes = std::min(queries, s.last_pack * pack_width) - lane;
    for (index_t c = 0; c < padded(d); c += block_columns) {
      const index_t wide = std::min(block_columns, padded(d) - c) / pack_width;
      product<a_layout::rows>(n, wide, lanes, probabilities + lane, tile_queries,
                              dout_rows.data + lane * dout_rows.stride + c, dout_rows.stride, dv + c, stride, from_c{});
      product<a_layout::rows>(n, wide, lanes, dscores + lane, tile_queries, q_rows.data + lane * q_rows.stride + c,
                              q_rows.stride, dk + c, stride, from_c{});
    }
    product<a_layout::columns>(d, s.packs(), n, k, rows.k_stride, dscores + lane, tile_queries, dq + lane, tile_queries,
                               from_c{});
  }

 private:
  float_rows whole_packs(const float* x, index_t stride, float* copy) const {
    if (d % pack_width == 0) return {x, stride};
    for (index_t i = 0; i < queries; ++i)
      for_each_pack(d,
                    [&](index_t c, auto lanes) { store(copy + i * padded(d) + c, load(x + i * stride + c, lanes)); });
    return {copy, padded(d)};
  }
};

/// Adds the queries [t0, t0 + n) of one head to dk and dv, (T, padded(d)) each, and writes their dq.
template <Pattern P>
void attend_tile_backward(const P& pattern, const attend_backward_args<float>& p, index_t b, index_t h, index_t t0,
                          index_t n, float* dk, float* dv, float* scratch) {
  const index_t d = p.q.extent(3), wide = padded(d);
  backward_tile tile(p, b, h, t0, n, scratch);
  lane_bounds bounds;
  for (int r = 0; r < key_runs::count; ++r) {
    const key_run run = tile_run(pattern, r, t0, t0 + n - 1);
    if (run.empty()) continue;
    bounds.set(pattern, r, t0, n, run);
    const key_rows<float> rows{p.k.row(b, h, run.begin),
                               p.v.row(b, h, run.begin),
                               run.step * p.k.stride(2),
                               run.step * p.v.stride(2),
                               0,
                               run.count()};
    bounds.for_each_stretch(tile.packs, 0, rows.end, tile_keys, [&](const key_stretch& s) {
      const index_t at = run[s.begin] * wide;
      tile.visit(bounds, rows, s, dk + at, dv + at, run.step * wide);
    });
  }
  std::fill_n(tile.lse, tile_queries, 1.0f);
  transpose_out(tile.dq, n, d, tile.lse, p.dq.row(b, h, t0), p.dq.stride(2));
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
      const pack s = dots<1>(d, q, 0, k + j * k_stride, k_stride, rows - j);
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

// One item per head adds up dk and dv over its query tiles. Where there are few heads, every head has several items
// with sums of their own, tile i belonging to item i % parts, and the sums are added in the order of the items.
template <class P>
void attend_backward_on(context& ctx, const P& pattern, const attend_backward_args<float>& p) {
  using namespace detail;
  constexpr index_t enough_items = 8;
  const index_t B = p.q.extent(0), H = p.q.extent(1), T = p.q.extent(2), d = p.q.extent(3), wide = padded(d);
  const index_t tiles = (T + tile_queries - 1) / tile_queries;
  const index_t parts = std::min(tiles, (enough_items + B * H - 1) / (B * H));
  const index_t tile_floats = backward_tile::floats(d), sum_floats = 2 * T * wide;
  float* const shared = parts > 1 ? ctx.shared_scratch(B * H * parts * sum_floats) : nullptr;

  const auto write = [&](index_t head, index_t begin, index_t end, const float* sums) {
    for (index_t t = begin; t < end; ++t)
      for_each_pack(d, [&](index_t c, auto lanes) {
        pack dk = load(sums + t * wide + c), dv = load(sums + (T + t) * wide + c);
        for (index_t part = 1; part < parts; ++part) {
          dk += load(sums + part * sum_floats + t * wide + c);
          dv += load(sums + part * sum_floats + (T + t) * wide + c);
        }
        store(p.dk.row(head / H, head % H, t) + c, dk, lanes);
        store(p.dv.row(head / H, head % H, t) + c, dv, lanes);
      });
  };

  const index_t work = T * T / parts * d;
  ctx.parallel_for(B * H * parts, work, tile_floats + (parts > 1 ? 0 : sum_floats), [&](index_t item, float* scratch) {
    const index_t head = item / parts, b = head / H, h = head % H;
    const index_t used = reference::rows_in_use(p.spans, b, T);
    float *const dk = parts > 1 ? shared + item * sum_floats : scratch + tile_floats, *const dv = dk + T * wide;
    std::fill_n(dk, sum_floats, 0.0f);
    visit_head(pattern, h, H, [&](const auto& one) {
      for (index_t t0 = item % parts * tile_queries; t0 < used; t0 += parts * tile_queries)
        attend_tile_backward(one, p, b, h, t0, std::min(tile_queries, used - t0), dk, dv, scratch);
    });
    if (item % parts == 0) zero_rows(p.dq, b, h, used, T);
    if (parts == 1) write(head, 0, T, dk);
  });
  if (parts > 1)
    ctx.parallel_for(B * H * tiles, parts * tile_queries * d, 0, [&](index_t item, float*) {
      const index_t head = item / tiles, t0 = item % tiles * tile_queries;
      write(head, t0, std::min(T, t0 + tile_queries), shared + head * parts * sum_floats);
    });
}

}  // namespace ratplus::cpu
