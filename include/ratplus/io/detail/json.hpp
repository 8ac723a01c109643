#pragma once
// JSON from strangers: nesting is limited before it can exhaust the stack, a key that occurs twice is an error instead
// of a silent choice, and messages quote at most a line of the input.

#include <cstddef>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "ratplus/core/text.hpp"

namespace ratplus::io::detail {

/// Parses a JSON document of at most `max_depth` nested levels without duplicate keys; throws format_error naming
/// `source`.
[[nodiscard]] inline nlohmann::json parse_json(std::string_view text, const std::string& source, int max_depth = 16) {
  using nlohmann::json;
  std::vector<std::set<std::string>> keys(static_cast<std::size_t>(max_depth) + 1);  // of the open object at each depth
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    const bool opens = event == json::parse_event_t::object_start || event == json::parse_event_t::array_start;
    if (opens && depth >= max_depth)
      throw format_error(message(source, ": JSON nested deeper than ", max_depth, " levels"));
    if (event == json::parse_event_t::object_start) keys[static_cast<std::size_t>(depth) + 1].clear();
    if (event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys[static_cast<std::size_t>(depth)].insert(key).second)
        throw format_error(message(source, ": key ", excerpt(key), " occurs twice"));
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), check);
  } catch (const json::parse_error& e) {
    throw format_error(message(source, ": not valid JSON at byte ", e.byte));
  } catch (const json::exception&) {
    throw format_error(message(source, ": JSON holds a number out of range"));
  }
}

}  // namespace ratplus::io::detail
