#pragma once
// The recurrence over keys and values, and RoPE, in one pass over the projection's output:
//
//     k̃_t = cell(k̃_{t−1}, k_t, g_t)      ṽ_t = cell(ṽ_{t−1}, v_t, g_t)      one gate for both
//     q' = rotate(q)      k' = rotate(k̃)      v' = ṽ (SPEC §1)
//
// Streams may be absent, and so may the rotation: with k alone and no rotation this is the bare scan, with q alone bare
// RoPE.

#include "ratplus/ops/context.hpp"
#include "ratplus/recurrence/concept.hpp"

namespace ratplus {

template <class T>
struct scan_forward_args {
  using A = accumulator_t<T>;
  view<const T, 4> q = {}, k = {}, v = {};  // (B, H, T, d), each absent or given
  view<const T, 4> gate = {};               // (B, H, T, d), pre-activation; given when the cell is gated and k or v is
  view<T, 4> q_out = {}, k_out = {},
             v_out = {};       // (B, H, T, d), written where the stream is given; may be the input itself
  view<const A, 2> rope = {};  // (≥ every position + 1, d) of make_rope_table; absent: no rotation
  view<const A, 3> k_first = {}, v_first = {};  // (B, H, d), state before row 0; absent: 0
  view<A, 3> k_last = {},
             v_last = {};  // (B, H, d), state after the last row, written; absent: not wanted; may be k_first, v_first
  sequence_spans spans = {};
};

namespace detail {
template <class C, class T>
void check_scan(const C&, const scan_forward_args<T>& p) {
  const auto& lead = p.k ? p.k : p.v ? p.v : p.q;
  const extents<4> shape = lead.shape();
  const extents<3> state{{shape[0], shape[1], shape[3]}};
  const char* op = "scan";
  const auto stream = [&](const char* name, const view<const T, 4>& in, const view<T, 4>& out) {
    if (!in) return;
    check_shape(op, name, in, shape);
    check_shape(op, name, out, shape);
  };
  stream("q", p.q, p.q_out);
  stream("k", p.k, p.k_out);
  stream("v", p.v, p.v_out);
  if (C::gated && (p.k || p.v)) check_shape(op, "gate", p.gate, shape);
  if (p.rope && p.rope.extent(1) != shape[3])
    throw shape_error(message("scan: rope table is for head size ", p.rope.extent(1), ", heads have ", shape[3]));
  if (p.rope && !p.spans.first && p.rope.extent(0) < shape[2])
    throw shape_error(message("scan: rope table has ", p.rope.extent(0), " positions, rows need ", shape[2]));
  if (p.rope && shape[3] % 2 != 0) throw shape_error(message("scan: rope needs an even head size, got ", shape[3]));
  check_shape_if_given(op, "k_first", p.k_first, state);
  check_shape_if_given(op, "v_first", p.v_first, state);
  check_shape_if_given(op, "k_last", p.k_last, state);
  check_shape_if_given(op, "v_last", p.v_last, state);
  check_spans(op, p.spans, shape[0]);
}
}  // namespace detail

/// States are carried in accumulator_t<T>, before rotation.
template <Context Ctx, class C, class T>
void scan_forward(Ctx& ctx, const C& cell, const scan_forward_args<T>& p) {
  require_cell<C>();
  detail::check_scan(cell, p);
  if ((p.k ? p.k : p.v ? p.v : p.q).size() > 0) scan_forward_on(ctx, cell, p);
}

template <class T>
struct scan_backward_args {
  using A = accumulator_t<T>;
  view<const T, 4> k = {}, v = {}, gate = {};  // (B, H, T, d), the inputs of the forward pass
  view<const T, 4> k_out = {}, v_out = {};  // (B, H, T, d), its outputs (k_out rotated): the states are read from them
  view<const T, 4> dq_out = {}, dk_out = {},
                   dv_out = {};                 // (B, H, T, d), gradients of the outputs; each absent with its stream
  view<const A, 2> rope = {};                   // as in the forward pass
  view<const A, 3> k_first = {}, v_first = {};  // (B, H, d), as in the forward pass
  view<const A, 3> dk_last = {}, dv_last = {};  // (B, H, d), gradients of the last states; absent: 0
  view<T, 4> dq = {}, dk = {}, dv = {}, dgate = {};  // (B, H, T, d), written; dq, dk, dv may be dq_out, dk_out, dv_out
  view<A, 3> dk_first = {}, dv_first = {};           // (B, H, d), written; absent: not wanted
  sequence_spans spans = {};
};

template <Context Ctx, class C, class T>
void scan_backward(Ctx& ctx, const C& cell, const scan_backward_args<T>& p) {
  require_cell<C>();
  const auto& lead = p.dk_out ? p.dk_out : p.dv_out ? p.dv_out : p.dq_out;
  const extents<4> shape = lead.shape();
  const extents<3> state{{shape[0], shape[1], shape[3]}};
  const char* op = "scan backward";
  if (p.dq_out) detail::check_shape(op, "dq", p.dq, shape);
  const auto stream = [&](const char* name, const auto& in, const auto& out, const auto& dout, const auto& din) {
    if (!dout) return;
    detail::check_shape(op, name, dout, shape);
    detail::check_shape(op, name, din, shape);
    if constexpr (!IdentityCell<C>) {
      detail::check_shape(op, name, in, shape);
      detail::check_shape(op, name, out, shape);
    }
  };
  stream("k", p.k, p.k_out, p.dk_out, p.dk);
  stream("v", p.v, p.v_out, p.dv_out, p.dv);
  if (C::gated && (p.dk_out || p.dv_out)) {
    detail::check_shape(op, "gate", p.gate, shape);
    detail::check_shape(op, "dgate", p.dgate, shape);
  }
  if (p.rope && p.rope.extent(1) != shape[3])
    throw shape_error(
        message("scan backward: rope table is for head size ", p.rope.extent(1), ", heads have ", shape[3]));
  detail::check_shape_if_given(op, "k_first", p.k_first, state);
  detail::check_shape_if_given(op, "v_first", p.v_first, state);
  detail::check_shape_if_given(op, "dk_last", p.dk_last, state);
  detail::check_shape_if_given(op, "dv_last", p.dv_last, state);
  detail::check_shape_if_given(op, "dk_first", p.dk_first, state);
  detail::check_shape_if_given(op, "dv_first", p.dv_first, state);
  detail::check_spans(op, p.spans, shape[0]);
  if (shape.product() > 0) scan_backward_on(ctx, cell, p);
}

}  // namespace ratplus
