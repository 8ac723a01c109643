#pragma once
// The numbers that make a model: everything `config.json` holds (io/config_file.hpp reads and prints it), nothing about
// patterns, which belong to the call.

#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "ratplus/core/error.hpp"
#include "ratplus/core/index.hpp"

namespace ratplus {

struct model_config {
  index_t vocab_size = 0;
  index_t d_model = 0;
  index_t num_heads = 0;
  index_t num_layers = 0;
  index_t d_ffn = 0;                         // published models use 4 d_model
  std::string recurrence = "gated_average";  // a cell's name; "none" is the attention baseline
  double rope_base = 10000;
  index_t max_seq_len = 0;
  std::optional<token_t> ignore_token = {};  // end of text: the label after this input token is not trained on

  [[nodiscard]] index_t head_size() const { return d_model / num_heads; }

  friend bool operator==(const model_config&, const model_config&) = default;
};

/// Throws value_error, naming field and value, unless a model of this shape can be built: every size positive and small
/// enough that no parameter count overflows, heads of equal even size (RoPE turns pairs of channels).
inline void validate(const model_config& config) {
  const auto fail = [](const auto&... what) { throw value_error(message("config: ", what...)); };
  const auto check = [&](const char* name, index_t value, index_t most) {
    if (value < 1) fail(name, " is ", value, ", must be positive");
    if (value > most) fail(name, " is ", value, ", at most ", most, " is possible");
  };
  // With these limits layers · (rows · columns) · sizeof(double) stays below 2^63.
  constexpr index_t most_tokens = std::numeric_limits<token_t>::max(), most_channels = 1 << 18, most_layers = 1 << 16;
  check("vocab_size", config.vocab_size, most_tokens);
  check("d_model", config.d_model, most_channels);
  check("num_heads", config.num_heads, most_channels);
  check("num_layers", config.num_layers, most_layers);
  check("d_ffn", config.d_ffn, most_channels);
  check("max_seq_len", config.max_seq_len, most_tokens);
  if (config.d_model % config.num_heads != 0)
    fail("num_heads is ", config.num_heads, ", must divide d_model, ", config.d_model);
  if (config.head_size() % 2 != 0)
    fail("d_model / num_heads is ", config.d_model, " / ", config.num_heads, " = ", config.head_size(),
         ", must be even");
  if (config.recurrence.empty()) fail("recurrence is empty, must name a cell or be \"none\"");
  if (!(config.rope_base >= 1) || !std::isfinite(config.rope_base))
    fail("rope_base is ", config.rope_base, ", must be finite and at least 1");
  if (config.ignore_token && (*config.ignore_token < 0 || *config.ignore_token >= config.vocab_size))
    fail("ignore_token is ", *config.ignore_token, ", must be below vocab_size, ", config.vocab_size);
}

}  // namespace ratplus
