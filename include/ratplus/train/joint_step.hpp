#pragma once
// Joint pretraining ("active recurrence learning"): one optimiser step under the sparse schedule, then one under dense,
// on the same batch (SPEC §5). Ordinary training and resolution adaptation are one half of it.

#include <cmath>
#include <span>

#include "ratplus/model/language_model.hpp"
#include "ratplus/pattern/names.hpp"
#include "ratplus/train/optimizer.hpp"

namespace ratplus {

/// A loss or a gradient norm is not finite. Thrown before any parameter is changed by the step.
struct not_finite : error {
  using error::error;
};

struct step_report {
  double loss = 0;       // mean cross-entropy in nats over the batch, before the update
  double grad_norm = 0;  // global norm before clipping
};

/// Everything a training step owns beside the model: gradients and the optimiser.
template <class Model>
class training {
 public:
  using A = typename Model::A;
  using space = typename Model::space;

  template <Context Ctx>
  training(Ctx& ctx, Model& model, adamw_options options = {}, double clip = 1)
      : model_(model),
        gradients_(model.make_gradients(ctx)),
        optimizer_(ctx, model.layout().size(), options),
        clip_(clip) {}

  /// Forward and backward over all micro-batches of one batch under `schedule`, clip, update. Throws not_finite.
  template <Context Ctx, class S>
  step_report step(Ctx& ctx, const S& schedule, std::span<const token_batch> micro_batches, double lr) {
    index_t labels = 0;
    for (const token_batch& batch : micro_batches) labels += counted_labels(batch.labels);
    if (labels == 0) throw value_error("training step: no label of the batch counts");
    fill(ctx, gradients_.view(), A(0));
    step_report report;
    for (const token_batch& batch : micro_batches)
      report.loss += model_.loss_and_gradients(ctx, schedule, batch, gradients_, 1.0 / static_cast<double>(labels));
    report.grad_norm = std::sqrt(squared_norm(ctx, std::as_const(gradients_).view()));
    if (!std::isfinite(report.loss) || !std::isfinite(report.grad_norm))
      throw not_finite(message("training step ", optimizer_.steps() + 1, ": loss is ", report.loss, ", gradient norm ",
                               report.grad_norm));
    const double scale = std::min(1.0, clip_ / (report.grad_norm + 1e-6));
    optimizer_.step(ctx, model_.parameters(), std::as_const(gradients_).view(), lr, scale);
    model_.parameters_changed(ctx);
    return report;
  }

  struct joint_report {
    step_report sparse, dense;
  };

  /// Both halves of a joint iteration, at one learning rate.
  template <Context Ctx, class S>
  joint_report joint_step(Ctx& ctx, const S& sparse, std::span<const token_batch> micro_batches, double lr) {
    joint_report report;
    report.sparse = step(ctx, sparse, micro_batches, lr);
    report.dense = step(ctx, ratplus::dense{}, micro_batches, lr);
    return report;
  }

  [[nodiscard]] adamw_optimizer<A, space>& optimizer() { return optimizer_; }

 private:
  Model& model_;
  tensor<A, 1, space> gradients_;
  adamw_optimizer<A, space> optimizer_;
  double clip_;
};

}  // namespace ratplus
