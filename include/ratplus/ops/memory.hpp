#pragma once
// Moving and filling memory.

#include "ratplus/ops/context.hpp"

namespace ratplus {

/// x = value, everywhere.
template <Context Ctx, class T>
void fill(Ctx& ctx, view<T, 1> x, T value) {
  if (x.size() > 0) fill_on(ctx, x, value);
}

/// y = x, row by row, converting the scalar type (round to nearest). Shapes equal; must not overlap.
template <Context Ctx, class From, class To, int Rank>
void copy(Ctx& ctx, view<const From, Rank> x, view<To, Rank> y) {
  detail::check_shape("copy", "destination", y, x.shape());
  if (x.size() > 0) copy_on(ctx, x, y);
}

/// Host memory → the context's space. `x.size()` elements, contiguous on both sides; the host memory may be reused on
/// return.
template <Context Ctx, class T>
void upload(Ctx& ctx, const T* host, view<T, 1> x) {
  if (x.size() > 0) upload_on(ctx, host, x);
}

/// The context's space → host memory, complete on return.
template <Context Ctx, class T>
void download(Ctx& ctx, view<const T, 1> x, T* host) {
  if (x.size() > 0) download_on(ctx, x, host);
}

}  // namespace ratplus
