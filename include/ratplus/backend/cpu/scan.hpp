#pragma once
// The recurrence and RoPE in one pass: a row of a head is read once, its gate applied to the states of k and v, the
// state of k and the row of q rotated, and all three written. States lie in scratch memory that stays in the cache; the
// pass is bound by memory, and rows ahead are prefetched because those of a projection lie pages apart.

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"
#include "ratplus/ops/scan.hpp"

namespace ratplus::cpu {

namespace detail {

/// The rows of one head of a view, or of an absent one.
template <class T>
struct head_rows {
  T* data = nullptr;
  index_t stride = 0, channels = 0;

  head_rows(const view<T, 4>& x, index_t b, index_t h) {
    if (x) *this = head_rows(x.row(b, h, index_t{0}), x.stride(2), x.extent(3));
  }
  explicit operator bool() const { return data != nullptr; }
  RATPLUS_INLINE T* operator()(index_t t) const { return data + t * stride; }

  /// Asks for row t, to read or to write it.
  RATPLUS_INLINE void prefetch(index_t t) const {
    constexpr index_t line = 64 / sizeof(float);
    if (data == nullptr) return;
    for (index_t i = 0; i < channels; i += line) __builtin_prefetch(data + t * stride + i, std::is_const_v<T> ? 0 : 1);
  }

 private:
  head_rows(T* p, index_t s, index_t c) : data(p), stride(s), channels(c) {}
};
inline constexpr index_t prefetch_rows = 8;

/// The states of one head, or null.
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

    const head_rows<const float> q(p.q, b, h), k(p.k, b, h), v(p.v, b, h), gate(p.gate, b, h);
    const head_rows<float> q_out(p.q_out, b, h), k_out(p.k_out, b, h), v_out(p.v_out, b, h);
    for (index_t t = 0; t < used; ++t) {
      if (t + prefetch_rows < used)
        for (const auto& x : {q, k, v, gate}) x.prefetch(t + prefetch_rows);
      if (k || v)
        for_each_pack(d, [&](index_t i, auto lanes) RATPLUS_INLINE_LAMBDA {
          pack g(0.0f);
          if constexpr (C::gated) g = load(gate(t) + i, lanes);
          if (k) store(k_state + i, cell.step(load(k_state + i), load(k(t) + i, lanes), g, first + t));
          if (v) {
            const pack state = cell.step(load(v_state + i), load(v(t) + i, lanes), g, first + t);
            store(v_state + i, state);
            store(v_out(t) + i, state, lanes);
          }
        });
      const auto rotate_or_copy = [&](const float* x, float* out) {
        if (p.rope)
          rotate<false>(x, p.rope.row(first + t), d, out);
        else if (x != out)
          std::copy_n(x, d, out);
      };
      if (k) rotate_or_copy(k_state, k_out(t));
      if (q) rotate_or_copy(q(t), q_out(t));
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
    const head_rows<const float> k(p.k, b, h), v(p.v, b, h), gate(p.gate, b, h), k_out(p.k_out, b, h),
        v_out(p.v_out, b, h), dq_out(p.dq_out, b, h), dk_out(p.dk_out, b, h), dv_out(p.dv_out, b, h);
    const head_rows<float> dq(p.dq, b, h), dk(p.dk, b, h), dv(p.dv, b, h), dgate(p.dgate, b, h);
    for (index_t t = used - 1; t >= 0; --t) {
      if (const index_t ahead = t - prefetch_rows; ahead >= 0) {
        for (const auto& x : {dq_out, dk_out, dv_out}) x.prefetch(ahead);
        if constexpr (reads)
          for (const auto& x : {k, v, gate, k_out, v_out}) x.prefetch(ahead);
        for (const auto& x : {dq, dk, dv, dgate}) x.prefetch(ahead);
      }

      const auto unrotated = [&](const float* x, index_t position, float* plain) -> const float* {
        if (!p.rope) return x;
        rotate<true>(x, p.rope.row(position), d, plain);
        return plain;
      };
      if (dq_out)
        if (const float* const x = unrotated(dq_out(t), first + t, dq(t)); x != dq(t)) std::copy_n(x, d, dq(t));
      const float* const dk_in = dk_out ? unrotated(dk_out(t), first + t, dk_plain) : nullptr;
      // States before row t; null: zero.
      const float *k_before = nullptr, *v_before = nullptr;
      if (reads && dk_out) k_before = t > 0 ? unrotated(k_out(t - 1), first + t - 1, k_plain) : row_of(p.k_first, b, h);
      if (reads && dv_out) v_before = t > 0 ? v_out(t - 1) : row_of(p.v_first, b, h);

      const auto adjoint = [&](const float* before, const float* x, pack g, const float* dout, float* dstate, float* dx,
                               index_t i, auto lanes) RATPLUS_INLINE_LAMBDA {
        pack state(0.0f), input(0.0f);
        if constexpr (reads) {
          if (before != nullptr) state = load(before + i, lanes);
          input = load(x + i, lanes);
        }
        const auto grad = cell.adjoint(state, input, g, first + t, load(dout + i, lanes) + load(dstate + i));
        store(dstate + i, grad.dstate);
        store(dx + i, grad.dinput, lanes);
        return grad.dgate;
      };
      if (dk_out || dv_out)
        for_each_pack(d, [&](index_t i, auto lanes) RATPLUS_INLINE_LAMBDA {
          pack g(0.0f), dg(0.0f);
          if constexpr (C::gated) g = load(gate(t) + i, lanes);
          if (dk_out) dg = adjoint(k_before, k(t), g, dk_in, dk_state, dk(t), i, lanes);
          if (dv_out) dg += adjoint(v_before, v(t), g, dv_out(t), dv_state, dv(t), i, lanes);
          if constexpr (C::gated) store(dgate(t) + i, dg, lanes);
        });
    }
    if (dk_out && p.dk_first) std::copy_n(dk_state, d, p.dk_first.row(b, h));
    if (dv_out && p.dv_first) std::copy_n(dv_state, d, p.dv_first.row(b, h));
    if (dq_out) zero_rows(p.dq, b, h, used, T);
    if (dk_out) zero_rows(p.dk, b, h, used, T);
    if (dv_out) zero_rows(p.dv, b, h, used, T);
    if (C::gated && (dk_out || dv_out)) zero_rows(p.dgate, b, h, used, T);
  });
}

}  // namespace ratplus::cpu
