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

}  // namespace ratplus
