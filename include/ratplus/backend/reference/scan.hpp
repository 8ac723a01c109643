#pragma once
#include <vector>

#include "ratplus/backend/reference/context.hpp"
#include "ratplus/ops/scan.hpp"

namespace ratplus::reference {

namespace detail {

/// out = row rotated by the angles of `table` (cos | sin), or the other way round. out may be row.
template <class From, class To, class A>
void rotate(const From* row, const A* table, index_t d, bool back, To* out) {
  const index_t half = d / 2;
  for (index_t i = 0; i < half; ++i) {
    const A c = table[i], s = back ? -table[half + i] : table[half + i];
    const A x1 = wide(row[i]), x2 = wide(row[half + i]);
    out[i] = static_cast<To>(x1 * c - x2 * s);
    out[half + i] = static_cast<To>(x2 * c + x1 * s);
  }
}

template <class T>
void zero_rows(const view<T, 4>& x, index_t b, index_t h, index_t begin) {
  for (index_t t = begin; t < x.extent(2); ++t)
    for (index_t i = 0; i < x.extent(3); ++i) x(b, h, t, i) = T(0);
}

}  // namespace detail

template <class C, class T>
void scan_forward_on(context&, const C& cell, const scan_forward_args<T>& p) {
  using A = accumulator_t<T>;
  const auto& lead = p.k ? p.k : p.v ? p.v : p.q;
  const index_t B = lead.extent(0), H = lead.extent(1), rows = lead.extent(2), d = lead.extent(3);
  std::vector<A> state(static_cast<std::size_t>(d));

  const auto stream = [&](index_t b, index_t h, const view<const T, 4>& in, const view<T, 4>& out,
                          const view<const A, 3>& initial, const view<A, 3>& final, bool recurrent, bool rotated) {
    if (!in) return;
    const index_t first = first_position(p.spans, b), used = rows_in_use(p.spans, b, rows);
    for (index_t i = 0; i < d; ++i) state[static_cast<std::size_t>(i)] = initial ? initial(b, h, i) : A(0);
    for (index_t t = 0; t < used; ++t) {
      for (index_t i = 0; i < d; ++i) {
        A& s = state[static_cast<std::size_t>(i)];
        const A gate = C::gated && recurrent ? wide(p.gate(b, h, t, i)) : A(0);
        s = recurrent ? static_cast<A>(cell.step(s, wide(in(b, h, t, i)), gate, first + t)) : wide(in(b, h, t, i));
      }
      if (rotated && p.rope)
        detail::rotate(state.data(), p.rope.row(first + t), d, false, out.row(b, h, t));
      else
        for (index_t i = 0; i < d; ++i) out(b, h, t, i) = static_cast<T>(state[static_cast<std::size_t>(i)]);
    }
    if (final)
      for (index_t i = 0; i < d; ++i) final(b, h, i) = state[static_cast<std::size_t>(i)];
    detail::zero_rows(out, b, h, used);
  };

  for (index_t b = 0; b < B; ++b)
    for (index_t h = 0; h < H; ++h) {
      stream(b, h, p.q, p.q_out, {}, {}, false, true);
      stream(b, h, p.k, p.k_out, p.k_first, p.k_last, true, true);
      stream(b, h, p.v, p.v_out, p.v_first, p.v_last, true, false);
    }
}

template <class C, class T>
void scan_backward_on(context&, const C& cell, const scan_backward_args<T>& p) {
  using A = accumulator_t<T>;
  const auto& lead = p.dk_out ? p.dk_out : p.dv_out ? p.dv_out : p.dq_out;
  const index_t B = lead.extent(0), H = lead.extent(1), rows = lead.extent(2), d = lead.extent(3);
  const auto size = static_cast<std::size_t>(d);
  std::vector<A> before(size), incoming(size), carried(size);

  bool gate_written = false;  // by the k stream, so that the v stream adds to it
  const auto stream = [&](index_t b, index_t h, const view<const T, 4>& in, const view<const T, 4>& out,
                          const view<const T, 4>& dout, const view<T, 4>& din, const view<const A, 3>& initial,
                          const view<const A, 3>& dlast, const view<A, 3>& dinitial, bool recurrent, bool rotated) {
    if (!dout) return;
    const index_t first = first_position(p.spans, b), used = rows_in_use(p.spans, b, rows);
    const bool rotate = rotated && p.rope;
    for (std::size_t i = 0; i < size; ++i) carried[i] = dlast ? dlast(b, h, static_cast<index_t>(i)) : A(0);
    for (index_t t = used - 1; t >= 0; --t) {
      if (rotate)
        detail::rotate(dout.row(b, h, t), p.rope.row(first + t), d, true, incoming.data());
      else
        for (index_t i = 0; i < d; ++i) incoming[static_cast<std::size_t>(i)] = wide(dout(b, h, t, i));
      if (!recurrent || IdentityCell<C>) {
        for (index_t i = 0; i < d; ++i) {
          A& last = carried[static_cast<std::size_t>(i)];
          din(b, h, t, i) = static_cast<T>(incoming[static_cast<std::size_t>(i)] + last);
          last = A(0);
        }
        continue;
      }
      if (t == 0)
        for (index_t i = 0; i < d; ++i) before[static_cast<std::size_t>(i)] = initial ? initial(b, h, i) : A(0);
      else if (rotate)
        detail::rotate(out.row(b, h, t - 1), p.rope.row(first + t - 1), d, true, before.data());
      else
        for (index_t i = 0; i < d; ++i) before[static_cast<std::size_t>(i)] = wide(out(b, h, t - 1, i));
      for (index_t i = 0; i < d; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const A gate = C::gated ? wide(p.gate(b, h, t, i)) : A(0);
        const cell_gradient<A> g =
            cell.adjoint(before[at], wide(in(b, h, t, i)), gate, first + t, incoming[at] + carried[at]);
        carried[at] = g.dstate;
        din(b, h, t, i) = static_cast<T>(g.dinput);
        if constexpr (C::gated)
          p.dgate(b, h, t, i) = static_cast<T>(gate_written ? wide(p.dgate(b, h, t, i)) + g.dgate : g.dgate);
      }
    }
    if (dinitial)
      for (index_t i = 0; i < d; ++i) dinitial(b, h, i) = carried[static_cast<std::size_t>(i)];
    detail::zero_rows(din, b, h, used);
    if (C::gated && recurrent && !gate_written) detail::zero_rows(p.dgate, b, h, used);
    gate_written = gate_written || recurrent;
  };

  for (index_t b = 0; b < B; ++b)
    for (index_t h = 0; h < H; ++h) {
      gate_written = false;
      stream(b, h, {}, {}, p.dq_out, p.dq, {}, {}, {}, false, true);
      stream(b, h, p.k, p.k_out, p.dk_out, p.dk, p.k_first, p.dk_last, p.dk_first, true, true);
      stream(b, h, p.v, p.v_out, p.dv_out, p.dv, p.v_first, p.dv_last, p.dv_first, true, false);
    }
}

}  // namespace ratplus::reference
