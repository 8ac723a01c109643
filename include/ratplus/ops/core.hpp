#pragma once
// The core of a mixer, what lies between its two products (SPEC §1, §3):
//
//     k̃, ṽ, q' = scan(q, k, v, g)      a = attention(q', k̃, ṽ and the past)      y = a ⊙ sigmoid(o)
//
// and, with a memory, the row's key, value and state kept for later rows. It is these operations one after the other;
// a backend may do a decoding step, one row of every sequence, at once (`core_step_on`).

#include "ratplus/ops/gate.hpp"
#include "ratplus/ops/scan_attend.hpp"

namespace ratplus {

/// What the core reads of earlier positions and leaves for later ones; absent in training.
template <class T, class KV>
struct core_memory {
  using A = accumulator_t<T>;
  view<KV, 3> k_pool = {}, v_pool = {};    // (B, slots, d)
  view<const head_slots, 1> heads = {};    // (H)
  const head_slots* heads_here = nullptr;  // (H), in host memory
  view<A, 3> k_state = {}, v_state = {};   // (B, H, d)
  sequence_spans spans = {};               // first given

  RATPLUS_HD explicit operator bool() const { return static_cast<bool>(heads); }
};

template <class T, class KV = T>
struct core_forward_args {
  using A = accumulator_t<T>;
  view<T, 4> q = {};                // (B, H, T, d), rotated in place
  view<const T, 4> k = {}, v = {};  // (B, H, T, d)
  view<const T, 4> gate = {};       // (B, H, T, d), of the recurrence; given when the cell is gated
  view<const T, 2> out_gate = {};   // (B · T, H · d), o
  view<const A, 2> rope = {};       // (≥ every position + 1, d)
  view<T, 4> k_scanned = {},
             v_scanned = {};  // (B, H, T, d), written; v_scanned may be v where the cell is the identity
  view<T, 2> attended = {};   // (B · T, H · d), written
  view<A, 3> lse = {};        // (B, H, T), written
  view<T, 2> y = {};          // (B · T, H · d), written
  core_memory<T, KV> memory = {};
  bool backward = true;  // whether a backward pass follows, which reads what is written here; never with a memory
};

/// The memory must not have been written by the operation just before this one: a backend may begin to read it early.
/// With a memory, or with no backward pass to follow, only y and the memory are of meaning afterwards; q, k_scanned,
/// v_scanned, attended and lse may or may not have been written.
template <Context Ctx, Cell C, class P, class T, class KV>
void core_forward(Ctx& ctx, const C& cell, const P& pattern, const core_forward_args<T, KV>& p) {
  const index_t B = p.q.extent(0), H = p.q.extent(1);
  if constexpr (requires { core_step_on(ctx, cell, pattern, p); })
    if (p.memory && p.q.extent(2) == 1) {
      const index_t d = p.q.extent(3);
      const char* op = "core";
      require_head_pattern<P>();
      check_heads(pattern, H);
      detail::check_shape(op, "keys", p.k, p.q.shape());
      detail::check_shape(op, "values", p.v, p.q.shape());
      if (C::gated) detail::check_shape(op, "gate", p.gate, p.q.shape());
      detail::check_shape(op, "output gate", p.out_gate, {{B, H * d}});
      detail::check_shape(op, "y", p.y, {{B, H * d}});
      detail::check_shape(op, "key pool", p.memory.k_pool, {{B, p.memory.k_pool.extent(1), d}});
      detail::check_shape(op, "value pool", p.memory.v_pool, p.memory.k_pool.shape());
      detail::check_shape(op, "heads", p.memory.heads, {{H}});
      detail::check_shape(op, "first", p.memory.spans.first, {{B}});
      detail::check_spans(op, p.memory.spans, B);
      if (p.q.size() > 0) core_step_on(ctx, cell, pattern, p);
      return;
    }

  scan_forward_args<T> scan{
      .q = p.q, .k = p.k, .gate = p.gate, .q_out = p.q, .k_out = p.k_scanned, .rope = p.rope, .spans = p.memory.spans};
  if constexpr (!IdentityCell<C>) {
    scan.v = p.v;
    scan.v_out = p.v_scanned;
    if (p.memory) {
      scan.k_first = p.memory.k_state;
      scan.v_first = p.memory.v_state;
      scan.k_last = p.memory.k_state;
      scan.v_last = p.memory.v_state;
    }
  }

  attend_forward_args<T, KV> attend{.q = p.q,
                                    .k = p.k_scanned,
                                    .v = p.v_scanned,
                                    .out = p.attended.split_last(H).split_first(B).swap(1, 2),
                                    .spans = p.memory.spans};
  if (p.memory) attend.past = {p.memory.k_pool, p.memory.v_pool, p.memory.heads, p.memory.heads_here};
  if (p.memory || !p.backward) {
    scan_attend(ctx, cell, pattern, scan_attend_args<T, KV>{.scan = scan, .attend = attend, .scores = p.lse});
  } else {
    attend.lse = p.lse;
    scan_forward(ctx, cell, scan);
    attend_forward(ctx, pattern, attend);
  }
  if (p.memory)
    cache_append(ctx, cache_append_args<T, KV>{.k = p.k_scanned,
                                               .v = p.v_scanned,
                                               .k_pool = p.memory.k_pool,
                                               .v_pool = p.memory.v_pool,
                                               .heads = p.memory.heads,
                                               .spans = p.memory.spans});
  gate_forward<Ctx, T>(ctx, p.attended, p.out_gate, p.y);
}

}  // namespace ratplus
