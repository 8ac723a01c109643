// Packs: the elementary functions over their whole range against double, and the movements of lanes.

#include "ratplus/backend/cpu/detail/rows.hpp"

#include <cmath>
#include <numeric>

#include "ratplus/backend/cpu/gelu.hpp"
#include "support/catch.hpp"

using namespace ratplus;
using namespace ratplus::cpu::detail;

namespace {

/// The worst |f(x) − expected(x)| / |expected(x)| for x from `begin` to `end`.
template <class F, class G>
double worst_error(float begin, float end, F&& f, G&& expected) {
  constexpr int steps = 200'000;
  double worst = 0;
  for (int i = 0; i < steps; i += pack_width) {
    float x[pack_width], y[pack_width];
    for (int j = 0; j < pack_width; ++j) x[j] = begin + (end - begin) * static_cast<float>(i + j) / steps;
    store(y, f(load(x)));
    for (int j = 0; j < pack_width; ++j) {
      const double right = expected(static_cast<double>(x[j]));
      const double error = std::abs(static_cast<double>(y[j]) - right) / std::abs(right);
      if (!(error <= worst)) worst = error;
    }
  }
  return worst;
}

float first(pack x) {
  float lanes[pack_width];
  store(lanes, x);
  return lanes[0];
}

double normal_cdf(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }

}  // namespace

TEST_CASE("pack: powers, the sigmoid and the normal distribution are accurate over their range") {
  CHECK(worst_error(
            -125.9f, 127.0f, [](pack x) { return exp2(x); }, [](double x) { return std::exp2(x); }) <= 2e-7);
  CHECK(worst_error(
            -87.0f, 87.0f, [](pack x) { return exp(x); }, [](double x) { return std::exp(x); }) <= 2e-7);
  CHECK(worst_error(
            -80.0f, 80.0f, [](pack x) { return sigmoid(x); }, [](double x) { return 1 / (1 + std::exp(-x)); }) <= 4e-7);
  CHECK(worst_error(
            -4.0f, 9.0f, [](pack x) { return standard_normal(x).cdf; }, normal_cdf) <= 1e-6);
  // Deep in the tail the square of x is rounded before the exponential.
  CHECK(worst_error(
            -12.0f, -4.0f, [](pack x) { return standard_normal(x).cdf; }, normal_cdf) <= 1e-5);
}

TEST_CASE("pack: out of range, infinite and NaN arguments") {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(first(exp2(pack(-infinity))) <= 0x1p-126f);
  CHECK(first(exp(pack(-1000.0f))) <= 0x1.1p-126f);
  CHECK(first(sigmoid(pack(-infinity))) <= 0x1.1p-126f);
  CHECK(first(sigmoid(pack(infinity))) == 1.0f);
  CHECK(std::isnan(first(exp2(pack(nan)))));
  CHECK(std::isnan(first(exp(pack(nan)))));
  CHECK(std::isnan(first(sigmoid(pack(nan)))));
  CHECK(std::isnan(first(standard_normal(pack(nan)).cdf)));
  CHECK(std::signbit(first(pack(-0.0f))));
}

TEST_CASE("pack: transposing, adding up and choosing lanes") {
  pack rows[pack_width];
  float in[pack_width][pack_width], out[pack_width][pack_width];
  for (int i = 0; i < pack_width; ++i) {
    std::iota(in[i], in[i] + pack_width, static_cast<float>(100 * i));
    rows[i] = load(in[i]);
  }
  transpose(rows);
  for (int i = 0; i < pack_width; ++i) store(out[i], rows[i]);
  for (int i = 0; i < pack_width; ++i)
    for (int j = 0; j < pack_width; ++j) CHECK(out[i][j] == in[j][i]);

  CHECK(sum(load(in[1])) == 100.0f * pack_width + pack_width * (pack_width - 1) / 2.0f);
  CHECK(maximum(load(in[1])) == 100.0f + pack_width - 1);
  const pack one(1.0f), two(2.0f);
  CHECK(first(select(one.v < two.v, one, two)) == 1.0f);
  CHECK(first(select(one.v > two.v, one, two)) == 2.0f);
}

TEST_CASE("pack: bfloat16 widens exactly, and parts of packs touch nothing else") {
  bfloat16 half[pack_width];
  for (int i = 0; i < pack_width; ++i) half[i] = bfloat16(1.0f + static_cast<float>(i) / 8);
  float wide[pack_width];
  store(wide, load(half));
  for (int i = 0; i < pack_width; ++i) CHECK(wide[i] == static_cast<float>(half[i]));

  for (index_t n = 0; n <= 3 * pack_width; ++n) {
    // Exactly n elements: the address sanitizer sees any other access.
    const std::vector<float> from(static_cast<std::size_t>(n), 2.0f);
    std::vector<float> to(static_cast<std::size_t>(n), 0.0f);
    for_each_pack(n, [&](index_t i, auto lanes) { store(to.data() + i, load(from.data() + i, lanes), lanes); });
    CHECK(to == from);
  }
}
