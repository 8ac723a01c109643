#pragma once
// Cells by the names that config.json and command lines use: the one place where a text selects a cell's type.

#include <string_view>
#include <utility>

#include "ratplus/core/text.hpp"
#include "ratplus/recurrence/chunked.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "ratplus/recurrence/none.hpp"

namespace ratplus {

/// Calls f with the cell of that name: "gated_average" (RAT+), "none" (attention) or "chunked:L" (RAT, restarting every
/// L ≥ 1 positions). The inverse of the cells' name(). Throws value_error for other names.
template <class F>
decltype(auto) visit_cell(std::string_view name, F&& f) {
  constexpr std::string_view chunks = "chunked:";
  if (name == gated_average::name()) return std::forward<F>(f)(gated_average{});
  if (name == none::name()) return std::forward<F>(f)(none{});
  if (name.substr(0, chunks.size()) != chunks)
    throw value_error(
        message("recurrence: no cell is named ", excerpt(name), ", expected gated_average, none or chunked:L"));
  return std::forward<F>(f)(
      chunked<>(parse_number(name.substr(chunks.size()), message("recurrence: ", excerpt(name)))));
}

}  // namespace ratplus
