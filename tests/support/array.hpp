#pragma once
// Host arrays of the tests: a shape and its elements in row-major order, copyable, and filled from a seed.

#include <cstdint>
#include <utility>
#include <vector>

#include "ratplus/core/scalar.hpp"
#include "ratplus/core/view.hpp"

namespace ratplus_tests {

using ratplus::bfloat16;
using ratplus::extents;
using ratplus::index_t;
using ratplus::token_t;
using ratplus::view;

/// Any scalar as a double.
template <class T>
[[nodiscard]] double number(T x) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return static_cast<double>(static_cast<float>(x));
  else
    return static_cast<double>(x);
}

/// A double rounded to any scalar.
template <class T>
[[nodiscard]] T rounded(double x) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return bfloat16(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

/// A shape: dims(2, 3).
template <class... N>
[[nodiscard]] constexpr extents<static_cast<int>(sizeof...(N))> dims(N... n) {
  return {{static_cast<index_t>(n)...}};
}

template <class T, int R>
struct array {
  extents<R> shape;
  std::vector<T> data;

  array() = default;
  explicit array(extents<R> s, T value = {}) : shape(s), data(static_cast<std::size_t>(s.product()), value) {}

  [[nodiscard]] index_t size() const { return static_cast<index_t>(data.size()); }
  template <class... I>
  T& operator()(I... i) {
    return data[static_cast<std::size_t>(offset(i...))];
  }
  template <class... I>
  const T& operator()(I... i) const {
    return data[static_cast<std::size_t>(offset(i...))];
  }
  /// The same elements under another shape.
  template <int R2>
  [[nodiscard]] array<T, R2> as(extents<R2> s) const {
    array<T, R2> other;
    other.shape = s;
    other.data = data;
    return other;
  }
  template <class U>
  [[nodiscard]] array<U, R> to() const {
    array<U, R> other(shape);
    for (std::size_t i = 0; i < data.size(); ++i) other.data[i] = rounded<U>(number(data[i]));
    return other;
  }

 private:
  template <class... I>
  [[nodiscard]] index_t offset(I... i) const {
    static_assert(sizeof...(I) == R);
    const index_t at[] = {static_cast<index_t>(i)...};
    index_t sum = 0;
    for (int n = 0; n < R; ++n) sum = sum * shape[n] + at[n];
    return sum;
  }
};

/// Calls f(extents<R>) for every index of a shape, in row-major order.
template <int R, class F>
void for_each_index(const extents<R>& shape, F&& f) {
  const index_t n = shape.product();
  for (index_t flat = 0; flat < n; ++flat) {
    extents<R> at;
    index_t rest = flat;
    for (int i = R - 1; i >= 0; --i) {
      at[i] = rest % shape[i];
      rest /= shape[i];
    }
    f(at);
  }
}

/// Numbers from a seed, the same on every machine.
class random_source {
 public:
  explicit random_source(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u) {}

  std::uint64_t bits() {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }
  /// Uniform in [0, 1).
  double unit() { return static_cast<double>(bits() >> 11) * 0x1.0p-53; }
  /// Mean 0 and standard deviation 1, uniform.
  double centred() { return (unit() * 2 - 1) * 1.7320508075688772; }
  index_t below(index_t n) { return static_cast<index_t>(bits() >> 33) % n; }

 private:
  std::uint64_t state_;
};

/// Elements of mean 0 and the given standard deviation.
template <class T, int R>
[[nodiscard]] array<T, R> random_array(extents<R> shape, std::uint64_t seed, double deviation = 1) {
  random_source source(seed);
  array<T, R> a(shape);
  for (T& x : a.data) x = rounded<T>(deviation * source.centred());
  return a;
}

/// Token ids in [0, vocabulary).
[[nodiscard]] inline array<token_t, 1> random_tokens(index_t count, index_t vocabulary, std::uint64_t seed) {
  random_source source(seed);
  array<token_t, 1> a(dims(count));
  for (token_t& x : a.data) x = static_cast<token_t>(source.below(vocabulary));
  return a;
}

[[nodiscard]] inline array<token_t, 1> tokens_of(std::vector<token_t> values) {
  array<token_t, 1> a;
  a.shape[0] = static_cast<index_t>(values.size());
  a.data = std::move(values);
  return a;
}

/// Σ a ⊙ b, in double.
template <class A, class B, int R>
[[nodiscard]] double inner(const array<A, R>& a, const array<B, R>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.data.size(); ++i) sum += number(a.data[i]) * number(b.data[i]);
  return sum;
}

}  // namespace ratplus_tests
