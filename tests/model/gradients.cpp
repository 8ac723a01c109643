// Finite differences in double through whole models.

#include "ratplus/backend/reference/backend.hpp"
#include "ratplus/pattern/parse.hpp"
#include "ratplus/recurrence/chunked.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "ratplus/recurrence/none.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/models.hpp"
#include "support/patterns.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

template <class Cell, class S>
void check_model(const Cell& cell, const S& schedule) {
  CAPTURE(cell.name());
  reference::context ctx;
  language_model<Cell, double> model(ctx, small_config(), cell);
  randomise(ctx, model, 2);
  const auto tokens = random_rows(2, 10, 11, 3);
  auto labels = random_rows(2, 10, 11, 4);
  labels(0, 3) = labels(1, 9) = ignored_label;
  const token_batch batch{rows_of(tokens), rows_of(labels)};
  auto gradients = model.make_gradients(ctx);
  (void)model.loss_and_gradients(ctx, schedule, batch, gradients.view());
  const auto flat = on_host(ctx, gradients);
  const double step = 1e-5;
  for (const auto& entry : model.layout().entries()) {
    CAPTURE(entry.name);
    array<double, 1> slopes(dims(entry.size()));
    for (index_t i = 0; i < entry.size(); ++i) {
      double& x = model.parameters()[entry.offset + i];
      const double kept = x;
      x = kept + step;
      const double above = model.loss(ctx, schedule, batch);
      x = kept - step;
      const double below = model.loss(ctx, schedule, batch);
      x = kept;
      slopes(i) = (above - below) / (2 * step);
    }
    CHECK(difference(part(flat, entry), slopes) <= 1e-7);
  }
}

}  // namespace

TEST_CASE("every parameter's gradient is the loss's slope: gated average under a hybrid schedule") {
  check_model(gated_average{}, parse_schedule("[dense|dilated:4],dilated:3+local:1+sinks:2"));
}

TEST_CASE("every parameter's gradient is the loss's slope: attention alone") {
  check_model(none{}, parse_schedule("local:4+sinks:1"));
}

TEST_CASE("every parameter's gradient is the loss's slope: chunked, and a user's own cell and pattern") {
  check_model(chunked<>(4), dilated<4>{});
  check_model(squashed_average{}, blocks<4>{});
}
