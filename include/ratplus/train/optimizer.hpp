#pragma once
// AdamW over a model's flat parameters, and the cosine schedule with warm-up (SPEC §5)

#include <cmath>
#include <numbers>

#include "ratplus/ops/memory.hpp"
#include "ratplus/ops/step.hpp"

namespace ratplus {

struct adamw_options {
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
};

/// Moments of every parameter and the number of steps taken. A is the parameters' type.
template <class A = float, class Space = host_space>
class adamw_optimizer {
 public:
  template <Context Ctx>
  adamw_optimizer(Ctx& ctx, index_t parameters, adamw_options options = {})
      : options_(options), m_(parameters), v_(parameters) {
    fill(ctx, m_.view(), A(0));
    fill(ctx, v_.view(), A(0));
  }

  /// One update; gradients are multiplied by grad_scale first.
  template <Context Ctx>
  void step(Ctx& ctx, view<A, 1> parameters, view<const A, 1> gradients, double lr, double grad_scale = 1) {
    ++steps_;
    adamw(ctx, adamw_args<A>{.parameter = parameters, .grad = gradients, .m = m_, .v = v_},
          {.lr = lr,
           .beta1 = options_.beta1,
           .beta2 = options_.beta2,
           .epsilon = options_.epsilon,
           .weight_decay = options_.weight_decay,
           .step = steps_,
           .grad_scale = grad_scale});
  }

  [[nodiscard]] const adamw_options& options() const { return options_; }

  // What a checkpoint needs for an exact resume.
  [[nodiscard]] index_t steps() const { return steps_; }
  [[nodiscard]] view<A, 1> m() { return m_; }
  [[nodiscard]] view<A, 1> v() { return v_; }
  /// After m() and v() have been written from a checkpoint.
  void resume_at(index_t steps) { steps_ = steps; }

 private:
  adamw_options options_;
  tensor<A, 1, Space> m_, v_;
  index_t steps_ = 0;
};

/// Learning rate of iteration i of N: linear warm-up over floor(warmup · N) iterations, then a cosine down to eta_min.
struct cosine_schedule {
  double lr = 8e-4, eta_min = 1e-6, warmup = 0.05;
  index_t iterations = 0;

  [[nodiscard]] double operator()(index_t i) const {
    const auto w = static_cast<index_t>(std::floor(warmup * static_cast<double>(iterations)));
    if (i < w) return static_cast<double>(i + 1) / static_cast<double>(w) * lr;
    const double progress = static_cast<double>(i - w) / static_cast<double>(iterations - w);
    return eta_min + (lr - eta_min) * (1 + std::cos(std::numbers::pi * progress)) / 2;
  }
};

}  // namespace ratplus
