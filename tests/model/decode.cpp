// Decoding equals the forward pass: step by step, in pieces, with sequences at positions of their own, and from a cache
// that keeps more than is asked.

#include "ratplus/pattern/names.hpp"
#include "ratplus/pattern/parse.hpp"
#include "ratplus/recurrence/chunked.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "ratplus/recurrence/none.hpp"
#include "support/backends.hpp"
#include "support/compare.hpp"
#include "support/models.hpp"
#include "support/patterns.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

using calls = std::vector<std::vector<token_t>>;  // lengths[call][sequence]

calls steps(index_t B, token_t prefill, token_t rows) {
  calls all;
  if (prefill > 0) all.push_back(std::vector<token_t>(static_cast<std::size_t>(B), prefill));
  for (token_t t = prefill; t < rows; ++t) all.push_back(std::vector<token_t>(static_cast<std::size_t>(B), 1));
  return all;
}

// The logits of every position, decoded by the given calls, against the forward pass.
template <class Backend, class Model, class Kept, class S>
void check_calls(Backend& backend, Model& model, const Kept& kept, const S& schedule, const calls& all,
                 double tolerance) {
  using A = typename Model::A;
  auto& ctx = backend.ctx;
  const auto B = static_cast<index_t>(all.front().size());
  const index_t V = model.config().vocab_size;
  std::vector<token_t> total(all.front().size(), 0);
  for (const auto& call : all)
    for (std::size_t b = 0; b < total.size(); ++b) total[b] += call[b];
  const index_t rows = *std::max_element(total.begin(), total.end());
  const auto tokens = random_rows(B, rows, V, 5);
  const auto whole = on_host(ctx, model.forward(ctx, schedule, rows_of(tokens)));

  kv_cache<typename Model::scalar, typename Model::space, A> cache(ctx, model.config(), kept, B, rows);
  array<A, 3> got(whole.shape);
  array<A, 3> expected(whole.shape);
  bool last_agrees = true;
  for (const auto& lengths : all) {
    const index_t n = std::max<index_t>(1, *std::max_element(lengths.begin(), lengths.end()));
    array<token_t, 2> piece(dims(B, n));
    for (index_t b = 0; b < B; ++b)
      for (index_t t = 0; t < lengths[static_cast<std::size_t>(b)]; ++t) piece(b, t) = tokens(b, cache.position(b) + t);
    std::vector<index_t> at;
    for (index_t b = 0; b < B; ++b) at.push_back(cache.position(b));
    tensor<A, 3, typename Model::space> logits(B, n, V);
    const bool uniform = std::count(lengths.begin(), lengths.end(), n) == B;
    model.extend(ctx, schedule, cache, rows_of(piece),
                 uniform ? std::nullopt : std::optional<std::vector<token_t>>(lengths), logits.view());
    const auto there = on_host(ctx, logits);
    for (index_t b = 0; b < B; ++b) {
      const auto length = static_cast<index_t>(lengths[static_cast<std::size_t>(b)]);
      last_agrees = last_agrees && cache.position(b) == at[static_cast<std::size_t>(b)] + length;
      for (index_t t = 0; t < length; ++t)
        for (index_t i = 0; i < V; ++i) {
          got(b, at[static_cast<std::size_t>(b)] + t, i) = there(b, t, i);
          expected(b, at[static_cast<std::size_t>(b)] + t, i) = whole(b, at[static_cast<std::size_t>(b)] + t, i);
        }
    }
  }
  CHECK(last_agrees);
  CHECK(difference(got, expected) <= tolerance);
}

template <class Backend>
inline constexpr double decode_tolerance = std::is_same_v<typename Backend::scalar, double>     ? 1e-11
                                           : std::is_same_v<typename Backend::scalar, bfloat16> ? 2e-2
                                                                                                : 1e-5;

const std::vector<std::string> schedules{"dense",
                                         "dilated:4",
                                         "dilated:16+local:5+sinks:3",
                                         "local:7",
                                         "local:0",
                                         "local:6+sinks:2",
                                         "dilated:64+sinks:40",
                                         "local:100+sinks:3",
                                         "dense,dilated:8",
                                         "[dense|dilated:4+local:3],local:9,dilated:3"};

}  // namespace

TEMPLATE_TEST_CASE("decoding equals the forward pass for every schedule", "", RATPLUS_TEST_MODEL_BACKENDS) {
  TestType backend;
  auto model = golden_model<gated_average>(backend, "golden");
  for (const std::string& text : schedules) {
    CAPTURE(text);
    const any_schedule s = parse_schedule(text);
    check_calls(backend, model, s, s, steps(2, 0, 40), decode_tolerance<TestType>);
    check_calls(backend, model, s, s, steps(1, 33, 40), decode_tolerance<TestType>);
    check_calls(backend, model, s, s, {{16, 16}, {1, 1}, {17, 17}, {3, 3}, {5, 5}}, decode_tolerance<TestType>);
    // Ragged: prompts of different lengths, a sequence that pauses, one that joins late.
    check_calls(backend, model, s, s, {{5, 17, 0}, {9, 1, 0}, {1, 0, 20}, {0, 1, 1}, {1, 1, 1}, {12, 1, 0}, {1, 1, 9}},
                decode_tolerance<TestType>);
  }
}

TEMPLATE_TEST_CASE("decoding with other cells and with patterns known at compile time", "",
                   RATPLUS_TEST_MODEL_BACKENDS) {
  TestType backend;
  const calls ragged{{5, 17}, {9, 1}, {1, 0}, {1, 1}, {0, 2}, {13, 1}};
  const auto check = [&](const auto& cell) {
    using Cell = std::remove_cvref_t<decltype(cell)>;
    model_of<TestType, Cell> model(backend.ctx, small_config(), cell);
    randomise(backend.ctx, model, 3);
    CAPTURE(cell.name());
    check_calls(backend, model, dilated_local<4, 3>{}, dilated_local<4, 3>{}, ragged, decode_tolerance<TestType>);
    check_calls(backend, model, by_layer<blocks<5>, by_head<dense, streaming<4, 1>>>{},
                by_layer<blocks<5>, by_head<dense, streaming<4, 1>>>{}, ragged, decode_tolerance<TestType>);
  };
  check(none{});
  check(chunked<>(7));
  check(squashed_average{});
}

TEMPLATE_TEST_CASE("one cache answers every sparser schedule", "", RATPLUS_TEST_MODEL_BACKENDS) {
  TestType backend;
  auto model = golden_model<gated_average>(backend, "golden");
  const calls ragged{{5, 17}, {9, 1}, {1, 0}, {1, 1}, {0, 2}, {13, 1}};
  const auto check = [&](const std::string& kept, const std::string& asked) {
    CAPTURE(kept, asked);
    check_calls(backend, model, parse_schedule(kept), parse_schedule(asked), ragged, decode_tolerance<TestType>);
  };
  for (const std::string& text : schedules) check("dense", text);
  check("dilated:4+local:8+sinks:3", "dilated:8+local:2");
  check("dilated:4+local:8+sinks:3", "local:7+sinks:1");
  check("[dense|dilated:2],dilated:4", "[dilated:3|dilated:6],dilated:8");
}

TEMPLATE_TEST_CASE("a cache refuses what it cannot do and stays as it was", "", RATPLUS_TEST_MODEL_BACKENDS) {
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  model_of<TestType, gated_average> model(ctx, small_config());
  randomise(ctx, model, 3);
  const any_schedule kept = parse_schedule("dilated:4+local:2");
  kv_cache<T, typename TestType::context::space, A> cache(ctx, model.config(), kept, 1, 10);
  const auto tokens = random_rows(1, 12, 11, 1);
  tensor<A, 3, typename TestType::context::space> logits(1, 8, 11), one(1, 1, 11);
  const auto rows = [&](index_t begin, index_t end) { return rows_of(tokens).slice(1, begin, end); };
  CHECK_THROWS_AS(model.extend(ctx, parse_schedule("dilated:2"), cache, rows(0, 8), std::nullopt, logits.view()),
                  value_error);
  CHECK_THROWS_WITH(model.extend(ctx, parse_schedule("local:3"), cache, rows(0, 8), std::nullopt, logits.view()),
                    contains("cache: layer 0 head 0 keeps"));
  model.extend(ctx, kept, cache, rows(0, 8), std::nullopt, logits.view());
  tensor<A, 3, typename TestType::context::space> three(1, 3, 11);
  CHECK_THROWS_AS(model.extend(ctx, kept, cache, rows(8, 11), std::nullopt, three.view()), cache_full);
  CHECK_THROWS_WITH(model.extend(ctx, kept, cache, rows(8, 11), std::nullopt, three.view()),
                    contains("sequence 0 is at position 8 of 10, 3 more do not fit"));
  CHECK(cache.position(0) == 8);
  model.extend(ctx, kept, cache, rows(8, 9), std::nullopt, one.view());
  const auto whole = on_host(ctx, model.forward(ctx, kept, rows(0, 9)));
  const auto step = on_host(ctx, one);
  array<double, 1> got(dims(11)), expected(dims(11));
  for (index_t i = 0; i < 11; ++i) {
    got(i) = number(step(0, 0, i));
    expected(i) = number(whole(0, 8, i));
  }
  CHECK(difference(got, expected) <= decode_tolerance<TestType>);

  // Anew: as fresh.
  cache.reset(ctx, 0);
  CHECK(cache.position(0) == 0);
  tensor<A, 3, typename TestType::context::space> again(1, 8, 11);
  model.extend(ctx, kept, cache, rows(0, 8), std::nullopt, again.view());
  CHECK(same_bits(on_host(ctx, again), on_host(ctx, logits)));
}
