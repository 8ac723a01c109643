// The walk of a tile of queries over the keys they see: every visible pair once, no invisible one unmasked, and no more
// work than the visible keys and a pack's width at the borders of their runs.

#include "ratplus/backend/cpu/detail/query_tile.hpp"

#include <map>

#include "ratplus/core/tensor.hpp"

#include "support/catch.hpp"
#include "support/patterns.hpp"

using namespace ratplus;
using namespace ratplus::cpu::detail;

namespace {

struct walk {
  std::map<std::pair<index_t, index_t>, int> pairs;  // (lane, key) left by the masks
  index_t computed = 0;                              // pairs computed
  bool masks_missing = false;
};

/// What a tile of n queries from position `first` on computes, in stretches of at most `most` keys.
template <Pattern P>
walk visit(const P& pattern, index_t first, index_t n, index_t most) {
  walk w;
  lane_bounds bounds;
  for (int r = 0; r < key_runs::count; ++r) {
    const key_run run = tile_run(pattern, r, first, first + n - 1);
    if (run.empty()) continue;
    bounds.set(pattern, r, first, n, run);
    bounds.for_each_stretch((n + pack_width - 1) / pack_width, 0, run.count(), most, [&](const key_stretch& s) {
      REQUIRE(s.begin < s.end);
      REQUIRE(s.keys() <= most);
      w.computed += s.keys() * s.packs() * pack_width;
      for (index_t j = s.begin; j < s.end; ++j)
        for (index_t v = s.first_pack; v < s.last_pack; ++v) {
          float chosen[pack_width];
          store(chosen, select(bounds.sees(v, j), pack(1.0f), pack(0.0f)));
          for (index_t lane = 0; lane < pack_width && v * pack_width + lane < n; ++lane) {
            if (chosen[lane] == 1.0f)
              ++w.pairs[{v * pack_width + lane, run[j]}];
            else if (!s.masked)
              w.masks_missing = true;
          }
        }
    });
  }
  return w;
}

template <Pattern P>
void check(const P& pattern, index_t first, index_t n, index_t most) {
  CAPTURE(first, n, most);
  const walk w = visit(pattern, first, n, most);
  CHECK_FALSE(w.masks_missing);
  index_t visible = 0, wrong = 0;
  for (index_t q = 0; q < n; ++q)
    for (index_t k = 0; k <= first + n; ++k) {
      const auto at = w.pairs.find({q, k});
      const int times = at == w.pairs.end() ? 0 : at->second;
      wrong += times != (pattern.sees(first + q, k) ? 1 : 0);
      visible += pattern.sees(first + q, k);
    }
  CHECK(wrong == 0);
  // At each end of a run up to a pack's width of keys too many for every query of the tile, padding included.
  const index_t padding = padded(n) - n;
  CHECK(w.computed <= visible + padded(n) * 2 * key_runs::count * pack_width + padding * (first + n));
}

}  // namespace

TEST_CASE("query tile: every pattern's visible pairs once, and little else") {
  for (const index_t first : {0, 1, 37, 200})
    for (const index_t n :
         {index_t{1}, index_t{pack_width - 1}, index_t{pack_width + 1}, tile_queries - 1, tile_queries})
      for (const index_t most : {index_t{7}, tile_keys}) {
        for (const auto& numbers : ratplus_tests::sparse_patterns()) {
          CAPTURE(numbers.text());
          check(numbers.pattern(), first, n, most);
        }
        check(ratplus_tests::blocks<12>{}, first, n, most);
        check(dense{}, first, n, most);
        check(dilated<16>{}, first, n, most);
        check(with_sinks<4, dilated_local<8, 6>>{}, first, n, most);
      }
}

TEST_CASE("query tile: queries go in and come out transposed, whatever the number of channels") {
  for (const index_t d : {1, 5, 16, 33, 64})
    for (const index_t n : {index_t{1}, index_t{pack_width}, tile_queries - 3, tile_queries}) {
      CAPTURE(d, n);
      const index_t stride = d + 3;
      const auto from = ratplus_tests::random_array<float>(ratplus_tests::dims(n, stride), 1);
      auto tile = make_tensor<float>(d, tile_queries);
      transpose_in(from.data.data(), stride, n, d, 2.0f, tile.data());
      for (index_t q = 0; q < tile_queries; ++q)
        for (index_t c = 0; c < d; ++c)
          REQUIRE(tile.view()(c, q) == (q < n ? 2 * from.data[static_cast<std::size_t>(q * stride + c)] : 0.0f));

      const std::vector<float> half(static_cast<std::size_t>(tile_queries), 0.5f);
      ratplus_tests::array<float, 2> to(ratplus_tests::dims(n, stride), 7.0f);
      transpose_out(tile.data(), n, d, half.data(), to.data.data(), stride);
      for (index_t q = 0; q < n; ++q)
        for (index_t c = 0; c < stride; ++c) REQUIRE(to(q, c) == (c < d ? from(q, c) : 7.0f));
    }
}
