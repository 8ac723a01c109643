// Whole models on the CPU: the same bits with any number of threads, the same seed the same run.

#include "ratplus/backend/cpu/backend.hpp"
#include "ratplus/pattern/parse.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "ratplus/train/joint_step.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/models.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

model_config config() {
  model_config c;
  c.vocab_size = 97;
  c.d_model = 64;
  c.num_heads = 4;
  c.num_layers = 2;
  c.d_ffn = 256;
  c.max_seq_len = 128;
  return c;
}

struct run {
  array<double, 1> losses{dims(6)};
  array<float, 1> parameters;
  array<float, 3> logits;
};

run train(int threads, std::uint64_t seed) {
  cpu::context ctx(threads);
  language_model<gated_average> model(ctx, config());
  model.initialise(ctx, seed);
  training trainer(ctx, model);
  const any_schedule sparse = parse_schedule("[dense|dilated:8+local:9],dilated:16+sinks:2");
  run r;
  for (index_t i = 0; i < 3; ++i) {
    const auto tokens = random_rows(4, 100, 97, static_cast<std::uint64_t>(10 + i)),
               labels = random_rows(4, 100, 97, static_cast<std::uint64_t>(20 + i));
    const token_batch batch{rows_of(tokens), rows_of(labels)};
    const auto report = trainer.joint_step(ctx, sparse, std::span(&batch, 1), 3e-3);
    r.losses(2 * i) = report.sparse.loss;
    r.losses(2 * i + 1) = report.dense.grad_norm;
  }
  r.parameters = on_host(ctx, std::as_const(model).parameters());
  r.logits = on_host(ctx, model.forward(ctx, sparse, rows_of(random_rows(4, 100, 97, 30))));
  return r;
}

}  // namespace

TEST_CASE("a training run has the same bits with 1, 2 and 3 threads") {
  const run expected = train(1, 5);
  for (const int threads : {1, 2, 3}) {
    CAPTURE(threads);
    const run got = train(threads, 5);
    CHECK(same_bits(got.losses, expected.losses));
    CHECK(same_bits(got.parameters, expected.parameters));
    CHECK(same_bits(got.logits, expected.logits));
  }
  CHECK_FALSE(same_bits(train(2, 6).parameters, expected.parameters));
}
