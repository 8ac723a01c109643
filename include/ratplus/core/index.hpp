#pragma once
#include <cstdint>

#include "ratplus/core/host_device.hpp"

namespace ratplus {

/// Signed type of positions, extents, strides and counts.
using index_t = std::int64_t;

/// Type of token ids and of per-sequence positions held in tensors.
using token_t = std::int32_t;

/// No sequence is longer, no number of a pattern larger: positions fit a token_t, and sums of three of them an index_t.
inline constexpr index_t max_position = INT32_MAX;

/// a / b and a mod b of positions, or of sums of two: 0 ≤ a < 2³² and 0 < b < 2³². On a GPU 32 bits take a fraction of
/// the time of 64.
[[nodiscard]] RATPLUS_HD constexpr index_t quotient(index_t a, index_t b) {
  return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
}
[[nodiscard]] RATPLUS_HD constexpr index_t modulo(index_t a, index_t b) {
  return static_cast<std::uint32_t>(a) % static_cast<std::uint32_t>(b);
}

}  // namespace ratplus
