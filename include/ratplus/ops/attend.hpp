#pragma once
// Attention under a pattern:
//
//     a_t = Σ_{s visible to t} softmax_s(q_t · k_s / sqrt(d)) v_s      lse_t = log Σ_s e^{q_t · k_s / sqrt(d)}
//
// (SPEC §1, §2). Work and memory grow with the visited keys: no T × T matrix is ever stored. Training, prefill in
// pieces and decoding are the same operation; with a past, earlier keys come from a cache and the rows of this call
// from k and v.

#include "ratplus/ops/context.hpp"
#include "ratplus/pattern/residency.hpp"

namespace ratplus {

/// Keys and values of earlier positions, in slots (pattern/residency.hpp). Sequence b has spans.first[b] of them.
template <class KV>
struct kv_past {
  view<const KV, 3> k = {}, v = {};        // (B, slots, d), all heads of a sequence in one pool
  view<const head_slots, 1> heads = {};    // (H), each head's slots, in the context's space
  const head_slots* heads_here = nullptr;  // (H), the same in host memory; null: a backend may then be slower

  RATPLUS_HD explicit operator bool() const { return static_cast<bool>(heads); }
};

template <class T, class KV = T>
struct attend_forward_args {
  view<const T, 4> q = {};             // (B, H, T, d)
  view<const T, 4> k = {}, v = {};     // (B, H, T, d), the same rows' keys and values
  view<T, 4> out = {};                 // (B, H, T, d), written; must not overlap q, k, v
  view<accumulator_t<T>, 3> lse = {};  // (B, H, T), written; absent: not wanted
  kv_past<KV> past = {};               // absent: row 0 is position 0
  sequence_spans spans = {};           // first is read only with a past
};

namespace detail {
template <class T>
void check_attend(const char* op, const view<const T, 4>& q, const view<const T, 4>& k, const view<const T, 4>& v) {
  if (k.extent(1) != q.extent(1))
    throw shape_error(message(op, ": keys have ", k.extent(1), " heads, queries ", q.extent(1)));
  if (k.extent(3) != q.extent(3))
    throw shape_error(message(op, ": keys have head size ", k.extent(3), ", queries ", q.extent(3)));
  check_shape(op, "keys", k, q.shape());
  check_shape(op, "values", v, q.shape());
}

template <class T, class KV>
void check_attend(const attend_forward_args<T, KV>& p) {
  const index_t B = p.q.extent(0), H = p.q.extent(1), T_ = p.q.extent(2), d = p.q.extent(3);
  check_attend("attend", p.q, p.k, p.v);
  check_shape("attend", "out", p.out, p.q.shape());
  check_shape_if_given("attend", "lse", p.lse, {{B, H, T_}});
  check_spans("attend", p.spans, B);
  if (p.past) {
    check_shape("attend", "past heads", p.past.heads, {{H}});
    check_shape("attend", "past keys", p.past.k, {{B, p.past.k.extent(1), d}});
    check_shape("attend", "past values", p.past.v, p.past.k.shape());
    if (!p.spans.first) throw shape_error("attend: a past needs spans.first, the number of its positions");
  }
}
}  // namespace detail

/// Scores are scaled by 1 / sqrt(d). The past must have been kept under a pattern that serves this one (`serves`); the
/// cache checks it.
template <Context Ctx, class P, class T, class KV>
void attend_forward(Ctx& ctx, const P& pattern, const attend_forward_args<T, KV>& p) {
  require_head_pattern<P>();
  check_heads(pattern, p.q.extent(1));
  detail::check_attend(p);
  if (p.q.size() > 0) attend_forward_on(ctx, pattern, p);
}

template <class T>
struct attend_backward_args {
  view<const T, 4> q = {}, k = {}, v = {};   // (B, H, T, d)
  view<const T, 4> out = {}, dout = {};      // (B, H, T, d), the forward pass's output and its gradient
  view<const accumulator_t<T>, 3> lse = {};  // (B, H, T), from the forward pass
  view<T, 4> dq = {}, dk = {}, dv = {};      // (B, H, T, d), written; dq must not overlap dout, dk and dv no input
  sequence_spans spans = {};                 // only length is read
};

/// Recomputes the probabilities from lse: p = e^{s − lse}, dS = p ⊙ (dout · v − Σ dout ⊙ out), dq = dS k / sqrt(d), …
template <Context Ctx, class P, class T>
void attend_backward(Ctx& ctx, const P& pattern, const attend_backward_args<T>& p) {
  require_head_pattern<P>();
  const index_t B = p.q.extent(0), H = p.q.extent(1), T_ = p.q.extent(2);
  check_heads(pattern, H);
  const char* op = "attend backward";
  detail::check_attend(op, p.q, p.k, p.v);
  detail::check_shape(op, "out", p.out, p.q.shape());
  detail::check_shape(op, "dout", p.dout, p.q.shape());
  detail::check_shape(op, "lse", p.lse, {{B, H, T_}});
  detail::check_shape(op, "dq", p.dq, p.q.shape());
  detail::check_shape(op, "dk", p.dk, p.q.shape());
  detail::check_shape(op, "dv", p.dv, p.q.shape());
  detail::check_spans(op, p.spans, B);
  if (p.q.size() > 0) attend_backward_on(ctx, pattern, p);
}

/// position[b] += length[b], or `rows` where no lengths are given: what an append does to the sequences' positions. All
/// (B).
template <Context Ctx>
void cache_advance(Ctx& ctx, view<token_t, 1> position, view<const token_t, 1> length, token_t rows) {
  detail::check_shape_if_given("cache advance", "length", length, position.shape());
  if (position.size() > 0) cache_advance_on(ctx, position, length, rows);
}

template <class T, class KV = T>
struct cache_append_args {
  view<const T, 4> k = {}, v = {};       // (B, H, T, d), rows at positions first[b] + t
  view<KV, 3> k_pool = {}, v_pool = {};  // (B, slots, d), written at the rows' slots
  view<const head_slots, 1> heads = {};  // (H)
  sequence_spans spans = {};
};

/// Stores the rows that later queries will see (sinks, anchors, the last W) and no others, converting to the cache's
/// type.
template <Context Ctx, class T, class KV>
void cache_append(Ctx& ctx, const cache_append_args<T, KV>& p) {
  const index_t B = p.k.extent(0), H = p.k.extent(1), d = p.k.extent(3);
  const char* op = "cache append";
  detail::check_shape(op, "values", p.v, p.k.shape());
  detail::check_shape(op, "key pool", p.k_pool, {{B, p.k_pool.extent(1), d}});
  detail::check_shape(op, "value pool", p.v_pool, p.k_pool.shape());
  detail::check_shape(op, "heads", p.heads, {{H}});
  detail::check_shape(op, "first", p.spans.first, {{B}});
  detail::check_spans(op, p.spans, B);
  if (p.k.size() > 0) cache_append_on(ctx, p);
}

}  // namespace ratplus
