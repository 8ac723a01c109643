#pragma once
#include <cstdint>

namespace ratplus {

/// Signed type of positions, extents, strides and counts.
using index_t = std::int64_t;

/// Type of token ids and of per-sequence positions held in tensors.
using token_t = std::int32_t;

}  // namespace ratplus
