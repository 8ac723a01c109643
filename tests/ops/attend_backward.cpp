// Attention backwards against the softmax's Jacobian over the gathered keys, and by the adjoint identity in v.

#include "ratplus/ops/attend.hpp"
#include "support/backends.hpp"
#include "support/guarded.hpp"
#include "support/oracles.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

struct attend_case {
  index_t B = 2, H = 2, rows = 65, d = 8;
  layout where = layout::strided;
  std::vector<token_t> lengths = {};
};

template <class Backend, class P>
void check_backward(Backend& backend, const std::string& name, const P& pattern, const predicate& visible,
                    const attend_case& c) {
  using T = typename Backend::scalar;
  using A = accumulator_t<T>;
  CAPTURE(name, c.B, c.H, c.rows, c.d, static_cast<int>(c.where), c.lengths);
  auto& ctx = backend.ctx;
  const auto shape = dims(c.B, c.H, c.rows, c.d);
  auto q = random_array<T>(shape, 1), k = random_array<T>(shape, 2), v = random_array<T>(shape, 3),
       dout = random_array<T>(shape, 4);
  const auto expected = oracle::attention(q, k, v, visible, c.lengths, &dout);
  auto out_values = expected.out.template to<T>();
  auto lse_values = expected.lse.template to<A>();
  if (!c.lengths.empty())
    for_each_index(shape, [&](const extents<4>& at) {
      if (at[2] < c.lengths[static_cast<std::size_t>(at[0])]) return;
      for (auto* x : {&q, &k, &v, &dout, &out_values}) (*x)(at[0], at[1], at[2], at[3]) = poison<T>();
      lse_values(at[0], at[1], at[2]) = poison<A>();
    });
  const guarded on_q(ctx, q, c.where), on_k(ctx, k, c.where), on_v(ctx, v, c.where), on_dout(ctx, dout, c.where),
      out(ctx, out_values, c.where);
  const guarded lse(ctx, lse_values, c.where);
  const guarded lengths(ctx, tokens_of(c.lengths));
  auto dq = poisoned<T>(ctx, shape, c.where), dk = poisoned<T>(ctx, shape, c.where),
       dv = poisoned<T>(ctx, shape, c.where);
  attend_backward_args<T> args;
  args.q = on_q.in(), args.k = on_k.in(), args.v = on_v.in(), args.out = out.in(), args.dout = on_dout.in();
  args.lse = lse.in(), args.dq = dq.out(), args.dk = dk.out(), args.dv = dv.out();
  if (!c.lengths.empty()) args.spans.length = lengths.in();
  attend_backward(ctx, pattern, args);
  CHECK(difference(dv.read(), expected.dv) <= Backend::tolerance);
  // dq and dk are differences: where a softmax is nearly one-hot, or a single key, they are rounding errors of terms of
  // the size of dout · v. Their error is measured against such terms.
  const double terms = std::sqrt(inner(expected.dv, expected.dv));
  const auto close = [&](const array<T, 4>& got, const array<double, 4>& wanted) {
    auto shifted = wanted;
    double norm = inner(wanted, wanted);
    if (norm > 1e-2 * terms * terms) return difference(got, wanted);
    array<double, 4> gap(wanted.shape);
    for (std::size_t i = 0; i < gap.data.size(); ++i) gap.data[i] = number(got.data[i]) - wanted.data[i];
    return difference(1 + std::sqrt(inner(gap, gap)) / terms, 1.0);
  };
  CHECK(close(dq.read(), expected.dq) <= Backend::tolerance);
  CHECK(close(dk.read(), expected.dk) <= Backend::tolerance);
}

}  // namespace

TEMPLATE_TEST_CASE("attend backward: every sparse pattern", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for (const numbers& n : sparse_patterns())
    for (const index_t rows : {37, 130}) {
      attend_case c;
      c.rows = rows;
      check_backward(backend, n.text(), n.pattern(), sees(n), c);
    }
}

TEMPLATE_TEST_CASE("attend backward: pattern types, hybrids and a user's own pattern", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for_each_static_pattern(4, [&](const char* name, const auto& pattern, const predicate& visible) {
    for (const index_t rows : {1, 50, 129}) {
      attend_case c;
      c.H = 4;
      c.rows = rows;
      c.d = 16;
      check_backward(backend, name, pattern, visible, c);
    }
  });
  const std::vector<numbers> groups{{1, 0, 0}, {4, 3, 1}, {0, 7, 0}};
  attend_case c;
  c.H = 6;
  c.rows = 70;
  check_backward(backend, "three groups", by_groups(groups), sees(groups, 6), c);
}

TEMPLATE_TEST_CASE("attend backward: every length and head size", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for (const numbers& n : {numbers{1, 0, 0}, numbers{16, 9, 2}, numbers{0, 20, 3}})
    for (const layout where : {layout::packed, layout::strided}) {
      for (const index_t rows : awkward_sizes) {
        attend_case c;
        c.rows = rows;
        c.where = where;
        check_backward(backend, n.text(), n.pattern(), sees(n), c);
      }
      for (const index_t d : {1, 2, 5, 16, 31, 64, 128, 130}) {
        attend_case c;
        c.d = d;
        c.rows = 35;
        c.where = where;
        check_backward(backend, n.text(), n.pattern(), sees(n), c);
      }
    }
  attend_case large;
  large.B = large.H = 1;
  large.rows = 777;
  large.d = 32;
  const numbers n{64, 33, 4};
  check_backward(backend, n.text(), n.pattern(), sees(n), large);
}

TEMPLATE_TEST_CASE("attend backward: rows of padding get and give no gradient", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for (const numbers& n : sparse_patterns()) {
    attend_case c;
    c.B = 4;
    c.rows = 70;
    c.lengths = {70, 33, 1, 0};
    check_backward(backend, n.text(), n.pattern(), sees(n), c);
  }
}

TEMPLATE_TEST_CASE("attend backward is the adjoint of the forward pass in v", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto shape = dims(2, 2, 97, 12);
  const auto v = random_array<T>(shape, 3), dout = random_array<T>(shape, 4);
  const guarded q(ctx, random_array<T>(shape, 1), layout::strided), k(ctx, random_array<T>(shape, 2), layout::strided),
      on_v(ctx, v, layout::strided), on_dout(ctx, dout, layout::strided);
  for (const numbers& n : {numbers{1, 0, 0}, numbers{16, 5, 3}, numbers{0, 8, 4}}) {
    auto out = poisoned<T>(ctx, shape), dq = poisoned<T>(ctx, shape), dk = poisoned<T>(ctx, shape),
         dv = poisoned<T>(ctx, shape);
    auto lse = poisoned<A>(ctx, dims(2, 2, 97));
    attend_forward_args<T> f;
    f.q = q.in(), f.k = k.in(), f.v = on_v.in(), f.out = out.out(), f.lse = lse.out();
    attend_forward(ctx, n.pattern(), f);
    attend_backward_args<T> b;
    b.q = q.in(), b.k = k.in(), b.v = on_v.in(), b.out = out.in(), b.dout = on_dout.in(), b.lse = lse.in();
    b.dq = dq.out(), b.dk = dk.out(), b.dv = dv.out();
    attend_backward(ctx, n.pattern(), b);
    CHECK(std::abs(inner(dout, out.read()) - inner(dv.read(), v)) <=
          TestType::tolerance * std::sqrt(inner(dout, dout) * inner(out.read(), out.read())));
  }
}
