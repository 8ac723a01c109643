#include "ratplus/ops/sample.hpp"

#include <algorithm>
#include <set>

#include "support/backends.hpp"
#include "support/guarded.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

template <class Backend, class T>
array<token_t, 1> draw(Backend& backend, const array<T, 2>& logits, const array<token_t, 1>& position,
                       const sampling& how) {
  const guarded on_logits(backend.ctx, logits, layout::strided);
  const guarded on_position(backend.ctx, position);
  auto token = poisoned<token_t>(backend.ctx, position.shape);
  sample(backend.ctx, sample_args<T>{on_logits.in(), on_position.in(), token.out()}, how);
  return token.read();
}

// `count` draws from the same logits: 64 sequences at as many positions as it takes.
template <class Backend>
std::vector<index_t> frequencies(Backend& backend, const std::vector<double>& logits, const sampling& how,
                                 index_t count) {
  using T = typename Backend::scalar;
  const auto V = static_cast<index_t>(logits.size());
  array<T, 2> rows(dims(64, V));
  for_each_index(rows.shape, [&](const extents<2>& at) {
    rows(at[0], at[1]) = rounded<T>(logits[static_cast<std::size_t>(at[1])]);
  });
  std::vector<index_t> seen(logits.size(), 0);
  for (index_t p = 0; p < count / 64; ++p)
    for (const token_t id : draw(backend, rows, array<token_t, 1>(dims(64), static_cast<token_t>(p)), how).data) {
      REQUIRE(id >= 0);
      REQUIRE(id < V);
      ++seen[static_cast<std::size_t>(id)];
    }
  return seen;
}

// Σ (seen − expected)² / expected over the tokens that may come; the others must not.
double chi_square(const std::vector<index_t>& seen, const std::vector<double>& probability) {
  double total = 0, sum = 0;
  for (const index_t n : seen) total += static_cast<double>(n);
  for (std::size_t i = 0; i < seen.size(); ++i) {
    const double expected = probability[i] * total, gap = static_cast<double>(seen[i]) - expected;
    if (expected > 0)
      sum += gap * gap / expected;
    else
      CHECK(seen[i] == 0);
  }
  return sum;
}

// Probabilities exact in bfloat16's logits: each twice the next.
const std::vector<double> halving{0.6931471805599453 * 2, 0.6931471805599453 * 1, 0, -0.6931471805599453};

std::vector<double> softmax(const std::vector<double>& logits, double temperature, const std::set<std::size_t>& kept) {
  std::vector<double> p(logits.size(), 0);
  double sum = 0;
  for (const std::size_t i : kept) sum += p[i] = std::exp(logits[i] / temperature);
  for (double& x : p) x /= sum;
  return p;
}

}  // namespace

TEMPLATE_TEST_CASE("greedy takes the most probable token, the lowest id among equals", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const index_t V : awkward_sizes) {
    CAPTURE(V);
    const auto logits = random_array<T>(dims(9, V), 1, 2);
    array<token_t, 1> expected(dims(9));
    for (index_t b = 0; b < 9; ++b)
      for (index_t i = 1; i < V; ++i)
        if (number(logits(b, i)) > number(logits(b, expected(b)))) expected(b) = static_cast<token_t>(i);
    CHECK(same_bits(draw(backend, logits, array<token_t, 1>(dims(9)), {}), expected));
  }
  array<T, 2> ties(dims(3, 300), rounded<T>(-1));
  ties(0, 299) = ties(0, 70) = ties(0, 71) = rounded<T>(2);
  ties(1, 5) = ties(1, 3) = rounded<T>(0);
  CHECK(draw(backend, ties, array<token_t, 1>(dims(3)), {}).data == std::vector<token_t>{70, 3, 0});
}

TEMPLATE_TEST_CASE("sampled frequencies are the softmax's, at every temperature", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  // 3 degrees of freedom: the 99.99th percentile is 21.1. The seed is fixed: this never flickers.
  for (const double temperature : {0.5, 1.0, 2.0}) {
    sampling how;
    how.temperature = temperature;
    how.seed = 11;
    const auto seen = frequencies(backend, halving, how, 6400);
    CHECK(chi_square(seen, softmax(halving, temperature, {0, 1, 2, 3})) < 21.1);
  }
}

TEMPLATE_TEST_CASE("top-k and top-p keep exactly their sets", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  // Probabilities 8/15, 4/15, 2/15, 1/15, out of order.
  const std::vector<double> logits{halving[2], halving[0], halving[3], halving[1]};
  const auto check = [&](index_t top_k, double top_p, const std::set<std::size_t>& kept) {
    CAPTURE(top_k, top_p);
    sampling how;
    how.temperature = 1;
    how.top_k = top_k;
    how.top_p = top_p;
    how.seed = 5;
    CHECK(chi_square(frequencies(backend, logits, how, 3200), softmax(logits, 1, kept)) < 21.1);
  };
  check(1, 1, {1});
  check(2, 1, {1, 3});
  check(3, 1, {0, 1, 3});
  check(9, 1, {0, 1, 2, 3});
  check(0, 0.5, {1});      // 8/15 reaches a half
  check(0, 0.54, {1, 3});  // 8/15 = 0.533 does not reach 0.54
  check(0, 0.79, {1, 3});  // 12/15 = 0.8
  check(0, 0.81, {0, 1, 3});
  check(0, 0.95, {0, 1, 2, 3});
  check(2, 0.66, {1});  // of the two kept, 2/3 and 1/3
  check(2, 0.67, {1, 3});
  check(0, 1e-9, {1});
}

TEMPLATE_TEST_CASE("a draw depends on seed, sequence and position alone", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  sampling how;
  how.temperature = 1;
  how.seed = 3;
  array<T, 2> logits(dims(64, 100));
  const array<token_t, 1> position(dims(64), 7);
  const auto first = draw(backend, logits, position, how);
  CHECK(same_bits(draw(backend, logits, position, how), first));
  CHECK(std::set<token_t>(first.data.begin(), first.data.end()).size() > 20);  // sequences differ
  CHECK_FALSE(same_bits(draw(backend, logits, array<token_t, 1>(dims(64), 8), how), first));
  // A sequence's draw does not change with its neighbours' logits.
  auto others = random_array<T>(dims(64, 100), 1, 3);
  for (index_t i = 0; i < 100; ++i) others(5, i) = rounded<T>(0);
  CHECK(draw(backend, others, position, how)(5) == first(5));
  how.seed = 4;
  CHECK_FALSE(same_bits(draw(backend, logits, position, how), first));
}

TEST_CASE("the uniform numbers are uniform and the options checked") {
  index_t bins[16] = {};
  for (std::uint64_t seed = 0; seed < 4; ++seed)
    for (std::uint64_t b = 0; b < 16; ++b)
      for (std::uint64_t p = 0; p < 100; ++p) {
        const double u = uniform(seed, b, p);
        REQUIRE(u >= 0);
        REQUIRE(u < 1);
        ++bins[static_cast<int>(u * 16)];
      }
  double chi = 0;
  for (const index_t n : bins) chi += (static_cast<double>(n) - 400) * (static_cast<double>(n) - 400) / 400;
  CHECK(chi < 44.3);  // 15 degrees of freedom, 99.99th percentile

  const auto check = [](double temperature, index_t k, double p) {
    sampling how;
    how.temperature = temperature;
    how.top_k = k;
    how.top_p = p;
    check_sampling(how);
  };
  CHECK_NOTHROW(check(0, 0, 1));
  CHECK_THROWS_AS(check(-1, 0, 1), value_error);
  CHECK_THROWS_WITH(check(-1, 0, 1), contains("temperature -1 is negative"));
  CHECK_THROWS_WITH(check(std::numeric_limits<double>::quiet_NaN(), 0, 1), contains("temperature"));
  CHECK_THROWS_WITH(check(1, -2, 1), contains("top-k -2 is negative"));
  CHECK_THROWS_WITH(check(1, 0, 0), contains("top-p 0 is outside (0, 1]"));
  CHECK_THROWS_WITH(check(1, 0, 1.5), contains("top-p 1.5 is outside (0, 1]"));
}
