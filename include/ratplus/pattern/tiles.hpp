#pragma once
// Tiles of queries: the union of a run over consecutive queries is again one run, because begin and end never decrease
// and the lattice never changes. A kernel walks that union and needs no mask but the two bounds of each query's own
// run.

#include "ratplus/pattern/concept.hpp"

namespace ratplus {

/// The positions that run r of any of the queries [first, last] visits. (0 ≤ r < key_runs::count, first ≤ last.)
template <Pattern P>
[[nodiscard]] RATPLUS_HD constexpr key_run tile_run(const P& pattern, int r, index_t first, index_t last) {
  return {pattern.keys(first)[r].begin, pattern.keys(last)[r].end, pattern.keys(last)[r].step};
}

/// The part of `run` inside [begin, end).
[[nodiscard]] RATPLUS_HD constexpr key_run clip(key_run run, index_t begin, index_t end) {
  if (begin > run.begin) run.begin += quotient(begin - run.begin + run.step - 1, run.step) * run.step;
  if (end < run.end) run.end = end;
  if (run.end < run.begin) run.end = run.begin;
  return run;
}

}  // namespace ratplus
