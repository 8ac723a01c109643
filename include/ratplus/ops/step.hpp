#pragma once
// The optimiser's arithmetic: AdamW with decoupled decay, and the global gradient norm (SPEC §5)

#include "ratplus/ops/context.hpp"

namespace ratplus {

struct adamw_coefficients {
  double lr = 0;
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
  index_t step = 1;       // counted from 1, for bias correction
  double grad_scale = 1;  // gradients are multiplied by it first: the clip
};

template <class T>
struct adamw_args {
  view<T, 1> parameter = {};   // (N), updated
  view<const T, 1> grad = {};  // (N)
  view<T, 1> m = {}, v = {};   // (N), moments, updated
};

/// p −= lr · decay · p; m = β₁m + (1 − β₁)g; v = β₂v + (1 − β₂)g²; p −= lr · (m / (1 − β₁^step)) / (sqrt(v / (1 −
/// β₂^step)) + ε).
template <Context Ctx, class T>
void adamw(Ctx& ctx, const adamw_args<T>& p, const adamw_coefficients& c) {
  detail::check_shape("adamw", "grad", p.grad, p.parameter.shape());
  detail::check_shape("adamw", "m", p.m, p.parameter.shape());
  detail::check_shape("adamw", "v", p.v, p.parameter.shape());
  if (p.parameter.size() > 0) adamw_on(ctx, p, c);
}

/// Σ x², summed in double in an order that does not depend on the number of threads. x contiguous, (N).
template <Context Ctx, class T>
[[nodiscard]] double squared_norm(Ctx& ctx, view<const T, 1> x) {
  return x.size() > 0 ? squared_norm_on(ctx, x) : 0.0;
}

}  // namespace ratplus
