#pragma once
// What a pattern is. It says which keys a query sees, enumerates them as at most three strided runs, and says which
// queries see a key. Everything else — masks, tiles, backward walks, cache sizes, FLOP counts — is derived from these
// three functions.

#include <concepts>

#include "ratplus/core/host_device.hpp"
#include "ratplus/core/index.hpp"

namespace ratplus {

/// Positions begin, begin + step, … below end. Empty when end ≤ begin.
struct key_run {
  index_t begin = 0;
  index_t end = 0;
  index_t step = 1;

  [[nodiscard]] RATPLUS_HD constexpr index_t count() const {
    return end > begin ? quotient(end - begin + step - 1, step) : 0;
  }
  [[nodiscard]] RATPLUS_HD constexpr bool empty() const { return end <= begin; }
  [[nodiscard]] RATPLUS_HD constexpr index_t operator[](index_t i) const { return begin + i * step; }
  /// Whether a position of this run's lattice lies inside it.
  [[nodiscard]] RATPLUS_HD constexpr bool bounds(index_t position) const { return begin <= position && position < end; }
  RATPLUS_HD friend constexpr bool operator==(const key_run& a, const key_run& b) {
    return a.begin == b.begin && a.end == b.end && a.step == b.step;
  }
};

/// The keys of one query: disjoint runs, any of them possibly empty.
struct key_runs {
  static constexpr int count = 3;
  key_run run[count];

  [[nodiscard]] RATPLUS_HD constexpr const key_run& operator[](int r) const { return run[r]; }
  /// Number of keys.
  [[nodiscard]] RATPLUS_HD constexpr index_t keys() const {
    index_t n = 0;
    for (const auto& r : run) n += r.count();
    return n;
  }
};

namespace detail {
template <class P>
concept HasSees = requires(const P& p, index_t i) {
  { p.sees(i, i) } -> std::convertible_to<bool>;
};
template <class P>
concept HasKeys = requires(const P& p, index_t i) {
  { p.keys(i) } -> std::same_as<key_runs>;
};
template <class P>
concept HasLastQuery = requires(const P& p, index_t i) {
  { p.last_query(i, i) } -> std::convertible_to<index_t>;
};
}  // namespace detail

/// A pattern of visibility between positions, all members constexpr and callable on host and device (RATPLUS_HD):
///
///   bool     sees(query, key)      the definition; false for key > query, true for key == query
///   key_runs keys(query)           the same set as disjoint runs. From query to query, run r keeps its step and its
///                                  lattice (begin mod step), and neither its begin nor its end ever decreases
///   index_t  last_query(key, T)    the last of T queries that sees `key`; the queries that see it are key … last_query
///
/// `consistent(pattern, T)` checks the three against each other and is constexpr: static_assert it for a pattern of
/// your own.
template <class P>
concept Pattern = detail::HasSees<P> && detail::HasKeys<P> && detail::HasLastQuery<P>;

/// Turns an unsatisfied Pattern into a sentence. Every entry point that takes a pattern calls it.
template <class P>
constexpr void require_pattern() {
  static_assert(detail::HasSees<P>,
                "ratplus: this type is not a Pattern: it lacks `bool sees(index_t query, index_t key) const`. "
                "Read ratplus/pattern/concept.hpp.");
  static_assert(detail::HasKeys<P>,
                "ratplus: this type is not a Pattern: it lacks `key_runs keys(index_t query) const`. "
                "Read ratplus/pattern/concept.hpp.");
  static_assert(detail::HasLastQuery<P>,
                "ratplus: this type is not a Pattern: it lacks `index_t last_query(index_t key, index_t T) const`. "
                "Read ratplus/pattern/concept.hpp.");
}

/// Whether a pattern's enumeration, its runs' lattices and its query intervals agree with `sees` for all T² pairs.
template <Pattern P>
[[nodiscard]] constexpr bool consistent(const P& pattern, index_t T) {
  key_runs before;
  for (index_t q = 0; q < T; ++q) {
    const key_runs runs = pattern.keys(q);
    for (int r = 0; r < key_runs::count; ++r) {
      const key_run &run = runs[r], &last = before[r];
      if (run.step < 1 || run.begin < 0 || (!run.empty() && run.end > q + 1)) return false;
      if (q > 0 && (run.step != last.step || run.begin < last.begin || run.end < last.end)) return false;
      if (q > 0 && (run.begin - last.begin) % run.step != 0) return false;
    }
    for (index_t k = 0; k < T; ++k) {
      int times = 0;
      for (const key_run& run : runs.run) times += run.bounds(k) && (k - run.begin) % run.step == 0;
      if (times != (pattern.sees(q, k) ? 1 : 0)) return false;
      const bool in_interval = k <= q && q <= pattern.last_query(k, T);
      if (in_interval != pattern.sees(q, k)) return false;
    }
    if (!pattern.sees(q, q)) return false;
    before = runs;
  }
  return true;
}

}  // namespace ratplus
