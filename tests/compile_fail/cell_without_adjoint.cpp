// expect: it lacks the adjoint, `cell_gradient<S> adjoint(S h, S x, S g, index_t t, S dh) const`
// expect: Read ratplus/recurrence/concept.hpp
#include "ratplus/backend/reference/scan.hpp"

struct sum {
  static constexpr bool gated = false;
  template <class S>
  S step(S h, S x, S, ratplus::index_t) const {
    return h + x;
  }
};

int main() {
  ratplus::reference::context ctx;
  ratplus::scan_backward(ctx, sum{}, ratplus::scan_backward_args<float>{});
}
