#pragma once
#include <cmath>
#include <numbers>

#include "ratplus/backend/reference/context.hpp"
#include "ratplus/ops/gelu.hpp"

namespace ratplus::reference {

namespace detail {
/// Φ(x), by the complementary function: 1 + erf(x / √2) would cancel for negative x.
template <class A>
[[nodiscard]] A normal_cdf(A x) {
  return A(0.5) * std::erfc(-x / std::numbers::sqrt2_v<A>);
}
}  // namespace detail

template <class T>
void gelu_forward_on(context&, view<const T, 2> x, view<T, 2> y) {
  for (index_t n = 0; n < x.extent(0); ++n)
    for (index_t i = 0; i < x.extent(1); ++i)
      y(n, i) = static_cast<T>(wide(x(n, i)) * detail::normal_cdf(wide(x(n, i))));
}

template <class T>
void gelu_backward_on(context&, view<const T, 2> x, view<const T, 2> dy, view<T, 2> dx, view<T, 2> y) {
  using A = accumulator_t<T>;
  const A density_at_0 = std::numbers::inv_sqrtpi_v<A> / std::numbers::sqrt2_v<A>;
  for (index_t n = 0; n < x.extent(0); ++n)
    for (index_t i = 0; i < x.extent(1); ++i) {
      const A v = wide(x(n, i)), cdf = detail::normal_cdf(v);
      dx(n, i) = static_cast<T>(wide(dy(n, i)) * (cdf + v * density_at_0 * std::exp(A(-0.5) * v * v)));
      if (y) y(n, i) = static_cast<T>(v * cdf);
    }
}

}  // namespace ratplus::reference
