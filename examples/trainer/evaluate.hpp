#pragma once
// Loss over consecutive windows of T positions, each token but the first predicted once.

#include <algorithm>
#include <limits>

#include "data.hpp"

namespace trainer {

struct evaluation {
  double nats = 0;     // Σ −log p
  index_t labels = 0;  // predictions that count

  [[nodiscard]] double loss() const { return labels > 0 ? nats / static_cast<double>(labels) : 0; }
};

/// Evaluates at most `most_tokens` tokens of the range, from its beginning.
template <ratplus::Context Ctx, class Model>
evaluation evaluate(Ctx& ctx, Model& model, const ratplus::any_schedule& schedule, const token_range& range, index_t B,
                    index_t T, index_t most_tokens = std::numeric_limits<index_t>::max()) {
  evaluation sum;
  const index_t predictions = std::min(range.size() - 1, most_tokens);
  const auto add = [&](const host_batch& batch) {
    const ratplus::token_batch all = batch.sequences(0, batch.batch);
    const index_t labels = ratplus::counted_labels(all.labels);
    if (labels == 0) return;
    sum.nats += model.loss(ctx, schedule, all, 1.0);
    sum.labels += labels;
  };
  index_t position = 0;
  while (predictions - position >= T) {
    host_batch batch(std::min(B, (predictions - position) / T), T);
    for (index_t b = 0; b < batch.batch; ++b, position += T) range.read(position, b, batch);
    add(batch);
  }
  if (position < predictions) {  // what is left is shorter
    host_batch rest(1, predictions - position);
    range.read(position, 0, rest);
    add(rest);
  }
  return sum;
}

}  // namespace trainer
