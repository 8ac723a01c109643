#pragma once
// Attention over the runs of a pattern, a tile of queries at a time, with the online softmax: for every stretch of keys
//
//     S = K Qᵀ · scale · log₂e     m' = max(m, S)     P = 2^(S − m')     l = l 2^(m − m') + Σ P     O = O 2^(m − m') +
//     Vᵀ P
//
// with queries as lanes (detail/query_tile.hpp says why). A query or two alone (decoding) would leave most lanes empty:
// there scores are dot products along the rows of keys, and long runs are cut into splits whose partial softmaxes are
// combined. Memory is a few tiles per thread.

#include <array>
#include <cmath>

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/dots.hpp"
#include "ratplus/backend/cpu/detail/gather.hpp"
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

}  // namespace ratplus::cpu
