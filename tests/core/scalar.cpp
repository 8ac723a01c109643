#include "ratplus/core/scalar.hpp"

#include <cmath>
#include <cstdint>
#include <limits>

#include "ratplus/core/math.hpp"
#include "support/catch.hpp"

using namespace ratplus;

TEST_CASE("bfloat16 rounds to nearest, ties to even") {
  const auto bits = [](float x) { return bfloat16(x).bits; };
  CHECK(bits(1.0f) == 0x3f80);
  CHECK(bits(-2.0f) == 0xc000);
  CHECK(bits(1.0f + 0x1p-8f) == 0x3f80);                     // a tie: down to even
  CHECK(bits(1.0f + 3 * 0x1p-8f) == 0x3f82);                 // a tie: up to even
  CHECK(bits(1.0f + 0x1p-8f + 0x1p-20f) == 0x3f81);          // just above the tie
  CHECK(bits(1.0f + 0x1p-8f - 0x1p-20f) == 0x3f80);          // just below
  CHECK(bits(std::numeric_limits<float>::max()) == 0x7f80);  // overflows to infinity
  CHECK(bits(std::numeric_limits<float>::infinity()) == 0x7f80);
  CHECK(bits(-0.0f) == 0x8000);
  CHECK(std::isnan(static_cast<float>(bfloat16(std::numeric_limits<float>::quiet_NaN()))));
  // A NaN whose payload lies in the lower half must not become an infinity.
  CHECK(std::isnan(static_cast<float>(bfloat16(std::bit_cast<float>(0x7f800001u)))));
}

TEST_CASE("every bfloat16 survives the way through float") {
  for (std::uint32_t i = 0; i <= 0xffff; ++i) {
    bfloat16 x;
    x.bits = static_cast<std::uint16_t>(i);
    const float wide = x;
    if (!std::isnan(wide) && bfloat16(wide).bits != x.bits) FAIL("bits " << i);
  }
}

TEST_CASE("sums of float and bfloat16 are float, of double double") {
  static_assert(std::is_same_v<accumulator_t<float>, float>);
  static_assert(std::is_same_v<accumulator_t<const bfloat16>, float>);
  static_assert(std::is_same_v<accumulator_t<const double>, double>);
  SUCCEED();
}

TEST_CASE("sigmoid neither overflows nor loses its small values") {
  for (double x = -700; x <= 700; x += 0.37) {
    const double expected = x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x));
    REQUIRE(std::abs(sigmoid(x) - expected) <= 1e-15 * expected);
    const auto f = static_cast<double>(sigmoid(static_cast<float>(x)));
    if (x > -80) REQUIRE(std::abs(f - sigmoid(static_cast<double>(static_cast<float>(x)))) <= 3e-7 * expected);
  }
  CHECK(sigmoid(1e30f) == 1.0f);
  CHECK(sigmoid(-1e30f) == 0.0f);
  CHECK(sigmoid(0.0) == 0.5);
}
