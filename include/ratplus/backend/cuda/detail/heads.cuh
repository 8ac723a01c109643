#pragma once
// Head patterns as kernel arguments: trivially copyable, and asked for the pattern of one head on the device. All
// sparse patterns travel as their three numbers, so that one instantiation of a kernel serves every one of them; a
// user's own kind of pattern travels as itself.

#include "ratplus/backend/cuda/error.cuh"
#include "ratplus/pattern/schedule.hpp"

namespace ratplus::cuda::detail {

/// What a pattern is in a kernel.
template <class P>
struct device_pattern {
  using type = std::conditional_t<SparsePattern<P>, any_sparse, P>;
};
template <class P>
using device_pattern_t = typename device_pattern<P>::type;

/// Whether the window of every query is its own key and no other.
template <class P>
[[nodiscard]] RATPLUS_HD constexpr bool sees_own_key_alone(const P& pattern) {
  if constexpr (SparsePattern<P>)
    return !any_sparse(pattern).dense() && any_sparse(pattern).window() == 0;
  else
    return false;
}

/// Every head has the same pattern.
template <class P>
struct uniform_heads {
  P pattern;

  template <class F>
  RATPLUS_HD void visit(index_t, F&& f) const {
    f(pattern);
  }
};

/// Groups of heads with sparse patterns.
struct sparse_heads {
  static constexpr int most = 64;
  any_sparse pattern[most];
  int groups, heads;

  template <class F>
  RATPLUS_HD void visit(index_t head, F&& f) const {
    f(pattern[static_cast<int>(head) * groups / heads]);
  }
};

/// Groups of heads, some of them with patterns of a user's own kind.
template <class P, class... Rest>
struct mixed_heads {
  P pattern;
  mixed_heads<Rest...> rest;
  int groups, heads;

  template <class F>
  RATPLUS_HD void visit(index_t head, F&& f) const {
    visit_group(static_cast<int>(head) * groups / heads, f);
  }
  template <class F>
  RATPLUS_HD void visit_group(int group, F&& f) const {
    if (group == 0)
      f(pattern);
    else
      rest.visit_group(group - 1, f);
  }
};
template <class P>
struct mixed_heads<P> {
  P pattern;

  template <class F>
  RATPLUS_HD void visit(index_t, F&& f) const {
    f(pattern);
  }
  template <class F>
  RATPLUS_HD void visit_group(int, F&& f) const {
    f(pattern);
  }
};

template <class... Ps>
constexpr bool all_sparse(const by_head<Ps...>*) {
  return (SparsePattern<Ps> && ...);
}

template <class P, class... Rest>
mixed_heads<device_pattern_t<P>, device_pattern_t<Rest>...> mix(int groups, int heads, const P& first,
                                                                const Rest&... rest) {
  if constexpr (sizeof...(Rest) == 0)
    return {device_pattern_t<P>(first)};
  else if constexpr (sizeof...(Rest) == 1)
    return {device_pattern_t<P>(first), {device_pattern_t<Rest>(rest)...}, groups, heads};
  else
    return {device_pattern_t<P>(first), mix(groups, heads, rest...), groups, heads};
}

/// Groups of sparse patterns for a kernel over `heads` heads.
inline sparse_heads groups_on_device(const any_by_head& pattern, index_t heads) {
  if (pattern.groups() > sparse_heads::most)
    throw value_error(message("by_head: ", pattern.groups(), " patterns, the CUDA backend takes at most ",
                              sparse_heads::most, " in one layer"));
  sparse_heads all{};
  all.groups = static_cast<int>(pattern.groups());
  all.heads = static_cast<int>(heads);
  for (int g = 0; g < all.groups; ++g) pattern.visit_group(g, [&](const auto& p) { all.pattern[g] = any_sparse(p); });
  return all;
}

/// `pattern` for a kernel over `heads` heads. `visit(head, f)` calls f(pattern of the head).
template <class P>
auto on_device(const P& pattern, index_t heads) {
  if constexpr (Pattern<P>) {
    static_assert(std::is_trivially_copyable_v<P>,
                  "ratplus: a pattern is copied to the device, so it must be trivially copyable");
    return uniform_heads<device_pattern_t<P>>{device_pattern_t<P>(pattern)};
  } else if constexpr (std::is_same_v<P, any_by_head>) {
    return groups_on_device(pattern, heads);
  } else if constexpr (all_sparse(static_cast<const P*>(nullptr))) {
    return groups_on_device(any_by_head(pattern), heads);
  } else {
    return std::apply(
        [&](const auto&... each) { return mix(static_cast<int>(pattern.groups()), static_cast<int>(heads), each...); },
        pattern.patterns);
  }
}

/// The same for a kernel that is large and whose work does not wait for patterns: sparse ones have one type, whether
/// heads differ or not, and the kernel half as many instantiations.
template <class P>
auto grouped_on_device(const P& pattern, index_t heads) {
  if constexpr (SparsePattern<P>)
    return groups_on_device(any_by_head(pattern), heads);
  else
    return on_device(pattern, heads);
}

}  // namespace ratplus::cuda::detail
