#pragma once
#include <cmath>

#include "ratplus/backend/reference/context.hpp"
#include "ratplus/ops/step.hpp"

namespace ratplus::reference {

template <class T>
void adamw_on(context&, const adamw_args<T>& p, const adamw_coefficients& c) {
  const double correct1 = 1 - std::pow(c.beta1, static_cast<double>(c.step));
  const double correct2 = 1 - std::pow(c.beta2, static_cast<double>(c.step));
  for (index_t i = 0; i < p.parameter.extent(0); ++i) {
    const double g = static_cast<double>(p.grad[i]) * c.grad_scale;
    const double m = c.beta1 * static_cast<double>(p.m[i]) + (1 - c.beta1) * g;
    const double v = c.beta2 * static_cast<double>(p.v[i]) + (1 - c.beta2) * g * g;
    const double decayed = static_cast<double>(p.parameter[i]) * (1 - c.lr * c.weight_decay);
    p.m[i] = static_cast<T>(m);
    p.v[i] = static_cast<T>(v);
    p.parameter[i] = static_cast<T>(decayed - c.lr * (m / correct1) / (std::sqrt(v / correct2) + c.epsilon));
  }
}

template <class T>
[[nodiscard]] double squared_norm_on(context&, view<const T, 1> x) {
  double sum = 0;
  for (index_t i = 0; i < x.extent(0); ++i) sum += static_cast<double>(wide(x[i])) * static_cast<double>(wide(x[i]));
  return sum;
}

}  // namespace ratplus::reference
