#pragma once
// Cross-entropy over rows of logits: loss += weight · Σ_n (log Σ_v e^{z_nv} − z_n,label), over rows whose label is not
// −100  (SPEC §5)

#include "ratplus/ops/context.hpp"

namespace ratplus {

/// The label of a position that does not count.
inline constexpr token_t ignored_label = -100;

template <class T>
struct cross_entropy_args {
  view<const T, 2> logits = {};        // (N, V)
  view<const token_t, 1> labels = {};  // (N), in [0, V) or ignored_label
  double weight = 1;                   // 1 / (number of labels that count) for a mean
  view<double, 1> loss = {};           // (1), added to
  view<T, 2> dlogits = {};  // (N, V), (softmax − onehot) · weight, written; may be logits; absent: not wanted
};

template <Context Ctx, class T>
void cross_entropy(Ctx& ctx, const cross_entropy_args<T>& p) {
  const char* op = "cross entropy";
  detail::check_shape(op, "labels", p.labels, {{p.logits.extent(0)}});
  detail::check_shape(op, "loss", p.loss, {{1}});
  detail::check_shape_if_given(op, "dlogits", p.dlogits, p.logits.shape());
  if (p.logits.size() > 0) cross_entropy_on(ctx, p);
}

}  // namespace ratplus
