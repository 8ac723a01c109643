// The tests' own instruments: a comparison that cannot be fooled, guards that bark.

#include <limits>

#include "support/backends.hpp"
#include "support/compare.hpp"
#include "support/guarded.hpp"
#include "support/oracles.hpp"

using namespace ratplus_tests;

namespace {

array<double, 2> matrix(double a, double b, double c, double d) {
  array<double, 2> m(dims(2, 2));
  m.data = {a, b, c, d};
  return m;
}

std::string text_of(const comparison& c) { return Catch::Detail::stringify(c); }

}  // namespace

TEST_CASE("the comparison is the norm ratio and names the worst element") {
  const auto expected = matrix(3, 0, 0, 4);
  const comparison c = difference(matrix(3, 0, 0.5, 4), expected);
  CHECK(c.ratio == 0.1);
  CHECK(c <= 0.1);
  CHECK_FALSE(c <= 0.0999);
  CHECK_THAT(text_of(c), contains("worst at (1, 0): got 0.5, expected 0"));
  CHECK(difference(expected, expected) <= 0.0);
  CHECK(difference(2.0, 2.0) <= 0.0);
  CHECK_FALSE(difference(2.1, 2.0) <= 0.01);
}

TEST_CASE("the comparison never passes what is not a number, not there, or of another size") {
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  const auto good = matrix(1, 2, 3, 4);
  for (const double bad : {nan, inf, -inf}) {
    CHECK_FALSE(difference(matrix(1, 2, 3, bad), good) <= inf);
    CHECK_FALSE(difference(good, matrix(bad, 2, 3, 4)) <= inf);
    CHECK_FALSE(difference(matrix(bad, 2, 3, 4), matrix(bad, 2, 3, 4)) <= inf);
    CHECK_FALSE(difference(bad, bad) <= inf);
    CHECK_THAT(text_of(difference(matrix(1, 2, 3, bad), good)), contains("not finite at (1, 1)"));
  }
  CHECK_FALSE(difference(array<float, 2>(dims(0, 4)), array<float, 2>(dims(0, 4))) <= inf);
  CHECK_FALSE(difference(array<float, 1>(), array<float, 1>()) <= inf);
  CHECK_FALSE(difference(array<float, 2>(dims(2, 3)), array<float, 2>(dims(3, 2))) <= inf);
  CHECK_FALSE(difference(array<float, 1>(dims(2)), array<float, 1>(dims(3))) <= inf);
  // Something where nothing was expected: infinitely wrong.
  CHECK_FALSE(difference(matrix(0, 0, 1e-30, 0), matrix(0, 0, 0, 0)) <= 1e300);
  CHECK(difference(matrix(0, 0, 0, 0), matrix(0, 0, 0, 0)) <= 0.0);
}

TEST_CASE("bits are compared as bits") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(same_bits(matrix(nan, 0, 1, 2), matrix(nan, 0, 1, 2)));
  CHECK_FALSE(same_bits(matrix(0, 0, 1, 2), matrix(-0.0, 0, 1, 2)));
  CHECK_FALSE(same_bits(array<float, 2>(dims(2, 3)), array<float, 2>(dims(3, 2))));
}

TEST_CASE("a write outside a guarded view is caught, an unwritten element cannot pass") {
  ratplus::reference::context ctx;
  for (const layout where : {layout::packed, layout::strided}) {
    const extents<4> shape{{2, 3, 5, 4}};
    const auto values = random_array<float>(shape, 1);
    guarded b(ctx, values, where);
    CHECK(same_bits(b.read(), values));
    b.out()(1, 2, 4, 3) = 7.0f;
    CHECK(b.read()(1, 2, 4, 3) == 7.0f);

    float* const last = &b.out()(1, 2, 4, 3);
    const float kept = last[1];
    last[1] = 0.0f;
    CHECK_THROWS_AS(b.read(), broken_guard);
    last[1] = kept;
    CHECK_NOTHROW(b.read());
    b.out().data()[-1] = 1.0f;
    CHECK_THROWS_AS(b.read(), broken_guard);

    auto out = poisoned<float>(ctx, shape, where);
    CHECK_FALSE(difference(out.read(), values) <= 1e300);
    for_each_index(shape, [&](const extents<4>& at) {
      if (at[3] > 0 || at[2] > 0) out.out()(at[0], at[1], at[2], at[3]) = values(at[0], at[1], at[2], at[3]);
    });
    CHECK_FALSE(difference(out.read(), values) <= 1e300);
  }
  // A strided view's rows have canaries between them.
  guarded m(ctx, random_array<float>(dims(3, 5), 2), layout::strided);
  CHECK(m.out().stride(0) > 5);
  m.out().row(0)[5] = 1.0f;
  CHECK_THROWS_AS(m.read(), broken_guard);
}

TEST_CASE("the attention oracle, by hand") {
  // One channel, keys and values by hand: query 2 under window 1 sees keys 1 and 2 alone.
  array<double, 4> q(dims(1, 1, 3, 1)), k(dims(1, 1, 3, 1)), v(dims(1, 1, 3, 1));
  q.data = {1, 1, 1};
  k.data = {5, 0, std::log(3.0)};
  v.data = {100, 4, 8};
  const auto r = oracle::attention(q, k, v, sees(numbers{0, 1, 0}));
  CHECK(difference(r.out(0, 0, 2, 0), 7.0) <= 1e-15);  // weights 1/4 and 3/4
  CHECK(difference(r.lse(0, 0, 2), std::log(4.0)) <= 1e-15);
  CHECK(r.out(0, 0, 0, 0) == 100.0);
}
