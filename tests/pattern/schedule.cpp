// Hybrids: which pattern a head of a layer gets, at compile time and at run time.

#include "ratplus/pattern/schedule.hpp"

#include <vector>

#include "ratplus/pattern/names.hpp"
#include "support/catch.hpp"

using namespace ratplus;
using ratplus_tests::contains;

namespace {

template <HeadPattern P>
std::vector<any_sparse> by_heads(const P& pattern, index_t heads) {
  std::vector<any_sparse> all;
  for (index_t h = 0; h < heads; ++h)
    visit_head(pattern, h, heads, [&](const auto& p) { all.push_back(any_sparse(p)); });
  return all;
}

const any_sparse full = dense{}, anchors = dilated<4>{}, window = local<3>{};

}  // namespace

TEST_CASE("heads are split evenly and in order") {
  const std::vector<any_sparse> expected = {full, full, anchors, anchors, window, window};
  const by_head<dense, dilated<4>, local<3>> fixed;
  CHECK(by_heads(fixed, 6) == expected);
  CHECK(by_heads(any_by_head(fixed), 6) == expected);
  CHECK(by_heads(any_by_head({full, anchors, window}), 6) == expected);
  CHECK(by_heads(dilated<4>{}, 2) == std::vector<any_sparse>{anchors, anchors});
  CHECK(by_heads(any_sparse(window), 2) == std::vector<any_sparse>{window, window});
  CHECK(by_heads(any_by_head(window), 2) == std::vector<any_sparse>{window, window});
}

TEST_CASE("groups must divide the heads") {
  const by_head<dense, dilated<4>, local<3>> three;
  CHECK_NOTHROW(check_heads(three, 6));
  CHECK_NOTHROW(check_heads(any_by_head(three), 3));
  CHECK_NOTHROW(check_heads(dense{}, 7));
  CHECK_THROWS_AS(check_heads(three, 4), value_error);
  CHECK_THROWS_WITH(check_heads(any_by_head(three), 4), contains("3 patterns do not divide 4 heads"));
  CHECK_THROWS_AS(any_by_head(std::vector<any_sparse>{}), value_error);
  CHECK_THROWS_AS(any_schedule(std::vector<any_by_head>{}), value_error);
}

TEST_CASE("layers repeat cyclically") {
  const by_layer<dense, by_head<dilated<4>, local<3>>, local<3>> fixed;
  const any_schedule loose = fixed;
  CHECK(loose.layers() == 3);
  for (index_t layer = 0; layer < 8; ++layer) {
    const std::vector<any_sparse> expected = layer % 3 == 0   ? std::vector<any_sparse>{full, full}
                                             : layer % 3 == 1 ? std::vector<any_sparse>{anchors, window}
                                                              : std::vector<any_sparse>{window, window};
    visit_layer(fixed, layer, [&](const auto& heads) { CHECK(by_heads(heads, 2) == expected); });
    visit_layer(loose, layer, [&](const auto& heads) { CHECK(by_heads(heads, 2) == expected); });
  }
  visit_layer(dilated<4>{}, 5,
              [&](const auto& heads) { CHECK(by_heads(heads, 1) == std::vector<any_sparse>{anchors}); });
}

TEST_CASE("every pattern of a schedule is visited, a group once") {
  std::vector<any_sparse> seen;
  const auto note = [&](const auto& p) { seen.push_back(any_sparse(p)); };
  const by_layer<by_head<dense, local<3>>, dilated<4>> schedule;
  const std::vector<any_sparse> expected = {full, window, anchors, full, window};
  for_each_pattern(schedule, 3, note);
  CHECK(seen == expected);
  seen.clear();
  for_each_pattern(any_schedule(schedule), 3, note);
  CHECK(seen == expected);
}

TEST_CASE("everything sparse converts to a schedule") {
  CHECK(any_schedule() == any_schedule(dense{}));
  CHECK(any_schedule(any_sparse(anchors)) == any_schedule(dilated<4>{}));
  CHECK(any_schedule(by_head<dense, dilated<4>>{}) == any_schedule(any_by_head({full, anchors})));
  CHECK_FALSE(any_schedule(dilated<4>{}) == any_schedule(dilated<5>{}));
  static_assert(Schedule<dense> && Schedule<any_sparse> && Schedule<any_schedule> && Schedule<by_layer<dense>>);
  static_assert(Schedule<by_head<dense>> && HeadPattern<by_head<dense>> && !HeadPattern<by_layer<dense>>);
  static_assert(!Schedule<int> && !HeadPattern<int> && !Pattern<int>);
}
