#pragma once
// config.json: the fields of model_config under their own names. `recurrence` is true (the gated average of RAT+),
// false (none) or a cell's name; `ignore_token` may be absent or null. Other keys are ignored, since published
// checkpoints carry more; a missing field, a wrong type and a key given twice are errors.

#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "ratplus/io/atomic.hpp"
#include "ratplus/io/detail/json.hpp"
#include "ratplus/io/mapped_file.hpp"
#include "ratplus/nn/config.hpp"

namespace ratplus::io {

/// Parses and validates the text of a config.json. Throws format_error for text, field or type, value_error for sizes
/// that make no model; both name `source`.
[[nodiscard]] inline model_config parse_config(std::string_view text, const std::string& source) {
  using nlohmann::json;
  const json document = detail::parse_json(text, source);
  const auto fail = [&](const auto&... what) { throw format_error(message(source, ": ", what...)); };
  if (!document.is_object()) fail("config is ", document.type_name(), ", expected an object");

  const auto field = [&](const char* name) -> const json& {
    const auto found = document.find(name);
    if (found == document.end()) fail("config has no ", name);
    return *found;
  };
  const auto wrong_type = [&](const char* name, const json& value, const char* expected) {
    // Invalid UTF-8 cannot be here (the parser refuses it), so dump does not throw.
    fail(name, " is ", excerpt(value.is_structured() ? value.type_name() : value.dump()), ", expected ", expected);
  };
  const auto integer = [&]<std::integral Integer>(const char* name, const json& value, Integer& out) {
    if (!value.is_number_integer()) wrong_type(name, value, "an integer");
    const bool fits = value.is_number_unsigned() ? std::in_range<Integer>(value.get<std::uint64_t>())
                                                 : std::in_range<Integer>(value.get<std::int64_t>());
    if (!fits) wrong_type(name, value, "a smaller integer");
    out = value.get<Integer>();
  };

  model_config config;
  const std::pair<const char*, index_t*> sizes[] = {
      {"vocab_size", &config.vocab_size}, {"d_model", &config.d_model}, {"num_heads", &config.num_heads},
      {"num_layers", &config.num_layers}, {"d_ffn", &config.d_ffn},     {"max_seq_len", &config.max_seq_len}};
  for (const auto& [name, out] : sizes) integer(name, field(name), *out);

  const json& recurrence = field("recurrence");
  if (recurrence.is_boolean()) {
    config.recurrence = recurrence.get<bool>() ? "gated_average" : "none";
  } else if (recurrence.is_string()) {
    config.recurrence = recurrence.get<std::string>();
  } else {
    wrong_type("recurrence", recurrence, "true, false or a cell's name");
  }

  const json& rope_base = field("rope_base");
  if (!rope_base.is_number()) wrong_type("rope_base", rope_base, "a number");
  config.rope_base = rope_base.get<double>();

  if (const auto token = document.find("ignore_token"); token != document.end() && !token->is_null())
    integer("ignore_token", *token, config.ignore_token.emplace());

  try {
    validate(config);
  } catch (const value_error& e) {
    throw value_error(message(source, ": ", e.what()));
  }
  return config;
}

/// The text parse_config reads back to the same config; the same config always gives the same text.
[[nodiscard]] inline std::string config_text(const model_config& config) {
  using nlohmann::ordered_json;
  ordered_json document = {{"vocab_size", config.vocab_size}, {"d_model", config.d_model},
                           {"num_heads", config.num_heads},   {"num_layers", config.num_layers},
                           {"d_ffn", config.d_ffn},           {"recurrence", config.recurrence},
                           {"rope_base", config.rope_base},   {"max_seq_len", config.max_seq_len},
                           {"ignore_token", nullptr}};
  if (config.recurrence == "gated_average") document["recurrence"] = true;
  if (config.recurrence == "none") document["recurrence"] = false;
  if (config.ignore_token) document["ignore_token"] = *config.ignore_token;
  return document.dump(2) + "\n";
}

/// Reads a config.json; errors name `path`.
[[nodiscard]] inline model_config read_config(const std::string& path) {
  constexpr std::size_t most = 1 << 20;
  const mapped_file file(path);
  if (file.size() > most)
    throw format_error(message(path, ": config of ", file.size(), " bytes, at most ", most, " allowed"));
  return parse_config({reinterpret_cast<const char*>(file.data()), file.size()}, path);
}

/// Replaces `path` by the config's text, all or nothing.
inline void write_config(const std::string& path, const model_config& config) {
  write_atomically(path, config_text(config));
}

}  // namespace ratplus::io
