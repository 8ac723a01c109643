#pragma once
// Which slots of a cache hold which positions. A cache kept under a pattern stores its sinks, its anchors and the last
// W positions, S + T/D + W slots; a run of positions that a query asks for is then at most two strided runs of slots
// (the window is a ring and may wrap). Pure arithmetic, host and device; backends read and write caches through it
// alone.

#include <vector>

#include "ratplus/pattern/schedule.hpp"

namespace ratplus {

/// Slots slot, slot + step, … holding consecutive elements of a key_run.
struct slot_run {
  index_t slot = 0;
  index_t step = 1;
  index_t count = 0;
};

/// Where a key_run lies: part[1] continues part[0].
struct slot_runs {
  slot_run part[2];
};

/// Slots of one head of one sequence for up to `positions` positions: [sinks | anchors | window ring].
class residency {
 public:
  constexpr residency() = default;
  constexpr residency(any_sparse kept, index_t positions) : kept_(kept), positions_(positions) {}

  [[nodiscard]] RATPLUS_HD constexpr const any_sparse& kept() const { return kept_; }
  [[nodiscard]] RATPLUS_HD constexpr index_t positions() const { return positions_; }

  [[nodiscard]] RATPLUS_HD constexpr index_t sink_slots() const { return kept_.dense() ? 0 : least(kept_.sinks()); }
  [[nodiscard]] RATPLUS_HD constexpr index_t anchor_slots() const {
    return kept_.anchored() ? quotient(positions_, kept_.dilation()) : 0;
  }
  [[nodiscard]] RATPLUS_HD constexpr index_t window_slots() const { return kept_.dense() ? 0 : least(kept_.window()); }
  [[nodiscard]] RATPLUS_HD constexpr index_t slots() const { return sink_slots() + anchor_slots() + window_slots(); }

  /// The slots a new position is written to: its sink, anchor and ring slot, −1 for each it does not have.
  struct homes_of {
    index_t slot[3] = {-1, -1, -1};
  };
  [[nodiscard]] RATPLUS_HD constexpr homes_of homes(index_t position) const {
    homes_of h;
    if (position < sink_slots()) h.slot[0] = position;
    if (kept_.is_anchor(position)) h.slot[1] = sink_slots() + quotient(position, kept_.dilation());
    if (window_slots() > 0) h.slot[2] = first_ring_slot() + modulo(position, window_slots());
    return h;
  }

  /// Whether the ring slot of `position` still holds it after `next` positions were written.
  [[nodiscard]] RATPLUS_HD constexpr bool in_ring(index_t position, index_t next) const {
    return position >= next - window_slots();
  }

  /// Slots of a run of anchors, or of any run of a cache that keeps every key: slot first_anchor_slot() + i holds
  /// position D − 1 + i D.
  [[nodiscard]] RATPLUS_HD constexpr index_t first_anchor_slot() const { return sink_slots(); }
  /// The ring of the window: slot first_ring_slot() + position % window_slots().
  [[nodiscard]] RATPLUS_HD constexpr index_t first_ring_slot() const { return sink_slots() + anchor_slots(); }

  /// Slots of a run that lies before the next position and that `serves` has accepted.
  [[nodiscard]] RATPLUS_HD constexpr slot_runs find(const key_run& run) const {
    const index_t n = run.count();
    if (n == 0) return {};
    const index_t D = kept_.dilation();
    if (kept_.is_anchor(run.begin) && modulo(run.step, D) == 0)
      return {{{sink_slots() + quotient(run.begin, D), quotient(run.step, D), n}, {}}};
    if (run.end <= sink_slots()) return {{{run.begin, run.step, n}, {}}};
    const index_t at = modulo(run.begin, window_slots()), before_wrap = window_slots() - at;
    if (n <= before_wrap) return {{{first_ring_slot() + at, 1, n}, {}}};
    return {{{first_ring_slot() + at, 1, before_wrap}, {first_ring_slot(), 1, n - before_wrap}}};
  }

 private:
  [[nodiscard]] RATPLUS_HD constexpr index_t least(index_t n) const { return n < positions_ ? n : positions_; }

  any_sparse kept_;
  index_t positions_ = 0;
};

/// Whether a cache kept under `kept` holds every key a query under `asked` sees, each run where `find` looks for it:
/// the anchors among the anchors, the window in the ring, the sinks among the sinks.
[[nodiscard]] constexpr bool serves(const any_sparse& kept, const any_sparse& asked) {
  if (kept.dense()) return true;
  const bool anchors = !asked.anchored() || (kept.anchored() && asked.dilation() % kept.dilation() == 0);
  return anchors && asked.window() <= kept.window() && asked.sinks() <= kept.sinks();
}

template <SparsePattern Kept, SparsePattern Asked>
inline constexpr bool serves_v = serves(any_sparse(Kept{}), any_sparse(Asked{}));

/// The sparse pattern under which a cache for `pattern` is kept: itself, or dense for a pattern of another kind.
template <Pattern P>
[[nodiscard]] constexpr any_sparse kept_pattern(const P& pattern) {
  if constexpr (SparsePattern<P>)
    return any_sparse(pattern);
  else
    return any_sparse{};
}

/// One head's place in a pool of slots.
struct head_slots {
  index_t offset = 0;
  residency where;
};

/// The places of H heads in one pool, one after the other, each kept under its own pattern of `kept`.
template <HeadPattern P>
[[nodiscard]] std::vector<head_slots> slots_of_heads(const P& kept, index_t H, index_t positions) {
  check_heads(kept, H);
  std::vector<head_slots> heads;
  index_t slots = 0;
  for (index_t h = 0; h < H; ++h) {
    heads.push_back(
        {slots, residency(visit_head(kept, h, H, [](const auto& p) { return kept_pattern(p); }), positions)});
    slots += heads.back().where.slots();
  }
  return heads;
}

/// Slots of such a pool.
[[nodiscard]] inline index_t pool_slots(const std::vector<head_slots>& heads) {
  return heads.empty() ? 0 : heads.back().offset + heads.back().where.slots();
}

/// Keys (and values) a cache under `pattern` holds for `positions` positions of one head.
template <Pattern P>
[[nodiscard]] constexpr index_t cached_keys(const P& pattern, index_t positions) {
  return residency(kept_pattern(pattern), positions).slots();
}

/// Bytes of keys and values of one layer and sequence whose elements take `element_bytes`.
template <Pattern P>
[[nodiscard]] constexpr index_t kv_cache_bytes(const P& pattern, index_t positions, index_t heads, index_t head_size,
                                               index_t element_bytes) {
  return 2 * element_bytes * heads * head_size * cached_keys(pattern, positions);
}

}  // namespace ratplus
