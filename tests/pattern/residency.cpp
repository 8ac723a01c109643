// Caches: a store is really filled, position by position, and every key that a query asks for is looked up in it.

#include "ratplus/pattern/residency.hpp"

#include <set>
#include <vector>

#include "ratplus/pattern/names.hpp"
#include "ratplus/pattern/tiles.hpp"
#include "support/catch.hpp"
#include "support/visibility.hpp"

using namespace ratplus;
using ratplus_tests::combinations;
using ratplus_tests::numbers;

namespace {

constexpr index_t T = 23;

any_sparse made_of(const numbers& n) { return {n.dilation, n.window, n.sinks}; }

/// A slot holds the position last written to it.
class store {
 public:
  explicit store(residency where) : where_(where), slots_(static_cast<std::size_t>(where.slots()), -1) {}

  void append() {
    for (const index_t slot : where_.homes(next_).slot)
      if (slot >= 0) slots_.at(static_cast<std::size_t>(slot)) = next_;
    ++next_;
  }
  [[nodiscard]] index_t next() const { return next_; }
  /// The stored positions that a query sees, with how often each was found.
  [[nodiscard]] std::multiset<index_t> find(const any_sparse& asked, index_t query) const {
    std::multiset<index_t> found;
    const key_runs keys = asked.keys(query);
    for (const key_run& run : keys.run)
      for (const slot_run& part : where_.find(clip(run, 0, next_)).part)
        for (index_t i = 0; i < part.count; ++i)
          found.insert(slots_.at(static_cast<std::size_t>(part.slot + i * part.step)));
    return found;
  }
  [[nodiscard]] index_t at(index_t slot) const { return slots_.at(static_cast<std::size_t>(slot)); }

 private:
  residency where_;
  std::vector<index_t> slots_;
  index_t next_ = 0;
};

const std::vector<numbers>& patterns() {
  static const std::vector<numbers> all = combinations({1, 2, 3, 4, 6, 30}, {0, 1, 3, 7, 22, 40}, {0, 1, 2, 4, 5, 30});
  return all;
}

/// Whether some query of the first `length` sees under `asked` a key that `kept` does not show it.
bool misses(const numbers& kept, const numbers& asked, index_t length) {
  for (index_t q = 0; q < length; ++q)
    for (index_t k = 0; k <= q; ++k)
      if (asked.visible(q, k) && !kept.visible(q, k)) return true;
  return false;
}

}  // namespace

TEST_CASE("a cache finds every key of every pattern that it serves, for the next position and for pieces") {
  index_t served = 0;
  for (const numbers& kept : patterns()) {
    store cache(residency(made_of(kept), T));
    std::vector<numbers> answered;
    for (const numbers& asked : patterns())
      if (serves(made_of(kept), made_of(asked))) answered.push_back(asked);
    served += static_cast<index_t>(answered.size());
    while (cache.next() < T) {
      for (const numbers& asked : answered)
        for (const index_t ahead : {0, 1, 6}) {  // rows of a piece: later queries, the same past
          const index_t query = cache.next() + ahead;
          const std::set<index_t> expected = asked.seen_by(query, cache.next());
          INFO("kept " << kept << ", asked " << asked << ", query " << query << " with " << cache.next() << " stored");
          REQUIRE(cache.find(made_of(asked), query) == std::multiset<index_t>(expected.begin(), expected.end()));
        }
      cache.append();
    }
  }
  CHECK(served > 2 * static_cast<index_t>(patterns().size()));
}

TEST_CASE("a cache refuses exactly the patterns that see more") {
  const index_t length = 150;  // beyond every window, and several times every dilation
  for (const numbers& kept : patterns())
    for (const numbers& asked : patterns()) {
      INFO("kept " << kept << ", asked " << asked);
      const bool accepted = serves(made_of(kept), made_of(asked));
      if (accepted) {
        REQUIRE_FALSE(misses(kept, asked, length));
      } else {
        // One key lies where no look-up would find it: a last sink that is kept, but as an anchor.
        const bool sink_is_anchor =
            asked.sinks == kept.sinks + 1 && kept.dilation && (kept.sinks + 1) % *kept.dilation == 0;
        if (!sink_is_anchor) REQUIRE(misses(kept, asked, length));
      }
    }
  static_assert(serves_v<dense, dilated<16>> && serves_v<dilated<4>, dilated<16>> &&
                !serves_v<dilated<16>, dilated<4>>);
  static_assert(serves_v<dilated_local<4, 8>, local<8>> && !serves_v<local<8>, dilated_local<4, 8>>);
}

TEST_CASE("a ring slot holds its position until the window has passed") {
  for (const numbers& kept : patterns()) {
    const residency where(made_of(kept), T);
    if (where.window_slots() == 0) continue;
    store cache(where);
    while (cache.next() < T) {
      cache.append();
      for (index_t p = 0; p < cache.next(); ++p) {
        INFO(kept << " position " << p << " of " << cache.next());
        REQUIRE((cache.at(where.homes(p).slot[2]) == p) == where.in_ring(p, cache.next()));
      }
    }
  }
}

TEST_CASE("slots of sinks, anchors and ring do not overlap and fill the cache") {
  for (const numbers& kept : patterns()) {
    const residency where(made_of(kept), T);
    std::set<index_t> used[3], all;
    for (index_t p = 0; p < T; ++p)
      for (std::size_t kind = 0; kind < 3; ++kind)
        if (const index_t slot = where.homes(p).slot[kind]; slot >= 0) {
          used[kind].insert(slot);
          all.insert(slot);
        }
    INFO(kept);
    REQUIRE(all.size() == used[0].size() + used[1].size() + used[2].size());
    REQUIRE(static_cast<index_t>(all.size()) == where.slots());
    if (!all.empty()) REQUIRE((*all.begin() == 0 && *all.rbegin() == where.slots() - 1));
  }
}
