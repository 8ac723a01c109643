// The training runs of the reference cases: learning rates, losses, gradient norms, parameters after the last step.

#include <nlohmann/json.hpp>

#include "ratplus/pattern/parse.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "ratplus/recurrence/none.hpp"
#include "ratplus/train/joint_step.hpp"
#include "support/backends.hpp"
#include "support/compare.hpp"
#include "support/models.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

template <class Cell, class Backend>
void check_training(const std::string& set, const std::string& kind) {
  CAPTURE(set, kind);
  Backend backend;
  auto& ctx = backend.ctx;
  auto model = golden_model<Cell>(backend, set);
  const auto cases = golden("cases", set);
  const auto how = nlohmann::json::parse(cases.metadata().at("train"));
  const auto tokens = golden_array<token_t, 3>(cases, "train/tokens"),
             labels = golden_array<token_t, 3>(cases, "train/labels");
  const auto rows = golden_array<double, 2>(cases, "train/" + kind + "/rows");
  const index_t steps = how.at("steps").get<index_t>(), per_step = tokens.shape[1] * tokens.shape[2];
  REQUIRE(rows.shape[0] == steps);

  const any_schedule sparse = parse_schedule(how.at("sparse").get<std::string>());
  const adamw_options options{how.at("betas").at(0).get<double>(), how.at("betas").at(1).get<double>(), 1e-8,
                              how.at("weight_decay").get<double>()};
  const cosine_schedule lr{how.at("lr").get<double>(), how.at("eta_min").get<double>(), how.at("warmup").get<double>(),
                           how.at("total").get<index_t>()};
  training trainer(ctx, model, options, how.at("clip").get<double>());
  array<double, 2> got(rows.shape);
  for (index_t i = 0; i < steps; ++i) {
    const auto slice = [&](const array<token_t, 3>& all) {
      return view<const token_t, 2>(all.data.data() + i * per_step, dims(tokens.shape[1], tokens.shape[2]));
    };
    const token_batch batch{slice(tokens), slice(labels)};
    got(i, 0) = lr(i);
    if (kind == "joint") {
      const auto report = trainer.joint_step(ctx, sparse, std::span(&batch, 1), lr(i));
      got(i, 1) = report.sparse.loss;
      got(i, 2) = report.sparse.grad_norm;
      got(i, 3) = report.dense.loss;
      got(i, 4) = report.dense.grad_norm;
    } else {
      const auto report = trainer.step(ctx, sparse, std::span(&batch, 1), lr(i));
      got(i, 1) = report.loss;
      got(i, 2) = report.grad_norm;
    }
  }
  using T = typename Backend::scalar;
  const double tolerance = std::is_same_v<T, double> ? 1e-5 : std::is_same_v<T, float> ? 5e-4 : 2e-2;
  for (index_t column = 0; column < rows.shape[1]; ++column) {
    CAPTURE(column);
    array<double, 1> ours(dims(steps)), theirs(dims(steps));
    for (index_t i = 0; i < steps; ++i) {
      ours(i) = got(i, column);
      theirs(i) = rows(i, column);
    }
    CHECK(difference(ours, theirs) <= (column == 0 ? 1e-12 : tolerance));
  }
  const auto flat = on_host(ctx, std::as_const(model).parameters());
  const std::string prefix = "train/" + kind + "/param/";
  auto missing = golden_names(cases, prefix, "").size();  // a set need not hold every tensor
  CHECK(missing > 0);
  for (const auto& entry : model.layout().entries()) {
    if (!cases.contains(prefix + entry.name)) continue;
    CAPTURE(entry.name);
    --missing;
    array<double, 1> stored(dims(entry.size()));
    stored.data = cases.template read_flat<double>(prefix + entry.name);
    REQUIRE(static_cast<index_t>(stored.data.size()) == entry.size());
    CHECK(difference(part(flat, entry), stored) <= tolerance);
  }
  CHECK(missing == 0);
}

}  // namespace

TEMPLATE_TEST_CASE("golden joint pretraining", "", RATPLUS_TEST_BACKENDS) {
  check_training<gated_average, TestType>("golden", "joint");
  check_training<none, TestType>("golden-attention", "joint");
}

TEMPLATE_TEST_CASE("golden adaptation", "", RATPLUS_TEST_BACKENDS) {
  check_training<gated_average, TestType>("golden", "adapt");
  check_training<none, TestType>("golden-attention", "adapt");
}
