#pragma once
// The partial softmax of a subset of keys: running maximum m, sum l = Σ e^{s−m}. The weighted values o = Σ e^{s−m} v
// are rescaled by the same two factors. Combination is associative and commutative with identity (−∞, 0), so runs of
// keys, splits of a decode and shards of a sequence join in any order.

#include <cmath>
#include <limits>

#include "ratplus/core/host_device.hpp"

namespace ratplus {

template <class S>
struct softmax_state {
  S max = -std::numeric_limits<S>::infinity();
  S sum = S(0);

  /// log Σ e^s over everything seen; −∞ when nothing was.
  RATPLUS_HD S log_sum_exp() const { return sum > S(0) ? max + std::log(sum) : max; }
};

/// The combined state and the factors by which each side's weighted values are multiplied.
template <class S>
struct softmax_merge {
  softmax_state<S> state;
  S scale_a, scale_b;
};

template <class S>
RATPLUS_HD softmax_merge<S> combine(const softmax_state<S>& a, const softmax_state<S>& b) {
  const S max = a.max > b.max ? a.max : b.max;
  // exp(−∞ − (−∞)) is NaN: an empty side contributes nothing instead.
  const S scale_a = a.sum > S(0) ? std::exp(a.max - max) : S(0);
  const S scale_b = b.sum > S(0) ? std::exp(b.max - max) : S(0);
  return {{max, a.sum * scale_a + b.sum * scale_b}, scale_a, scale_b};
}

}  // namespace ratplus
