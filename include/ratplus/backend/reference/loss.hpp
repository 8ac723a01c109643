#pragma once
#include <algorithm>
#include <cmath>

#include "ratplus/backend/reference/context.hpp"
#include "ratplus/ops/loss.hpp"

namespace ratplus::reference {

template <class T>
void cross_entropy_on(context&, const cross_entropy_args<T>& p) {
  using A = accumulator_t<T>;
  const index_t N = p.logits.extent(0), V = p.logits.extent(1);
  for (index_t n = 0; n < N; ++n) {
    const token_t label = p.labels[n];
    A max = wide(p.logits(n, 0)), sum = 0;
    for (index_t i = 1; i < V; ++i) max = std::max(max, wide(p.logits(n, i)));
    for (index_t i = 0; i < V; ++i) sum += std::exp(wide(p.logits(n, i)) - max);
    const A lse = max + std::log(sum);
    if (label != ignored_label) p.loss[0] += p.weight * static_cast<double>(lse - wide(p.logits(n, label)));
    if (!p.dlogits) continue;
    for (index_t i = 0; i < V; ++i) {
      const A prob = std::exp(wide(p.logits(n, i)) - lse);
      p.dlogits(n, i) = static_cast<T>(
          label == ignored_label ? A(0) : (prob - (i == label ? A(1) : A(0))) * static_cast<A>(p.weight));
    }
  }
}

}  // namespace ratplus::reference
