// Sparse patterns, their tiles and their facts against the predicate of SPEC §2, for numbers that divide nothing,
// exceed the sequence, or are zero.

#include "ratplus/pattern/sparse.hpp"

#include <algorithm>
#include <vector>

#include "ratplus/pattern/facts.hpp"
#include "ratplus/pattern/names.hpp"
#include "ratplus/pattern/residency.hpp"
#include "ratplus/pattern/tiles.hpp"
#include "support/catch.hpp"
#include "support/visibility.hpp"

using namespace ratplus;
using ratplus_tests::combinations;
using ratplus_tests::contains;
using ratplus_tests::numbers;

namespace {

const std::vector<numbers>& sweep() {
  static const std::vector<numbers> all = combinations(
      {1, 2, 3, 4, 5, 7, 8, 16, 40, 41, 100}, {0, 1, 2, 3, 5, 8, 17, 39, 40, 60}, {0, 1, 2, 3, 4, 5, 9, 40, 55});
  return all;
}
constexpr index_t lengths[] = {1, 2, 5, 17, 37, 40};

any_sparse made_of(const numbers& n) { return {n.dilation, n.window, n.sinks}; }

/// How often each position below T occurs in the runs.
std::vector<int> occurrences(const key_runs& runs, index_t T) {
  std::vector<int> times(static_cast<std::size_t>(T));
  for (const key_run& run : runs.run)
    for (index_t i = 0; i < run.count(); ++i) times.at(static_cast<std::size_t>(run[i])) += 1;
  return times;
}

/// The first pair (query, key) of T positions on which a pattern's three members do not say what the oracle says.
template <Pattern P>
std::string disagreement(const P& pattern, const numbers& n, index_t T) {
  for (index_t q = 0; q < T; ++q) {
    const std::vector<int> times = occurrences(pattern.keys(q), T);
    for (index_t k = 0; k < T; ++k) {
      const bool visible = n.visible(q, k);
      if (pattern.sees(q, k) != visible) return message("sees(", q, ", ", k, ")");
      if (times[static_cast<std::size_t>(k)] != (visible ? 1 : 0)) return message("keys(", q, ") at ", k);
      if ((k <= q && q <= pattern.last_query(k, T)) != visible) return message("last_query(", k, ", ", T, ") for ", q);
    }
  }
  return {};
}

template <auto D, index_t W, index_t S>
numbers written_out(sparse<D, W, S>) {
  if constexpr (std::same_as<std::remove_const_t<decltype(D)>, undilated_t>)
    return {std::nullopt, W, S};
  else
    return {D, W, S};
}

}  // namespace

TEST_CASE("run-time patterns see what the predicate says") {
  for (const numbers& n : sweep())
    for (const index_t T : lengths) {
      INFO(n << " T=" << T);
      REQUIRE(disagreement(made_of(n), n, T) == "");
      REQUIRE(consistent(made_of(n), T));
    }
}

TEMPLATE_TEST_CASE("compile-time patterns see what the predicate says and equal the run-time ones", "", dense,
                   dilated<2>, dilated<3>, dilated<16>, dilated<64>, (dilated_local<4, 5>), (dilated_local<7, 40>),
                   local<0>, local<6>, local<100>, (streaming<4, 2>), (streaming<0, 3>), (streaming<50, 50>),
                   (with_sinks<3, dilated<5>>), (with_sinks<4, dilated_local<4, 9>>), (sparse<3, 2, 1>),
                   (sparse<1, 4, 4>)) {
  const TestType pattern;
  const numbers n = written_out(pattern);
  for (const index_t T : lengths) {
    INFO(n << " T=" << T);
    REQUIRE(disagreement(pattern, n, T) == "");
    REQUIRE(consistent(pattern, T));
    CHECK(keys_visited(pattern, T) == keys_visited(made_of(n), T));
    CHECK(cached_keys(pattern, T) == cached_keys(made_of(n), T));
  }
  CHECK(any_sparse(pattern) == made_of(n));
  static_assert(consistent(TestType{}, 24));
}

TEST_CASE("facts equal what counting gives") {
  for (const numbers& n : sweep())
    for (const index_t T : lengths) {
      index_t visited = 0;
      for (index_t q = 0; q < T; ++q) visited += static_cast<index_t>(n.seen_by(q, T).size());
      INFO(n << " T=" << T);
      REQUIRE(keys_visited(made_of(n), T) == visited);
      const index_t kept =
          n.dilation == 1 ? T : std::min(n.sinks, T) + std::min(n.window, T) + (n.dilation ? T / *n.dilation : 0);
      REQUIRE(cached_keys(made_of(n), T) == kept);
    }
  CHECK(keys_visited(any_sparse{}, 0) == 0);
}

TEST_CASE("a tile of queries visits the positions of its queries' runs and no other") {
  const index_t T = 40;
  for (const numbers& n : sweep()) {
    const any_sparse pattern = made_of(n);
    INFO(n);
    for (const index_t size : {1, 3, 16, 40})
      for (index_t first = 0; first < T; first += size) {
        const index_t last = std::min(first + size, T) - 1;
        for (int r = 0; r < key_runs::count; ++r) {
          std::set<index_t> by_query, by_tile;
          for (index_t q = first; q <= last; ++q)
            for (index_t i = 0; i < pattern.keys(q)[r].count(); ++i) by_query.insert(pattern.keys(q)[r][i]);
          const key_run tile = tile_run(pattern, r, first, last);
          for (index_t i = 0; i < tile.count(); ++i) by_tile.insert(tile[i]);
          REQUIRE(by_tile == by_query);
        }
      }
  }
}

TEST_CASE("clip keeps a run's lattice and the positions inside") {
  for (const key_run run : {key_run{0, 0, 1}, key_run{5, 3, 2}, key_run{0, 20, 1}, key_run{3, 20, 4}, key_run{6, 7, 7}})
    for (index_t begin = 0; begin < 24; ++begin)
      for (index_t end = 0; end < 24; ++end) {
        std::vector<index_t> expected, got;
        for (index_t i = 0; i < run.count(); ++i)
          if (run[i] >= begin && run[i] < end) expected.push_back(run[i]);
        const key_run part = clip(run, begin, end);
        for (index_t i = 0; i < part.count(); ++i) got.push_back(part[i]);
        INFO("[" << run.begin << ", " << run.end << ") step " << run.step << " clipped to [" << begin << ", " << end
                 << ")");
        REQUIRE(got == expected);
        REQUIRE((part.begin - run.begin) % run.step == 0);
      }
}

TEST_CASE("facts at lengths no loop would reach in time") {
  constexpr index_t T = 262144;
  static_assert(keys_visited(dense{}, T) == T * (T + 1) / 2);
  // Query t sees the (t + 1) / 16 anchors up to itself, and itself: Σ = 16 (0 + … + 16383) + 16384 + 15/16 T.
  static_assert(keys_visited(dilated<16>{}, T) == 16 * (16383 * 16384 / 2) + 16384 + T / 16 * 15);
  static_assert(keys_visited(local<1023>{}, T) == 1024 * T - 1023 * 1024 / 2);
  static_assert(keys_visited(dilated<4>{}, 8) == 12);
  static_assert(keys_visited(streaming<1, 1>{}, 5) == 1 + 2 + 3 + 3 + 3);
  static_assert(attention_flops(dense{}, 2, 3, 8) == 3 * (2 * 2 * 8) * 3);
  static_assert(2 * attention_backward_flops(dilated<2>{}, T, 16, 128) ==
                5 * attention_flops(dilated<2>{}, T, 16, 128));
  static_assert(cached_keys(with_sinks<4, dilated_local<16, 256>>{}, 4096) == 4 + 256 + 256);
  static_assert(kv_cache_bytes(dilated<16>{}, 4096, 16, 128, 2) == 2 * 2 * 16 * 128 * 256);
  // Numbers as large as they may be: nothing overflows.
  constexpr any_sparse largest(max_position, max_position, max_position);
  static_assert(keys_visited(largest, T) == T * (T + 1) / 2);
  static_assert(keys_visited(any_sparse(max_position, 0, max_position), T) == T * (T + 1) / 2);
  static_assert(keys_visited(any_sparse(max_position, 0, 0), T) == T);
  static_assert(largest.last_query(0, max_position) == max_position - 1);
}

TEST_CASE("numbers outside their domain are errors") {
  CHECK_THROWS_AS(any_sparse(0, 0, 0), value_error);
  CHECK_THROWS_WITH(any_sparse(-3, 0, 0), contains("dilation -3 is less than 1"));
  CHECK_THROWS_WITH(any_sparse(2, -1, 0), contains("window -1 is negative"));
  CHECK_THROWS_WITH(any_sparse(std::nullopt, 0, -2), contains("sinks -2 is negative"));
  CHECK_THROWS_WITH(any_sparse(2, max_position + 1, 0), contains("window 2147483648") && contains("2147483647"));
}

TEST_CASE("more sinks than asked are kept, never fewer") {
  static_assert(std::same_as<with_sinks<2, dilated<4>>, sparse<index_t{4}, 0, 2>>);
  static_assert(std::same_as<with_sinks<2, streaming<8, 5>>, streaming<8, 5>>);
  CHECK(any_sparse(with_sinks<2, streaming<8, 5>>{}) == any_sparse(std::nullopt, 8, 5));
}
