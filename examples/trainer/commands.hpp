#pragma once
// The commands, for any context. cpu.cpp and cuda.cu instantiate them.

#include <iostream>
#include <type_traits>

#include "evaluate.hpp"
#include "ratplus/io/checkpoint.hpp"
#include "ratplus/model/generate.hpp"
#include "ratplus/pattern/facts.hpp"
#include "ratplus/pattern/residency.hpp"
#include "report.hpp"
#include "tensors.hpp"
#include "train.hpp"

namespace trainer {

/// f(model) with a new model of the config. T: type of its products.
template <class T, ratplus::Context Ctx, class F>
int with_model(Ctx& ctx, const ratplus::model_config& config, F&& f) {
  return ratplus::visit_cell(config.recurrence, [&](const auto& cell) {
    ratplus::language_model<std::decay_t<decltype(cell)>, T, typename Ctx::space> model(ctx, config, cell);
    return f(model);
  });
}

/// f(model) with the model of a folder.
template <class T, ratplus::Context Ctx, class F>
int with_model(Ctx& ctx, const std::string& folder, F&& f) {
  const ratplus::io::model_source source = ratplus::io::open_model(folder);
  return with_model<T>(ctx, source.config, [&](auto& model) {
    load_model(ctx, source, model);
    return f(model);
  });
}

template <class T, ratplus::Context Ctx>
int run(Ctx& ctx, const pretrain_options& o) {
  const run_data data(o.training, o.config);
  prepare_folder(o.training);
  const named_schedule dense{"dense", {}};
  run_plan plan{.options = o.training,
                .config = o.config,
                .pattern = o.joint ? o.sparse : dense,
                .joint = o.joint,
                .options_text = options_text(o, data.learnt.size()),
                .evaluated = {dense}};
  if (o.joint) plan.evaluated.push_back(o.sparse);
  return with_model<T>(ctx, o.config, [&](auto& model) {
    model.initialise(ctx, o.training.seed);
    return train(ctx, model, plan, data);
  });
}

template <class T, ratplus::Context Ctx>
int run(Ctx& ctx, const adapt_options& given) {
  const ratplus::io::model_source source = ratplus::io::open_model(given.model);
  adapt_options o = given;
  if (o.training.seq_len == 0) o.training.seq_len = source.config.max_seq_len;
  const run_data data(o.training, source.config);
  prepare_folder(o.training);
  const run_plan plan{.options = o.training,
                      .config = source.config,
                      .pattern = o.pattern,
                      .joint = false,
                      .options_text = options_text(o, data.learnt.size()),
                      .evaluated = {o.pattern}};
  return with_model<T>(ctx, source.config, [&](auto& model) {
    load_model(ctx, source, model);
    return train(ctx, model, plan, data);
  });
}

/// Keys that the queries of T positions see, all layers and heads.
inline index_t keys_visited(const ratplus::any_schedule& schedule, const ratplus::model_config& c, index_t T) {
  index_t keys = 0;
  for (index_t layer = 0; layer < c.num_layers; ++layer) {
    const ratplus::any_by_head& heads = schedule.layer(layer);
    check_heads(heads, c.num_heads);
    for (index_t g = 0; g < heads.groups(); ++g)
      keys += c.num_heads / heads.groups() *
              heads.visit_group(g, [&](const auto& pattern) { return ratplus::keys_visited(pattern, T); });
  }
  return keys;
}

template <class T, ratplus::Context Ctx>
int run(Ctx& ctx, const eval_options& o) {
  return with_model<T>(ctx, o.model, [&](auto& model) {
    using Model = std::decay_t<decltype(model)>;
    const ratplus::model_config& c = model.config();
    const index_t seq_len = o.seq_len > 0 ? o.seq_len : c.max_seq_len;
    const ratplus::io::token_stream stream = open_stream(o.data, c.vocab_size);
    const auto evaluated = static_cast<index_t>(std::ceil(o.last_part * static_cast<double>(stream.size())));
    const token_range range(stream, stream.size() - evaluated, stream.size(), c.ignore_token);
    range.require(1, "--data");
    std::vector<eval_row> rows;
    for (const named_schedule& p : o.patterns) {
      const index_t keys = keys_visited(p.schedule, c, seq_len), dense = keys_visited({}, c, seq_len);
      const evaluation sum = evaluate(ctx, model, p.schedule, range, o.batch, seq_len);
      const bool text = c.vocab_size == 256 &&
                        o.data.format.value_or(ratplus::io::token_format::bytes) == ratplus::io::token_format::bytes;
      const double bits = sum.nats / std::log(2.0);
      const double bytes = o.text_bytes ? static_cast<double>(*o.text_bytes)
                           : text       ? static_cast<double>(sum.labels)
                                        : std::nan("");
      const ratplus::kv_cache<typename Model::scalar, typename Model::space> cache(ctx, c, p.schedule, 1, seq_len);
      rows.push_back({.pattern = p.name,
                      .loss = sum.loss(),
                      .perplexity = std::exp(sum.loss()),
                      .bits_per_byte = bits / bytes,
                      .tokens = sum.labels,
                      .keys_visited = keys,
                      .keys_dense = dense,
                      .kv_cache_bytes = static_cast<index_t>(cache.bytes())});
    }
    print_table(rows, seq_len, o.json);
    return 0;
  });
}

/// Text is bytes: the token ids of a vocabulary of 256.
template <class T, ratplus::Context Ctx>
int run(Ctx& ctx, const generate_options& o) {
  return with_model<T>(ctx, o.model, [&](auto& model) {
    using Model = std::decay_t<decltype(model)>;
    if (model.config().vocab_size != 256)
      throw ratplus::value_error(ratplus::message("--prompt: text is read and written as bytes, a vocabulary of 256; ",
                                                  o.model, " has ", model.config().vocab_size, " tokens"));
    std::vector<token_t> prompt;
    for (const char c : o.prompt) prompt.push_back(static_cast<unsigned char>(c));
    if (prompt.empty()) throw ratplus::value_error("--prompt: the text is empty");
    const index_t positions = static_cast<index_t>(prompt.size()) + o.tokens;
    ratplus::kv_cache<typename Model::scalar, typename Model::space> cache(ctx, model.config(), o.pattern.schedule, 1,
                                                                           positions);
    const ratplus::generation_options options{
        .tokens = o.tokens,
        .how = {.temperature = o.temperature, .top_k = o.top_k, .top_p = o.top_p, .seed = o.seed},
        .stop = model.config().ignore_token};
    std::cout << o.prompt << std::flush;
    generate(ctx, model, o.pattern.schedule, cache, {prompt}, options,
             [](index_t, token_t token) { std::cout << static_cast<char>(token) << std::flush; });
    std::cout << std::endl;
    if (!std::cout) throw ratplus::io_error("standard output: cannot write");
    return 0;
  });
}

template <class T, ratplus::Context Ctx>
int run(Ctx& ctx, const logits_options& o) {
  return with_model<T>(ctx, o.model, [&](auto& model) {
    write_logits(ctx, model, o);
    return 0;
  });
}

template <class T, ratplus::Context Ctx>
int run(Ctx& ctx, const grads_options& o) {
  return with_model<T>(ctx, o.model, [&](auto& model) {
    write_gradients(ctx, model, o);
    return 0;
  });
}

template <class T, ratplus::Context Ctx>
int run_command(Ctx& ctx, const command& what) {
  return std::visit([&](const auto& options) { return run<T>(ctx, options); }, what);
}

}  // namespace trainer
