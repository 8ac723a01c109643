#pragma once
// An operation is called as `attend_forward(ctx, …)`. The function of that name in ops/ states the contract, checks the
// shapes and forwards to `attend_forward_on(ctx, …)`, which argument-dependent lookup finds in the namespace of the
// context's backend.

#include <concepts>

#include "ratplus/core/scalar.hpp"
#include "ratplus/core/tensor.hpp"

namespace ratplus {

/// Where operations run: owns threads, streams and scratch memory, and names the memory space its views must lie in.
/// `recording` holds a step for replaying (ops/replay.hpp). `synchronize()` returns when everything asked of it is
/// done.
template <class C>
concept Context = requires(C& ctx) {
  typename C::space;
  typename C::recording;
  ctx.synchronize();
};

/// Where the rows of a batch stand. Row t of sequence b is position first[b] + t; rows t ≥ length[b] are padding: their
/// outputs are zero and they touch no state. Absent: positions from 0, every row in use. Both (B), in the context's
/// space.
struct sequence_spans {
  view<const token_t, 1> first = {}, length = {};
};

namespace detail {

template <int R>
std::string shape_text(const extents<R>& shape) {
  std::string text = "(";
  for (int i = 0; i < R; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

/// Throws shape_error `op: name is (…), expected (…)`.
template <class T, int R>
void check_shape(const char* op, const char* name, const view<T, R>& v, const extents<R>& expected) {
  if (!(v.shape() == expected))
    throw shape_error(message(op, ": ", name, " is ", shape_text(v.shape()), ", expected ", shape_text(expected)));
}

template <class T, int R>
void check_shape_if_given(const char* op, const char* name, const view<T, R>& v, const extents<R>& expected) {
  if (v) check_shape(op, name, v, expected);
}

inline void check_spans(const char* op, const sequence_spans& spans, index_t batch) {
  check_shape_if_given(op, "first", spans.first, {{batch}});
  check_shape_if_given(op, "length", spans.length, {{batch}});
}

}  // namespace detail
}  // namespace ratplus
