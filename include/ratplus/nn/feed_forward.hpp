#pragma once
// The feed-forward layer: y = x + GELU(RMSNorm(x) · W_1ᵀ) · W_2ᵀ (SPEC §4)

#include "ratplus/nn/parameters.hpp"
#include "ratplus/nn/residual.hpp"
#include "ratplus/ops/norm_matmul.hpp"

namespace ratplus {

template <class T, class Space>
struct feed_forward_tape {
  tensor<accumulator_t<T>, 1, Space> rstd;  // (N)
  tensor<T, 2, Space> hidden;               // (N, F), before GELU

  feed_forward_tape() = default;
  feed_forward_tape(const model_config& c, index_t rows) : rstd(rows), hidden(rows, c.d_ffn) {}
};

/// x (N, d) → y (N, d), the residual stream; `normed` (N, d) and `activated` (N, F) are overwritten. y may be x.
template <Context Ctx, class T>
void feed_forward_forward(Ctx& ctx, const feed_forward_weights<const T>& w, view<const accumulator_t<T>, 2> x,
                          feed_forward_tape<T, typename Ctx::space>& tape, view<T, 2> normed, view<T, 2> activated,
                          view<accumulator_t<T>, 2> y) {
  using A = accumulator_t<T>;
  norm_matmul(ctx, norm_matmul_args<T>{.x = x,
                                       .norm = w.norm,
                                       .b = w.fc1,
                                       .normed = normed,
                                       .rstd = tape.rstd,
                                       .c = tape.hidden,
                                       .activated = activated});
  matmul(ctx, matmul_args<T, A>{
                  .a = activated, .b = w.fc2, .c = y, .addend = x, .transpose_b = true, .b_is_parameter = true});
}

/// `dy` (N, d) is the gradient of y on entry and of x on return. Weight gradients are added to `dw`; normed, dnormed
/// (N, d), activated and dhidden (N, F) are overwritten.
template <Context Ctx, class T>
void feed_forward_backward(Ctx& ctx, const feed_forward_weights<const T>& w, view<const accumulator_t<T>, 2> x,
                           const feed_forward_tape<T, typename Ctx::space>& tape, view<accumulator_t<T>, 2> dy,
                           const feed_forward_weights<accumulator_t<T>>& dw, view<T, 2> normed, view<T, 2> dnormed,
                           view<T, 2> activated, view<T, 2> dhidden) {
  using A = accumulator_t<T>;
  const view<const T, 2> factor = as_factor<Ctx, T>(ctx, dy, dnormed);
  matmul(ctx, matmul_args<T>{.a = factor, .b = w.fc2, .c = dhidden});
  gelu_backward<Ctx, T>(ctx, tape.hidden, dhidden, dhidden, activated);
  matmul(ctx, matmul_args<T, A>{.a = factor, .b = activated, .c = dw.fc2, .addend = dw.fc2, .transpose_a = true});
  rms_norm_forward(ctx, rms_norm_forward_args<T>{.x = x, .weight = w.norm, .y = normed, .rstd = {}});
  matmul(ctx, matmul_args<T, A>{.a = dhidden, .b = normed, .c = dw.fc1, .addend = dw.fc1, .transpose_a = true});
  matmul(ctx, matmul_args<T>{.a = dhidden, .b = w.fc1, .c = dnormed});
  rms_norm_backward(ctx, rms_norm_backward_args<T>{
                             .x = x, .weight = w.norm, .rstd = tape.rstd, .dy = dnormed, .dx = dy, .dweight = dw.norm});
}

}  // namespace ratplus
