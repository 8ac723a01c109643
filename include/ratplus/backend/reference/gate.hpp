#pragma once
#include "ratplus/backend/reference/context.hpp"
#include "ratplus/core/math.hpp"
#include "ratplus/ops/gate.hpp"

namespace ratplus::reference {

template <class T>
void gate_forward_on(context&, view<const T, 2> a, view<const T, 2> o, view<T, 2> y) {
  for (index_t n = 0; n < a.extent(0); ++n)
    for (index_t i = 0; i < a.extent(1); ++i) y(n, i) = static_cast<T>(wide(a(n, i)) * sigmoid(wide(o(n, i))));
}

template <class T>
void gate_backward_on(context&, view<const T, 2> a, view<const T, 2> o, view<const T, 2> dy, view<T, 2> da,
                      view<T, 2> d_o) {
  using A = accumulator_t<T>;
  for (index_t n = 0; n < a.extent(0); ++n)
    for (index_t i = 0; i < a.extent(1); ++i) {
      const A s = sigmoid(wide(o(n, i))), g = wide(dy(n, i)), x = wide(a(n, i));
      da(n, i) = static_cast<T>(g * s);
      d_o(n, i) = static_cast<T>(g * x * s * (A(1) - s));
    }
}

}  // namespace ratplus::reference
