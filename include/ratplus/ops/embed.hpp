#pragma once
// Token embedding: x_n = E[token_n] (SPEC §4)

#include "ratplus/ops/context.hpp"

namespace ratplus {

/// tokens (N), each in [0, V): the caller's promise, checked where tokens enter (model, trainer). table (V, d), x (N,
/// d) written.
template <Context Ctx, class T>
void embed_forward(Ctx& ctx, view<const token_t, 1> tokens, view<const T, 2> table, view<T, 2> x) {
  detail::check_shape("embed", "x", x, {{tokens.extent(0), table.extent(1)}});
  if (x.size() > 0) embed_forward_on(ctx, tokens, table, x);
}

/// dtable[token_n] += dx_n, in the order of n.
template <Context Ctx, class T>
void embed_backward(Ctx& ctx, view<const token_t, 1> tokens, view<const T, 2> dx, view<accumulator_t<T>, 2> dtable) {
  detail::check_shape("embed backward", "dx", dx, {{tokens.extent(0), dtable.extent(1)}});
  if (dx.size() > 0) embed_backward_on(ctx, tokens, dx, dtable);
}

}  // namespace ratplus
