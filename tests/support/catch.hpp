#pragma once
// Catch2, version 2 or 3. Tests include this and no other Catch header, and use what both versions have: TEST_CASE,
// SECTION, TEMPLATE_TEST_CASE, GENERATE, CHECK/REQUIRE (…_THROWS_AS, …_THROWS_WITH, …_THAT), INFO, CAPTURE. Numbers are
// compared by support/compare.hpp, not by Catch's Approx.

#include <string>

#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators_all.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#else
#include <catch2/catch.hpp>
#endif

namespace ratplus_tests {

/// Matcher for part of a message: `CHECK_THROWS_WITH(f(), contains("6 heads"))`.
inline auto contains(const std::string& text) {
#if __has_include(<catch2/catch_test_macros.hpp>)
  return Catch::Matchers::ContainsSubstring(text);
#else
  return Catch::Matchers::Contains(text);
#endif
}

}  // namespace ratplus_tests
