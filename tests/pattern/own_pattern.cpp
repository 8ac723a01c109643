// Patterns of a user's own: one that works everywhere, and broken ones that `consistent` finds out.

#include <algorithm>
#include <cmath>
#include <vector>

#include "ratplus/backend/reference/attend.hpp"
#include "ratplus/pattern/describe.hpp"
#include "support/array.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

using namespace ratplus;
using ratplus_tests::array;
using ratplus_tests::difference;
using ratplus_tests::random_array;

namespace {

/// Sees its own block of keys and the last key of each block before.
struct blocks {
  index_t size = 4;

  constexpr bool sees(index_t query, index_t key) const {
    return key <= query && (key / size == query / size || key % size == size - 1);
  }
  constexpr key_runs keys(index_t query) const {
    const index_t own = query / size * size;
    return {{{size - 1, std::max(own, size - 1), size}, {own, query + 1, 1}, {0, 0, 1}}};
  }
  constexpr index_t last_query(index_t key, index_t T) const {
    const index_t block_end = key / size * size + size - 1;
    return key == block_end ? T - 1 : std::min(T - 1, block_end);
  }
};
static_assert(consistent(blocks{}, 19) && consistent(blocks{5}, 40) && consistent(blocks{1}, 6));

// Each breaks one promise.
struct forgets_itself : blocks {
  constexpr bool sees(index_t query, index_t key) const { return key < query && blocks::sees(query, key); }
};
struct counts_twice : blocks {
  constexpr key_runs keys(index_t query) const {
    key_runs runs = blocks::keys(query);
    runs.run[2] = {0, 1, 1};
    return runs;
  }
};
struct sees_the_future : blocks {
  constexpr bool sees(index_t query, index_t key) const { return key == query + 1 || blocks::sees(query, key); }
};
struct stops_early : blocks {
  constexpr index_t last_query(index_t key, index_t T) const { return std::min(T - 1, key + 2); }
};
struct lattice_moves {  // the previous key, in a run whose lattice would have to be the same for odd and even queries
  constexpr bool sees(index_t query, index_t key) const { return key <= query && query - key <= 1; }
  constexpr key_runs keys(index_t query) const {
    return {{{query, query + 1, 1}, {query > 0 ? query - 1 : 0, query, 2}, {0, 0, 1}}};
  }
  constexpr index_t last_query(index_t key, index_t T) const { return std::min(T - 1, key + 1); }
};
struct step_moves {  // a sink in a run of one key, whose step is another at every query
  constexpr bool sees(index_t query, index_t key) const { return key <= query && (key == query || key == 0); }
  constexpr key_runs keys(index_t query) const {
    return {{{0, query > 0 ? 1 : 0, 1 + query % 2}, {query, query + 1, 1}, {0, 0, 1}}};
  }
  constexpr index_t last_query(index_t key, index_t T) const { return key == 0 ? T - 1 : key; }
};
struct goes_back {  // the runs trade places at every other query
  constexpr bool sees(index_t query, index_t key) const { return key <= query && (query == key || key == 0); }
  constexpr key_runs keys(index_t query) const {
    const key_run own{query, query + 1, 1}, sink{0, query > 0 ? 1 : 0, 1};
    return query % 2 == 0 ? key_runs{{own, sink, {}}} : key_runs{{sink, own, {}}};
  }
  constexpr index_t last_query(index_t key, index_t T) const { return key == 0 ? T - 1 : key; }
};
static_assert(Pattern<blocks> && !SparsePattern<blocks>);
static_assert(Schedule<blocks> && Schedule<by_layer<blocks, by_head<dense, blocks>>>);

}  // namespace

TEST_CASE("consistent finds every broken promise") {
  CHECK(consistent(blocks{}, 19));
  CHECK_FALSE(consistent(forgets_itself{}, 19));
  CHECK_FALSE(consistent(counts_twice{}, 19));
  CHECK_FALSE(consistent(sees_the_future{}, 19));
  CHECK_FALSE(consistent(stops_early{}, 19));
  CHECK_FALSE(consistent(lattice_moves{}, 19));
  CHECK_FALSE(consistent(step_moves{}, 19));
  CHECK_FALSE(consistent(goes_back{}, 19));
}

TEST_CASE("facts and pictures of a pattern of one's own") {
  CHECK(keys_visited(blocks{2}, 4) == 1 + 2 + 2 + 3);
  CHECK(cached_keys(blocks{}, 19) == 19);
  CHECK(picture(blocks{2}, 4) ==
        "# · · ·\n"
        "# # · ·\n"
        "· # # ·\n"
        "· # # #\n");
}

TEST_CASE("attention under a pattern of one's own is the softmax over the keys that it sees") {
  const index_t B = 2, H = 2, T = 19, d = 4;
  const extents<4> shape{{B, H, T, d}};
  const auto q = random_array<double>(shape, 1), k = random_array<double>(shape, 2), v = random_array<double>(shape, 3);
  array<double, 4> out(shape), expected(shape);
  const blocks pattern{5};

  attend_forward_args<double> args;
  args.q = {q.data.data(), shape};
  args.k = {k.data.data(), shape};
  args.v = {v.data.data(), shape};
  args.out = {out.data.data(), shape};
  reference::context ctx;
  attend_forward(ctx, pattern, args);

  for (index_t b = 0; b < B; ++b)
    for (index_t h = 0; h < H; ++h)
      for (index_t t = 0; t < T; ++t) {
        double total = 0;
        for (index_t s = 0; s < T; ++s) {
          if (!pattern.sees(t, s)) continue;
          double score = 0;
          for (index_t i = 0; i < d; ++i) score += q(b, h, t, i) * k(b, h, s, i);
          const double weight = std::exp(score / std::sqrt(static_cast<double>(d)));
          total += weight;
          for (index_t i = 0; i < d; ++i) expected(b, h, t, i) += weight * v(b, h, s, i);
        }
        for (index_t i = 0; i < d; ++i) expected(b, h, t, i) /= total;
      }
  CHECK(difference(out, expected) <= 1e-14);

  // One head sparse, the other a pattern of one's own: hybrids take every kind.
  const by_head<blocks, dense> hybrid{{pattern, {}}};
  array<double, 4> mixed(shape), full(shape);
  args.out = {mixed.data.data(), shape};
  attend_forward(ctx, hybrid, args);
  args.out = {full.data.data(), shape};
  attend_forward(ctx, dense{}, args);
  for (index_t b = 0; b < B; ++b)
    for (index_t t = 0; t < T; ++t)
      for (index_t i = 0; i < d; ++i) {
        REQUIRE(mixed(b, index_t{0}, t, i) == out(b, index_t{0}, t, i));
        REQUIRE(mixed(b, index_t{1}, t, i) == full(b, index_t{1}, t, i));
      }
}
