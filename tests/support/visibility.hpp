#pragma once
// The oracle of the patterns: the predicate of SPEC §2, written again and sharing nothing with the library.

#include <cstdint>
#include <optional>
#include <ostream>
#include <set>
#include <vector>

namespace ratplus_tests {

/// A pattern as its definition gives it. No dilation: window and sinks alone.
struct numbers {
  std::optional<std::int64_t> dilation;
  std::int64_t window, sinks;

  [[nodiscard]] bool visible(std::int64_t t, std::int64_t s) const {
    if (s > t) return false;
    if (dilation.has_value() && (s + 1) % *dilation == 0) return true;
    return t - s <= window || s < sinks;
  }
  /// Positions that query t sees, of those below `end`.
  [[nodiscard]] std::set<std::int64_t> seen_by(std::int64_t t, std::int64_t end) const {
    std::set<std::int64_t> keys;
    for (std::int64_t s = 0; s <= t && s < end; ++s)
      if (visible(t, s)) keys.insert(s);
    return keys;
  }
  friend std::ostream& operator<<(std::ostream& out, const numbers& n) {
    out << "D=";
    if (n.dilation.has_value())
      out << *n.dilation;
    else
      out << "none";
    return out << " W=" << n.window << " S=" << n.sinks;
  }
};

/// Every combination.
[[nodiscard]] inline std::vector<numbers> combinations(const std::vector<std::int64_t>& dilations,
                                                       const std::vector<std::int64_t>& windows,
                                                       const std::vector<std::int64_t>& sinks) {
  std::vector<numbers> all;
  for (const auto w : windows)
    for (const auto s : sinks) {
      all.push_back({std::nullopt, w, s});
      for (const auto d : dilations) all.push_back({d, w, s});
    }
  return all;
}

}  // namespace ratplus_tests
