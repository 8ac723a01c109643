#pragma once
#include <cmath>
#include <vector>

#include "ratplus/backend/reference/context.hpp"
#include "ratplus/backend/reference/scan.hpp"
#include "ratplus/core/softmax_state.hpp"
#include "ratplus/ops/attend.hpp"
#include "ratplus/pattern/tiles.hpp"

namespace ratplus::reference {

namespace detail {

/// Calls f(key row, value row) for every key that the query at `position` sees, in the order of its runs.
template <class P, class T, class KV, class F>
void for_each_visible(const P& pattern, const attend_forward_args<T, KV>& p, index_t b, index_t h, index_t position,
                      F&& f) {
  const index_t first = p.past ? p.spans.first[b] : 0;
  const key_runs keys = pattern.keys(position);
  for (const key_run& run : keys.run) {
    if (p.past) {
      const head_slots& head = p.past.heads[h];
      for (const slot_run& part : head.where.find(clip(run, 0, first)).part)
        for (index_t i = 0; i < part.count; ++i) {
          const index_t slot = head.offset + part.slot + i * part.step;
          f(p.past.k.row(b, slot), p.past.v.row(b, slot));
        }
    }
    const key_run fresh = clip(run, first, position + 1);
    for (index_t s = fresh.begin; s < fresh.end; s += fresh.step) f(p.k.row(b, h, s - first), p.v.row(b, h, s - first));
  }
}

template <class A, class X, class Y>
[[nodiscard]] A dot(const X* x, const Y* y, index_t d) {
  A sum = 0;
  for (index_t i = 0; i < d; ++i) sum += static_cast<A>(wide(x[i])) * static_cast<A>(wide(y[i]));
  return sum;
}

}  // namespace detail

template <class P, class T, class KV>
void attend_forward_on(context&, const P& pattern, const attend_forward_args<T, KV>& p) {
  using A = accumulator_t<T>;
  const index_t B = p.q.extent(0), H = p.q.extent(1), rows = p.q.extent(2), d = p.q.extent(3);
  const A scale = A(1) / std::sqrt(static_cast<A>(d));
  std::vector<A> sum(static_cast<std::size_t>(d));
  for (index_t b = 0; b < B; ++b)
    for (index_t h = 0; h < H; ++h) {
      const index_t used = rows_in_use(p.spans, b, rows), first = p.past ? p.spans.first[b] : 0;
      for (index_t t = 0; t < used; ++t) {
        softmax_state<A> state;
        std::fill(sum.begin(), sum.end(), A(0));
        visit_head(pattern, h, H, [&](const auto& head_pattern) {
          detail::for_each_visible(head_pattern, p, b, h, first + t, [&](const auto* key, const auto* value) {
            const A score = scale * detail::dot<A>(p.q.row(b, h, t), key, d);
            const auto merged = combine(state, softmax_state<A>{score, A(1)});
            state = merged.state;
            for (index_t i = 0; i < d; ++i) {
              A& o = sum[static_cast<std::size_t>(i)];
              o = merged.scale_a * o + merged.scale_b * static_cast<A>(wide(value[i]));
            }
          });
        });
        for (index_t i = 0; i < d; ++i)
          p.out(b, h, t, i) = static_cast<T>(sum[static_cast<std::size_t>(i)] / state.sum);
        if (p.lse) p.lse(b, h, t) = state.log_sum_exp();
      }
      detail::zero_rows(p.out, b, h, used);
      if (p.lse)
        for (index_t t = used; t < rows; ++t) p.lse(b, h, t) = A(0);
    }
}

template <class P, class T>
void attend_backward_on(context&, const P& pattern, const attend_backward_args<T>& p) {
  using A = accumulator_t<T>;
  const index_t B = p.q.extent(0), H = p.q.extent(1), rows = p.q.extent(2), d = p.q.extent(3);
  const A scale = A(1) / std::sqrt(static_cast<A>(d));
  const auto row = static_cast<std::size_t>(d);
  // Summed in A whatever T is: one head's gradients at a time.
  std::vector<A> dk(static_cast<std::size_t>(rows) * row), dv(dk.size()), dq(row);
  for (index_t b = 0; b < B; ++b)
    for (index_t h = 0; h < H; ++h) {
      const index_t used = rows_in_use(p.spans, b, rows);
      std::fill(dk.begin(), dk.end(), A(0));
      std::fill(dv.begin(), dv.end(), A(0));
      for (index_t t = 0; t < used; ++t) {
        const T *q = p.q.row(b, h, t), *dout = p.dout.row(b, h, t);
        const A delta = detail::dot<A>(dout, p.out.row(b, h, t), d);
        std::fill(dq.begin(), dq.end(), A(0));
        const key_runs keys = visit_head(pattern, h, H, [&](const auto& head) { return head.keys(t); });
        for (const key_run& run : keys.run)
          for (index_t s = run.begin; s < run.end; s += run.step) {
            const T *k = p.k.row(b, h, s), *v = p.v.row(b, h, s);
            const A prob = std::exp(scale * detail::dot<A>(q, k, d) - p.lse(b, h, t));
            const A dscore = prob * (detail::dot<A>(dout, v, d) - delta) * scale;
            A *dk_row = dk.data() + s * d, *dv_row = dv.data() + s * d;
            for (index_t i = 0; i < d; ++i) {
              dq[static_cast<std::size_t>(i)] += dscore * wide(k[i]);
              dk_row[i] += dscore * wide(q[i]);
              dv_row[i] += prob * wide(dout[i]);
            }
          }
        for (index_t i = 0; i < d; ++i) p.dq(b, h, t, i) = static_cast<T>(dq[static_cast<std::size_t>(i)]);
      }
      for (index_t t = 0; t < rows; ++t)
        for (index_t i = 0; i < d; ++i) {
          p.dk(b, h, t, i) = static_cast<T>(dk[static_cast<std::size_t>(t * d + i)]);
          p.dv(b, h, t, i) = static_cast<T>(dv[static_cast<std::size_t>(t * d + i)]);
        }
      detail::zero_rows(p.dq, b, h, used);
    }
}

template <class T, class KV>
void cache_append_on(context&, const cache_append_args<T, KV>& p) {
  const index_t B = p.k.extent(0), H = p.k.extent(1), rows = p.k.extent(2), d = p.k.extent(3);
  for (index_t b = 0; b < B; ++b)
    for (index_t h = 0; h < H; ++h) {
      const index_t first = p.spans.first[b], used = rows_in_use(p.spans, b, rows);
      const head_slots& head = p.heads[h];
      for (index_t t = 0; t < used; ++t) {
        const auto homes = head.where.homes(first + t);
        for (const index_t slot : homes.slot) {
          if (slot < 0) continue;
          for (index_t i = 0; i < d; ++i) {
            p.k_pool(b, head.offset + slot, i) = static_cast<KV>(static_cast<accumulator_t<KV>>(wide(p.k(b, h, t, i))));
            p.v_pool(b, head.offset + slot, i) = static_cast<KV>(static_cast<accumulator_t<KV>>(wide(p.v(b, h, t, i))));
          }
        }
      }
    }
}

inline void cache_advance_on(context&, view<token_t, 1> position, view<const token_t, 1> length, token_t rows) {
  for (index_t b = 0; b < position.extent(0); ++b) position[b] += length ? length[b] : rows;
}

}  // namespace ratplus::reference
