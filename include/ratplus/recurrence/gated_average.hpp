#pragma once
// RAT+'s cell: h_t = γ_t h_{t−1} + (1 − γ_t) x_t                                   (SPEC §1)

#include "ratplus/recurrence/concept.hpp"

namespace ratplus {

/// γ = sigmoid(g), as in the model.
struct sigmoid_gate {
  template <class S>
  RATPLUS_HD static S value(S g) {
    return sigmoid(g);
  }
  /// dγ/dg.
  template <class S>
  RATPLUS_HD static S derivative(S gamma) {
    return gamma * (S(1) - gamma);
  }
};

/// γ = g: the gate is given after its activation.
struct given_gate {
  template <class S>
  RATPLUS_HD static S value(S g) {
    return g;
  }
  template <class S>
  RATPLUS_HD static S derivative(S) {
    return S(1);
  }
};

/// The gated average. Adjoint: dh_{t−1} = γ dh, dx = (1 − γ) dh, dγ = (h_{t−1} − x) dh.
template <class Gate = sigmoid_gate>
struct basic_gated_average {
  static constexpr bool gated = true;
  [[nodiscard]] static std::string name() { return "gated_average"; }

  template <class S>
  RATPLUS_HD S step(S h, S x, S g, index_t) const {
    const S gamma = Gate::value(g);
    return gamma * h + (S(1) - gamma) * x;
  }

  template <class S>
  RATPLUS_HD cell_gradient<S> adjoint(S h, S x, S g, index_t, S dh) const {
    const S gamma = Gate::value(g);
    return {gamma * dh, (S(1) - gamma) * dh, (h - x) * dh * Gate::derivative(gamma)};
  }

  template <class S>
  RATPLUS_HD affine<S> element(S x, S g, index_t) const {
    const S gamma = Gate::value(g);
    return {gamma, (S(1) - gamma) * x};
  }
};

using gated_average = basic_gated_average<>;

}  // namespace ratplus
