#pragma once
// The reference backend: naive loops in any scalar type, double included, one statement per formula. It is the
// specification that other backends are tested against, and what the CPU backend falls back to.

#include "ratplus/ops/context.hpp"

namespace ratplus::reference {

struct context {
  using space = host_space;
  struct recording {};
  void synchronize() const {}
};

/// Nothing is recorded on a host.
template <class F>
void replay_on(context&, context::recording&, F&& f) {
  f();
}

/// bfloat16 is computed with in float.
template <class T>
[[nodiscard]] constexpr accumulator_t<T> wide(T x) {
  return static_cast<accumulator_t<T>>(x);
}

/// Position of row 0 of sequence b, and its number of rows in use.
[[nodiscard]] inline index_t first_position(const sequence_spans& spans, index_t b) {
  return spans.first ? spans.first[b] : 0;
}
[[nodiscard]] inline index_t rows_in_use(const sequence_spans& spans, index_t b, index_t rows) {
  return spans.length ? spans.length[b] : rows;
}

}  // namespace ratplus::reference
