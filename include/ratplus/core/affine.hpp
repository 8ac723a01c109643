#pragma once
// The affine element of a linear recurrence: h ↦ a·h + b. Composition is associative, with identity (1, 0), so any
// grouping of consecutive steps (chunks of a scan, shards of a sequence) may be combined in any bracketing.

#include "ratplus/core/host_device.hpp"

namespace ratplus {

template <class S>
struct affine {
  S a, b;

  RATPLUS_HD static constexpr affine identity() { return {S(1), S(0)}; }
  RATPLUS_HD constexpr S operator()(S h) const { return a * h + b; }
};

/// `earlier` first, then `later`.
template <class S>
RATPLUS_HD constexpr affine<S> combine(const affine<S>& earlier, const affine<S>& later) {
  return {later.a * earlier.a, later.a * earlier.b + later.b};
}

}  // namespace ratplus
