// The recurrence forward: every cell, stream, span and state against a loop in double.

#include "ratplus/ops/scan.hpp"

#include "ratplus/ops/rope.hpp"
#include "ratplus/recurrence/chunked.hpp"
#include "ratplus/recurrence/none.hpp"
#include "support/backends.hpp"
#include "support/guarded.hpp"
#include "support/oracles.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

struct scan_case {
  index_t B = 2, H = 2, rows = 17, d = 8;
  layout where = layout::strided;
  bool q = true, k = true, v = true;
  bool rotate = true, initial = true, last = true;
  bool spans = false;  // own first position and length for every sequence
  bool in_place = false;
};

// Fills the rows of padding with NaN: what is there must not matter.
template <class T>
void poison_padding(array<T, 4>& x, const std::vector<token_t>& lengths) {
  for_each_index(x.shape, [&](const extents<4>& at) {
    if (at[2] >= lengths[static_cast<std::size_t>(at[0])]) x(at[0], at[1], at[2], at[3]) = poison<T>();
  });
}

template <class Backend, class Cell>
void check_scan(Backend& backend, const Cell& cell, const oracle::cell_step& step, const scan_case& c) {
  using T = typename Backend::scalar;
  using A = accumulator_t<T>;
  auto& ctx = backend.ctx;
  CAPTURE(cell.name(), c.B, c.H, c.rows, c.d, static_cast<int>(c.where), c.q, c.k, c.v, c.rotate, c.initial, c.spans,
          c.in_place);
  const auto shape = dims(c.B, c.H, c.rows, c.d);
  std::vector<token_t> first, lengths;
  for (index_t b = 0; b < c.B; ++b) {
    first.push_back(static_cast<token_t>(c.spans ? 3 * b + 1 : 0));
    lengths.push_back(static_cast<token_t>(c.spans ? std::max<index_t>(0, c.rows - 5 * b) : c.rows));
  }
  auto q = random_array<T>(shape, 1), k = random_array<T>(shape, 2), v = random_array<T>(shape, 3),
       gate = random_array<T>(shape, 4, 2);
  array<A, 3> k_first(dims(c.B, c.H, c.d)), v_first(k_first.shape);
  if (c.initial) {
    k_first = random_array<A>(k_first.shape, 5);
    v_first = random_array<A>(k_first.shape, 6);
  }

  array<double, 3> k_last, v_last;
  auto expected_q = q.template to<double>();
  for_each_index(shape, [&](const extents<4>& at) {
    if (at[2] >= lengths[static_cast<std::size_t>(at[0])]) expected_q(at[0], at[1], at[2], at[3]) = 0;
  });
  auto expected_k = oracle::scan(k, gate, step, k_first.template to<double>(), first, lengths, k_last);
  const auto expected_v = oracle::scan(v, gate, step, v_first.template to<double>(), first, lengths, v_last);
  if (c.rotate) {
    expected_q = oracle::rope(expected_q, 10000, first);
    expected_k = oracle::rope(expected_k, 10000, first);
  }

  for (auto* x : {&q, &k, &v, &gate}) poison_padding(*x, lengths);
  guarded on_q(ctx, q, c.where), on_k(ctx, k, c.where), on_v(ctx, v, c.where);
  const guarded on_gate(ctx, gate, c.where);
  const guarded on_k_first(ctx, k_first), on_v_first(ctx, v_first);
  const guarded on_first(ctx, tokens_of(first)), on_lengths(ctx, tokens_of(lengths));
  auto q_out = poisoned<T>(ctx, shape, c.where), k_out = poisoned<T>(ctx, shape, c.where),
       v_out = poisoned<T>(ctx, shape, c.where);
  auto on_k_last = poisoned<A>(ctx, k_first.shape), on_v_last = poisoned<A>(ctx, k_first.shape);
  const auto table = make_rope_table<A>(ctx, c.rows + 3 * c.B + 1, c.rotate ? c.d : 2, 10000.0);

  scan_forward_args<T> args;
  if (c.q) args.q = on_q.in(), args.q_out = c.in_place ? on_q.out() : q_out.out();
  if (c.k) args.k = on_k.in(), args.k_out = c.in_place ? on_k.out() : k_out.out();
  if (c.v) args.v = on_v.in(), args.v_out = c.in_place ? on_v.out() : v_out.out();
  if (Cell::gated && (c.k || c.v)) args.gate = on_gate.in();
  if (c.rotate) args.rope = table.view();
  if (c.initial && c.k) args.k_first = on_k_first.in();
  if (c.initial && c.v) args.v_first = on_v_first.in();
  if (c.last && c.k) args.k_last = on_k_last.out();
  if (c.last && c.v) args.v_last = on_v_last.out();
  if (c.spans) args.spans = {on_first.in(), on_lengths.in()};
  scan_forward(ctx, cell, args);

  if (c.q) CHECK(difference((c.in_place ? on_q : q_out).read(), expected_q) <= Backend::tolerance);
  if (c.k) CHECK(difference((c.in_place ? on_k : k_out).read(), expected_k) <= Backend::tolerance);
  if (c.v) CHECK(difference((c.in_place ? on_v : v_out).read(), expected_v) <= Backend::tolerance);
  if (c.last && c.k) CHECK(difference(on_k_last.read(), k_last) <= tolerance_of<A>);
  if (c.last && c.v) CHECK(difference(on_v_last.read(), v_last) <= tolerance_of<A>);
  if (!c.k) CHECK(same_bits(k_out.read(), array<T, 4>(shape, poison<T>())));
}

template <class Backend, class F>
void for_each_cell(F&& f) {
  f(gated_average{}, oracle::gated_average_step());
  f(none{}, oracle::cell_step([](double, double x, double, index_t) { return x; }));
  f(chunked<>(7), oracle::cell_step([](double h, double x, double g, index_t t) {
      return oracle::gated_average_step()(t % 7 == 0 ? 0.0 : h, x, g, t);
    }));
  f(squashed_average{}, oracle::cell_step([](double h, double x, double g, index_t t) {
      const double u = oracle::logistic(g) * h + (1 - oracle::logistic(g)) * x;
      return (t % 3 == 0 ? 2 : 1) * u / (1 + u * u);
    }));
  f(leaky_sum{}, oracle::cell_step([](double h, double x, double, index_t) { return 0.75 * h + x; }));
}

}  // namespace

TEMPLATE_TEST_CASE("scan: every cell, with spans, states and rotation", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for_each_cell<TestType>([&](const auto& cell, const oracle::cell_step& step) {
    for (const bool spans : {false, true})
      for (const bool in_place : {false, true}) {
        scan_case c;
        c.B = 3;
        c.spans = spans;
        c.in_place = in_place;
        check_scan(backend, cell, step, c);
        c.initial = c.last = c.rotate = false;
        check_scan(backend, cell, step, c);
        c.rows = 130;
        c.d = 17;
        check_scan(backend, cell, step, c);
      }
  });
}

TEMPLATE_TEST_CASE("scan: every size", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for (const index_t n : awkward_sizes)
    for (const layout where : {layout::packed, layout::strided}) {
      scan_case c;
      c.where = where;
      c.rows = n;
      check_scan(backend, gated_average{}, oracle::gated_average_step(), c);
      c.rows = 19;
      c.d = n;
      c.rotate = n % 2 == 0;
      check_scan(backend, gated_average{}, oracle::gated_average_step(), c);
    }
  scan_case large;
  large.B = 1;
  large.H = 3;
  large.rows = 1500;
  large.d = 64;
  check_scan(backend, gated_average{}, oracle::gated_average_step(), large);
}

TEMPLATE_TEST_CASE("scan: any of the streams may be absent", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for (int streams = 1; streams < 8; ++streams)
    for (const bool rotate : {false, true}) {
      scan_case c;
      c.q = (streams & 1) != 0;
      c.k = (streams & 2) != 0;
      c.v = (streams & 4) != 0;
      c.rotate = rotate;
      check_scan(backend, gated_average{}, oracle::gated_average_step(), c);
    }
}

TEMPLATE_TEST_CASE("scan: pieces with the carried state are the whole", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  const index_t B = 2, H = 2, rows = 71, d = 6;
  const auto shape = dims(B, H, rows, d);
  const auto k = random_array<T>(shape, 1), v = random_array<T>(shape, 2), gate = random_array<T>(shape, 3, 2);
  const guarded on_k(ctx, k, layout::strided), on_v(ctx, v, layout::strided), on_gate(ctx, gate, layout::strided);
  const auto table = make_rope_table<A>(ctx, rows, d, 10000.0);
  for_each_cell<TestType>([&](const auto& cell, const oracle::cell_step&) {
    CAPTURE(cell.name());
    auto k_whole = poisoned<T>(ctx, shape), v_whole = poisoned<T>(ctx, shape);
    auto k_pieces = poisoned<T>(ctx, shape), v_pieces = poisoned<T>(ctx, shape);
    scan_forward_args<T> args;
    args.k = on_k.in();
    args.v = on_v.in();
    args.gate = on_gate.in();
    args.k_out = k_whole.out();
    args.v_out = v_whole.out();
    args.rope = table.view();
    scan_forward(ctx, cell, args);

    // The states are carried in the same memory, first and last.
    guarded k_state(ctx, array<A, 3>(dims(B, H, d))), v_state(ctx, array<A, 3>(dims(B, H, d)));
    index_t begin = 0;
    for (const index_t piece : {1, 16, 3, 33, 17, 1}) {
      const index_t end = begin + piece;
      const guarded first(ctx, array<token_t, 1>(dims(B), static_cast<token_t>(begin)));
      args.k = on_k.in().slice(2, begin, end);
      args.v = on_v.in().slice(2, begin, end);
      args.gate = on_gate.in().slice(2, begin, end);
      args.k_out = k_pieces.out().slice(2, begin, end);
      args.v_out = v_pieces.out().slice(2, begin, end);
      args.k_first = k_state.in();
      args.v_first = v_state.in();
      args.k_last = k_state.out();
      args.v_last = v_state.out();
      args.spans = {first.in(), {}};
      scan_forward(ctx, cell, args);
      begin = end;
    }
    REQUIRE(begin == rows);
    CHECK(difference(k_pieces.read(), k_whole.read()) <= TestType::tolerance);
    CHECK(difference(v_pieces.read(), v_whole.read()) <= TestType::tolerance);
  });
}

TEMPLATE_TEST_CASE("scan: a sequence without rows keeps its state", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto state = random_array<A>(dims(2, 1, 4), 1);
  const guarded k(ctx, array<T, 4>(dims(2, 1, 3, 4), poison<T>()));
  const guarded first_state(ctx, state);
  const guarded lengths(ctx, tokens_of({0, 0}));
  auto out = poisoned<T>(ctx, dims(2, 1, 3, 4));
  auto last = poisoned<A>(ctx, state.shape);
  scan_forward_args<T> args;
  args.k = args.gate = k.in();
  args.k_out = out.out();
  args.k_first = first_state.in();
  args.k_last = last.out();
  args.spans.length = lengths.in();
  scan_forward(ctx, gated_average{}, args);
  CHECK(same_bits(last.read(), state));
  CHECK(difference(out.read(), array<T, 4>(dims(2, 1, 3, 4))) <= 0.0);
}
