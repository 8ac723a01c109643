// config.json: what is printed is read back; what is not a config is an error that names the field.

#include "ratplus/io/config_file.hpp"

#include <random>

#include "ratplus/io/safetensors.hpp"
#include "support/catch.hpp"
#include "support/scratch.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

model_config small_config() {
  model_config config;
  config.vocab_size = 61;
  config.d_model = 32;
  config.num_heads = 4;
  config.num_layers = 3;
  config.d_ffn = 128;
  config.max_seq_len = 64;
  config.ignore_token = 2;
  return config;
}

/// The small config's text with one field replaced by `value`, or without it when `value` is empty.
std::string with(const std::string& field, const std::string& value) {
  auto document = nlohmann::ordered_json::parse(io::config_text(small_config()));
  document.erase(field);
  std::string text = document.dump();
  if (!value.empty()) text.insert(text.size() - 1, ",\"" + field + "\":" + value);
  return text;
}

}  // namespace

TEST_CASE("config: what is written is read back") {
  const scratch_folder folder;
  auto config = small_config();
  config.recurrence = GENERATE("gated_average", "none", "chunked:16", "a \"cell\" of mine");
  config.rope_base = GENERATE(10000.0, 500000.5);
  if (config.rope_base > 20000) config.ignore_token.reset();
  io::write_config(folder / "config.json", config);
  CHECK(io::read_config(folder / "config.json") == config);
  CHECK(io::config_text(io::read_config(folder / "config.json")) == read_file(folder / "config.json"));
}

TEST_CASE("config: the published spellings") {
  CHECK(io::parse_config(with("recurrence", "true"), "c").recurrence == "gated_average");
  CHECK(io::parse_config(with("recurrence", "false"), "c").recurrence == "none");
  CHECK(io::parse_config(with("recurrence", R"("chunked")"), "c").recurrence == "chunked");
  CHECK(io::parse_config(with("rope_base", "10000"), "c").rope_base == 10000.0);
  CHECK(io::parse_config(with("ignore_token", "null"), "c").ignore_token == std::nullopt);
  CHECK(io::parse_config(with("ignore_token", ""), "c").ignore_token == std::nullopt);
  CHECK(io::parse_config(with("ignore_token", "0"), "c").ignore_token == 0);
  CHECK(io::parse_config(with("architecture", R"({"name":["x",{"y":null}]})"), "c") == small_config());
  CHECK(io::config_text(small_config()).find("\"recurrence\": true") != std::string::npos);

  for (const std::string name : {"golden", "golden-attention"}) {
    const auto model = io::safetensors_file::open(std::string(RATPLUS_GOLDEN_DIR "/model-") + name + ".safetensors");
    const auto config = io::parse_config(model.metadata().at("config"), name);
    CHECK(config.recurrence == (name == "golden" ? "gated_average" : "none"));
    CHECK(model.info("embedding.wte.weight").shape == std::vector<index_t>{config.vocab_size, config.d_model});
  }
}

TEST_CASE("config: a missing field or a wrong type is named") {
  const auto fails = [](const std::string& text) {
    const auto found = message_of<format_error>([&] { (void)io::parse_config(text, "run/config.json"); });
    CHECK_THAT(found, contains("run/config.json: "));
    return found;
  };
  for (const std::string field : {"vocab_size", "d_model", "num_heads", "num_layers", "d_ffn", "max_seq_len"}) {
    CHECK_THAT(fails(with(field, "")), contains("config has no " + field));
    CHECK_THAT(fails(with(field, "32.0")), contains(field + " is '32.0', expected an integer"));
    CHECK_THAT(fails(with(field, "\"32\"")), contains(field + " is '\"32\"', expected an integer"));
    CHECK_THAT(fails(with(field, "null")), contains(field + " is 'null', expected an integer"));
    CHECK_THAT(fails(with(field, "[1]")), contains(field + " is 'array', expected an integer"));
    CHECK_THAT(fails(with(field, "18446744073709551615")), contains("expected a smaller integer"));
  }
  CHECK_THAT(fails(with("recurrence", "")), contains("config has no recurrence"));
  CHECK_THAT(fails(with("recurrence", "1")), contains("recurrence is '1', expected true, false or a cell's name"));
  CHECK_THAT(fails(with("rope_base", "")), contains("config has no rope_base"));
  CHECK_THAT(fails(with("rope_base", "true")), contains("rope_base is 'true', expected a number"));
  CHECK_THAT(fails(with("ignore_token", "\"no\"")), contains("ignore_token is '\"no\"', expected an integer"));
  CHECK_THAT(fails(with("ignore_token", "2147483648")), contains("expected a smaller integer"));
  CHECK_THAT(fails("[]"), contains("config is array, expected an object"));
  CHECK_THAT(fails(""), contains("not valid JSON at byte 1"));
  CHECK_THAT(fails("{} {}"), contains("not valid JSON"));
  CHECK_THAT(fails(with("rope_base", "1e999")), contains("number out of range"));
  CHECK_THAT(fails(with("x", "\"\xff\"")), contains("not valid JSON"));
}

TEST_CASE("config: a key given twice is an error at every level, the same key in two places is not") {
  const auto parse = [](const std::string& text) { return [text] { (void)io::parse_config(text, "c"); }; };
  CHECK_THAT(message_of<format_error>(parse(with("x", "1,\"d_model\":64"))), contains("key 'd_model' occurs twice"));
  CHECK_THAT(message_of<format_error>(parse(with("x", R"([{"a":{"b":1,"b":2}}])"))), contains("key 'b' occurs twice"));
  CHECK_NOTHROW(parse(with("x", R"([{"a":1,"d_model":2},{"a":1,"b":{"a":1}},{"b":{"a":1}}])"))());
}

TEST_CASE("config: nesting and size are limited") {
  const scratch_folder folder;
  const auto deep = message_of<format_error>([] { (void)io::parse_config(std::string(1'000'000, '['), "c"); });
  CHECK_THAT(deep, contains("JSON nested deeper than 16 levels"));
  std::string objects;
  for (int i = 0; i < 1'000'000; ++i) objects += R"({"a":)";
  CHECK_THAT(message_of<format_error>([&] { (void)io::parse_config(objects, "c"); }), contains("nested deeper"));

  write_file(folder / "large", with("x", "\"" + std::string(1 << 20, 'x') + "\""));
  CHECK_THAT(message_of<format_error>([&] { (void)io::read_config(folder / "large"); }),
             contains("at most 1048576 allowed"));
  write_file(folder / "empty", "");
  CHECK_THAT(message_of<format_error>([&] { (void)io::read_config(folder / "empty"); }), contains("not valid JSON"));
  CHECK_THAT(message_of<io_error>([&] { (void)io::read_config(folder / "absent"); }), contains("absent: cannot open"));
}

TEST_CASE("config: sizes that make no model are named with their value") {
  const auto fails = [](const std::string& field, const std::string& value) {
    const auto found = message_of<value_error>([&] { (void)io::parse_config(with(field, value), "run/config.json"); });
    CHECK_THAT(found, contains("run/config.json: config: "));
    return found;
  };
  for (const std::string field : {"vocab_size", "d_model", "num_heads", "num_layers", "d_ffn", "max_seq_len"}) {
    CHECK_THAT(fails(field, "0"), contains(field + " is 0, must be positive"));
    CHECK_THAT(fails(field, "-8"), contains(field + " is -8, must be positive"));
    CHECK_THAT(fails(field, "9223372036854775807"), contains(field + " is 9223372036854775807, at most"));
  }
  CHECK_THAT(fails("num_heads", "5"), contains("num_heads is 5, must divide d_model, 32"));
  CHECK_THAT(fails("num_heads", "64"), contains("num_heads is 64, must divide d_model, 32"));
  CHECK_THAT(fails("num_heads", "32"), contains("d_model / num_heads is 32 / 32 = 1, must be even"));
  CHECK_THAT(fails("recurrence", "\"\""), contains("recurrence is empty"));
  CHECK_THAT(fails("rope_base", "0"), contains("rope_base is 0, must be"));
  CHECK_THAT(fails("rope_base", "-10000"), contains("rope_base is -10000, must be"));
  CHECK_THAT(fails("ignore_token", "61"), contains("ignore_token is 61, must be below vocab_size, 61"));
  CHECK_THAT(fails("ignore_token", "-100"), contains("ignore_token is -100"));

  auto config = small_config();
  CHECK_NOTHROW(validate(config));
  config.rope_base = std::nan("");
  CHECK_THROWS_AS(validate(config), value_error);
}

TEST_CASE("config: random damage is read or refused, never worse") {
  const std::string whole = io::config_text(small_config());
  std::mt19937 random(11);
  const auto below = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  int read = 0, refused = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string text = whole;
    for (std::size_t damages = 1 + below(3); damages > 0; --damages) {
      const std::size_t at = below(text.size());
      switch (below(4)) {
        case 0:
          text[at] = static_cast<char>(random());
          break;
        case 1:
          text[at] = "0123456789,:[]{}\"\\-e"[below(20)];
          break;
        case 2:
          text.resize(at + 1);
          break;
        default:
          text.insert(at, text.substr(below(text.size()), 1 + below(20)));
      }
    }
    try {
      validate(io::parse_config(text, "c"));
      ++read;
    } catch (const error&) {
      ++refused;
    }
  }
  CHECK(read > 100);
  CHECK(refused > 1000);
}
