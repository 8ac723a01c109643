#pragma once
// Exact GELU: y = x Φ(x), Φ(x) = (1 + erf(x / √2)) / 2; y' = Φ(x) + x φ(x) (SPEC §4)

#include "ratplus/ops/context.hpp"

namespace ratplus {

/// x, y: (N, F); y may be x.
template <Context Ctx, class T>
void gelu_forward(Ctx& ctx, view<const T, 2> x, view<T, 2> y) {
  detail::check_shape("gelu", "y", y, x.shape());
  if (x.size() > 0) gelu_forward_on(ctx, x, y);
}

/// dx = dy ⊙ y'(x), written; dx may be dy. y, when given, is written once more: cheap here for a caller that did not
/// keep it.
template <Context Ctx, class T>
void gelu_backward(Ctx& ctx, view<const T, 2> x, view<const T, 2> dy, view<T, 2> dx, view<T, 2> y = {}) {
  detail::check_shape("gelu backward", "dy", dy, x.shape());
  detail::check_shape("gelu backward", "dx", dx, x.shape());
  detail::check_shape_if_given("gelu backward", "y", y, x.shape());
  if (x.size() > 0) gelu_backward_on(ctx, x, dy, dx, y);
}

}  // namespace ratplus
