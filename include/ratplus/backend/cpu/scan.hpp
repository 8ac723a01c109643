#pragma once
// The recurrence and RoPE in one pass: a row of a head is read once, its gate applied to the states of k and v, the
// state of k and the row of q rotated, and all three written. States lie in scratch memory that stays in the cache; the
// pass is bound by memory. Rows of a projection lie pages apart, so all heads of a row are done before the next row
// (two to three times as fast as head by head), and rows ahead are prefetched.

#include "ratplus/backend/cpu/context.hpp"
#include "ratplus/backend/cpu/detail/rows.hpp"
#include "ratplus/ops/scan.hpp"

namespace ratplus::cpu {

namespace detail {

/// The rows of the heads of one sequence of a view, or of an absent one.
template <class T>
struct sequence_rows {
  T* data = nullptr;
  index_t head_stride = 0, row_stride = 0, channels = 0;

  sequence_rows(const view<T, 4>& x, index_t b) {
    if (x) *this = sequence_rows(x.row(b, index_t{0}, index_t{0}), x.stride(1), x.stride(2), x.extent(3));
  }
  explicit operator bool() const { return data != nullptr; }
  RATPLUS_INLINE T* operator()(index_t h, index_t t) const { return data + h * head_stride + t * row_stride; }

  /// Asks for row t of head h, to read or to write it.
  RATPLUS_INLINE void prefetch(index_t h, index_t t) const {
    constexpr index_t line = 64 / sizeof(float);
    if (data == nullptr) return;
    for (index_t i = 0; i < channels; i += line) __builtin_prefetch((*this)(h, t) + i, std::is_const_v<T> ? 0 : 1);
  }

 private:
  sequence_rows(T* p, index_t h, index_t t, index_t c) : data(p), head_stride(h), row_stride(t), channels(c) {}
};
/// Rows that are asked for ahead of the one at work.
inline constexpr index_t prefetch_rows = 2;

/// f(b, h0, h1, scratch) for the heads [h0, h1) of every sequence b, with `floats` floats of scratch for each head:
/// all heads of a sequence, or as many as give every thread the same share. Heads do not touch each other, so results
/// do not depend on the groups.
template <class F>
void for_each_head_group(context& ctx, index_t B, index_t H, index_t work, index_t floats, F&& f) {
  index_t groups = 1;
  while (groups < H && B * groups % ctx.threads != 0) ++groups;
  const index_t most = (H + groups - 1) / groups;
  ctx.parallel_for(B * groups, work * most, floats * most, [&](index_t item, float* scratch) {
    const index_t b = item / groups, group = item % groups;
    f(b, H * group / groups, H * (group + 1) / groups, scratch);
  });
}

/// The states of one head, or null.
template <class T>
[[nodiscard]] T* row_of(const view<T, 3>& x, index_t b, index_t h) {
  return x ? x.row(b, h) : nullptr;
}

/// state = x(b, h), or zeros where x is absent; whole packs.
inline void begin_with(float* state, const view<const float, 3>& x, index_t b, index_t h, index_t d) {
  std::fill_n(state, padded(d), 0.0f);
  if (x) std::copy_n(x.row(b, h), d, state);
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
  for_each_head_group(ctx, B, H, 32 * T * d, 2 * padded(d), [&](index_t b, index_t h0, index_t h1, float* scratch) {
    const index_t first = reference::first_position(p.spans, b), used = reference::rows_in_use(p.spans, b, T);
    const auto k_state_of = [&](index_t h) { return scratch + (h - h0) * 2 * padded(d); };
    const auto v_state_of = [&](index_t h) { return k_state_of(h) + padded(d); };
    for (index_t h = h0; h < h1; ++h) {
      begin_with(k_state_of(h), p.k_first, b, h, d);
      begin_with(v_state_of(h), p.v_first, b, h, d);
    }
    const sequence_rows<const float> q(p.q, b), k(p.k, b), v(p.v, b), gate(p.gate, b);
    const sequence_rows<float> q_out(p.q_out, b), k_out(p.k_out, b), v_out(p.v_out, b);
    const auto row = [&](index_t h, index_t t) RATPLUS_INLINE_LAMBDA {
      float *const k_state = k_state_of(h), *const v_state = v_state_of(h);
      if (k || v)
        for_each_pack(d, [&](index_t i, auto lanes) RATPLUS_INLINE_LAMBDA {
          pack g(0.0f);
          if constexpr (C::gated) g = load(gate(h, t) + i, lanes);
          if (k) store(k_state + i, cell.step(load(k_state + i), load(k(h, t) + i, lanes), g, first + t));
          if (v) {
            const pack state = cell.step(load(v_state + i), load(v(h, t) + i, lanes), g, first + t);
            store(v_state + i, state);
            store(v_out(h, t) + i, state, lanes);
          }
        });
      const auto rotate_or_copy = [&](const float* x, float* out) {
        if (p.rope)
          rotate<false>(x, p.rope.row(first + t), d, out);
        else if (x != out)
          std::copy_n(x, d, out);
      };
      if (k) rotate_or_copy(k_state, k_out(h, t));
      if (q) rotate_or_copy(q(h, t), q_out(h, t));
    };
    for (index_t t = 0; t < used; ++t)
      for (index_t h = h0; h < h1; ++h) {
        if (t + prefetch_rows < used)
          for (const auto& x : {q, k, v, gate}) x.prefetch(h, t + prefetch_rows);
        row(h, t);
      }
    for (index_t h = h0; h < h1; ++h) {
      if (p.k && p.k_last) std::copy_n(k_state_of(h), d, p.k_last.row(b, h));
      if (p.v && p.v_last) std::copy_n(v_state_of(h), d, p.v_last.row(b, h));
      if (p.q) zero_rows(p.q_out, b, h, used, T);
      if (p.k) zero_rows(p.k_out, b, h, used, T);
      if (p.v) zero_rows(p.v_out, b, h, used, T);
    }
  });
}

template <class C>
void scan_backward_on(context& ctx, const C& cell, const scan_backward_args<float>& p) {
  using namespace detail;
  const auto& lead = p.dk_out ? p.dk_out : p.dv_out ? p.dv_out : p.dq_out;
  const index_t B = lead.extent(0), H = lead.extent(1), T = lead.extent(2), d = lead.extent(3);
  // What the adjoint reads; an identity cell needs neither inputs nor states.
  constexpr bool reads = !IdentityCell<C>;
  for_each_head_group(ctx, B, H, 48 * T * d, 4 * padded(d), [&](index_t b, index_t h0, index_t h1, float* scratch) {
    const index_t first = reference::first_position(p.spans, b), used = reference::rows_in_use(p.spans, b, T);
    // Gradients of the states carried back, and rows of k's stream with the rotation undone.
    const auto dk_state_of = [&](index_t h) { return scratch + (h - h0) * 2 * padded(d); };
    const auto dv_state_of = [&](index_t h) { return dk_state_of(h) + padded(d); };
    float *const dk_plain = dk_state_of(h1), *const k_plain = dk_plain + padded(d);
    for (index_t h = h0; h < h1; ++h) {
      begin_with(dk_state_of(h), p.dk_last, b, h, d);
      begin_with(dv_state_of(h), p.dv_last, b, h, d);
    }
    const sequence_rows<const float> k(p.k, b), v(p.v, b), gate(p.gate, b), k_out(p.k_out, b), v_out(p.v_out, b),
        dq_out(p.dq_out, b), dk_out(p.dk_out, b), dv_out(p.dv_out, b);
    const sequence_rows<float> dq(p.dq, b), dk(p.dk, b), dv(p.dv, b), dgate(p.dgate, b);
    const auto row = [&](index_t h, index_t t) RATPLUS_INLINE_LAMBDA {
      const auto unrotated = [&](const float* x, index_t position, float* plain) -> const float* {
        if (!p.rope) return x;
        rotate<true>(x, p.rope.row(position), d, plain);
        return plain;
      };
      if (dq_out)
        if (const float* const x = unrotated(dq_out(h, t), first + t, dq(h, t)); x != dq(h, t))
          std::copy_n(x, d, dq(h, t));
      const float* const dk_in = dk_out ? unrotated(dk_out(h, t), first + t, dk_plain) : nullptr;
      // States before row t; null: zero.
      const float *k_before = nullptr, *v_before = nullptr;
      if (reads && dk_out)
        k_before = t > 0 ? unrotated(k_out(h, t - 1), first + t - 1, k_plain) : row_of(p.k_first, b, h);
      if (reads && dv_out) v_before = t > 0 ? v_out(h, t - 1) : row_of(p.v_first, b, h);

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
          if constexpr (C::gated) g = load(gate(h, t) + i, lanes);
          if (dk_out) dg = adjoint(k_before, k(h, t), g, dk_in, dk_state_of(h), dk(h, t), i, lanes);
          if (dv_out) dg += adjoint(v_before, v(h, t), g, dv_out(h, t), dv_state_of(h), dv(h, t), i, lanes);
          if constexpr (C::gated) store(dgate(h, t) + i, dg, lanes);
        });
    };
    for (index_t t = used - 1; t >= 0; --t)
      for (index_t h = h0; h < h1; ++h) {
        if (const index_t ahead = t - prefetch_rows; ahead >= 0) {
          for (const auto& x : {dq_out, dk_out, dv_out}) x.prefetch(h, ahead);
          if constexpr (reads)
            for (const auto& x : {k, v, gate, k_out, v_out}) x.prefetch(h, ahead);
          dgate.prefetch(h, ahead);
        }
        row(h, t);
      }
    for (index_t h = h0; h < h1; ++h) {
      if (dk_out && p.dk_first) std::copy_n(dk_state_of(h), d, p.dk_first.row(b, h));
      if (dv_out && p.dv_first) std::copy_n(dv_state_of(h), d, p.dv_first.row(b, h));
      if (dq_out) zero_rows(p.dq, b, h, used, T);
      if (dk_out) zero_rows(p.dk, b, h, used, T);
      if (dv_out) zero_rows(p.dv, b, h, used, T);
      if (C::gated && (dk_out || dv_out)) zero_rows(p.dgate, b, h, used, T);
    }
  });
}

}  // namespace ratplus::cpu
