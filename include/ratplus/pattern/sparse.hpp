#pragma once
// Dilation D, window W, sinks S: query t sees key s when
//
//     s ≤ t  and  ( (s + 1) % D == 0   or   t − s ≤ W   or   s < S )                        (SPEC §2)
//
// The one place with this arithmetic. `sparse<D, W, S>` fixes the numbers at compile time, `any_sparse` holds them at
// run time; kernels are written once for both. The three runs of a query are: sinks [0, S), anchors (every D-th key
// from the first at or after S up to the window) and the window [max(t − W, S), t].

#include <optional>

#include "ratplus/core/error.hpp"
#include "ratplus/pattern/concept.hpp"

namespace ratplus {

/// In place of a dilation: the pattern keeps no anchors, only its window and its sinks.
struct undilated_t {
  friend constexpr bool operator==(undilated_t, undilated_t) { return true; }
};
inline constexpr undilated_t undilated{};

/// The arithmetic, over a type that has `anchored()`, `dilation()` (≥ 1, meaningful when anchored), `window()` and
/// `sinks()`.
template <class Numbers>
struct sparse_rules {
  [[nodiscard]] RATPLUS_HD constexpr bool sees(index_t query, index_t key) const {
    return key <= query && (is_anchor(key) || query - key <= self().window() || key < self().sinks());
  }

  [[nodiscard]] RATPLUS_HD constexpr key_runs keys(index_t query) const {
    const index_t end = query + 1;
    if (dense()) return {{{0, 0, 1}, {0, end, 1}, {0, 0, 1}}};
    const index_t sinks = self().sinks(),
                  oldest = query - self().window();  // oldest position of the window, may be < 0
    const index_t sunk = sinks < end ? sinks : end;
    key_runs runs{{{0, sunk, 1}, {0, 0, 1}, {oldest > sinks ? oldest : sinks, end > sinks ? end : sinks, 1}}};
    if (self().anchored()) {
      const index_t D = self().dilation(), first = first_anchor();
      runs.run[1] = {first, oldest > first ? oldest : first, D};
    }
    return runs;
  }

  [[nodiscard]] RATPLUS_HD constexpr index_t last_query(index_t key, index_t T) const {
    const index_t last = T - 1;
    if (is_anchor(key) || key < self().sinks()) return last;
    return last - key <= self().window() ? last : key + self().window();
  }

  /// Every key is kept.
  [[nodiscard]] RATPLUS_HD constexpr bool dense() const { return self().anchored() && self().dilation() == 1; }

  /// Kept for its position alone: at D − 1, 2D − 1, …
  [[nodiscard]] RATPLUS_HD constexpr bool is_anchor(index_t key) const {
    return self().anchored() && modulo(key + 1, self().dilation()) == 0;
  }

  /// The first anchor that is not a sink.
  [[nodiscard]] RATPLUS_HD constexpr index_t first_anchor() const {
    const index_t D = self().dilation();
    return quotient(self().sinks(), D) * D + D - 1;
  }

 private:
  [[nodiscard]] RATPLUS_HD constexpr const Numbers& self() const { return static_cast<const Numbers&>(*this); }
};

namespace detail {
// Overloads and not `if constexpr` or decltype(D), which do not survive nvcc's rewriting of host code in this place.
constexpr bool dilates(undilated_t) { return false; }
constexpr bool dilates(index_t) { return true; }
constexpr index_t stride_of(undilated_t) { return 1; }
constexpr index_t stride_of(index_t dilation) { return dilation; }
}  // namespace detail

/// Compile-time numbers. D is an integer ≥ 1 or `undilated`; W counts the keys before the query; S the first positions
/// kept.
template <auto D, index_t W = 0, index_t S = 0>
struct sparse : sparse_rules<sparse<D, W, S>> {
  static constexpr bool has_anchors = detail::dilates(D);
  static constexpr index_t stride = detail::stride_of(D);
  static_assert(stride >= 1,
                "ratplus: a dilation must be at least 1 (dilated<1> is dense); see ratplus/pattern/sparse.hpp");
  static_assert(W >= 0, "ratplus: a window must not be negative (0 sees the query's own key only)");
  static_assert(S >= 0, "ratplus: the number of sinks must not be negative");
  static_assert(stride <= max_position && W <= max_position && S <= max_position,
                "ratplus: a pattern's numbers must not exceed ratplus::max_position");

  [[nodiscard]] RATPLUS_HD static constexpr bool anchored() { return has_anchors; }
  [[nodiscard]] RATPLUS_HD static constexpr index_t dilation() { return stride; }
  [[nodiscard]] RATPLUS_HD static constexpr index_t window() { return W; }
  [[nodiscard]] RATPLUS_HD static constexpr index_t sinks() { return S; }
};

/// The same numbers at run time, for command lines and files. Converts from every `sparse<D, W, S>`.
class any_sparse : public sparse_rules<any_sparse> {
 public:
  /// Dense.
  constexpr any_sparse() = default;

  /// Throws value_error when D < 1, W < 0, S < 0 or one exceeds max_position. No dilation: window and sinks alone.
  constexpr any_sparse(std::optional<index_t> dilation, index_t window, index_t sinks)
      : dilation_(dilation.value_or(1)), window_(window), sinks_(sinks), anchored_(dilation.has_value()) {
    if (dilation_ < 1) throw value_error(message("pattern: dilation ", dilation_, " is less than 1"));
    if (window_ < 0) throw value_error(message("pattern: window ", window_, " is negative"));
    if (sinks_ < 0) throw value_error(message("pattern: sinks ", sinks_, " is negative"));
    if (dilation_ > max_position || window_ > max_position || sinks_ > max_position)
      throw value_error(message("pattern: dilation ", dilation_, ", window ", window_, ", sinks ", sinks_, ": at most ",
                                max_position, " is possible"));
  }

  template <auto D, index_t W, index_t S>
  constexpr any_sparse(sparse<D, W, S> p) : dilation_(p.dilation()), window_(W), sinks_(S), anchored_(p.anchored()) {}

  [[nodiscard]] RATPLUS_HD constexpr bool anchored() const { return anchored_; }
  [[nodiscard]] RATPLUS_HD constexpr index_t dilation() const { return dilation_; }
  [[nodiscard]] RATPLUS_HD constexpr index_t window() const { return window_; }
  [[nodiscard]] RATPLUS_HD constexpr index_t sinks() const { return sinks_; }

  friend constexpr bool operator==(const any_sparse& a, const any_sparse& b) {
    return a.dilation_ == b.dilation_ && a.window_ == b.window_ && a.sinks_ == b.sinks_ && a.anchored_ == b.anchored_;
  }

 private:
  index_t dilation_ = 1, window_ = 0, sinks_ = 0;
  bool anchored_ = true;
};

/// A pattern that is, or converts to, three numbers.
template <class P>
concept SparsePattern = Pattern<P> && std::convertible_to<P, any_sparse>;

}  // namespace ratplus
