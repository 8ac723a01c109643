#pragma once
// Scalar types. bfloat16 is a storage format: float32 with the lower sixteen mantissa bits rounded away (to nearest,
// ties to even).

#include <cstdint>
#include <type_traits>

#include "ratplus/core/host_device.hpp"

namespace ratplus {

/// The upper half of a float32. Layout-compatible with CUDA's __nv_bfloat16; arithmetic goes through float.
struct bfloat16 {
  std::uint16_t bits = 0;

  bfloat16() = default;

  RATPLUS_HD constexpr explicit bfloat16(float value) {
    // The builtin and not std::bit_cast, which a device function may not call.
    const auto word = __builtin_bit_cast(std::uint32_t, value);
    const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t rounded = word + 0x7fffu + ((word >> 16) & 1u);
    bits = static_cast<std::uint16_t>(nan ? (word >> 16) | 0x40u : rounded >> 16);
  }

  RATPLUS_HD constexpr operator float() const {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
  }
};

/// Type in which sums, statistics and states of data of type T are held: float32 or better.
template <class T>
using accumulator_t = std::conditional_t<std::is_same_v<std::remove_const_t<T>, double>, double, float>;

}  // namespace ratplus
