#pragma once
// Rotary position embedding, rotate-half form: with angle θ_i = position / base^(2i / d_h) for i < d_h / 2 and x₁, x₂
// the halves of a head, rotated = (x₁ cos − x₂ sin, x₂ cos + x₁ sin) (SPEC §1)
//
// The angles are computed in double once, into a table that scans read: in float32 they would be wrong in the third
// digit at position 262144.

#include <cmath>

#include "ratplus/ops/memory.hpp"

namespace ratplus {

/// (positions, head_size): row p holds cos θ_i, then sin θ_i, for i < head_size / 2. S is float or double.
template <class S, Context Ctx>
[[nodiscard]] tensor<S, 2, typename Ctx::space> make_rope_table(Ctx& ctx, index_t positions, index_t head_size,
                                                                double base) {
  if (head_size % 2 != 0) throw shape_error(message("rope: head size ", head_size, " is odd"));
  auto host = make_tensor<S>(positions, head_size);
  const index_t half = head_size / 2;
  for (index_t i = 0; i < half; ++i) {
    const double frequency = std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(head_size));
    for (index_t p = 0; p < positions; ++p) {
      const double angle = static_cast<double>(p) * frequency;
      host.data()[p * head_size + i] = static_cast<S>(std::cos(angle));
      host.data()[p * head_size + half + i] = static_cast<S>(std::sin(angle));
    }
  }
  auto table = make_tensor<S, typename Ctx::space>(positions, head_size);
  upload(ctx, static_cast<const S*>(host.data()), table.as(table.size()));
  return table;
}

}  // namespace ratplus
