#pragma once
// The one way in which numbers are compared: `CHECK(difference(got, expected) <= 2e-6)`, the norm ratio
// ‖got − expected‖ / ‖expected‖ in double. It is NaN, which passes no bound, when the sizes differ, when there is
// nothing to compare, or when either side holds a NaN or an infinity. When the bound fails, Catch prints the worst
// element and its index.

#include <cmath>
#include <limits>
#include <ostream>
#include <sstream>
#include <string>

#include "support/array.hpp"

namespace ratplus_tests {

struct comparison {
  double ratio = std::numeric_limits<double>::quiet_NaN();
  std::string text;  // what is wrong, or the worst element

  friend bool operator<=(const comparison& c, double bound) { return c.ratio <= bound; }
  friend std::ostream& operator<<(std::ostream& out, const comparison& c) {
    return out << c.ratio << " [" << c.text << "]";
  }
};

template <int R>
[[nodiscard]] std::string index_text(const extents<R>& shape, std::size_t flat) {
  std::string text;
  auto rest = static_cast<index_t>(flat);
  for (int i = R - 1; i >= 0; --i) {
    text = std::to_string(rest % shape[i]) + (text.empty() ? "" : ", ") + text;
    rest /= shape[i];
  }
  return "(" + text + ")";
}

template <class A, class B, int R>
[[nodiscard]] comparison difference(const array<A, R>& got, const array<B, R>& expected) {
  comparison c;
  std::ostringstream text;
  if (!(got.shape == expected.shape) || got.data.size() != expected.data.size()) {
    text << "shapes differ: got ";
    for (int i = 0; i < R; ++i) text << (i ? "x" : "") << got.shape[i];
    text << ", expected ";
    for (int i = 0; i < R; ++i) text << (i ? "x" : "") << expected.shape[i];
  } else if (expected.data.empty()) {
    text << "nothing to compare";
  } else {
    double error = 0, norm = 0, worst = -1;
    std::size_t at = 0;
    for (std::size_t i = 0; i < got.data.size(); ++i) {
      const double x = number(got.data[i]), y = number(expected.data[i]), gap = std::abs(x - y);
      if (!std::isfinite(x) || !std::isfinite(y)) {
        text << "not finite at " << index_text(got.shape, i) << ": got " << x << ", expected " << y;
        c.text = text.str();
        return c;
      }
      if (gap > worst) {
        worst = gap;
        at = i;
      }
      error += gap * gap;
      norm += y * y;
    }
    c.ratio = error == 0 ? 0 : std::sqrt(error) / std::sqrt(norm);  // ∞ when something was expected to be all zero
    text.precision(9);
    text << "worst at " << index_text(got.shape, at) << ": got " << number(got.data[at]) << ", expected "
         << number(expected.data[at]);
  }
  c.text = text.str();
  return c;
}

/// Two numbers, by the same rule.
[[nodiscard]] inline comparison difference(double got, double expected) {
  array<double, 1> a(dims(1), got), b(dims(1), expected);
  return difference(a, b);
}

/// Bit for bit the same, NaNs included.
template <class T, int R>
[[nodiscard]] bool same_bits(const array<T, R>& a, const array<T, R>& b) {
  static_assert(std::is_trivially_copyable_v<T>);
  return a.shape == b.shape && a.data.size() == b.data.size() &&
         std::char_traits<char>::compare(reinterpret_cast<const char*>(a.data.data()),
                                         reinterpret_cast<const char*>(b.data.data()), a.data.size() * sizeof(T)) == 0;
}

}  // namespace ratplus_tests
