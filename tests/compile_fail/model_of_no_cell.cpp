// expect: it lacks the adjoint, `cell_gradient<S> adjoint(S h, S x, S g, index_t t, S dh) const`
#include "ratplus/backend/reference/backend.hpp"
#include "ratplus/model/language_model.hpp"

struct sum {
  static constexpr bool gated = false;
  template <class S>
  S step(S h, S x, S, ratplus::index_t) const {
    return h + x;
  }
};

int main() {
  ratplus::reference::context ctx;
  ratplus::language_model<sum> model(ctx, {});
}
