#include "ratplus/ops/gelu.hpp"

#include <numbers>

#include "support/backends.hpp"
#include "support/guarded.hpp"

using namespace ratplus;
using namespace ratplus_tests;

TEMPLATE_TEST_CASE("gelu forward and backward", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto check = [&](index_t N, index_t F, layout where, double size) {
    CAPTURE(N, F, static_cast<int>(where), size);
    const auto x = random_array<T>(dims(N, F), 1, size), dy = random_array<T>(dims(N, F), 2);
    array<double, 2> y(x.shape), dx(x.shape);
    for (std::size_t i = 0; i < x.data.size(); ++i) {
      const double v = number(x.data[i]), cdf = std::erfc(-v * std::numbers::sqrt2 / 2) / 2;
      y.data[i] = v * cdf;
      dx.data[i] = number(dy.data[i]) * (cdf + v * std::exp(-v * v / 2) / std::sqrt(2 * std::numbers::pi));
    }
    const guarded on_x(ctx, x, where), on_dy(ctx, dy, where);
    auto on_y = poisoned<T>(ctx, x.shape, where), on_dx = poisoned<T>(ctx, x.shape, where);
    gelu_forward(ctx, on_x.in(), on_y.out());
    CHECK(difference(on_y.read(), y) <= TestType::tolerance);
    gelu_backward(ctx, on_x.in(), on_dy.in(), on_dx.out());
    CHECK(difference(on_dx.read(), dx) <= TestType::tolerance);

    guarded in_place(ctx, x, where), over_dy(ctx, dy, where);
    gelu_forward(ctx, in_place.in(), in_place.out());
    CHECK(same_bits(in_place.read(), on_y.read()));
    auto again = poisoned<T>(ctx, x.shape, where);
    gelu_backward(ctx, on_x.in(), over_dy.in(), over_dy.out(), again.out());
    CHECK(same_bits(over_dy.read(), on_dx.read()));
    CHECK(same_bits(again.read(), on_y.read()));
  };
  for (const index_t n : awkward_sizes)
    for (const layout where : {layout::packed, layout::strided}) {
      check(n, 5, where, 1);
      check(2, n, where, 1);
    }
  check(65, 127, layout::strided, 3);
  check(40, 40, layout::packed, 0.01);
}

TEMPLATE_TEST_CASE("gelu far from zero is the identity, or zero", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  auto& ctx = backend.ctx;
  array<T, 2> x(dims(1, 5)), ones(dims(1, 5), rounded<T>(1));
  x.data = {rounded<T>(100), rounded<T>(-100), rounded<T>(1e4), rounded<T>(-1e4), rounded<T>(0)};
  const guarded on_x(ctx, x), dy(ctx, ones);
  auto y = poisoned<T>(ctx, x.shape), dx = poisoned<T>(ctx, x.shape);
  gelu_forward(ctx, on_x.in(), y.out());
  gelu_backward(ctx, on_x.in(), dy.in(), dx.out());
  array<double, 2> expected_y(x.shape), expected_dx(x.shape);
  expected_y.data = {number(x.data[0]), 0, number(x.data[2]), 0, 0};
  expected_dx.data = {1, 0, 1, 0, 0.5};
  CHECK(difference(y.read(), expected_y) <= 1e-30);
  CHECK(difference(dx.read(), expected_dx) <= 1e-7);
}
