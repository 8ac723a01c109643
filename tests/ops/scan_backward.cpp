// The recurrence backwards, against the reference backend in double (which gradients.cpp holds against finite
// differences), and by the adjoint identity.

#include "ratplus/backend/reference/scan.hpp"
#include "ratplus/ops/rope.hpp"
#include "ratplus/recurrence/chunked.hpp"
#include "ratplus/recurrence/none.hpp"
#include "support/backends.hpp"
#include "support/guarded.hpp"
#include "support/patterns.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

struct scan_case {
  index_t B = 2, H = 2, rows = 17, d = 8;
  layout where = layout::strided;
  bool q = true, k = true, v = true, rotate = true, states = true, spans = false, in_place = false;
};

template <class T>
struct inputs {
  using A = accumulator_t<T>;
  array<T, 4> q, k, v, gate, dq_out, dk_out, dv_out;
  array<A, 3> k_first, v_first, dk_last, dv_last;
  array<token_t, 1> first, length;

  template <class U>
  inputs<U> to() const {
    using UA = accumulator_t<U>;
    return {q.template to<U>(),
            k.template to<U>(),
            v.template to<U>(),
            gate.template to<U>(),
            dq_out.template to<U>(),
            dk_out.template to<U>(),
            dv_out.template to<U>(),
            k_first.template to<UA>(),
            v_first.template to<UA>(),
            dk_last.template to<UA>(),
            dv_last.template to<UA>(),
            first,
            length};
  }
};

template <class T>
struct gradients {
  using A = accumulator_t<T>;
  array<T, 4> dq, dk, dv, dgate;
  array<A, 3> dk_first, dv_first;
};

// Forward and backward on a context.
template <class T, class Ctx, class Cell>
gradients<T> backward(Ctx& ctx, const Cell& cell, const inputs<T>& in, const scan_case& c) {
  using A = accumulator_t<T>;
  const auto shape = in.k.shape;
  const guarded q(ctx, in.q, c.where), k(ctx, in.k, c.where), v(ctx, in.v, c.where), gate(ctx, in.gate, c.where);
  const guarded k_first(ctx, in.k_first), v_first(ctx, in.v_first), dk_last(ctx, in.dk_last), dv_last(ctx, in.dv_last);
  const guarded first(ctx, in.first), length(ctx, in.length);
  guarded dq_out(ctx, in.dq_out, c.where), dk_out(ctx, in.dk_out, c.where), dv_out(ctx, in.dv_out, c.where);
  auto q_out = poisoned<T>(ctx, shape, c.where), k_out = poisoned<T>(ctx, shape, c.where),
       v_out = poisoned<T>(ctx, shape, c.where);
  auto dq = poisoned<T>(ctx, shape, c.where), dk = poisoned<T>(ctx, shape, c.where),
       dv = poisoned<T>(ctx, shape, c.where), dgate = poisoned<T>(ctx, shape, c.where);
  auto dk_first = poisoned<A>(ctx, in.k_first.shape), dv_first = poisoned<A>(ctx, in.k_first.shape);
  const auto table = make_rope_table<A>(ctx, c.rows + 20, c.rotate ? c.d : 2, 10000.0);

  scan_forward_args<T> f;
  scan_backward_args<T> b;
  if (c.q) {
    f.q = q.in(), f.q_out = q_out.out();
    b.dq_out = dq_out.in(), b.dq = c.in_place ? dq_out.out() : dq.out();
  }
  if (c.k) {
    f.k = b.k = k.in(), f.k_out = k_out.out(), b.k_out = k_out.in();
    b.dk_out = dk_out.in(), b.dk = c.in_place ? dk_out.out() : dk.out();
    if (c.states) {
      f.k_first = b.k_first = k_first.in(), b.dk_last = dk_last.in();
      b.dk_first = dk_first.out();
    }
  }
  if (c.v) {
    f.v = b.v = v.in(), f.v_out = v_out.out(), b.v_out = v_out.in();
    b.dv_out = dv_out.in(), b.dv = c.in_place ? dv_out.out() : dv.out();
    if (c.states) {
      f.v_first = b.v_first = v_first.in(), b.dv_last = dv_last.in();
      b.dv_first = dv_first.out();
    }
  }
  if (Cell::gated && (c.k || c.v)) f.gate = b.gate = gate.in(), b.dgate = dgate.out();
  if (c.rotate) f.rope = b.rope = table.view();
  if (c.spans) f.spans = b.spans = {first.in(), length.in()};
  scan_forward(ctx, cell, f);
  scan_backward(ctx, cell, b);

  gradients<T> g;
  if (c.q) g.dq = (c.in_place ? dq_out : dq).read();
  if (c.k) g.dk = (c.in_place ? dk_out : dk).read();
  if (c.v) g.dv = (c.in_place ? dv_out : dv).read();
  if (Cell::gated && (c.k || c.v)) g.dgate = dgate.read();
  if (c.k && c.states) g.dk_first = dk_first.read();
  if (c.v && c.states) g.dv_first = dv_first.read();
  return g;
}

template <class T>
inputs<T> random_inputs(const scan_case& c) {
  using A = accumulator_t<T>;
  const auto shape = dims(c.B, c.H, c.rows, c.d);
  const auto state = dims(c.B, c.H, c.d);
  inputs<T> in{random_array<T>(shape, 1),    random_array<T>(shape, 2),  random_array<T>(shape, 3),
               random_array<T>(shape, 4, 2), random_array<T>(shape, 5),  random_array<T>(shape, 6),
               random_array<T>(shape, 7),    random_array<A>(state, 8),  random_array<A>(state, 9),
               random_array<A>(state, 10),   random_array<A>(state, 11), array<token_t, 1>(dims(c.B)),
               array<token_t, 1>(dims(c.B))};
  for (index_t b = 0; b < c.B; ++b) {
    in.first(b) = static_cast<token_t>(4 * b + 1);
    in.length(b) = static_cast<token_t>(std::max<index_t>(0, c.rows - 6 * b));
  }
  return in;
}

template <class Backend, class Cell>
void check_backward(Backend& backend, const Cell& cell, const scan_case& c) {
  using T = typename Backend::scalar;
  using A = accumulator_t<T>;
  CAPTURE(cell.name(), c.B, c.H, c.rows, c.d, static_cast<int>(c.where), c.q, c.k, c.v, c.rotate, c.states, c.spans,
          c.in_place);
  inputs<T> in = random_inputs<T>(c);
  reference::context reference;
  const gradients<double> expected = backward(reference, cell, in.template to<double>(), c);
  if (c.spans)  // what stands in the rows of padding must not matter
    for (auto* x : {&in.q, &in.k, &in.v, &in.gate, &in.dq_out, &in.dk_out, &in.dv_out})
      for_each_index(x->shape, [&](const extents<4>& at) {
        if (at[2] >= in.length(at[0])) (*x)(at[0], at[1], at[2], at[3]) = poison<T>();
      });
  const gradients<T> got = backward(backend.ctx, cell, in, c);
  if (c.q) CHECK(difference(got.dq, expected.dq) <= Backend::tolerance);
  if (c.k) CHECK(difference(got.dk, expected.dk) <= Backend::tolerance);
  if (c.v) CHECK(difference(got.dv, expected.dv) <= Backend::tolerance);
  if (Cell::gated && (c.k || c.v)) CHECK(difference(got.dgate, expected.dgate) <= Backend::tolerance);
  // A state's gradient is carried in A; only a cell that is not affine reads the rounded states on the way.
  const double state_tolerance = AssociativeCell<Cell> ? tolerance_of<A> : Backend::tolerance;
  if (c.k && c.states && !IdentityCell<Cell>) CHECK(difference(got.dk_first, expected.dk_first) <= state_tolerance);
  if (c.v && c.states && !IdentityCell<Cell>) CHECK(difference(got.dv_first, expected.dv_first) <= state_tolerance);
}

}  // namespace

TEMPLATE_TEST_CASE("scan backward: every cell, with spans, states and rotation", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  const auto check = [&](const auto& cell) {
    for (const bool spans : {false, true})
      for (const bool in_place : {false, true}) {
        scan_case c;
        c.B = 3;
        c.spans = spans;
        c.in_place = in_place;
        check_backward(backend, cell, c);
        c.states = c.rotate = false;
        c.rows = 130;
        c.d = 17;
        check_backward(backend, cell, c);
      }
  };
  check(gated_average{});
  check(none{});
  check(chunked<>(7));
  check(squashed_average{});
  check(leaky_sum{});
}

TEMPLATE_TEST_CASE("scan backward: every size", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for (const index_t n : awkward_sizes)
    for (const layout where : {layout::packed, layout::strided}) {
      scan_case c;
      c.where = where;
      c.rows = n;
      check_backward(backend, gated_average{}, c);
      c.rows = 19;
      c.d = n;
      c.rotate = n % 2 == 0;
      check_backward(backend, gated_average{}, c);
    }
  scan_case large;
  large.B = 1;
  large.H = 3;
  large.rows = 1000;
  large.d = 64;
  check_backward(backend, gated_average{}, large);
}

TEMPLATE_TEST_CASE("scan backward: any of the streams may be absent", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for (int streams = 1; streams < 8; ++streams) {
    scan_case c;
    c.q = (streams & 1) != 0;
    c.k = (streams & 2) != 0;
    c.v = (streams & 4) != 0;
    check_backward(backend, gated_average{}, c);
  }
}

TEMPLATE_TEST_CASE("scan backward is the adjoint of the forward pass in k and in the state", "",
                   RATPLUS_TEST_BACKENDS) {
  // For a given gate h is linear in (x, h₋₁): <dh, h(x, h₋₁)> = <dx, x> + <dh₋₁, h₋₁>.
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto shape = dims(2, 3, 65, 10);
  const auto state = dims(2, 3, 10);
  const auto x = random_array<T>(shape, 1), gate = random_array<T>(shape, 2, 2), dh = random_array<T>(shape, 3);
  const auto first = random_array<A>(state, 4);
  const guarded on_x(ctx, x, layout::strided), on_gate(ctx, gate, layout::strided), on_dh(ctx, dh, layout::strided);
  const guarded on_first(ctx, first);
  const auto table = make_rope_table<A>(ctx, 65, 10, 10000.0);
  auto h = poisoned<T>(ctx, shape), dx = poisoned<T>(ctx, shape), dgate = poisoned<T>(ctx, shape);
  auto dfirst = poisoned<A>(ctx, state);
  scan_forward_args<T> f;
  f.k = on_x.in(), f.gate = on_gate.in(), f.k_out = h.out(), f.k_first = on_first.in(), f.rope = table.view();
  scan_forward(ctx, gated_average{}, f);
  scan_backward_args<T> b;
  b.k = on_x.in(), b.gate = on_gate.in(), b.k_out = h.in(), b.k_first = on_first.in(), b.rope = table.view();
  b.dk_out = on_dh.in(), b.dk = dx.out(), b.dgate = dgate.out(), b.dk_first = dfirst.out();
  scan_backward(ctx, gated_average{}, b);
  const double left = inner(dh, h.read()), right = inner(dx.read(), x) + inner(dfirst.read(), first);
  CHECK(std::abs(left - right) <= TestType::tolerance * std::sqrt(inner(dh, dh) * inner(x, x)));
}
