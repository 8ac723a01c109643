#pragma once
// Rows of keys, values or queries gathered for tiles that read them many times.

#include "ratplus/backend/cpu/detail/rows.hpp"

namespace ratplus::cpu::detail {

/// Rows widened to float, scaled and gathered into rows of padded(d): they are read many times, and rows a power of two
/// apart would share a few sets of the caches.
template <class KV>
void gather(const KV* x, index_t stride, index_t rows, index_t d, float scale, float* to) {
  for (index_t i = 0; i < rows; ++i)
    for_each_pack(d, [&](index_t c, auto lanes) {
      store(to + i * padded(d) + c, load(x + i * stride + c, lanes) * pack(scale));
    });
}

/// Tiles of queries that share gathered keys and values: gathering them for one tile takes a fifth of its time.
inline constexpr index_t shared_tiles = 4;

/// Keys and values of a run from element `begin` on, gathered into rows of padded(d).
struct gathered_rows {
  const float *k, *v;
  index_t begin;
};

}  // namespace ratplus::cpu::detail
