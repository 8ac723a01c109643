#pragma once
// The token mixer: y = (attention(recurrence(n · W_inᵀ)) ⊙ sigmoid(o)) · W_outᵀ + x, n = RMSNorm(x) (SPEC §1)
//
// The pattern is an argument of the call. What the backward pass needs is kept in a tape; the norm's output and the
// gated output, cheap to make again, are not.

#include "ratplus/nn/parameters.hpp"
#include "ratplus/nn/residual.hpp"
#include "ratplus/ops/core.hpp"
#include "ratplus/ops/norm_matmul.hpp"

namespace ratplus {

/// Rows of a batch: N = B · T.
struct batch_shape {
  index_t batch = 0, rows = 0;

  [[nodiscard]] index_t count() const { return batch * rows; }
  friend bool operator==(const batch_shape&, const batch_shape&) = default;
};

template <class T, class Space>
struct mixer_tape {
  using A = accumulator_t<T>;
  tensor<A, 1, Space> rstd;       // (N)
  tensor<T, 2, Space> projected;  // (N, 5d or 4d): o, q (rotated in place), k, v, g
  tensor<T, 2, Space> keys;       // (N, d), k̃ rotated
  tensor<T, 2, Space> values;     // (N, d), ṽ
  tensor<T, 2, Space> attended;   // (N, d)
  tensor<A, 3, Space> lse;        // (B, H, T)

  mixer_tape() = default;
  mixer_tape(const model_config& c, bool gated, batch_shape s)
      : rstd(s.count()),
        projected(s.count(), (gated ? 5 : 4) * c.d_model),
        keys(s.count(), c.d_model),
        values(s.count(), c.d_model),
        attended(s.count(), c.d_model),
        lse(s.batch, c.num_heads, s.rows) {}
};

/// Slices of the projection (or of its gradient) as heads, (B, H, T, d_h).
template <class T>
struct projection_slices {
  view<T, 4> q, k, v, gate;
  view<T, 2> out_gate;  // (N, d)

  projection_slices(view<T, 2> projected, const model_config& c, batch_shape s, bool gated) {
    const auto slice = [&](index_t i) { return projected.slice(1, i * c.d_model, (i + 1) * c.d_model); };
    out_gate = slice(0);
    q = as_heads(slice(1), c, s);
    k = as_heads(slice(2), c, s);
    v = as_heads(slice(3), c, s);
    if (gated) gate = as_heads(slice(4), c, s);
  }

  /// (N, d) → (B, H, T, d_h).
  [[nodiscard]] static view<T, 4> as_heads(view<T, 2> x, const model_config& c, batch_shape s) {
    return x.split_last(c.num_heads).split_first(s.batch).swap(1, 2);
  }
};

template <class T>
[[nodiscard]] view<T, 4> as_heads(view<T, 2> x, const model_config& c, batch_shape s) {
  return projection_slices<T>::as_heads(x, c, s);
}

/// x (N, d) → y (N, d), the residual stream; `scratch` (N, d) is overwritten. y may be x. `training`: the tape is
/// written for mixer_backward, otherwise it is scratch.
template <Context Ctx, Cell C, HeadPattern P, class T, class KV>
void mixer_forward(Ctx& ctx, const C& cell, const P& pattern, const model_config& c, batch_shape s,
                   const mixer_weights<const T>& w, view<const accumulator_t<T>, 2> rope,
                   view<const accumulator_t<T>, 2> x, const core_memory<T, KV>& memory, bool training,
                   mixer_tape<T, typename Ctx::space>& tape, view<T, 2> scratch, view<accumulator_t<T>, 2> y) {
  using A = accumulator_t<T>;
  norm_matmul(ctx,
              norm_matmul_args<T>{
                  .x = x, .norm = w.norm, .b = w.in_proj, .normed = scratch, .rstd = tape.rstd, .c = tape.projected});
  const projection_slices<T> in(tape.projected, c, s, C::gated);

  core_forward(ctx, cell, pattern,
               core_forward_args<T, KV>{
                   .q = in.q,
                   .k = in.k,
                   .v = in.v,
                   .gate = in.gate,
                   .out_gate = in.out_gate,
                   .rope = rope,
                   .k_scanned = as_heads(tape.keys.view(), c, s),
                   .v_scanned = IdentityCell<C> ? in.v : as_heads(tape.values.view(), c, s),
                   .attended = tape.attended,
                   .lse = tape.lse,
                   .y = scratch,
                   .memory = memory,
                   .backward = training,
               });
  matmul(ctx, matmul_args<T, A>{
                  .a = scratch, .b = w.out_proj, .c = y, .addend = x, .transpose_b = true, .b_is_parameter = true});
}

/// `dy` (N, d) is the gradient of y on entry and of x on return. Weight gradients are added to `dw`. dprojected is like
/// tape.projected; normed and dnormed (N, d) are overwritten.
template <Context Ctx, Cell C, HeadPattern P, class T>
void mixer_backward(Ctx& ctx, const C& cell, const P& pattern, const model_config& c, batch_shape s,
                    const mixer_weights<const T>& w, view<const accumulator_t<T>, 2> rope,
                    view<const accumulator_t<T>, 2> x, const mixer_tape<T, typename Ctx::space>& tape,
                    view<accumulator_t<T>, 2> dy, const mixer_weights<accumulator_t<T>>& dw, view<T, 2> dprojected,
                    view<T, 2> normed, view<T, 2> dnormed) {
  using A = accumulator_t<T>;
  const projection_slices<const T> in(tape.projected, c, s, C::gated);
  const projection_slices<T> d(dprojected, c, s, C::gated);

  // y = gated · W_outᵀ + x
  const view<const T, 2> factor = as_factor<Ctx, T>(ctx, dy, dnormed);
  const view<T, 2> gated = normed, dgated = normed;  // one after the other
  gate_forward<Ctx, T>(ctx, tape.attended, in.out_gate, gated);
  matmul(ctx, matmul_args<T, A>{.a = factor, .b = gated, .c = dw.out_proj, .addend = dw.out_proj, .transpose_a = true});
  matmul(ctx, matmul_args<T>{.a = factor, .b = w.out_proj, .c = dgated});
  gate_backward<Ctx, T>(ctx, tape.attended, in.out_gate, dgated, dgated, d.out_gate);

  const view<const T, 4> keys = as_heads(tape.keys.view(), c, s);
  const view<const T, 4> values = IdentityCell<C> ? in.v : as_heads(tape.values.view(), c, s);
  attend_backward(ctx, pattern,
                  attend_backward_args<T>{.q = in.q,
                                          .k = keys,
                                          .v = values,
                                          .out = as_heads(tape.attended.view(), c, s),
                                          .dout = as_heads(view<const T, 2>(dgated), c, s),
                                          .lse = tape.lse,
                                          .dq = d.q,
                                          .dk = d.k,
                                          .dv = d.v,
                                          .spans = {}});
  scan_backward_args<T> scan{.k = in.k,
                             .gate = in.gate,
                             .k_out = keys,
                             .dq_out = d.q,
                             .dk_out = d.k,
                             .rope = rope,
                             .dq = d.q,
                             .dk = d.k,
                             .dgate = d.gate};
  if constexpr (!IdentityCell<C>) {
    scan.v = in.v;
    scan.v_out = values;
    scan.dv_out = d.v;
    scan.dv = d.v;
  }
  scan_backward(ctx, cell, scan);

  rms_norm_forward(ctx, rms_norm_forward_args<T>{.x = x, .weight = w.norm, .y = normed, .rstd = {}});
  matmul(ctx,
         matmul_args<T, A>{.a = dprojected, .b = normed, .c = dw.in_proj, .addend = dw.in_proj, .transpose_a = true});
  matmul(ctx, matmul_args<T>{.a = dprojected, .b = w.in_proj, .c = dnormed});
  rms_norm_backward(ctx, rms_norm_backward_args<T>{
                             .x = x, .weight = w.norm, .rstd = tape.rstd, .dy = dnormed, .dx = dy, .dweight = dw.norm});
}

}  // namespace ratplus
