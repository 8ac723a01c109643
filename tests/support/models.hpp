#pragma once
// Models of the tests: the reference cases' parameters in a language_model, tensors by name, tokens in host memory.

#include <map>
#include <string>

#include "ratplus/io/config_file.hpp"
#include "ratplus/model/language_model.hpp"
#include "support/golden.hpp"

namespace ratplus_tests {

template <class Backend, class Cell>
using model_of = ratplus::language_model<Cell, typename Backend::scalar, typename Backend::context::space>;

[[nodiscard]] inline ratplus::model_config golden_config(const std::string& set) {
  const auto file = golden("model", set);
  return ratplus::io::parse_config(file.metadata().at("config"), file.path());
}

/// The model of a golden set, with its parameters.
template <class Cell, class Backend>
[[nodiscard]] model_of<Backend, Cell> golden_model(Backend& backend, const std::string& set) {
  using Model = model_of<Backend, Cell>;
  using A = typename Model::A;
  const auto file = golden("model", set);
  Model model(backend.ctx, golden_config(set));
  std::vector<A> flat(static_cast<std::size_t>(model.layout().size()), A(0));
  for (const auto& entry : model.layout().entries()) {
    if (file.info(entry.name).shape != entry.shape) throw ratplus::format_error(entry.name + " has another shape");
    const auto values = file.template read_flat<A>(entry.name);
    std::copy(values.begin(), values.end(), flat.begin() + entry.offset);
  }
  if (file.names().size() != model.layout().entries().size())
    throw ratplus::format_error("the golden model has more tensors");
  upload(backend.ctx, static_cast<const A*>(flat.data()), model.parameters());
  model.parameters_changed(backend.ctx);
  return model;
}

/// A flat buffer of the model's layout (its parameters, or gradients) in host memory.
template <class Ctx, class A>
[[nodiscard]] array<A, 1> on_host(Ctx& ctx, ratplus::view<const A, 1> flat) {
  array<A, 1> a(flat.shape());
  download(ctx, flat, a.data.data());
  return a;
}

/// The tensor of a flat buffer, as one row of numbers.
template <class A>
[[nodiscard]] array<A, 1> part(const array<A, 1>& flat, const ratplus::parameter_layout::entry& entry) {
  array<A, 1> a(dims(entry.size()));
  std::copy_n(flat.data.begin() + entry.offset, entry.size(), a.data.begin());
  return a;
}

[[nodiscard]] inline ratplus::view<const token_t, 2> rows_of(const array<token_t, 2>& a) {
  return {a.data.data(), a.shape};
}

template <class Ctx, class A, int R>
[[nodiscard]] array<A, R> on_host(Ctx& ctx, const ratplus::tensor<A, R, typename Ctx::space>& t) {
  array<A, R> a(t.shape());
  download(ctx, t.as(t.size()), a.data.data());
  return a;
}

/// A small model whose weights are large enough for attention to choose.
[[nodiscard]] inline ratplus::model_config small_config() {
  ratplus::model_config c;
  c.vocab_size = 11;
  c.d_model = 8;
  c.num_heads = 2;
  c.num_layers = 2;
  c.d_ffn = 12;
  c.max_seq_len = 64;
  return c;
}

template <class Ctx, class Model>
void randomise(Ctx& ctx, Model& model, std::uint64_t seed, double deviation = 0.4) {
  using A = typename Model::A;
  std::vector<A> flat(static_cast<std::size_t>(model.layout().size()), A(0));
  random_source source(seed);
  for (const auto& entry : model.layout().entries())
    for (index_t i = 0; i < entry.size(); ++i)
      flat[static_cast<std::size_t>(entry.offset + i)] =
          static_cast<A>(deviation * source.centred() + (entry.is_norm() ? 1.0 : 0.0));
  upload(ctx, static_cast<const A*>(flat.data()), model.parameters());
  model.parameters_changed(ctx);
}

[[nodiscard]] inline array<token_t, 2> random_rows(index_t B, index_t T, index_t vocabulary, std::uint64_t seed) {
  return random_tokens(B * T, vocabulary, seed).as(dims(B, T));
}

}  // namespace ratplus_tests
