#pragma once
// A cell that forgets its state at every multiple of `length`: RAT, the predecessor, is chunked<gated_average>.

#include "ratplus/core/error.hpp"
#include "ratplus/recurrence/gated_average.hpp"

namespace ratplus {

template <class Inner = gated_average>
class chunked {
  static_assert((require_cell<Inner>(), true));

 public:
  static constexpr bool gated = Inner::gated;

  /// Throws value_error when length < 1.
  explicit chunked(index_t length, Inner inner = {}) : length_(length), inner_(inner) {
    if (length < 1) throw value_error(message("chunked: length ", length, " is less than 1"));
  }

  /// "chunked:L" — the inner cell is the gated average.
  [[nodiscard]] std::string name() const { return message("chunked:", length_); }

  template <class S>
  RATPLUS_HD S step(S h, S x, S g, index_t t) const {
    return inner_.step(t % length_ == 0 ? S(0) : h, x, g, t);
  }

  template <class S>
  RATPLUS_HD cell_gradient<S> adjoint(S h, S x, S g, index_t t, S dh) const {
    const bool restart = t % length_ == 0;
    cell_gradient<S> d = inner_.adjoint(restart ? S(0) : h, x, g, t, dh);
    if (restart) d.dstate = S(0);
    return d;
  }

  template <class S>
  RATPLUS_HD affine<S> element(S x, S g, index_t t) const requires AssociativeCell<Inner> {
    affine<S> e = inner_.element(x, g, t);
    if (t % length_ == 0) e.a = S(0);
    return e;
  }

 private:
  index_t length_;
  [[no_unique_address]] Inner inner_;
};

}  // namespace ratplus
