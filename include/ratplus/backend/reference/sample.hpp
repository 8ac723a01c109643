#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "ratplus/backend/reference/context.hpp"
#include "ratplus/ops/sample.hpp"

namespace ratplus::reference {

template <class T>
void sample_on(context&, const sample_args<T>& p, const sampling& how) {
  const index_t B = p.logits.extent(0), V = p.logits.extent(1);
  std::vector<token_t> order(static_cast<std::size_t>(V));
  std::vector<double> weight(order.size());  // of each id
  for (index_t b = 0; b < B; ++b) {
    const auto logit = [&](token_t id) { return static_cast<double>(wide(p.logits(b, id))); };
    const auto more_probable = [&](token_t x, token_t y) {
      return logit(x) > logit(y) || (logit(x) == logit(y) && x < y);
    };
    std::iota(order.begin(), order.end(), token_t{0});
    if (how.temperature == 0) {
      p.token[b] = *std::min_element(order.begin(), order.end(), more_probable);
      continue;
    }
    std::sort(order.begin(), order.end(), more_probable);
    std::size_t kept = how.top_k > 0 ? static_cast<std::size_t>(std::min(how.top_k, V)) : order.size();
    double total = 0;
    const auto of = [&](std::size_t i) -> double& { return weight[static_cast<std::size_t>(order[i])]; };
    for (std::size_t i = 0; i < kept; ++i)
      total += of(i) = std::exp((logit(order[i]) - logit(order[0])) / how.temperature);
    // The fewest of the kept whose share reaches top_p.
    double share = 0;
    for (std::size_t i = 0; i < kept && how.top_p < 1; ++i) {
      share += of(i);
      if (share >= how.top_p * total) {
        kept = i + 1;
        total = share;
      }
    }
    const double target =
        total * uniform(how.seed, static_cast<std::uint64_t>(b), static_cast<std::uint64_t>(p.position[b]));
    std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept));
    std::size_t chosen = 0;
    for (double below = of(0); below <= target && chosen + 1 < kept; below += of(chosen)) ++chosen;
    p.token[b] = order[chosen];
  }
}

}  // namespace ratplus::reference
