#include "ratplus/ops/gate.hpp"

#include "support/backends.hpp"
#include "support/guarded.hpp"

using namespace ratplus;
using namespace ratplus_tests;

TEMPLATE_TEST_CASE("gate forward and backward", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto check = [&](index_t N, index_t d, layout where, double size) {
    CAPTURE(N, d, static_cast<int>(where), size);
    const auto a = random_array<T>(dims(N, d), 1), o = random_array<T>(dims(N, d), 2, size),
               dy = random_array<T>(dims(N, d), 3);
    array<double, 2> y(a.shape), da(a.shape), d_o(a.shape);
    for (std::size_t i = 0; i < a.data.size(); ++i) {
      const double e = std::exp(-number(o.data[i])), s = 1 / (1 + e);
      y.data[i] = number(a.data[i]) * s;
      da.data[i] = number(dy.data[i]) * s;
      d_o.data[i] = number(dy.data[i]) * number(a.data[i]) * s * s * e;
    }
    const guarded on_a(ctx, a, where), on_o(ctx, o, where), on_dy(ctx, dy, where);
    auto on_y = poisoned<T>(ctx, a.shape, where);
    gate_forward(ctx, on_a.in(), on_o.in(), on_y.out());
    CHECK(difference(on_y.read(), y) <= TestType::tolerance);
    guarded in_place(ctx, a, where);
    gate_forward(ctx, in_place.in(), on_o.in(), in_place.out());
    CHECK(same_bits(in_place.read(), on_y.read()));

    auto on_da = poisoned<T>(ctx, a.shape, where), on_do = poisoned<T>(ctx, a.shape, where);
    gate_backward(ctx, on_a.in(), on_o.in(), on_dy.in(), on_da.out(), on_do.out());
    CHECK(difference(on_da.read(), da) <= TestType::tolerance);
    CHECK(difference(on_do.read(), d_o) <= TestType::tolerance);
    guarded over_dy(ctx, dy, where);
    auto do_again = poisoned<T>(ctx, a.shape, where);
    gate_backward(ctx, on_a.in(), on_o.in(), over_dy.in(), over_dy.out(), do_again.out());
    CHECK(same_bits(over_dy.read(), on_da.read()));
    CHECK(same_bits(do_again.read(), on_do.read()));
  };
  for (const index_t n : awkward_sizes)
    for (const layout where : {layout::packed, layout::strided}) {
      check(n, 7, where, 2);
      check(3, n, where, 2);
    }
  check(65, 129, layout::strided, 3);
}

TEMPLATE_TEST_CASE("gate saturates without overflow", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  auto& ctx = backend.ctx;
  array<T, 2> o(dims(1, 4)), ones(dims(1, 4), rounded<T>(1));
  o.data = {rounded<T>(1e4), rounded<T>(-1e4), rounded<T>(200), rounded<T>(-200)};
  const guarded a(ctx, ones), on_o(ctx, o);
  auto y = poisoned<T>(ctx, o.shape), da = poisoned<T>(ctx, o.shape), d_o = poisoned<T>(ctx, o.shape);
  gate_forward(ctx, a.in(), on_o.in(), y.out());
  gate_backward(ctx, a.in(), on_o.in(), a.in(), da.out(), d_o.out());
  array<double, 2> expected(o.shape);
  expected.data = {1, 0, 1, 0};
  CHECK(difference(y.read(), expected) <= 1e-12);
  CHECK(difference(da.read(), expected) <= 1e-12);
  for (const T x : d_o.read().data) CHECK(std::abs(number(x)) <= 1e-12);
}
