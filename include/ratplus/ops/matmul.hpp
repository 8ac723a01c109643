#pragma once
// C = op(A) · op(B) [+ addend], the products of the model's projections and of their gradients.

#include "ratplus/ops/context.hpp"

namespace ratplus {

/// Row-major matrices, rows possibly apart (a slice of a wider matrix). Data A and B share a type; C may be wider
/// (float32 gradients of bfloat16 products). Sums are float32 or better.
template <class T, class TC = T>
struct matmul_args {
  view<const T, 2> a = {};        // (M, K), or (K, M) when transpose_a
  view<const T, 2> b = {};        // (K, N), or (N, K) when transpose_b
  view<TC, 2> c = {};             // (M, N), written
  view<const TC, 2> addend = {};  // (M, N), absent: none; may be c itself: accumulate
  bool transpose_a = false;
  bool transpose_b = false;
  bool b_is_parameter = false;  // b was not written by the operation just before this one: it may be read early
};

/// `c` must not overlap `a` or `b`. Throws shape_error when the extents do not fit.
template <Context Ctx, class T, class TC>
void matmul(Ctx& ctx, const matmul_args<T, TC>& p) {
  const index_t M = p.c.extent(0), N = p.c.extent(1), K = p.a.extent(p.transpose_a ? 0 : 1);
  detail::check_shape("matmul", "a", p.a, p.transpose_a ? extents<2>{{K, M}} : extents<2>{{M, K}});
  detail::check_shape("matmul", "b", p.b, p.transpose_b ? extents<2>{{N, K}} : extents<2>{{K, N}});
  detail::check_shape_if_given("matmul", "addend", p.addend, {{M, N}});
  if (M > 0 && N > 0) matmul_on(ctx, p);
}

}  // namespace ratplus
