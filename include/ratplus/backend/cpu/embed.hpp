#pragma once
// Embedding rows are copied; their gradients are added in the order of the tokens by splitting the channels, not the
// tokens, among the threads.

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"

namespace ratplus::cpu {

inline void embed_forward_on(context& ctx, view<const token_t, 1> tokens, view<const float, 2> table,
                             view<float, 2> x) {
  ctx.parallel_ranges(x.extent(0), detail::piece_rows(x.extent(1)), [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n) std::copy_n(table.row(tokens[n]), x.extent(1), x.row(n));
  });
}

inline void embed_backward_on(context& ctx, view<const token_t, 1> tokens, view<const float, 2> dx,
                              view<float, 2> dtable) {
  constexpr index_t piece = 64;  // channels: four cache lines
  ctx.parallel_ranges(dx.extent(1), piece, [&](index_t begin, index_t end) {
    for (index_t n = 0; n < dx.extent(0); ++n) {
      const float* from = dx.row(n);
      float* to = dtable.row(tokens[n]);
      for (index_t i = begin; i < end; ++i) to[i] += from[i];
    }
  });
}

}  // namespace ratplus::cpu
