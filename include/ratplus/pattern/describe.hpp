#pragma once
// Patterns for people: a picture of who sees whom, and a table of what it costs.

#include <cstdio>
#include <string>
#include <vector>

#include "ratplus/pattern/facts.hpp"
#include "ratplus/pattern/names.hpp"
#include "ratplus/pattern/parse.hpp"
#include "ratplus/pattern/residency.hpp"

namespace ratplus {

/// T lines of T marks, a query each: `s` a sink, `d` a key kept by the dilation, `#` any other key that is seen (those
/// of the window), `·` one that is not. Patterns of other kinds have `#` alone.
template <Pattern P>
[[nodiscard]] std::string picture(const P& pattern, index_t T) {
  const char* marks[key_runs::count] = {"#", "#", "#"};
  if constexpr (SparsePattern<P>)
    if (!any_sparse(pattern).dense()) {
      marks[0] = "s";
      marks[1] = "d";
    }
  std::string text;
  std::vector<const char*> line;
  for (index_t q = 0; q < T; ++q) {
    line.assign(static_cast<std::size_t>(T), "·");
    const key_runs runs = pattern.keys(q);
    for (int r = 0; r < key_runs::count; ++r)
      for (index_t i = 0; i < runs[r].count(); ++i) line[static_cast<std::size_t>(runs[r][i])] = marks[r];
    for (const char* mark : line) text.append(mark).append(" ");
    text.back() = '\n';
  }
  return text;
}

namespace detail {

/// 13 201 408
[[nodiscard]] inline std::string in_thousands(index_t n) {
  const std::string digits = std::to_string(n);
  std::string text;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ' ';
    text += digits[i];
  }
  return text;
}

/// 1.25 G with base 1000, 1.16 Gi with base 1024.
[[nodiscard]] inline std::string with_prefix(index_t n, double base) {
  auto value = static_cast<double>(n);
  const char* prefix = " kMGTPE";
  for (; value >= base; value /= base) ++prefix;
  char text[32];
  std::snprintf(text, sizeof text, "%.3g ", value);
  std::string out = text;
  if (*prefix != ' ') out += *prefix == 'k' && base > 1000 ? 'K' : *prefix;
  if (*prefix != ' ' && base > 1000) out += 'i';
  return out;
}

}  // namespace detail

/// What attention of one layer over one sequence of T positions costs under `pattern`, beside dense: three lines of
/// keys visited (summed over the heads), FLOPs of the forward pass, and the KV cache with its elements' size.
template <HeadPattern P>
[[nodiscard]] std::string describe(const P& pattern, index_t T, index_t heads, index_t head_size,
                                   index_t element_bytes = 2) {
  check_heads(pattern, heads);
  const index_t groups = head_groups(pattern), in_group = heads / groups;
  index_t visited = 0, flops = 0, cached = 0, bytes = 0;
  for (index_t g = 0; g < groups; ++g)
    visit_head(pattern, g, groups, [&](const auto& p) {
      visited += in_group * keys_visited(p, T);
      flops += attention_flops(p, T, in_group, head_size);
      cached += in_group * cached_keys(p, T);
      bytes += kv_cache_bytes(p, T, in_group, head_size, element_bytes);
    });
  const dense all;
  const auto share = [](index_t part, index_t whole) {
    char text[32];
    std::snprintf(text, sizeof text, "%6.2f %% of dense",
                  whole > 0 ? 100 * static_cast<double>(part) / static_cast<double>(whole) : 100.0);
    return std::string(text);
  };
  const auto line = [](const char* what, const std::string& value, const std::string& ratio) {
    char text[128];
    std::snprintf(text, sizeof text, "  %-14s %16s  %s\n", what, value.c_str(), ratio.c_str());
    return std::string(text);
  };
  return line("keys visited", detail::in_thousands(visited), share(visited, heads * keys_visited(all, T))) +
         line("forward", detail::with_prefix(flops, 1000) + "FLOP",
              share(flops, attention_flops(all, T, heads, head_size))) +
         line("cached keys", detail::in_thousands(cached), share(cached, heads * cached_keys(all, T))) +
         line("KV cache", detail::with_prefix(bytes, 1024) + "B",
              share(bytes, kv_cache_bytes(all, T, heads, head_size, element_bytes)));
}

}  // namespace ratplus
