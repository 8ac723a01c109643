#pragma once
#include <cstdint>

namespace ratplus {

/// Signed type of positions, extents, strides and counts.
using index_t = std::int64_t;

/// Type of token ids and of per-sequence positions held in tensors.
using token_t = std::int32_t;

/// No sequence is longer, no number of a pattern larger: positions fit a token_t, and sums of three of them an index_t.
inline constexpr index_t max_position = INT32_MAX;

}  // namespace ratplus
