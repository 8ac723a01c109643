#pragma once
// RMSNorm: y = x · rstd ⊙ w, rstd = 1 / sqrt(mean(x²) + eps), eps = 1e-6 (SPEC §1)
//
// Norms are what reads the residual stream: x and dx have its type, y and dy that of the products around it.

#include "ratplus/ops/context.hpp"

namespace ratplus {

inline constexpr double rms_norm_epsilon = 1e-6;

template <class T>
struct rms_norm_forward_args {
  view<const accumulator_t<T>, 2> x = {};       // (N, d)
  view<const accumulator_t<T>, 1> weight = {};  // (d)
  view<T, 2> y = {};                            // (N, d), written; may be x where the types are the same
  view<accumulator_t<T>, 1> rstd = {};          // (N), written; absent: not wanted
};

template <Context Ctx, class T>
void rms_norm_forward(Ctx& ctx, const rms_norm_forward_args<T>& p) {
  const index_t N = p.x.extent(0), d = p.x.extent(1);
  detail::check_shape("rms_norm", "weight", p.weight, {{d}});
  detail::check_shape("rms_norm", "y", p.y, {{N, d}});
  detail::check_shape_if_given("rms_norm", "rstd", p.rstd, {{N}});
  if (p.x.size() > 0) rms_norm_forward_on(ctx, p);
}

template <class T>
struct rms_norm_backward_args {
  view<const accumulator_t<T>, 2> x = {};       // (N, d)
  view<const accumulator_t<T>, 1> weight = {};  // (d)
  view<const accumulator_t<T>, 1> rstd = {};    // (N), from the forward pass
  view<const T, 2> dy = {};                     // (N, d)
  view<accumulator_t<T>, 2> dx = {};            // (N, d), added to
  view<accumulator_t<T>, 1> dweight = {};       // (d), added to
};

template <Context Ctx, class T>
void rms_norm_backward(Ctx& ctx, const rms_norm_backward_args<T>& p) {
  const index_t N = p.x.extent(0), d = p.x.extent(1);
  detail::check_shape("rms_norm", "weight", p.weight, {{d}});
  detail::check_shape("rms_norm", "rstd", p.rstd, {{N}});
  detail::check_shape("rms_norm", "dy", p.dy, {{N, d}});
  detail::check_shape("rms_norm", "dx", p.dx, {{N, d}});
  detail::check_shape("rms_norm", "dweight", p.dweight, {{d}});
  if (p.x.size() > 0) rms_norm_backward_on(ctx, p);
}

}  // namespace ratplus
