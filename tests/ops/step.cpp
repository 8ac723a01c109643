#include "ratplus/ops/step.hpp"

#include "support/backends.hpp"
#include "support/guarded.hpp"

using namespace ratplus;
using namespace ratplus_tests;

// Parameters and moments are float32 or better, whatever the type of the products.
TEMPLATE_TEST_CASE("adamw over several steps follows an independent loop in double", "", RATPLUS_TEST_BACKENDS) {
  using P = accumulator_t<typename TestType::scalar>;
  TestType backend;
  auto& ctx = backend.ctx;
  for (const index_t n : awkward_sizes) {
    CAPTURE(n);
    const auto start = random_array<P>(dims(n), 1);
    guarded parameter(ctx, start), m(ctx, array<P, 1>(dims(n))), v(ctx, array<P, 1>(dims(n)));
    auto p = start.template to<double>();
    array<double, 1> first(dims(n)), second(dims(n));
    for (index_t step = 1; step <= 5; ++step) {
      const double lr = 0.01 / static_cast<double>(step), scale = step % 2 ? 1.0 : 0.3;
      const auto grad = random_array<P>(dims(n), static_cast<std::uint64_t>(10 + step));
      const guarded on_grad(ctx, grad);
      adamw_coefficients c;
      c.lr = lr;
      c.step = step;
      c.grad_scale = scale;
      adamw(ctx, adamw_args<P>{parameter.out(), on_grad.in(), m.out(), v.out()}, c);
      for (index_t i = 0; i < n; ++i) {
        const double g = number(grad(i)) * scale;
        p(i) -= lr * 0.1 * p(i);
        first(i) = 0.9 * first(i) + 0.1 * g;
        second(i) = 0.95 * second(i) + 0.05 * g * g;
        const double m_hat = first(i) / (1 - std::pow(0.9, static_cast<double>(step)));
        const double v_hat = second(i) / (1 - std::pow(0.95, static_cast<double>(step)));
        p(i) -= lr * m_hat / (std::sqrt(v_hat) + 1e-8);
      }
    }
    CHECK(difference(parameter.read(), p) <= tolerance_of<P>);
    CHECK(difference(m.read(), first) <= tolerance_of<P>);
    CHECK(difference(v.read(), second) <= tolerance_of<P>);
  }
}

TEMPLATE_TEST_CASE("adamw uses every coefficient", "", RATPLUS_TEST_BACKENDS) {
  using P = accumulator_t<typename TestType::scalar>;
  TestType backend;
  auto& ctx = backend.ctx;
  guarded parameter(ctx, array<P, 1>(dims(1), P(2))), m(ctx, array<P, 1>(dims(1), P(0.5))),
      v(ctx, array<P, 1>(dims(1), P(0.25)));
  const guarded grad(ctx, array<P, 1>(dims(1), P(4)));
  const adamw_coefficients c{0.1, 0.5, 0.75, 1.0, 0.25, 2, 0.25};
  adamw(ctx, adamw_args<P>{parameter.out(), grad.in(), m.out(), v.out()}, c);
  // g = 1; m = 0.25 + 0.5; v = 0.1875 + 0.25; corrections 1 − 1/4 and 1 − 9/16: m̂ = v̂ = 1. 2 · 0.975 − 0.1 · 1 / 2.
  CHECK(difference(number(m.read()(0)), 0.75) <= 1e-7);
  CHECK(difference(number(v.read()(0)), 0.4375) <= 1e-7);
  CHECK(difference(number(parameter.read()(0)), 1.9) <= 1e-7);
}

TEMPLATE_TEST_CASE("adamw with no gradient only decays", "", RATPLUS_TEST_BACKENDS) {
  using P = accumulator_t<typename TestType::scalar>;
  TestType backend;
  auto& ctx = backend.ctx;
  guarded parameter(ctx, array<P, 1>(dims(3), P(1))), m(ctx, array<P, 1>(dims(3))), v(ctx, array<P, 1>(dims(3)));
  const guarded grad(ctx, array<P, 1>(dims(3)));
  adamw_coefficients c;
  c.lr = 0.5;
  adamw(ctx, adamw_args<P>{parameter.out(), grad.in(), m.out(), v.out()}, c);
  CHECK(difference(parameter.read(), array<double, 1>(dims(3), 0.95)) <= 1e-7);
}

TEMPLATE_TEST_CASE("squared_norm sums in double", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const index_t n : awkward_sizes) {
    const auto x = random_array<T>(dims(n), 1);
    const guarded on_x(backend.ctx, x);
    CHECK(difference(squared_norm(backend.ctx, on_x.in()), inner(x, x)) <= 1e-12);
  }
  // A million equal squares: float32 sums would be off in the third digit.
  const array<T, 1> many(dims(1000003), rounded<T>(0.1));
  const guarded on_many(backend.ctx, many);
  CHECK(difference(squared_norm(backend.ctx, on_many.in()), 1000003 * number(many(0)) * number(many(0))) <= 1e-9);
  const guarded none(backend.ctx, array<T, 1>(dims(0)));
  CHECK(squared_norm(backend.ctx, none.in()) == 0.0);
  // Beyond float32's largest number.
  const guarded large(backend.ctx, array<T, 1>(dims(2), rounded<T>(1e25)));
  const double x = number(rounded<T>(1e25));
  CHECK(difference(squared_norm(backend.ctx, large.in()), 2 * x * x) <= 1e-12);
}
