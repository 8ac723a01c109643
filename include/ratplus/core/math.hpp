#pragma once
// The functions a recurrence cell may apply to a scalar. A backend that processes several channels at once passes packs
// instead of scalars and supplies these functions for its pack type, found by argument-dependent lookup: cells call
// them unqualified.

#include <cmath>

#include "ratplus/core/host_device.hpp"

namespace ratplus {

/// 1 / (1 + e^{-x}), without overflow for any x.
RATPLUS_HD inline float sigmoid(float x) {
  const float e = std::exp(-std::fabs(x));
  return (x >= 0 ? 1.0f : e) / (1.0f + e);
}

RATPLUS_HD inline double sigmoid(double x) {
  const double e = std::exp(-std::fabs(x));
  return (x >= 0 ? 1.0 : e) / (1.0 + e);
}

/// The normal distribution's tail without cancellation: Φ(−a) = e^{−a²/2} · normal_tail_ratio(1 / (1 + 0.3 a)), to 4e-9
/// relative for 0 ≤ a ≤ 13. The bell, which derivatives need too, is the caller's. multiply_add(x, y, z) = x y + z.
template <class X, class MultiplyAdd>
RATPLUS_HD inline X normal_tail_ratio(X t, MultiplyAdd&& multiply_add) {
  constexpr float c[] = {1.196864526e-01f,  1.195761688e-01f, 1.102012098e-01f,  7.854093595e-02f, 9.574106832e-02f,
                         -7.868540514e-02f, 1.909362622e-01f, -2.276036904e-01f, 1.121861650e-01f, -2.057916899e-02f};
  X sum(c[9]);
  for (int i = 8; i >= 0; --i) sum = multiply_add(sum, t, X(c[i]));
  return t * sum;
}

}  // namespace ratplus
