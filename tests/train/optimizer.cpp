// The learning-rate schedule, the clip, micro-batches, and a step that must not be taken.

#include "ratplus/train/optimizer.hpp"

#include <limits>

#include "ratplus/backend/reference/backend.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "ratplus/train/joint_step.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/models.hpp"

using namespace ratplus;
using namespace ratplus_tests;

TEST_CASE("cosine schedule: linear warm-up, then down to eta_min") {
  const cosine_schedule lr{0.8, 0.1, 0.25, 11};  // floor(2.75) = 2 iterations of warm-up
  CHECK(difference(lr(0), 0.4) <= 1e-15);
  CHECK(difference(lr(1), 0.8) <= 1e-15);
  CHECK(difference(lr(2), 0.8) <= 1e-15);
  const double pi = std::acos(-1.0);
  CHECK(difference(lr(5), 0.1 + 0.7 * (1 + std::cos(pi / 3)) / 2) <= 1e-14);
  CHECK(difference(lr(11), 0.1) <= 1e-14);
  const cosine_schedule cold{0.8, 0.1, 0.0, 4};  // adaptation has no warm-up
  CHECK(difference(cold(0), 0.8) <= 1e-15);
  CHECK(difference(cold(2), 0.45) <= 1e-14);
}

namespace {

using model_type = language_model<gated_average, double>;

array<double, 1> trained(double clip, const std::vector<std::pair<index_t, index_t>>& micro_batches) {
  reference::context ctx;
  model_type model(ctx, small_config());
  randomise(ctx, model, 1);
  training trainer(ctx, model, {}, clip);
  const auto tokens = random_rows(4, 9, 11, 2);
  auto labels = random_rows(4, 9, 11, 3);
  labels(1, 2) = labels(3, 3) = labels(3, 4) = ignored_label;
  std::vector<token_batch> batches;
  for (const auto& range : micro_batches)
    batches.push_back(
        {rows_of(tokens).slice(0, range.first, range.second), rows_of(labels).slice(0, range.first, range.second)});
  trainer.step(ctx, dilated<4>{}, batches, 0.01);
  return on_host(ctx, std::as_const(model).parameters());
}

}  // namespace

TEST_CASE("micro-batches are one batch, whatever their number of labels") {
  const auto whole = trained(1, {{0, 4}});
  CHECK(difference(trained(1, {{0, 1}, {1, 4}}), whole) <= 1e-9);
  CHECK(difference(trained(1, {{0, 2}, {2, 3}, {3, 4}}), whole) <= 1e-9);
}

TEST_CASE("a step reports the norm before clipping, and clips") {
  reference::context ctx;
  model_type model(ctx, small_config());
  randomise(ctx, model, 1);
  const auto tokens = random_rows(2, 9, 11, 2), labels = random_rows(2, 9, 11, 3);
  const token_batch batch{rows_of(tokens), rows_of(labels)};
  auto gradients = model.make_gradients(ctx);
  const double loss = model.loss_and_gradients(ctx, dense{}, batch, gradients.view());
  const auto g = on_host(ctx, gradients);
  const auto before = on_host(ctx, std::as_const(model).parameters());
  const double norm = std::sqrt(inner(g, g)), clip = norm / 3;
  training trainer(ctx, model, {0.9, 0.95, 1.0, 0.0}, clip);  // a large epsilon, so that the gradient's size shows
  const auto report = trainer.step(ctx, dense{}, std::span(&batch, 1), 0.5);
  CHECK(difference(report.loss, loss) <= 1e-14);
  CHECK(difference(report.grad_norm, norm) <= 1e-12);
  auto expected = before;
  for (std::size_t i = 0; i < g.data.size(); ++i) {
    const double clipped = g.data[i] * (clip / (norm + 1e-6));
    expected.data[i] -= 0.5 * clipped / (std::abs(clipped) + 1.0);
  }
  CHECK(difference(on_host(ctx, std::as_const(model).parameters()), expected) <= 1e-12);
}

TEST_CASE("a step that is not finite, or has no labels, changes nothing") {
  reference::context ctx;
  model_type model(ctx, small_config());
  randomise(ctx, model, 1);
  const auto tokens = random_rows(2, 9, 11, 2);
  auto labels = random_rows(2, 9, 11, 3);
  const token_batch batch{rows_of(tokens), rows_of(labels)};
  training trainer(ctx, model);
  model.parameters()[model.layout().entries().back().offset] = std::numeric_limits<double>::infinity();
  const auto before = on_host(ctx, std::as_const(model).parameters());
  CHECK_THROWS_AS(trainer.step(ctx, dense{}, std::span(&batch, 1), 0.1), not_finite);
  CHECK(same_bits(on_host(ctx, std::as_const(model).parameters()), before));
  CHECK(trainer.optimizer().steps() == 0);
  for (token_t& x : labels.data) x = ignored_label;
  CHECK_THROWS_WITH(trainer.step(ctx, dense{}, std::span(&batch, 1), 0.1), contains("no label of the batch counts"));
}
