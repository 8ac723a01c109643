#pragma once
// No recurrence: k̃ = k, ṽ = v. The attention baseline.

#include "ratplus/recurrence/concept.hpp"

namespace ratplus {

struct none {
  static constexpr bool gated = false;
  static constexpr bool identity = true;
  [[nodiscard]] static std::string name() { return "none"; }

  template <class S>
  RATPLUS_HD S step(S, S x, S, index_t) const {
    return x;
  }
  template <class S>
  RATPLUS_HD cell_gradient<S> adjoint(S, S, S, index_t, S dh) const {
    return {S(0), dh, S(0)};
  }
  template <class S>
  RATPLUS_HD affine<S> element(S x, S, index_t) const {
    return {S(0), x};
  }
};

}  // namespace ratplus
