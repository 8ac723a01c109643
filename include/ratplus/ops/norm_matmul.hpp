#pragma once
// What a layer begins with: C = RMSNorm(x; w) · Bᵀ and, where it is a feed-forward layer, GELU(C) (SPEC §1, §4). The
// operations of these names one after the other; a backend may do few rows at once (`norm_matmul_on`).

#include "ratplus/ops/gelu.hpp"
#include "ratplus/ops/matmul.hpp"
#include "ratplus/ops/norm.hpp"

namespace ratplus {

template <class T, class TC = T>
struct norm_matmul_args {
  using A = accumulator_t<T>;
  view<const A, 2> x = {};     // (M, K)
  view<const A, 1> norm = {};  // (K); it and b are parameters, not written by the operation just before this one
  view<const T, 2> b = {};     // (N, K)
  view<T, 2> normed = {};      // (M, K), scratch
  view<A, 1> rstd = {};        // (M), written; absent: not wanted
  view<TC, 2> c = {};          // (M, N), written
  view<T, 2> activated = {};   // (M, N), GELU of c, written; absent: not wanted
};

/// Throws shape_error when the extents do not fit. `normed` is of no meaning afterwards.
template <Context Ctx, class T, class TC>
void norm_matmul(Ctx& ctx, const norm_matmul_args<T, TC>& p) {
  static_assert(std::same_as<T, TC> || !std::same_as<T, accumulator_t<T>>);
  if constexpr (requires { norm_matmul_on(ctx, p); }) {
    const index_t M = p.x.extent(0), K = p.x.extent(1), N = p.c.extent(1);
    const char* op = "norm_matmul";
    detail::check_shape(op, "norm", p.norm, {{K}});
    detail::check_shape(op, "b", p.b, {{N, K}});
    detail::check_shape(op, "c", p.c, {{M, N}});
    detail::check_shape_if_given(op, "rstd", p.rstd, {{M}});
    detail::check_shape_if_given(op, "activated", p.activated, {{M, N}});
    if (norm_matmul_on(ctx, p)) return;
  }
  rms_norm_forward(ctx, rms_norm_forward_args<T>{.x = p.x, .weight = p.norm, .y = p.normed, .rstd = p.rstd});
  matmul(ctx, matmul_args<T, TC>{.a = p.normed, .b = p.b, .c = p.c, .transpose_b = true, .b_is_parameter = true});
  if constexpr (std::same_as<T, TC>)
    if (p.activated) gelu_forward<Ctx, T>(ctx, p.c, p.activated);
}

}  // namespace ratplus
