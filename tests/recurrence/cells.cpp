// Recurrence cells: the formulas of SPEC §1, adjoints against finite differences, affine elements against steps.

#include <cmath>
#include <vector>

#include "ratplus/recurrence/by_name.hpp"
#include "support/array.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

using namespace ratplus;
using ratplus_tests::contains;
using ratplus_tests::difference;
using ratplus_tests::random_source;

namespace {

/// A cell of a user's own, affine in nothing: h_t = tanh(γ h_{t−1} + x), with the tanh that core/math.hpp's sigmoid
/// gives.
struct squashed {
  static constexpr bool gated = true;

  template <class S>
  S step(S h, S x, S g, index_t) const {
    return S(2) * sigmoid(S(2) * (sigmoid(g) * h + x)) - S(1);
  }
  template <class S>
  cell_gradient<S> adjoint(S h, S x, S g, index_t t, S dh) const {
    const S gamma = sigmoid(g), out = step(h, x, g, t), dsum = dh * (S(1) - out * out);
    return {gamma * dsum, dsum, h * gamma * (S(1) - gamma) * dsum};
  }
};
static_assert(Cell<squashed> && !AssociativeCell<squashed> && !IdentityCell<squashed>);

// What the concept must tell apart.
static_assert(AssociativeCell<gated_average> && AssociativeCell<none> && AssociativeCell<chunked<>>);
static_assert(Cell<chunked<squashed>> && !AssociativeCell<chunked<squashed>>);
static_assert(IdentityCell<none> && !IdentityCell<gated_average> && !IdentityCell<chunked<>>);
static_assert(!Cell<int>);

/// Central differences of one step in each argument, against the adjoint.
template <class C>
void check_adjoint(const C& cell, std::uint64_t seed) {
  random_source source(seed);
  const double e = 1e-6;
  for (index_t t = 0; t < 12; ++t) {
    const double h = source.centred(), x = source.centred(), g = 2 * source.centred(), dh = source.centred();
    const cell_gradient<double> d = cell.adjoint(h, x, g, t, dh);
    const auto slope = [&](double in_h, double in_x, double in_g) {
      return dh *
             (cell.step(h + e * in_h, x + e * in_x, g + e * in_g, t) -
              cell.step(h - e * in_h, x - e * in_x, g - e * in_g, t)) /
             (2 * e);
    };
    INFO("t = " << t << ", h = " << h << ", x = " << x << ", g = " << g);
    CHECK(std::abs(d.dstate - slope(1, 0, 0)) <= 1e-9);
    CHECK(std::abs(d.dinput - slope(0, 1, 0)) <= 1e-9);
    if (C::gated) CHECK(std::abs(d.dgate - slope(0, 0, 1)) <= 1e-9);
  }
}

/// One element, and all elements combined in two bracketings, against the loop of steps.
template <class C>
void check_elements(const C& cell, std::uint64_t seed) {
  random_source source(seed);
  const index_t T = 21;
  std::vector<double> x(T), g(T);
  for (auto& value : x) value = source.centred();
  for (auto& value : g) value = source.centred();
  const double initial = source.centred();
  for (index_t begin = 0; begin < T; ++begin) {
    double h = initial;
    auto forwards = affine<double>::identity();
    for (index_t t = begin; t < T; ++t) {
      const auto i = static_cast<std::size_t>(t);
      const affine<double> e = cell.element(x[i], g[i], t);
      CHECK(difference(e(h), cell.step(h, x[i], g[i], t)) <= 1e-14);
      h = cell.step(h, x[i], g[i], t);
      forwards = combine(forwards, e);
    }
    auto backwards = affine<double>::identity();
    for (index_t t = T - 1; t >= begin; --t) {
      const auto i = static_cast<std::size_t>(t);
      backwards = combine(cell.element(x[i], g[i], t), backwards);
    }
    CHECK(difference(forwards(initial), h) <= 1e-13);
    CHECK(difference(backwards(initial), h) <= 1e-13);
  }
}

}  // namespace

TEST_CASE("the gated average is the formula") {
  const double gamma = 1 / (1 + std::exp(-0.3));
  CHECK(difference(gated_average{}.step(2.0, -1.0, 0.3, 5), gamma * 2 - (1 - gamma)) <= 1e-15);
  CHECK(difference(basic_gated_average<given_gate>{}.step(2.0, -1.0, 0.25, 5), 0.25 * 2 - 0.75) <= 1e-15);
  CHECK(none{}.step(2.0, -1.0, 0.3, 5) == -1.0);
}

TEST_CASE("a gate of any size saturates and never overflows") {
  for (const float g : {-1e30f, -200.0f, 200.0f, 1e30f}) {
    CHECK(gated_average{}.step(2.0f, -1.0f, g, 0) == (g > 0 ? 2.0f : -1.0f));
    CHECK(gated_average{}.adjoint(2.0f, -1.0f, g, 0, 1.0f).dgate == 0.0f);
  }
}

TEST_CASE("adjoints are the derivatives of the steps") {
  check_adjoint(gated_average{}, 1);
  check_adjoint(basic_gated_average<given_gate>{}, 2);
  check_adjoint(none{}, 3);
  check_adjoint(chunked<>(4), 4);
  check_adjoint(chunked<>(1), 5);
  check_adjoint(squashed{}, 6);
  check_adjoint(chunked<squashed>(5), 7);
}

TEST_CASE("elements are the steps, and combine in any bracketing") {
  check_elements(gated_average{}, 1);
  check_elements(none{}, 2);
  check_elements(chunked<>(4), 3);
  check_elements(chunked<>(1), 4);
}

TEST_CASE("a chunked cell forgets at every multiple of its length, and only there") {
  const chunked<> cell(4);
  for (index_t t = 0; t < 13; ++t) {
    const double with_state = cell.step(3.0, 1.0, 0.5, t), without = cell.step(0.0, 1.0, 0.5, t);
    CHECK((with_state == without) == (t % 4 == 0));
    CHECK(without == gated_average{}.step(0.0, 1.0, 0.5, t));
    if (t % 4 != 0) CHECK(with_state == gated_average{}.step(3.0, 1.0, 0.5, t));
  }
  CHECK_THROWS_AS(chunked<>(0), value_error);
  CHECK_THROWS_WITH(chunked<>(-2), contains("chunked: length -2 is less than 1"));
}

TEST_CASE("cells are found by the names that they give") {
  const auto name_of = [](std::string_view name) {
    return visit_cell(name, [](const auto& cell) { return cell.name(); });
  };
  for (const char* name : {"gated_average", "none", "chunked:1", "chunked:64"}) CHECK(name_of(name) == name);
  visit_cell("chunked:3", [](const auto& cell) {
    CHECK(cell.step(3.0, 1.0, 0.5, 3) == cell.step(0.0, 1.0, 0.5, 3));
    CHECK(cell.step(3.0, 1.0, 0.5, 4) != cell.step(0.0, 1.0, 0.5, 4));
  });
  CHECK(visit_cell("none", [](const auto& cell) { return IdentityCell<std::decay_t<decltype(cell)>>; }));

  const std::string known = ", expected gated_average, none or chunked:L";
  CHECK_THROWS_AS(name_of("lstm"), value_error);
  CHECK_THROWS_WITH(name_of("lstm"), "recurrence: no cell is named 'lstm'" + known);
  CHECK_THROWS_WITH(name_of(""), "recurrence: no cell is named ''" + known);
  CHECK_THROWS_WITH(name_of("None"), "recurrence: no cell is named 'None'" + known);
  CHECK_THROWS_WITH(name_of("chunked"), "recurrence: no cell is named 'chunked'" + known);
  CHECK_THROWS_WITH(name_of("chunked:"), "recurrence: 'chunked:': the number is missing");
  CHECK_THROWS_WITH(name_of("chunked:x"), "recurrence: 'chunked:x': 'x' is not a whole number");
  CHECK_THROWS_WITH(name_of("chunked:0"), "chunked: length 0 is less than 1");
  CHECK_THROWS_AS(name_of("chunked:99999999999"), value_error);
}
