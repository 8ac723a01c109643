#pragma once
// The residual stream, what every layer reads and adds to, and its gradient are held in accumulator_t<T>: every layer
// rounds what it reads of them, none rounds what the layers before it have added up.

#include <concepts>

#include "ratplus/ops/memory.hpp"

namespace ratplus {

/// `x` (N, d) as a factor of products of T: itself where T is its type already, else rounded into `scratch` (N, d).
template <Context Ctx, class T>
[[nodiscard]] view<const T, 2> as_factor(Ctx& ctx, view<const accumulator_t<T>, 2> x, view<T, 2> scratch) {
  if constexpr (std::same_as<T, accumulator_t<T>>) {
    return x;
  } else {
    copy(ctx, x, scratch);
    return scratch;
  }
}

}  // namespace ratplus
