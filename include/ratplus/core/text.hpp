#pragma once
// Text from strangers: quoted in messages, and whole numbers out of it.

#include <charconv>
#include <string>
#include <string_view>
#include <system_error>

#include "ratplus/core/error.hpp"
#include "ratplus/core/index.hpp"

namespace ratplus {

/// 'text' for a message: control characters as dots, cut after 100 bytes.
[[nodiscard]] inline std::string excerpt(std::string_view text) {
  constexpr std::size_t limit = 100;
  std::string out = "'";
  for (const char c : text.substr(0, limit)) out += (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) ? '.' : c;
  return out + (text.size() > limit ? "…'" : "'");
}

/// The number that `digits` write, 0 … max_position. Throws value_error, beginning with `where`, for anything but
/// decimal digits (no sign, no space) and for larger numbers.
[[nodiscard]] inline index_t parse_number(std::string_view digits, const std::string& where) {
  if (digits.empty()) throw value_error(message(where, ": the number is missing"));
  if (digits.find_first_not_of("0123456789") != std::string_view::npos)
    throw value_error(message(where, ": ", excerpt(digits), " is not a whole number"));
  index_t value = 0;
  const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (result.ec != std::errc{} || value > max_position)
    throw value_error(message(where, ": ", excerpt(digits), " is more than ", max_position, ", the last position"));
  return value;
}

}  // namespace ratplus
