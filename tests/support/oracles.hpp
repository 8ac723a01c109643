#pragma once
// What operations should compute, written in double straight from SPEC, sharing no code with the library: attention as
// dense attention over the gathered keys of each query, the recurrence as a loop, RoPE from its angles.

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "support/array.hpp"
#include "support/patterns.hpp"

namespace ratplus_tests::oracle {

struct attention_result {
  array<double, 4> out, dq, dk, dv;
  array<double, 3> lse;
};

/// Rows t ≥ lengths[b] are padding (no lengths: none): zero everywhere and seen by nobody. Without dout, no gradients.
template <class T>
[[nodiscard]] attention_result attention(const array<T, 4>& q, const array<T, 4>& k, const array<T, 4>& v,
                                         const predicate& visible, const std::vector<token_t>& lengths = {},
                                         const array<T, 4>* dout = nullptr) {
  const index_t B = q.shape[0], H = q.shape[1], rows = q.shape[2], d = q.shape[3];
  attention_result r{array<double, 4>(q.shape), array<double, 4>(q.shape), array<double, 4>(q.shape),
                     array<double, 4>(q.shape), array<double, 3>(dims(B, H, rows))};
  const double scale = 1 / std::sqrt(static_cast<double>(d));
  for (index_t b = 0; b < B; ++b)
    for (index_t h = 0; h < H; ++h)
      for (index_t t = 0; t < (lengths.empty() ? rows : lengths[static_cast<std::size_t>(b)]); ++t) {
        std::vector<index_t> keys;
        for (index_t s = 0; s <= t; ++s)
          if (visible(h, t, s)) keys.push_back(s);
        std::vector<double> p;
        for (const index_t s : keys) {
          double score = 0;
          for (index_t i = 0; i < d; ++i) score += number(q(b, h, t, i)) * number(k(b, h, s, i));
          p.push_back(score * scale);
        }
        const double most = *std::max_element(p.begin(), p.end());
        double sum = 0;
        for (const double score : p) sum += std::exp(score - most);
        r.lse(b, h, t) = most + std::log(sum);
        for (double& x : p) x = std::exp(x - r.lse(b, h, t));
        for (std::size_t j = 0; j < keys.size(); ++j)
          for (index_t i = 0; i < d; ++i) r.out(b, h, t, i) += p[j] * number(v(b, h, keys[j], i));
        if (!dout) continue;
        // Softmax's Jacobian: ds_j = p_j (dp_j − Σ p dp).
        std::vector<double> dp;
        double mean = 0;
        for (std::size_t j = 0; j < keys.size(); ++j) {
          double sum_j = 0;
          for (index_t i = 0; i < d; ++i) sum_j += number((*dout)(b, h, t, i)) * number(v(b, h, keys[j], i));
          dp.push_back(sum_j);
          mean += p[j] * sum_j;
        }
        for (std::size_t j = 0; j < keys.size(); ++j) {
          const index_t s = keys[j];
          const double ds = p[j] * (dp[j] - mean) * scale;
          for (index_t i = 0; i < d; ++i) {
            r.dq(b, h, t, i) += ds * number(k(b, h, s, i));
            r.dk(b, h, s, i) += ds * number(q(b, h, t, i));
            r.dv(b, h, s, i) += p[j] * number((*dout)(b, h, t, i));
          }
        }
      }
  return r;
}

/// h_t from h_{t−1}, x_t, the gate's pre-activation g_t and the position t.
using cell_step = std::function<double(double h, double x, double g, index_t t)>;

[[nodiscard]] inline double logistic(double x) { return 1 / (1 + std::exp(-x)); }

[[nodiscard]] inline cell_step gated_average_step() {
  return [](double h, double x, double g, index_t) { return logistic(g) * h + (1 - logistic(g)) * x; };
}

/// States of one stream: (B, H, T, d); first[b] is the position of row 0. `last` receives the state after the last row.
template <class T>
[[nodiscard]] array<double, 4> scan(const array<T, 4>& x, const array<T, 4>& gate, const cell_step& step,
                                    const array<double, 3>& initial, const std::vector<token_t>& first,
                                    const std::vector<token_t>& lengths, array<double, 3>& last) {
  array<double, 4> states(x.shape);
  last = initial;
  for (index_t b = 0; b < x.shape[0]; ++b)
    for (index_t h = 0; h < x.shape[1]; ++h)
      for (index_t i = 0; i < x.shape[3]; ++i)
        for (index_t t = 0; t < lengths[static_cast<std::size_t>(b)]; ++t) {
          double& state = last(b, h, i);
          state = step(state, number(x(b, h, t, i)), number(gate(b, h, t, i)), first[static_cast<std::size_t>(b)] + t);
          states(b, h, t, i) = state;
        }
  return states;
}

/// Each row rotated by its position's angles, rotate-half form.
[[nodiscard]] inline array<double, 4> rope(array<double, 4> x, double base, const std::vector<token_t>& first) {
  const index_t d = x.shape[3], half = d / 2;
  for (index_t b = 0; b < x.shape[0]; ++b)
    for (index_t h = 0; h < x.shape[1]; ++h)
      for (index_t t = 0; t < x.shape[2]; ++t)
        for (index_t i = 0; i < half; ++i) {
          const double position = static_cast<double>(first[static_cast<std::size_t>(b)] + t);
          const double angle = position / std::pow(base, 2 * static_cast<double>(i) / static_cast<double>(d));
          double &x1 = x(b, h, t, i), &x2 = x(b, h, t, half + i);
          const double y1 = x1 * std::cos(angle) - x2 * std::sin(angle);
          x2 = x2 * std::cos(angle) + x1 * std::sin(angle);
          x1 = y1;
        }
  return x;
}

}  // namespace ratplus_tests::oracle
