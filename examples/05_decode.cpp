// Prefill and decode: a prompt is read in pieces, text is decoded a token at a time, and the logits are those of the
// full forward pass under the same pattern. The cache keeps what its pattern still sees, and no more.

#include <cmath>
#include <cstdio>
#include <vector>

#include "ratplus/ratplus.hpp"

using namespace ratplus;

int main() {
  cpu::context cpu;
  const model_config config{
      .vocab_size = 256, .d_model = 64, .num_heads = 4, .num_layers = 2, .d_ffn = 256, .max_seq_len = 512};
  language_model<gated_average> model(cpu, config);
  model.initialise(cpu, 7);  // random weights: the point here is the bookkeeping

  const index_t T = 400, prompt = 390;
  std::vector<token_t> ids(static_cast<std::size_t>(T));
  for (index_t t = 0; t < T; ++t) ids[static_cast<std::size_t>(t)] = static_cast<token_t>((t * t + 3 * t) % 256);
  const auto tokens = as_view(static_cast<const token_t*>(ids.data()), index_t{1}, T);

  bool agree = true;
  const auto decode_under = [&](const auto& pattern) {
    const auto full = model.forward(cpu, pattern, tokens);  // (1, T, V)

    kv_cache<float> cache(cpu, config, pattern, 1, T);
    tensor<float, 2> logits(1, config.vocab_size);
    double worst = 0;
    const auto append = [&](index_t begin, index_t end) {
      model.extend(cpu, pattern, cache, tokens.slice(1, begin, end), std::nullopt, logits.view());
      for (index_t v = 0; v < config.vocab_size; ++v)
        worst = std::fmax(worst, std::fabs(logits.as(config.vocab_size)[v] - full.view()(0, end - 1, v)));
    };
    append(0, 128);  // the prompt in pieces, of any sizes
    append(128, 129);
    append(129, prompt);
    for (index_t t = prompt; t < T; ++t) append(t, t + 1);  // then token by token

    std::printf("%-26s cache %7zu bytes for %lld positions   largest difference to the full pass %.1e\n",
                to_string(pattern).c_str(), cache.bytes(), static_cast<long long>(T), worst);
    agree = agree && worst < 1e-4;
  };

  decode_under(dense{});
  decode_under(dilated<16>{});
  decode_under(dilated_local<16, 32>{});
  decode_under(streaming<32, 4>{});

  // Text: greedy under the sparse pattern, from a cache that was kept dense and therefore serves every pattern.
  kv_cache<float> cache(cpu, config, dense{}, 1, 64);
  const auto made = generate(cpu, model, dilated<16>{}, cache, {{72, 101, 108, 108, 111}}, {.tokens = 8});
  std::printf("continuation:");
  for (const token_t id : made[0]) std::printf(" %d", id);
  std::printf("\n");
  return agree ? 0 : 1;
}
