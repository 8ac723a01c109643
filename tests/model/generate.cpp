// Generation against choosing tokens by hand from full forward passes; how runs repeat, stop and resume; what a model
// refuses.

#include "ratplus/model/generate.hpp"

#include "ratplus/pattern/parse.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "support/backends.hpp"
#include "support/compare.hpp"
#include "support/models.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

using text = std::vector<token_t>;

const std::vector<text> prompts{{3, 1, 4, 1, 5, 9, 2, 6}, {7}, {2, 7, 1, 8, 2}};
const any_schedule& schedule() {
  static const any_schedule s = parse_schedule("dense,dilated:4+local:3+sinks:1");
  return s;
}

template <class Backend>
model_of<Backend, gated_average> random_model(Backend& backend) {
  model_of<Backend, gated_average> model(backend.ctx, small_config());
  randomise(backend.ctx, model, 4, 0.6);
  return model;
}

template <class Backend, class Model>
std::vector<text> generated(Backend& backend, Model& model, const generation_options& options,
                            const std::vector<text>& from = prompts) {
  kv_cache<typename Model::scalar, typename Model::space, typename Model::A> cache(
      backend.ctx, model.config(), schedule(), static_cast<index_t>(from.size()), 40);
  return generate(backend.ctx, model, schedule(), cache, from, options);
}

}  // namespace

TEMPLATE_TEST_CASE("greedy generation chooses from the forward pass's logits", "", RATPLUS_TEST_MODEL_BACKENDS) {
  TestType backend;
  auto model = random_model(backend);
  generation_options options;
  options.tokens = 12;
  std::vector<text> expected;
  for (text sequence : prompts) {
    text made;
    for (index_t i = 0; i < options.tokens; ++i) {
      const auto n = static_cast<index_t>(sequence.size());
      const auto logits =
          on_host(backend.ctx, model.forward(backend.ctx, schedule(), as_view(std::as_const(sequence).data(), 1, n)));
      token_t best = 0;
      for (token_t id = 1; id < 11; ++id)
        if (logits(0, n - 1, id) > logits(0, n - 1, best)) best = id;
      sequence.push_back(best);
      made.push_back(best);
    }
    expected.push_back(made);
  }
  for (const index_t piece : {1, 3, 512}) {
    options.prefill_piece = piece;
    CHECK(generated(backend, model, options) == expected);
  }
}

TEMPLATE_TEST_CASE("a generation repeats, stops and can be resumed", "", RATPLUS_TEST_MODEL_BACKENDS) {
  TestType backend;
  auto& ctx = backend.ctx;
  auto model = random_model(backend);
  using Model = decltype(model);
  generation_options options;
  options.tokens = 20;
  options.how.temperature = 1;
  options.how.seed = 9;
  const auto whole = generated(backend, model, options);
  for (const text& made : whole) CHECK(made.size() == 20);
  CHECK(generated(backend, model, options) == whole);
  options.how.seed = 10;
  CHECK(generated(backend, model, options) != whole);
  options.how.seed = 9;

  // Cut after 8 tokens: the last of them is not in the cache yet and is the prompt of the rest.
  kv_cache<typename Model::scalar, typename Model::space, typename Model::A> cache(ctx, model.config(), schedule(), 3,
                                                                                   40);
  options.tokens = 8;
  auto parts = generate(ctx, model, schedule(), cache, prompts, options);
  std::vector<text> last;
  for (const text& made : parts) last.push_back({made.back()});
  options.tokens = 12;
  const auto rest = generate(ctx, model, schedule(), cache, last, options);
  for (std::size_t b = 0; b < parts.size(); ++b) parts[b].insert(parts[b].end(), rest[b].begin(), rest[b].end());
  CHECK(parts == whole);

  // A sequence ends with its stop token; the others go on as they would.
  options.tokens = 20;
  options.stop = whole[0][5];
  std::vector<text> told(3);
  kv_cache<typename Model::scalar, typename Model::space, typename Model::A> fresh(ctx, model.config(), schedule(), 3,
                                                                                   40);
  const auto stopped = generate(ctx, model, schedule(), fresh, prompts, options,
                                [&](index_t b, token_t id) { told[static_cast<std::size_t>(b)].push_back(id); });
  CHECK(told == stopped);
  for (std::size_t b = 0; b < whole.size(); ++b) {
    text expected;
    for (const token_t id : whole[b]) {
      expected.push_back(id);
      if (id == *options.stop) break;
    }
    CHECK(stopped[b] == expected);
  }
}

TEMPLATE_TEST_CASE("generation refuses what does not fit, before anything is changed", "",
                   RATPLUS_TEST_MODEL_BACKENDS) {
  TestType backend;
  auto& ctx = backend.ctx;
  auto model = random_model(backend);
  using Model = decltype(model);
  kv_cache<typename Model::scalar, typename Model::space, typename Model::A> cache(ctx, model.config(), schedule(), 3,
                                                                                   20);
  generation_options options;
  options.tokens = 14;  // 8 + 14 − 1 positions
  CHECK_THROWS_AS(generate(ctx, model, schedule(), cache, prompts, options), cache_full);
  CHECK(cache.position(0) == 0);
  options.tokens = 13;
  CHECK_NOTHROW(generate(ctx, model, schedule(), cache, prompts, options));
  CHECK(cache.position(0) == 20);
  CHECK_THROWS_WITH(generate(ctx, model, schedule(), cache, {{1}, {2}}, options),
                    contains("2 prompts, the cache has 3 sequences"));
  CHECK_THROWS_WITH(generate(ctx, model, schedule(), cache, {{1}, {}, {2}}, options), contains("prompt 1 is empty"));
}

TEMPLATE_TEST_CASE("a model refuses tokens, labels and shapes that are not its own", "", RATPLUS_TEST_MODEL_BACKENDS) {
  TestType backend;
  auto& ctx = backend.ctx;
  auto model = random_model(backend);
  auto tokens = random_rows(2, 5, 11, 1);
  const auto good = tokens;
  tokens(1, 3) = 11;
  CHECK_THROWS_WITH(model.forward(ctx, schedule(), rows_of(tokens)),
                    contains("id 11 at (1, 3) is outside the vocabulary of 11"));
  tokens(1, 3) = -100;
  CHECK_THROWS_AS(model.forward(ctx, schedule(), rows_of(tokens)), value_error);
  // −100 is a label, though, and no other negative number.
  CHECK_NOTHROW(model.loss(ctx, schedule(), {rows_of(good), rows_of(tokens)}));
  tokens(1, 3) = -99;
  CHECK_THROWS_WITH(model.loss(ctx, schedule(), {rows_of(good), rows_of(tokens)}),
                    contains("labels: id -99 at (1, 3)"));
  CHECK_THROWS_AS(model.loss(ctx, schedule(), {rows_of(good), rows_of(good).slice(1, 0, 4)}), shape_error);
  const array<token_t, 2> ignored(dims(2, 5), -100), none_at_all(dims(0, 5));
  CHECK_THROWS_WITH(model.loss(ctx, schedule(), {rows_of(good), rows_of(ignored)}), contains("no label counts"));
  CHECK_THROWS_AS(model.forward(ctx, schedule(), rows_of(none_at_all)), shape_error);
  CHECK_THROWS_WITH(model.forward(ctx, parse_schedule("[dense|local:2|local:3]"), rows_of(good)),
                    contains("3 patterns do not divide 2 heads evenly"));
}

TEMPLATE_TEST_CASE("initial weights: deviation 0.02, norms 1, the seed's own", "", RATPLUS_TEST_MODEL_BACKENDS) {
  TestType backend;
  auto& ctx = backend.ctx;
  auto config = small_config();
  config.d_model = 32;
  config.d_ffn = 128;
  model_of<TestType, gated_average> model(ctx, config), other(ctx, config);
  model.initialise(ctx, 1);
  other.initialise(ctx, 2);
  const auto flat = on_host(ctx, std::as_const(model).parameters());
  CHECK_FALSE(same_bits(on_host(ctx, std::as_const(other).parameters()), flat));
  other.initialise(ctx, 1);
  CHECK(same_bits(on_host(ctx, std::as_const(other).parameters()), flat));
  double squares = 0, sum = 0;
  index_t n = 0;
  for (const auto& entry : model.layout().entries()) {
    const auto values = part(flat, entry);
    if (entry.is_norm()) {
      for (const auto x : values.data) CHECK(x == 1);
      continue;
    }
    for (const auto x : values.data) {
      sum += number(x);
      squares += number(x) * number(x);
    }
    n += entry.size();
  }
  const auto count = static_cast<double>(n);
  CHECK(difference(std::sqrt(squares / count), 0.02) <= 4 / std::sqrt(2 * count));
  CHECK(std::abs(sum / count) <= 4 * 0.02 / std::sqrt(count));
}
