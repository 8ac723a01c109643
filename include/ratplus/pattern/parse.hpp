#pragma once
// The text form of patterns, both ways (SPEC §2):
//
//     pattern  := term ('+' term)*          term := 'dense' | 'dilated:' D | 'local:' W | 'sinks:' S
//     heads    := '[' pattern ('|' pattern)* ']'
//     schedule := (pattern | heads) (',' (pattern | heads))*
//
// Without spaces. `to_string` writes one form for equal patterns, and parsing it gives them back.

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ratplus/core/text.hpp"
#include "ratplus/pattern/schedule.hpp"

namespace ratplus {

namespace detail {

/// Parses a text, all of which every message quotes.
class pattern_parser {
 public:
  explicit pattern_parser(std::string_view text) : where_(message("pattern ", excerpt(text))), text_(text) {
    if (text.empty()) fail("nothing is written, ", expected);
    if (text.find_first_of(" \t\r\n") != std::string_view::npos) fail("spaces are not allowed");
  }

  [[nodiscard]] any_sparse pattern() const { return pattern(text_); }
  [[nodiscard]] any_schedule schedule() const {
    std::vector<any_by_head> layers;
    for_each_part(text_, ',', [&](std::string_view layer) { layers.push_back(heads(layer)); });
    return any_schedule(std::move(layers));
  }

 private:
  static constexpr const char* expected = "expected dense, dilated:D, local:W or sinks:S, joined by '+'";

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    throw value_error(message(where_, ": ", parts...));
  }

  /// Calls f for each of the parts that `separator` parts; there is always one.
  template <class F>
  static void for_each_part(std::string_view text, char separator, F&& f) {
    for (std::size_t end; (end = text.find(separator)) != std::string_view::npos; text.remove_prefix(end + 1))
      f(text.substr(0, end));
    f(text);
  }

  [[nodiscard]] any_by_head heads(std::string_view text) const {
    if (text.empty()) fail("a layer is empty, ", expected);
    if (text.front() != '[') return pattern(text);
    if (text.back() != ']') fail("no ']' closes ", excerpt(text), ", expected [pattern|pattern|...]");
    std::vector<any_sparse> groups;
    for_each_part(text.substr(1, text.size() - 2), '|',
                  [&](std::string_view group) { groups.push_back(pattern(group)); });
    return any_by_head(std::move(groups));
  }

  [[nodiscard]] any_sparse pattern(std::string_view text) const {
    if (const auto at = text.find_first_of("[]|,"); at != std::string_view::npos)
      fail("'", text[at], "' is not expected in ", excerpt(text),
           "; one pattern for each head group is written [a|b], one for each layer a,b");
    std::optional<index_t> dilation, window, sinks;
    for_each_part(text, '+', [&](std::string_view term) { read_term(term, dilation, window, sinks); });
    return {dilation, window.value_or(0), sinks.value_or(0)};
  }

  void read_term(std::string_view term, std::optional<index_t>& dilation, std::optional<index_t>& window,
                 std::optional<index_t>& sinks) const {
    const std::size_t colon = term.find(':');
    const std::string_view word = term.substr(0, colon);
    const bool dense = word == "dense";
    auto* number = dense || word == "dilated" ? &dilation
                   : word == "local"          ? &window
                   : word == "sinks"          ? &sinks
                                              : nullptr;
    if (term.empty()) fail("a term is empty, ", expected);
    if (number == nullptr) fail("unknown term ", excerpt(term), ", ", expected);
    if (*number && number == &dilation)
      fail("dense and dilated:D both give the dilation, ", excerpt(term), " gives it again");
    if (*number) fail(excerpt(term), " gives the same number again, expected at most one ", word, " term");
    if (dense) {
      if (colon != std::string_view::npos) fail(excerpt(term), ": dense takes no number");
      *number = 1;
      return;
    }
    if (colon == std::string_view::npos) fail(excerpt(term), " lacks its number, ", expected);
    *number = parse_number(term.substr(colon + 1), message(where_, ": ", excerpt(term)));
    if (dilation == index_t{0}) fail(excerpt(term), ": a dilation is at least 1 (dilated:1 is dense)");
  }

  std::string where_;
  std::string_view text_;
};

}  // namespace detail

/// "dilated:16+local:256+sinks:4". Throws value_error, quoting the text, the offending term and what is expected.
[[nodiscard]] inline any_sparse parse_pattern(std::string_view text) { return detail::pattern_parser(text).pattern(); }

/// "[dense|dilated:16],dense": head patterns for the layers. Throws value_error as parse_pattern does.
[[nodiscard]] inline any_schedule parse_schedule(std::string_view text) {
  return detail::pattern_parser(text).schedule();
}

[[nodiscard]] inline std::string to_string(const any_sparse& p) {
  std::string text = !p.anchored() ? "" : p.dense() ? "dense" : message("dilated:", p.dilation());
  const auto add = [&](const char* word, index_t number) {
    text += message(text.empty() ? "" : "+", word, ":", number);
  };
  if (p.window() > 0 || (!p.anchored() && p.sinks() == 0)) add("local", p.window());
  if (p.sinks() > 0) add("sinks", p.sinks());
  return text;
}

template <SparsePattern P>
[[nodiscard]] std::string to_string(const P& pattern) {
  return to_string(any_sparse(pattern));
}

[[nodiscard]] inline std::string to_string(const any_by_head& p) {
  if (p.groups() == 1) return p.visit_group(0, [](const any_sparse& all) { return to_string(all); });
  std::string text;
  for (index_t g = 0; g < p.groups(); ++g)
    text.append(g == 0 ? "[" : "|").append(p.visit_group(g, [](const any_sparse& group) { return to_string(group); }));
  return text + "]";
}

template <class... Ps>
[[nodiscard]] std::string to_string(const by_head<Ps...>& pattern) {
  return to_string(any_by_head(pattern));
}

[[nodiscard]] inline std::string to_string(const any_schedule& s) {
  std::string text;
  for (index_t i = 0; i < s.layers(); ++i) text.append(i == 0 ? "" : ",").append(to_string(s.layer(i)));
  return text;
}

template <class... Ps>
[[nodiscard]] std::string to_string(const by_layer<Ps...>& schedule) {
  return to_string(any_schedule(schedule));
}

}  // namespace ratplus
