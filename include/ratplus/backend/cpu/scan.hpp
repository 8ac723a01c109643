#pragma once
// The recurrence and RoPE in one pass: a row of a head is read once, its gate applied to the states of k and v, the
// state of k and the row of q rotated, and all three written. States lie in scratch memory that stays in the cache; the
// pass is bound by memory, and rows ahead are prefetched because those of a projection lie pages apart.

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"
#include "ratplus/ops/scan.hpp"

namespace ratplus::cpu {

namespace detail {

/// Row `t` of one head of a view, or null when the view is absent.
template <class T>
[[nodiscard]] T* row_of(const view<T, 4>& x, index_t b, index_t h, index_t t) {
  return x ? x.row(b, h, t) : nullptr;
}
template <class T>
[[nodiscard]] T* row_of(const view<T, 3>& x, index_t b, index_t h) {
  return x ? x.row(b, h) : nullptr;
}

/// out = x rotated by the angles of a row of the rope table (cos | sin), backwards with back = true. out may be x.
template <bool back>
RATPLUS_INLINE void rotate(const float* x, const float* angles, index_t d, float* out) {
  const index_t half = d / 2;
  for_each_pack(half, [&](index_t i, auto lanes) {
    const pack c = load(angles + i, lanes), sine = load(angles + half + i, lanes), s = back ? -sine : sine;
    const pack x1 = load(x + i, lanes), x2 = load(x + half + i, lanes);
    store(out + i, x1 * c - x2 * s, lanes);
    store(out + half + i, multiply_add(x2, c, x1 * s), lanes);
  });
}

/// Asks for the row `distance` rows away from row t, if it is one of the rows [0, rows).
template <class T>
RATPLUS_INLINE void prefetch(const view<T, 4>& x, index_t b, index_t h, index_t t, index_t rows) {
  constexpr index_t line = 64 / sizeof(float);
  if (!x || t < 0 || t >= rows) return;
  const T* const row = x.row(b, h, t);
  for (index_t i = 0; i < x.extent(3); i += line) __builtin_prefetch(row + i);
}
inline constexpr index_t prefetch_rows = 8;

}  // namespace detail

template <class C>
void scan_forward_on(context& ctx, const C& cell, const scan_forward_args<float>& p) {
  using namespace detail;
  const auto& lead = p.k ? p.k : p.v ? p.v : p.q;
  const index_t B = lead.extent(0), H = lead.extent(1), T = lead.extent(2), d = lead.extent(3);
  ctx.parallel_for(B * H, 32 * T * d, 2 * padded(d), [&](index_t item, float* scratch) {
    const index_t b = item / H, h = item % H;
    const index_t first = reference::first_position(p.spans, b), used = reference::rows_in_use(p.spans, b, T);
    float *const k_state = scratch, *const v_state = scratch + padded(d);
    const auto begin_with = [&](float* state, const float* initial) {
      std::fill_n(state, padded(d), 0.0f);
      if (initial != nullptr) std::copy_n(initial, d, state);
    };
    begin_with(k_state, row_of(p.k_first, b, h));
    begin_with(v_state, row_of(p.v_first, b, h));

    for (index_t t = 0; t < used; ++t) {
      const index_t ahead = t + prefetch_rows;
      prefetch(p.q, b, h, ahead, used);
      prefetch(p.k, b, h, ahead, used);
      prefetch(p.v, b, h, ahead, used);
      if constexpr (C::gated) prefetch(p.gate, b, h, ahead, used);

      const float *const k = row_of(p.k, b, h, t), *const v = row_of(p.v, b, h, t);
      const float* const gate = C::gated ? row_of(p.gate, b, h, t) : nullptr;
      const float* const angles = p.rope ? p.rope.row(first + t) : nullptr;
      float *const k_out = row_of(p.k_out, b, h, t), *const v_out = row_of(p.v_out, b, h, t);
      if (k != nullptr || v != nullptr)
        for_each_pack(d, [&](index_t i, auto lanes) {
          pack g(0.0f);
          if constexpr (C::gated) g = load(gate + i, lanes);
          if (k != nullptr) store(k_state + i, cell.step(load(k_state + i), load(k + i, lanes), g, first + t));
          if (v != nullptr) {
            const pack s = cell.step(load(v_state + i), load(v + i, lanes), g, first + t);
            store(v_state + i, s);
            store(v_out + i, s, lanes);
          }
        });
      const auto rotate_or_copy = [&](const float* x, float* out) {
        if (angles != nullptr)
          rotate<false>(x, angles, d, out);
        else if (x != out)
          std::copy_n(x, d, out);
      };
      if (k != nullptr) rotate_or_copy(k_state, k_out);
      if (p.q) rotate_or_copy(p.q.row(b, h, t), p.q_out.row(b, h, t));
    }
    if (p.k && p.k_last) std::copy_n(k_state, d, p.k_last.row(b, h));
    if (p.v && p.v_last) std::copy_n(v_state, d, p.v_last.row(b, h));
    if (p.q) zero_rows(p.q_out, b, h, used, T);
    if (p.k) zero_rows(p.k_out, b, h, used, T);
    if (p.v) zero_rows(p.v_out, b, h, used, T);
  });
}

template <class C>
void scan_backward_on(context& ctx, const C& cell, const scan_backward_args<float>& p) {
  using namespace detail;
  const auto& lead = p.dk_out ? p.dk_out : p.dv_out ? p.dv_out : p.dq_out;
  const index_t B = lead.extent(0), H = lead.extent(1), T = lead.extent(2), d = lead.extent(3);
  // What the adjoint reads; an identity cell needs neither inputs nor states.
  constexpr bool reads = !IdentityCell<C>;
  ctx.parallel_for(B * H, 48 * T * d, 4 * padded(d), [&](index_t item, float* scratch) {
    const index_t b = item / H, h = item % H;
    const index_t first = reference::first_position(p.spans, b), used = reference::rows_in_use(p.spans, b, T);
    // Gradients of the states carried back, and rows of k's stream with the rotation undone.
    float *const dk_state = scratch, *const dv_state = scratch + padded(d);
    float *const dk_plain = scratch + 2 * padded(d), *const k_plain = scratch + 3 * padded(d);
    const auto begin_with = [&](float* state, const float* final) {
      std::fill_n(state, padded(d), 0.0f);
      if (final != nullptr) std::copy_n(final, d, state);
    };
    begin_with(dk_state, row_of(p.dk_last, b, h));
    begin_with(dv_state, row_of(p.dv_last, b, h));
    const bool k_given = static_cast<bool>(p.dk_out), v_given = static_cast<bool>(p.dv_out);

    for (index_t t = used - 1; t >= 0; --t) {
      const index_t ahead = t - prefetch_rows;
      prefetch(p.dq_out, b, h, ahead, used);
      prefetch(p.dk_out, b, h, ahead, used);
      prefetch(p.dv_out, b, h, ahead, used);
      if constexpr (reads) {
        if (k_given) prefetch(p.k, b, h, ahead, used), prefetch(p.k_out, b, h, ahead, used);
        if (v_given) prefetch(p.v, b, h, ahead, used), prefetch(p.v_out, b, h, ahead, used);
        if constexpr (C::gated) prefetch(p.gate, b, h, ahead, used);
      }

      const auto unrotated = [&](const float* x, index_t position, float* plain) -> const float* {
        if (!p.rope) return x;
        rotate<true>(x, p.rope.row(position), d, plain);
        return plain;
      };
      if (p.dq_out) {
        const float* const dq = unrotated(p.dq_out.row(b, h, t), first + t, p.dq.row(b, h, t));
        if (dq != p.dq.row(b, h, t)) std::copy_n(dq, d, p.dq.row(b, h, t));
      }
      const float* const dk_out = k_given ? unrotated(p.dk_out.row(b, h, t), first + t, dk_plain) : nullptr;
      const float* const dv_out = row_of(p.dv_out, b, h, t);
      // States before row t; null: zero.
      const float *k_before = nullptr, *v_before = nullptr;
      if (reads && k_given)
        k_before = t > 0 ? unrotated(p.k_out.row(b, h, t - 1), first + t - 1, k_plain) : row_of(p.k_first, b, h);
      if (reads && v_given) v_before = t > 0 ? p.v_out.row(b, h, t - 1) : row_of(p.v_first, b, h);

      const auto adjoint = [&](const float* before, const view<const float, 4>& x, pack g, const float* dout,
                               float* dstate, const view<float, 4>& dx, index_t i, auto lanes) RATPLUS_INLINE_LAMBDA {
        const pack state = before != nullptr ? load(before + i, lanes) : pack(0.0f);
        pack input(0.0f);
        if constexpr (reads) input = load(x.row(b, h, t) + i, lanes);
        const auto grad = cell.adjoint(state, input, g, first + t, load(dout + i, lanes) + load(dstate + i));
        store(dstate + i, grad.dstate);
        store(dx.row(b, h, t) + i, grad.dinput, lanes);
        return grad.dgate;
      };
      if (k_given || v_given)
        for_each_pack(d, [&](index_t i, auto lanes) {
          pack g(0.0f), dgate(0.0f);
          if constexpr (C::gated) g = load(p.gate.row(b, h, t) + i, lanes);
          if (k_given) dgate = adjoint(k_before, p.k, g, dk_out, dk_state, p.dk, i, lanes);
          if (v_given) dgate += adjoint(v_before, p.v, g, dv_out, dv_state, p.dv, i, lanes);
          if constexpr (C::gated) store(p.dgate.row(b, h, t) + i, dgate, lanes);
        });
    }
    if (k_given && p.dk_first) std::copy_n(dk_state, d, p.dk_first.row(b, h));
    if (v_given && p.dv_first) std::copy_n(dv_state, d, p.dv_first.row(b, h));
    if (p.dq_out) zero_rows(p.dq, b, h, used, T);
    if (k_given) zero_rows(p.dk, b, h, used, T);
    if (v_given) zero_rows(p.dv, b, h, used, T);
    if (C::gated && (k_given || v_given)) zero_rows(p.dgate, b, h, used, T);
  });
}

}  // namespace ratplus::cpu
