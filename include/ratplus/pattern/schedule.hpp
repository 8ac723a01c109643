#pragma once
// Hybrids. A head pattern assigns patterns to the heads of one layer, a schedule assigns head patterns to layers,
// cyclically. A plain pattern is the head pattern that gives every head the same, and every head pattern is the
// schedule that gives every layer the same. `visit_head` and `visit_layer` are the only places where a run-time number
// selects a compile-time type.

#include <tuple>
#include <utility>
#include <vector>

#include "ratplus/pattern/sparse.hpp"

namespace ratplus {

namespace detail {
/// Calls f(std::get<i>(t)) for a run-time i.
template <class Tuple, class F, std::size_t I = 0>
constexpr decltype(auto) visit_at(const Tuple& t, index_t i, F&& f) {
  if constexpr (I + 1 == std::tuple_size_v<Tuple>)
    return std::forward<F>(f)(std::get<I>(t));
  else
    return i == static_cast<index_t>(I) ? std::forward<F>(f)(std::get<I>(t))
                                        : visit_at<Tuple, F, I + 1>(t, i, std::forward<F>(f));
}
}  // namespace detail

/// Patterns known at compile time, one for each of sizeof...(Ps) equal groups of consecutive heads.
template <class... Ps>
struct by_head {
  static_assert(sizeof...(Ps) > 0, "ratplus: by_head needs at least one pattern");
  static_assert((require_pattern<Ps>(), ..., true));
  std::tuple<Ps...> patterns;

  [[nodiscard]] static constexpr index_t groups() { return sizeof...(Ps); }
  template <class F>
  constexpr decltype(auto) visit_group(index_t group, F&& f) const {
    return detail::visit_at(patterns, group, std::forward<F>(f));
  }
};

/// The same at run time, for sparse patterns.
class any_by_head {
 public:
  any_by_head(any_sparse all = {}) : patterns_{all} {}
  explicit any_by_head(std::vector<any_sparse> groups) : patterns_(std::move(groups)) {
    if (patterns_.empty()) throw value_error("by_head: no patterns given");
  }
  template <SparsePattern P, SparsePattern... Ps>
  any_by_head(const by_head<P, Ps...>& p)
      : patterns_(
            std::apply([](const auto&... each) { return std::vector<any_sparse>{any_sparse(each)...}; }, p.patterns)) {}
  template <auto D, index_t W, index_t S>
  any_by_head(sparse<D, W, S> all) : patterns_{any_sparse(all)} {}

  [[nodiscard]] index_t groups() const { return static_cast<index_t>(patterns_.size()); }
  template <class F>
  decltype(auto) visit_group(index_t group, F&& f) const {
    return std::forward<F>(f)(patterns_[static_cast<std::size_t>(group)]);
  }
  friend bool operator==(const any_by_head&, const any_by_head&) = default;

 private:
  std::vector<any_sparse> patterns_;
};

/// A pattern for every head: one Pattern for all, or groups.
template <class P>
concept HeadPattern = Pattern<P> || requires(const P& p, void (*f)(const any_sparse&)) {
  { p.groups() } -> std::convertible_to<index_t>;
};

/// Turns an unsatisfied HeadPattern into a sentence about the Pattern it might have been.
template <class P>
constexpr void require_head_pattern() {
  if constexpr (!HeadPattern<P>) require_pattern<P>();
}

/// Number of groups of heads; 1 for a plain pattern.
template <HeadPattern P>
[[nodiscard]] constexpr index_t head_groups(const P& pattern) {
  if constexpr (Pattern<P>)
    return 1;
  else
    return pattern.groups();
}

/// Throws value_error when the groups of `pattern` do not divide the heads evenly.
template <HeadPattern P>
void check_heads(const P& pattern, index_t heads) {
  if (heads % head_groups(pattern) != 0)
    throw value_error(message("by_head: ", head_groups(pattern), " patterns do not divide ", heads, " heads evenly"));
}

/// f(pattern of `head`), for one of `heads` heads that check_heads has accepted.
template <HeadPattern P, class F>
constexpr decltype(auto) visit_head(const P& pattern, index_t head, index_t heads, F&& f) {
  if constexpr (Pattern<P>)
    return std::forward<F>(f)(pattern);
  else
    return pattern.visit_group(head * pattern.groups() / heads, std::forward<F>(f));
}

/// Head patterns known at compile time, one per layer, repeated cyclically.
template <class... Ps>
struct by_layer {
  static_assert(sizeof...(Ps) > 0, "ratplus: by_layer needs at least one pattern");
  static_assert((require_head_pattern<Ps>(), ..., true));
  std::tuple<Ps...> layers;

  template <class F>
  constexpr decltype(auto) visit_layer(index_t layer, F&& f) const {
    return detail::visit_at(layers, layer % static_cast<index_t>(sizeof...(Ps)), std::forward<F>(f));
  }
};

/// The same at run time: what SPEC §2's text form describes. Converts from every hybrid of sparse patterns.
class any_schedule {
 public:
  template <class P>
  requires std::convertible_to<P, any_by_head> any_schedule(const P& every_layer) : layers_{any_by_head(every_layer)} {}
  any_schedule() : any_schedule(any_sparse{}) {}
  explicit any_schedule(std::vector<any_by_head> layers) : layers_(std::move(layers)) {
    if (layers_.empty()) throw value_error("schedule: no layers given");
  }
  template <class P, class... Ps>
  any_schedule(const by_layer<P, Ps...>& s)
      : layers_(
            std::apply([](const auto&... each) { return std::vector<any_by_head>{any_by_head(each)...}; }, s.layers)) {}

  [[nodiscard]] index_t layers() const { return static_cast<index_t>(layers_.size()); }
  [[nodiscard]] const any_by_head& layer(index_t i) const { return layers_[static_cast<std::size_t>(i % layers())]; }
  template <class F>
  decltype(auto) visit_layer(index_t i, F&& f) const {
    return std::forward<F>(f)(layer(i));
  }
  friend bool operator==(const any_schedule&, const any_schedule&) = default;

 private:
  std::vector<any_by_head> layers_;
};

namespace detail {
/// What a schedule may be asked to call: takes patterns of every kind, a user's own included.
struct any_visitor {
  template <class P>
  constexpr void operator()(const P&) const {}
};
}  // namespace detail

/// A head pattern for every layer: one for all, or a cyclic list.
template <class S>
concept Schedule = HeadPattern<S> || requires(const S& s) {
  s.visit_layer(index_t{}, detail::any_visitor{});
};

/// Turns an unsatisfied Schedule into a sentence about the Pattern it might have been.
template <class S>
constexpr void require_schedule() {
  if constexpr (!Schedule<S>) require_pattern<S>();
}

/// f(head pattern of `layer`).
template <Schedule S, class F>
constexpr decltype(auto) visit_layer(const S& schedule, index_t layer, F&& f) {
  if constexpr (HeadPattern<S>)
    return std::forward<F>(f)(schedule);
  else
    return schedule.visit_layer(layer, std::forward<F>(f));
}

/// Calls f(pattern) for each group of heads of each of `layers` layers.
template <Schedule S, class F>
void for_each_pattern(const S& schedule, index_t layers, F&& f) {
  for (index_t layer = 0; layer < layers; ++layer)
    visit_layer(schedule, layer, [&](const auto& heads) {
      const index_t groups = head_groups(heads);
      for (index_t g = 0; g < groups; ++g) visit_head(heads, g, groups, f);
    });
}

}  // namespace ratplus
