// The laws of the two monoids: identity, associativity, and that joining parts is doing the whole.

#include "ratplus/core/affine.hpp"
#include "ratplus/core/softmax_state.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

using namespace ratplus;
using namespace ratplus_tests;

TEST_CASE("affine maps compose") {
  random_source random(1);
  const auto next = [&] { return affine<double>{random.centred(), random.centred()}; };
  for (int i = 0; i < 50; ++i) {
    const auto f = next(), g = next(), h = next();
    const double x = random.centred();
    CHECK(difference(combine(f, g)(x), g(f(x))) <= 1e-14);  // the earlier one first
    CHECK(difference(combine(combine(f, g), h)(x), combine(f, combine(g, h))(x)) <= 1e-13);
    CHECK(combine(f, affine<double>::identity())(x) == f(x));
    CHECK(combine(affine<double>::identity(), f)(x) == f(x));
  }
}

namespace {

// Scores and values joined one by one into a state and a weighted sum.
struct partial {
  softmax_state<double> state;
  double sum = 0;
};

partial join(const partial& a, const partial& b) {
  const auto merged = combine(a.state, b.state);
  return {merged.state, merged.scale_a * a.sum + merged.scale_b * b.sum};
}

}  // namespace

TEST_CASE("partial softmaxes join in any bracketing and order") {
  random_source random(2);
  for (const double spread : {1.0, 30.0, 1000.0}) {
    std::vector<partial> parts;
    double most = -1e300;
    std::vector<double> scores, values;
    for (int i = 0; i < 20; ++i) {
      scores.push_back(spread * random.centred());
      values.push_back(random.centred());
      parts.push_back({{scores.back(), 1}, values.back()});
      most = std::max(most, scores.back());
    }
    double sum = 0, weighted = 0;
    for (std::size_t i = 0; i < scores.size(); ++i) {
      sum += std::exp(scores[i] - most);
      weighted += std::exp(scores[i] - most) * values[i];
    }
    partial left, right, halves;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      left = join(left, parts[i]);
      right = join(parts[parts.size() - 1 - i], right);
    }
    for (std::size_t i = 0; i < parts.size(); i += 2) halves = join(halves, join(parts[i + 1], parts[i]));
    for (const partial& p : {left, right, halves}) {
      CHECK(difference(p.state.log_sum_exp(), most + std::log(sum)) <= 1e-14);
      CHECK(difference(p.sum / p.state.sum, weighted / sum) <= 1e-12);
    }
  }
}

TEST_CASE("nothing is the softmax's identity, on either side, and joined to itself") {
  const softmax_state<double> none, some{3.0, 2.0};
  for (const auto& merged : {combine(none, some), combine(some, none)}) {
    CHECK(merged.state.max == 3.0);
    CHECK(merged.state.sum == 2.0);
  }
  const auto empty = combine(none, none);
  CHECK(empty.state.sum == 0.0);
  CHECK(empty.scale_a == 0.0);
  CHECK(empty.state.log_sum_exp() == -std::numeric_limits<double>::infinity());
}
