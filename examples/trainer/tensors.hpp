#pragma once
// `logits` and `grads`: what a model computes for given tokens, as safetensors.

#include "options.hpp"
#include "ratplus/io/checkpoint.hpp"
#include "ratplus/model/language_model.hpp"

namespace trainer {

/// `tokens` or `labels`, (B, T).
inline ratplus::tensor<token_t, 2> read_ids(const ratplus::io::safetensors_file& file, const char* name) {
  return file.read<token_t, 2>(name);
}

/// Every position's logits, (B, T, V), in one forward pass, or from a prefill of the first `prefill` positions and one
/// decoding step for each of the others.
template <ratplus::Context Ctx, class Model>
void write_logits(Ctx& ctx, Model& model, const logits_options& o) {
  using A = typename Model::A;
  using Space = typename Model::space;
  const auto file = ratplus::io::safetensors_file::open(o.tokens);
  const auto tokens = read_ids(file, "tokens");
  const index_t B = tokens.extent(0), T = tokens.extent(1), V = model.config().vocab_size;
  ratplus::tensor<A, 3> logits(B, T, V);
  const auto keep = [&](ratplus::view<const A, 3> piece, index_t begin) {  // (B, n, V) of positions begin, …
    const index_t row = piece.extent(1) * V;
    for (index_t b = 0; b < B; ++b)
      download(ctx, ratplus::as_view(piece.data() + b * row, row), logits.data() + (b * T + begin) * V);
  };
  if (!o.prefill) {
    const auto all = model.forward(ctx, o.pattern.schedule, tokens.view());
    keep(all.view(), 0);
  } else {
    if (*o.prefill > T)
      throw ratplus::value_error(ratplus::message("--prefill: ", *o.prefill, " positions, ", o.tokens, " has ", T));
    ratplus::kv_cache<typename Model::scalar, Space> cache(ctx, model.config(), o.pattern.schedule, B, T);
    const auto extend = [&](index_t begin, index_t end) {
      ratplus::tensor<A, 3, Space> piece(B, end - begin, V);
      model.extend(ctx, o.pattern.schedule, cache, tokens.view().slice(1, begin, end), {}, piece.view());
      keep(std::as_const(piece).view(), begin);
    };
    if (*o.prefill > 0) extend(0, *o.prefill);
    for (index_t t = *o.prefill; t < T; ++t) extend(t, t + 1);
  }
  ratplus::io::safetensors_writer out;
  out.add("logits", logits);
  out.write(o.out);
}

/// Loss and the gradient of every tensor.
template <ratplus::Context Ctx, class Model>
void write_gradients(Ctx& ctx, Model& model, const grads_options& o) {
  const auto file = ratplus::io::safetensors_file::open(o.tokens);
  const auto tokens = read_ids(file, "tokens"), labels = read_ids(file, "labels");
  auto gradients = model.make_gradients(ctx);
  ratplus::tensor<double, 1> loss(1);
  *loss.data() = model.loss_and_gradients(ctx, o.pattern.schedule, {tokens.view(), labels.view()}, gradients.view());
  const auto host = ratplus::io::detail::to_host(ctx, std::as_const(gradients).view());
  ratplus::io::safetensors_writer out;
  out.add("loss", loss);
  ratplus::io::detail::add_flat(out, "grad/", model.layout(), host);
  out.write(o.out);
}

}  // namespace trainer
