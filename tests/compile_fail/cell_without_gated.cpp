// expect: it lacks `static constexpr bool gated`
// expect: Read ratplus/recurrence/concept.hpp
#include "ratplus/backend/reference/scan.hpp"

struct sum {
  template <class S>
  S step(S h, S x, S, ratplus::index_t) const {
    return h + x;
  }
  template <class S>
  ratplus::cell_gradient<S> adjoint(S, S, S, ratplus::index_t, S dh) const {
    return {dh, dh, S(0)};
  }
};

int main() {
  ratplus::reference::context ctx;
  ratplus::scan_forward(ctx, sum{}, ratplus::scan_forward_args<float>{});
}
