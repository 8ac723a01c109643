#pragma once
// What a recurrence cell is: how the state of one channel is carried along the sequence. A cell is pure arithmetic on
// one channel; how channels, heads and positions are walked is the backends' business.

#include <concepts>
#include <string>

#include "ratplus/core/affine.hpp"
#include "ratplus/core/host_device.hpp"
#include "ratplus/core/index.hpp"
#include "ratplus/core/math.hpp"

namespace ratplus {

/// What one step backwards yields from the gradient of h_t: the gradients of h_{t−1}, of x_t and of the gate's
/// pre-activation g_t.
template <class S>
struct cell_gradient {
  S dstate, dinput, dgate;
};

namespace detail {
template <class C>
concept HasGated = requires {
  { C::gated } -> std::convertible_to<bool>;
};
template <class C>
concept HasStep = requires(const C& c, float s, index_t t) {
  { c.step(s, s, s, t) } -> std::convertible_to<float>;
};
template <class C>
concept HasAdjoint = requires(const C& c, float s, index_t t) {
  { c.adjoint(s, s, s, t, s) } -> std::convertible_to<cell_gradient<float>>;
};
}  // namespace detail

/// A cell has, for a state h, an input x, a gate's pre-activation g and the position t, all of type S:
///
///   static constexpr bool gated                    whether the projection has a slice g; if not, S(0) is passed and
///                                                  dgate is ignored
///   S step(S h, S x, S g, index_t t)               h_t from h = h_{t−1}
///   cell_gradient<S> adjoint(S h, S x, S g, index_t t, S dh)      h = h_{t−1}, dh the gradient of h_t
///   std::string name()                             as config.json calls it; only models that are saved need it
///
/// S is float, double or a pack of floats: use arithmetic and the functions of core/math.hpp, called unqualified (after
/// `using ratplus::sigmoid;` in a namespace of your own), and branch on t alone; then every backend vectorises the
/// cell. Members are const and RATPLUS_HD.
template <class C>
concept Cell = detail::HasGated<C> && detail::HasStep<C> && detail::HasAdjoint<C>;

/// A cell whose step is affine in h also gives that map; a backend may then scan chunks of a sequence in parallel.
///
///   affine<S> element(S x, S g, index_t t)      step(h, x, g, t) == element(x, g, t)(h)
template <class C>
concept AssociativeCell = Cell<C> && requires(const C& c, float s, index_t t) {
  { c.element(s, s, t) } -> std::convertible_to<affine<float>>;
};

/// A cell that passes its input through: h_t = x_t. Backends then skip the recurrence.
template <class C>
concept IdentityCell = Cell<C> && requires {
  requires C::identity;
};

/// Turns an unsatisfied Cell into a sentence. Every entry point that takes a cell calls it.
template <class C>
constexpr void require_cell() {
  static_assert(detail::HasGated<C>,
                "ratplus: this type is not a recurrence Cell: it lacks `static constexpr bool gated`. "
                "Read ratplus/recurrence/concept.hpp.");
  static_assert(detail::HasStep<C>,
                "ratplus: this type is not a recurrence Cell: it lacks `S step(S h, S x, S g, index_t t) const`. "
                "Read ratplus/recurrence/concept.hpp.");
  static_assert(
      detail::HasAdjoint<C>,
      "ratplus: this type is not a recurrence Cell: it lacks the adjoint, `cell_gradient<S> adjoint(S h, S x, S g, "
      "index_t t, S dh) const`. Read ratplus/recurrence/concept.hpp.");
}

}  // namespace ratplus
