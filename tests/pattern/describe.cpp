// Pictures and tables.

#include "ratplus/pattern/describe.hpp"

#include "support/catch.hpp"
#include "support/visibility.hpp"

using namespace ratplus;
using ratplus_tests::contains;
using ratplus_tests::numbers;

TEST_CASE("pictures") {
  CHECK(picture(dense{}, 3) ==
        "# · ·\n"
        "# # ·\n"
        "# # #\n");
  CHECK(picture(parse_pattern("dilated:3+local:1+sinks:1"), 7) ==
        "s · · · · · ·\n"
        "s # · · · · ·\n"
        "s # # · · · ·\n"
        "s · # # · · ·\n"
        "s · d # # · ·\n"
        "s · d · # # ·\n"
        "s · d · · # #\n");
  CHECK(picture(dilated<2>{}, 0).empty());
}

TEST_CASE("a picture shows what the predicate says") {
  for (const numbers& n : ratplus_tests::combinations({1, 2, 5}, {0, 3, 20}, {0, 2, 20})) {
    const index_t T = 12;
    std::string expected, got = picture(any_sparse(n.dilation, n.window, n.sinks), T);
    for (index_t q = 0; q < T; ++q)
      for (index_t k = 0; k < T; ++k) expected += (n.visible(q, k) ? "#" : "·") + std::string(k + 1 < T ? " " : "\n");
    for (char& mark : got)
      if (mark == 's' || mark == 'd') mark = '#';
    INFO(n);
    CHECK(got == expected);
  }
}

TEST_CASE("the table counts every head of every group") {
  CHECK(describe(dense{}, 4096, 16, 128) ==
        "  keys visited        134 250 496  100.00 % of dense\n"
        "  forward              68.7 GFLOP  100.00 % of dense\n"
        "  cached keys              65 536  100.00 % of dense\n"
        "  KV cache                 32 MiB  100.00 % of dense\n");
  // Half of the heads see 4096 · 4097 / 2 keys, the others 16 (0 + … + 255) + 256 + 15/16 · 4096.
  CHECK(describe(by_head<dense, dilated<16>>{}, 4096, 16, 128) ==
        "  keys visited         71 335 936   53.14 % of dense\n"
        "  forward              36.5 GFLOP   53.14 % of dense\n"
        "  cached keys              34 816   53.12 % of dense\n"
        "  KV cache                 17 MiB   53.12 % of dense\n");
  CHECK_THAT(describe(local<1>{}, 4, 1, 2, 4),
             contains("keys visited                  7   70.00 %") && contains("forward                 56 FLOP") &&
                 contains("cached keys                   1   25.00 %") && contains("KV cache                   16 B"));
  CHECK_THROWS_AS(describe(by_head<dense, dilated<16>>{}, 4096, 3, 128), value_error);
}
