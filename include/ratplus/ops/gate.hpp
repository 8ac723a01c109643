#pragma once
// The mixer's output gate: y = a ⊙ sigmoid(o) (SPEC §1)

#include "ratplus/ops/context.hpp"

namespace ratplus {

/// a, o, y: (N, d); y may be a.
template <Context Ctx, class T>
void gate_forward(Ctx& ctx, view<const T, 2> a, view<const T, 2> o, view<T, 2> y) {
  detail::check_shape("gate", "o", o, a.shape());
  detail::check_shape("gate", "y", y, a.shape());
  if (a.size() > 0) gate_forward_on(ctx, a, o, y);
}

/// da = dy ⊙ sigmoid(o), do = dy ⊙ a ⊙ sigmoid'(o), both written; da may be dy.
template <Context Ctx, class T>
void gate_backward(Ctx& ctx, view<const T, 2> a, view<const T, 2> o, view<const T, 2> dy, view<T, 2> da,
                   view<T, 2> d_o) {
  const char* op = "gate backward";
  detail::check_shape(op, "o", o, a.shape());
  detail::check_shape(op, "dy", dy, a.shape());
  detail::check_shape(op, "da", da, a.shape());
  detail::check_shape(op, "do", d_o, a.shape());
  if (a.size() > 0) gate_backward_on(ctx, a, o, dy, da, d_o);
}

}  // namespace ratplus
