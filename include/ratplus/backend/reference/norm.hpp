#pragma once
#include <cmath>

#include "ratplus/backend/reference/context.hpp"
#include "ratplus/ops/norm.hpp"

namespace ratplus::reference {

template <class T>
void rms_norm_forward_on(context&, const rms_norm_forward_args<T>& p) {
  using A = accumulator_t<T>;
  const index_t N = p.x.extent(0), d = p.x.extent(1);
  for (index_t n = 0; n < N; ++n) {
    double squares = 0;  // one after the other in float32, thousands of positive terms would lose two digits
    for (index_t i = 0; i < d; ++i) squares += static_cast<double>(p.x(n, i)) * static_cast<double>(p.x(n, i));
    const A rstd = static_cast<A>(1 / std::sqrt(squares / static_cast<double>(d) + rms_norm_epsilon));
    for (index_t i = 0; i < d; ++i) p.y(n, i) = static_cast<T>(p.x(n, i) * rstd * p.weight[i]);
    if (p.rstd) p.rstd[n] = rstd;
  }
}

// With x̂ = x · rstd: dx += rstd (w ⊙ dy − x̂ · mean(w ⊙ dy ⊙ x̂)), dw += Σ_n dy ⊙ x̂.
template <class T>
void rms_norm_backward_on(context&, const rms_norm_backward_args<T>& p) {
  using A = accumulator_t<T>;
  const index_t N = p.x.extent(0), d = p.x.extent(1);
  for (index_t n = 0; n < N; ++n) {
    const A rstd = p.rstd[n];
    A mean = 0;
    for (index_t i = 0; i < d; ++i) mean += p.weight[i] * wide(p.dy(n, i)) * p.x(n, i) * rstd;
    mean /= static_cast<A>(d);
    for (index_t i = 0; i < d; ++i) {
      const A normed = p.x(n, i) * rstd, dy = wide(p.dy(n, i));
      p.dx(n, i) += rstd * (p.weight[i] * dy - normed * mean);
      p.dweight[i] += dy * normed;
    }
  }
}

}  // namespace ratplus::reference
