#pragma once
// What the benchmarks of whole models share: sizes and texts.

#include <random>
#include <vector>

#include "ratplus/core/scalar.hpp"
#include "ratplus/nn/config.hpp"

namespace bench {

/// A model whose feed-forward layers are four times as wide as its rows.
inline ratplus::model_config model_of(ratplus::index_t vocabulary, ratplus::index_t d, ratplus::index_t layers,
                                      ratplus::index_t heads, ratplus::index_t positions) {
  return {.vocab_size = vocabulary,
          .d_model = d,
          .num_heads = heads,
          .num_layers = layers,
          .d_ffn = 4 * d,
          .max_seq_len = positions};
}

/// n tokens of a vocabulary, uniform, the same for a seed every time.
inline std::vector<ratplus::token_t> random_tokens(ratplus::index_t n, ratplus::index_t vocabulary, unsigned seed) {
  std::mt19937 engine(seed);
  std::uniform_int_distribution<ratplus::token_t> any(0, static_cast<ratplus::token_t>(vocabulary - 1));
  std::vector<ratplus::token_t> ids(static_cast<std::size_t>(n));
  for (ratplus::token_t& id : ids) id = any(engine);
  return ids;
}

}  // namespace bench
