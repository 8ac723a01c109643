#pragma once
// The field's names for the patterns of pattern/sparse.hpp.

#include "ratplus/pattern/sparse.hpp"

namespace ratplus {

/// Every key: ordinary causal attention.
using dense = sparse<1>;

/// Every D-th key (positions D−1, 2D−1, …) and the query's own.
template <index_t D>
using dilated = sparse<D>;

/// Every D-th key and the W keys before the query.
template <index_t D, index_t W>
using dilated_local = sparse<D, W>;

/// The W keys before the query, and its own.
template <index_t W>
using local = sparse<undilated, W>;

/// Window and sinks: attention whose cache does not grow.
template <index_t W, index_t S>
using streaming = sparse<undilated, W, S>;

namespace detail {
template <index_t S, class P>
struct add_sinks;
template <index_t S, auto D, index_t W, index_t S0>
struct add_sinks<S, sparse<D, W, S0>> {
  using type = sparse<D, W, (S > S0 ? S : S0)>;
};
}  // namespace detail

/// Pattern P that also keeps the first S positions.
template <index_t S, class P>
using with_sinks = typename detail::add_sinks<S, P>::type;

}  // namespace ratplus
