#pragma once
// Walking the channels of a row pack by pack, the last one in part.

#include <algorithm>

#include "ratplus/backend/cpu/detail/simd.hpp"
#include "ratplus/core/view.hpp"

namespace ratplus::cpu::detail {

/// f(i, n) for the packs at i = 0, pack_width, …, n their number of lanes in use: the constant pack_width but for the
/// last, so that whole packs compile to whole loads.
template <class F>
RATPLUS_INLINE void for_each_pack(index_t channels, F&& f) {
  index_t i = 0;
  for (; i + pack_width <= channels; i += pack_width) f(i, std::integral_constant<index_t, pack_width>{});
  if (i < channels) f(i, channels - i);
}

template <class T>
RATPLUS_INLINE pack load(const T* p, std::integral_constant<index_t, pack_width>) {
  return load(p);
}
template <class T>
RATPLUS_INLINE pack load(const T* p, index_t lanes) {
  return load_part(p, lanes);
}
RATPLUS_INLINE void store(float* p, pack x, std::integral_constant<index_t, pack_width>) { store(p, x); }
RATPLUS_INLINE void store(float* p, pack x, index_t lanes) { store_part(p, x, lanes); }

/// Channels rounded up to whole packs.
constexpr index_t padded(index_t channels) { return (channels + pack_width - 1) / pack_width * pack_width; }

/// Channels of elementwise work given to a thread at a time.
inline constexpr index_t piece_channels = 1 << 15;

/// Rows of `channels` that make one such piece.
constexpr index_t piece_rows(index_t channels) { return channels < piece_channels ? piece_channels / channels : 1; }

/// Rows [begin, end) of one head.
inline void zero_rows(const view<float, 4>& x, index_t b, index_t h, index_t begin, index_t end) {
  for (index_t t = begin; t < end; ++t) std::fill_n(x.row(b, h, t), x.extent(3), 0.0f);
}

}  // namespace ratplus::cpu::detail
