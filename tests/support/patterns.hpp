#pragma once
// Patterns as the tests see them: the predicate of SPEC §2 written out once more, beside the library's object for it;
// and a pattern and cells of a user's own, of kinds the library does not have.

#include <functional>
#include <string>
#include <vector>

#include "ratplus/core/error.hpp"
#include "ratplus/pattern/names.hpp"
#include "ratplus/pattern/schedule.hpp"
#include "ratplus/recurrence/concept.hpp"
#include "support/array.hpp"

namespace ratplus_tests {

using ratplus::sigmoid;  // for scalars; a backend's packs bring their own

/// Whether head h's query t sees key s.
using predicate = std::function<bool(index_t h, index_t t, index_t s)>;

/// D = 0: no dilation.
struct numbers {
  index_t dilation = 1, window = 0, sinks = 0;

  [[nodiscard]] bool sees(index_t t, index_t s) const {
    if (s > t) return false;
    return (dilation > 0 && (s + 1) % dilation == 0) || t - s <= window || s < sinks;
  }
  [[nodiscard]] ratplus::any_sparse pattern() const {
    return {dilation > 0 ? std::optional<index_t>(dilation) : std::nullopt, window, sinks};
  }
  [[nodiscard]] std::string text() const { return ratplus::message("D", dilation, " W", window, " S", sinks); }
};

/// For every head the same.
[[nodiscard]] inline predicate sees(numbers n) {
  return [n](index_t, index_t t, index_t s) { return n.sees(t, s); };
}

/// Groups of heads, in order.
[[nodiscard]] inline predicate sees(std::vector<numbers> groups, index_t heads) {
  return [groups, heads](index_t h, index_t t, index_t s) {
    const auto each = static_cast<std::size_t>(heads) / groups.size();
    return groups[static_cast<std::size_t>(h) / each].sees(t, s);
  };
}

[[nodiscard]] inline ratplus::any_by_head by_groups(const std::vector<numbers>& groups) {
  std::vector<ratplus::any_sparse> patterns;
  for (const numbers& n : groups) patterns.push_back(n.pattern());
  return ratplus::any_by_head(patterns);
}

/// Every kind, with numbers that divide nothing; D and W beyond T, S beyond T.
[[nodiscard]] inline std::vector<numbers> sparse_patterns() {
  return {{1, 0, 0},  {2, 0, 0},   {4, 0, 0},   {16, 0, 0},  {7, 0, 0},   {500, 0, 0}, {16, 16, 4}, {4, 5, 0},
          {8, 6, 3},  {0, 0, 0},   {0, 7, 0},   {0, 64, 0},  {0, 500, 0}, {0, 8, 4},   {0, 33, 17}, {3, 1, 1},
          {13, 0, 5}, {16, 3, 40}, {500, 2, 1}, {0, 1, 500}, {5, 500, 0}, {1, 20, 10}};
}

/// A user's own kind: blocks of L positions. A query sees its own block up to itself, and every block's first position.
template <index_t L>
struct blocks {
  [[nodiscard]] RATPLUS_HD constexpr bool sees(index_t query, index_t key) const {
    return key <= query && (key / L == query / L || key % L == 0);
  }
  [[nodiscard]] RATPLUS_HD constexpr ratplus::key_runs keys(index_t query) const {
    const index_t start = query / L * L;
    return {{{0, start, L}, {start, query + 1, 1}, {0, 0, 1}}};
  }
  [[nodiscard]] RATPLUS_HD constexpr index_t last_query(index_t key, index_t T) const {
    const index_t block_end = (key / L + 1) * L;
    return key % L == 0 || block_end > T ? T - 1 : block_end - 1;
  }
};
static_assert(ratplus::consistent(blocks<8>{}, 40));

template <index_t L>
[[nodiscard]] predicate sees_blocks() {
  return [](index_t, index_t t, index_t s) { return s <= t && (t / L == s / L || s % L == 0); };
}

/// f(name, pattern, predicate) for pattern types: each kind of name, a hybrid of heads (of which there must be an even
/// number), and the user's own.
template <class F>
void for_each_static_pattern(index_t heads, F&& f) {
  f("dense", ratplus::dense{}, sees(numbers{1, 0, 0}));
  f("dilated<16>", ratplus::dilated<16>{}, sees(numbers{16, 0, 0}));
  f("local<9>", ratplus::local<9>{}, sees(numbers{0, 9, 0}));
  f("with_sinks<4, dilated_local<8, 6>>", ratplus::with_sinks<4, ratplus::dilated_local<8, 6>>{},
    sees(numbers{8, 6, 4}));
  f("blocks<12>", blocks<12>{}, sees_blocks<12>());
  if (heads % 2 == 0) {
    f("[streaming<5, 2> | dense]", ratplus::by_head<ratplus::streaming<5, 2>, ratplus::dense>{},
      sees({{0, 5, 2}, {1, 0, 0}}, heads));
    f("[blocks<12> | dilated<4>]", ratplus::by_head<blocks<12>, ratplus::dilated<4>>{},
      [heads, own = sees_blocks<12>()](index_t h, index_t t, index_t s) {
        return h < heads / 2 ? own(h, t, s) : numbers{4, 0, 0}.sees(t, s);
      });
  }
}

/// A user's own cell, not affine and different from position to position: u = γ h + (1 − γ) x, h' = u a_t / (1 + u²)
/// with a_t = 2 at every third position and 1 elsewhere.
struct squashed_average {
  static constexpr bool gated = true;
  [[nodiscard]] static std::string name() { return "squashed_average"; }

  template <class S>
  RATPLUS_HD S step(S h, S x, S g, index_t t) const {
    const S gamma = sigmoid(g), u = gamma * h + (S(1) - gamma) * x;
    return gain<S>(t) * u / (S(1) + u * u);
  }
  template <class S>
  RATPLUS_HD ratplus::cell_gradient<S> adjoint(S h, S x, S g, index_t t, S dh) const {
    const S gamma = sigmoid(g), u = gamma * h + (S(1) - gamma) * x, r = S(1) / (S(1) + u * u);
    const S du = dh * gain<S>(t) * (S(1) - u * u) * r * r;
    return {gamma * du, (S(1) - gamma) * du, (h - x) * gamma * (S(1) - gamma) * du};
  }

 private:
  template <class S>
  RATPLUS_HD static S gain(index_t t) {
    return t % 3 == 0 ? S(2) : S(1);
  }
};

/// A user's own cell without a gate: h' = 0.75 h + x.
struct leaky_sum {
  static constexpr bool gated = false;
  [[nodiscard]] static std::string name() { return "leaky_sum"; }

  template <class S>
  RATPLUS_HD S step(S h, S x, S, index_t) const {
    return S(0.75f) * h + x;
  }
  template <class S>
  RATPLUS_HD ratplus::cell_gradient<S> adjoint(S, S, S, index_t, S dh) const {
    return {S(0.75f) * dh, dh, S(0)};
  }
  template <class S>
  RATPLUS_HD ratplus::affine<S> element(S x, S, index_t) const {
    return {S(0.75f), x};
  }
};

}  // namespace ratplus_tests
