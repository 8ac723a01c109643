#include "ratplus/ops/norm.hpp"

#include "support/backends.hpp"
#include "support/guarded.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

struct norm_oracle {
  array<double, 2> y, dx;
  array<double, 1> rstd, dweight;
};

// The Jacobian row by row: dx_j = Σ_i dy_i w_i (δ_ij r − x_i x_j r³ / d).
template <class A, class T>
norm_oracle norm(const array<A, 2>& x, const array<A, 1>& w, const array<T, 2>& dy) {
  const index_t N = x.shape[0], d = x.shape[1];
  norm_oracle o{array<double, 2>(x.shape), array<double, 2>(x.shape), array<double, 1>(dims(N)),
                array<double, 1>(dims(d))};
  for (index_t n = 0; n < N; ++n) {
    double squares = 0, along = 0;
    for (index_t i = 0; i < d; ++i) {
      squares += number(x(n, i)) * number(x(n, i));
      along += number(dy(n, i)) * number(w(i)) * number(x(n, i));
    }
    const double r = 1 / std::sqrt(squares / static_cast<double>(d) + 1e-6);
    o.rstd(n) = r;
    for (index_t i = 0; i < d; ++i) {
      o.y(n, i) = number(x(n, i)) * r * number(w(i));
      o.dx(n, i) = number(dy(n, i)) * number(w(i)) * r - number(x(n, i)) * r * r * r * along / static_cast<double>(d);
      o.dweight(i) += number(dy(n, i)) * number(x(n, i)) * r;
    }
  }
  return o;
}

}  // namespace

TEMPLATE_TEST_CASE("rms_norm forward and backward", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto check = [&](index_t N, index_t d, layout where, double size) {
    CAPTURE(N, d, static_cast<int>(where), size);
    const auto x = random_array<A>(dims(N, d), 1, size), dx_before = random_array<A>(dims(N, d), 4);
    const auto dy = random_array<T>(dims(N, d), 2);
    const auto w = random_array<A>(dims(d), 3);
    const auto dw_before = random_array<A>(dims(d), 5);
    const norm_oracle expected = norm(x, w, dy);

    const guarded on_x(ctx, x, where);
    const guarded on_dy(ctx, dy, where);
    const guarded on_w(ctx, w);
    auto y = poisoned<T>(ctx, x.shape, where);
    auto rstd = poisoned<A>(ctx, dims(N));
    rms_norm_forward(ctx, rms_norm_forward_args<T>{on_x.in(), on_w.in(), y.out(), rstd.out()});
    CHECK(difference(y.read(), expected.y) <= TestType::tolerance);
    CHECK(difference(rstd.read(), expected.rstd) <= tolerance_of<A>);

    // Without rstd, and in place: the same bits.
    auto again = poisoned<T>(ctx, x.shape, where);
    rms_norm_forward(ctx, rms_norm_forward_args<T>{on_x.in(), on_w.in(), again.out(), {}});
    CHECK(same_bits(again.read(), y.read()));
    if constexpr (std::is_same_v<T, A>) {
      guarded in_place(ctx, x, where);
      rms_norm_forward(ctx, rms_norm_forward_args<T>{in_place.in(), on_w.in(), in_place.out(), {}});
      CHECK(same_bits(in_place.read(), y.read()));
    }

    // Gradients are added to what is there.
    guarded dx(ctx, dx_before, where);
    guarded dw(ctx, dw_before);
    rms_norm_backward(ctx, rms_norm_backward_args<T>{on_x.in(), on_w.in(), rstd.in(), on_dy.in(), dx.out(), dw.out()});
    auto dx_expected = expected.dx;
    auto dw_expected = expected.dweight;
    for (std::size_t i = 0; i < dx_expected.data.size(); ++i) dx_expected.data[i] += number(dx_before.data[i]);
    for (std::size_t i = 0; i < dw_expected.data.size(); ++i) dw_expected.data[i] += number(dw_before.data[i]);
    CHECK(difference(dx.read(), dx_expected) <= tolerance_of<A>);
    CHECK(difference(dw.read(), dw_expected) <= tolerance_of<A>);
  };
  for (const index_t n : awkward_sizes)
    for (const layout where : {layout::packed, layout::strided}) {
      check(n, 32, where, 1);
      check(5, n, where, 1);
    }
  check(2, 4099, layout::packed, 1);
  check(300, 65, layout::strided, 1e3);
  check(9, 64, layout::packed, 1e-3);  // where epsilon is as large as the mean square
}

TEMPLATE_TEST_CASE("rms_norm of zeros is zero and its gradient finite", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto w = random_array<A>(dims(8), 1);
  const auto dy = random_array<T>(dims(3, 8), 2);
  const guarded x(ctx, array<A, 2>(dims(3, 8)));
  const guarded on_dy(ctx, dy);
  const guarded on_w(ctx, w);
  auto y = poisoned<T>(ctx, dims(3, 8));
  auto rstd = poisoned<A>(ctx, dims(3));
  rms_norm_forward(ctx, rms_norm_forward_args<T>{x.in(), on_w.in(), y.out(), rstd.out()});
  CHECK(difference(y.read(), array<T, 2>(dims(3, 8))) <= 0.0);
  CHECK(difference(rstd.read(), array<double, 1>(dims(3), 1000.0)) <= tolerance_of<A>);
  guarded dx(ctx, array<A, 2>(dims(3, 8)));
  guarded dw(ctx, array<A, 1>(dims(8)));
  rms_norm_backward(ctx, rms_norm_backward_args<T>{x.in(), on_w.in(), rstd.in(), on_dy.in(), dx.out(), dw.out()});
  CHECK(difference(dx.read(), norm(array<A, 2>(dims(3, 8)), w, dy).dx) <= tolerance_of<A>);
  CHECK(difference(dw.read(), array<A, 1>(dims(8))) <= 0.0);
}
