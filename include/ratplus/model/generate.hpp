#pragma once
// Generating text: prefill the prompts, then choose and append a token at a time.

#include <functional>

#include "ratplus/model/language_model.hpp"
#include "ratplus/ops/replay.hpp"
#include "ratplus/ops/sample.hpp"

namespace ratplus {

struct generation_options {
  index_t tokens = 100;              // new tokens of each sequence
  sampling how = {};                 // greedy unless a temperature is set
  std::optional<token_t> stop = {};  // a sequence that produced it is finished
  index_t prefill_piece = 512;       // prompts are read in pieces of this many rows, which bounds the memory
};

/// Continues every sequence of `cache` (fresh, or holding earlier text) with its prompt, then with up to options.tokens
/// new tokens. Returns the new tokens of each sequence; `on_token(sequence, token)` is called as each is chosen. Every
/// prompt needs at least one token; the cache needs room for prompt + tokens − 1 positions of each sequence, else
/// cache_full is thrown before it is changed.
template <Context Ctx, class Model, class S, class Cache>
std::vector<std::vector<token_t>> generate(Ctx& ctx, Model& model, const S& schedule, Cache& cache,
                                           const std::vector<std::vector<token_t>>& prompts,
                                           const generation_options& options,
                                           const std::function<void(index_t, token_t)>& on_token = {}) {
  using A = typename Model::A;
  using Space = typename Model::space;
  check_sampling(options.how);
  const index_t B = cache.batch(), V = model.config().vocab_size;
  if (static_cast<index_t>(prompts.size()) != B)
    throw shape_error(message("generate: ", prompts.size(), " prompts, the cache has ", B, " sequences"));
  std::vector<std::vector<token_t>> made(prompts.size());
  if (options.tokens <= 0) return made;
  index_t longest = 0;
  std::vector<token_t> whole;
  for (index_t b = 0; b < B; ++b) {
    const auto n = static_cast<index_t>(prompts[static_cast<std::size_t>(b)].size());
    if (n == 0) throw value_error(message("generate: prompt ", b, " is empty"));
    longest = std::max(longest, n);
    whole.push_back(static_cast<token_t>(n + options.tokens - 1));
  }
  cache.check_room(whole);

  tensor<A, 2, Space> logits(B, V), piece_logits(B, V);
  const index_t piece = std::max<index_t>(1, std::min(options.prefill_piece, longest));
  for (index_t begin = 0; begin < longest; begin += piece) {
    const index_t n = std::min(piece, longest - begin);
    std::vector<token_t> rows(static_cast<std::size_t>(B * n), 0), lengths;
    for (index_t b = 0; b < B; ++b) {
      const auto& prompt = prompts[static_cast<std::size_t>(b)];
      const index_t left = std::clamp<index_t>(static_cast<index_t>(prompt.size()) - begin, 0, n);
      std::copy_n(prompt.begin() + std::min(begin, static_cast<index_t>(prompt.size())), left, rows.begin() + b * n);
      lengths.push_back(static_cast<token_t>(left));
    }
    model.extend(ctx, schedule, cache, as_view(static_cast<const token_t*>(rows.data()), B, n), lengths,
                 piece_logits.view());
    // Keep the logits of the sequences that got a token: those of a prompt's last piece stay.
    for (index_t b = 0; b < B; ++b)
      if (lengths[static_cast<std::size_t>(b)] > 0) copy(ctx, std::as_const(piece_logits).view()[b], logits.view()[b]);
  }

  cache.check_serves(schedule);
  tensor<token_t, 1, Space> chosen(B), active_there(B);
  std::vector<token_t> token(prompts.size()), active(prompts.size(), 1);
  const auto choose = [&] {
    sample(ctx, sample_args<A>{.logits = logits, .position = cache.positions_there(), .token = chosen}, options.how);
  };
  choose();
  typename Ctx::recording step;
  for (index_t i = 0;; ++i) {
    download(ctx, std::as_const(chosen).view(), token.data());
    bool any = false;
    for (std::size_t b = 0; b < token.size(); ++b) {
      if (active[b] == 0) continue;
      made[b].push_back(token[b]);
      if (on_token) on_token(static_cast<index_t>(b), token[b]);
      if (options.stop && token[b] == *options.stop) active[b] = 0;
      any = any || active[b] != 0;
    }
    if (!any || i + 1 == options.tokens) return made;
    cache.grow(active);
    upload(ctx, static_cast<const token_t*>(active.data()), active_there.view());
    replay(ctx, step, [&] {
      model.decode_step(ctx, schedule, cache, std::as_const(chosen).view(), std::as_const(active_there).view(),
                        logits.view());
      choose();
    });
  }
}

}  // namespace ratplus
