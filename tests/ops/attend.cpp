// Attention forward against dense attention over the gathered keys of each query.

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
  std::vector<token_t> lengths = {};  // none: every row is in use
};

template <class Backend, class P>
void check_attend(Backend& backend, const std::string& name, const P& pattern, const predicate& visible,
                  const attend_case& c) {
  using T = typename Backend::scalar;
  using A = accumulator_t<T>;
  CAPTURE(name, c.B, c.H, c.rows, c.d, static_cast<int>(c.where), c.lengths);
  auto& ctx = backend.ctx;
  const auto shape = dims(c.B, c.H, c.rows, c.d);
  auto q = random_array<T>(shape, 1), k = random_array<T>(shape, 2), v = random_array<T>(shape, 3);
  const auto expected = oracle::attention(q, k, v, visible, c.lengths);
  if (!c.lengths.empty())  // what stands in the rows of padding must not matter
    for (auto* x : {&q, &k, &v})
      for_each_index(shape, [&](const extents<4>& at) {
        if (at[2] >= c.lengths[static_cast<std::size_t>(at[0])]) (*x)(at[0], at[1], at[2], at[3]) = poison<T>();
      });
  const guarded on_q(ctx, q, c.where), on_k(ctx, k, c.where), on_v(ctx, v, c.where);
  const guarded lengths(ctx, tokens_of(c.lengths));
  auto out = poisoned<T>(ctx, shape, c.where);
  auto lse = poisoned<A>(ctx, dims(c.B, c.H, c.rows), c.where);
  attend_forward_args<T> args;
  args.q = on_q.in(), args.k = on_k.in(), args.v = on_v.in(), args.out = out.out(), args.lse = lse.out();
  if (!c.lengths.empty()) args.spans.length = lengths.in();
  attend_forward(ctx, pattern, args);
  CHECK(difference(out.read(), expected.out) <= Backend::tolerance);
  CHECK(difference(lse.read(), expected.lse) <= tolerance_of<A>);

  auto again = poisoned<T>(ctx, shape, c.where);
  args.out = again.out();
  args.lse = {};  // not wanted
  attend_forward(ctx, pattern, args);
  CHECK(same_bits(again.read(), out.read()));
}

}  // namespace

TEMPLATE_TEST_CASE("attend: every sparse pattern", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for (const numbers& n : sparse_patterns())
    for (const index_t rows : {37, 130}) {
      attend_case c;
      c.rows = rows;
      check_attend(backend, n.text(), n.pattern(), sees(n), c);
    }
}

TEMPLATE_TEST_CASE("attend: pattern types, hybrids and a user's own pattern", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for_each_static_pattern(4, [&](const char* name, const auto& pattern, const predicate& visible) {
    for (const index_t rows : {1, 50, 129}) {
      attend_case c;
      c.H = 4;
      c.rows = rows;
      c.d = 16;
      check_attend(backend, name, pattern, visible, c);
    }
  });
}

TEMPLATE_TEST_CASE("attend: hybrids of heads at run time", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  const std::vector<numbers> groups{{1, 0, 0}, {4, 3, 1}, {0, 7, 0}};
  attend_case c;
  c.H = 6;
  c.rows = 70;
  check_attend(backend, "three groups", by_groups(groups), sees(groups, 6), c);
  c.H = 3;
  c.B = 1;
  c.where = layout::packed;
  check_attend(backend, "three groups", by_groups(groups), sees(groups, 3), c);
  const any_by_head all(dilated<4>{});
  check_attend(backend, "one group", all, sees(numbers{4, 0, 0}), c);
}

TEMPLATE_TEST_CASE("attend: every length and head size", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for (const numbers& n : {numbers{1, 0, 0}, numbers{16, 9, 2}, numbers{0, 20, 3}})
    for (const layout where : {layout::packed, layout::strided}) {
      for (const index_t rows : awkward_sizes) {
        attend_case c;
        c.rows = rows;
        c.where = where;
        check_attend(backend, n.text(), n.pattern(), sees(n), c);
      }
      for (const index_t d : {1, 2, 5, 16, 31, 64, 128, 130}) {
        attend_case c;
        c.d = d;
        c.rows = 35;
        c.where = where;
        check_attend(backend, n.text(), n.pattern(), sees(n), c);
      }
    }
  attend_case large;
  large.B = large.H = 1;
  large.rows = 777;
  large.d = 32;
  const numbers n{64, 33, 4};
  check_attend(backend, n.text(), n.pattern(), sees(n), large);
}

TEMPLATE_TEST_CASE("attend: rows of padding are zero and harmless", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for (const numbers& n : sparse_patterns()) {
    attend_case c;
    c.B = 4;
    c.rows = 70;
    c.lengths = {70, 33, 1, 0};
    check_attend(backend, n.text(), n.pattern(), sees(n), c);
  }
}

TEMPLATE_TEST_CASE("attend: scores far apart neither overflow nor vanish", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  if (std::is_same_v<typename TestType::scalar, bfloat16>) return;  // their scores differ by rounding alone
  using T = typename TestType::scalar;
  auto& ctx = backend.ctx;
  // Scores in the thousands, with e^score beyond any float: they amplify rounding, so products and sums are exact here
  // and the bound is what a relative error of float32 in the score makes.
  const auto shape = dims(1, 1, 40, 4);
  array<T, 4> q(shape), k(shape);
  random_source source(9);
  for (T& x : q.data) x = rounded<T>(static_cast<double>(256 * (source.below(9) - 4)));
  for (T& x : k.data) x = rounded<T>(static_cast<double>(source.below(9) - 4));
  const auto v = random_array<T>(shape, 3);
  const guarded on_q(ctx, q), on_k(ctx, k), on_v(ctx, v);
  for (const numbers& n : {numbers{1, 0, 0}, numbers{8, 5, 2}}) {
    auto out = poisoned<T>(ctx, shape);
    attend_forward_args<T> args;
    args.q = on_q.in(), args.k = on_k.in(), args.v = on_v.in(), args.out = out.out();
    attend_forward(ctx, n.pattern(), args);
    CHECK(difference(out.read(), oracle::attention(q, k, v, sees(n)).out) <=
          (std::is_same_v<T, double> ? 1e-12 : 5e-4));
  }
}

TEMPLATE_TEST_CASE("attend: a query alone returns its own value", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto v = random_array<T>(dims(2, 3, 20, 8), 3);
  const guarded on_q(ctx, random_array<T>(v.shape, 1)), on_k(ctx, random_array<T>(v.shape, 2)), on_v(ctx, v);
  auto out = poisoned<T>(ctx, v.shape);
  attend_forward_args<T> args;
  args.q = on_q.in(), args.k = on_k.in(), args.v = on_v.in(), args.out = out.out();
  attend_forward(ctx, local<0>{}, args);
  CHECK(difference(out.read(), v) <= 1e-7);
}

TEMPLATE_TEST_CASE("attend: a key that no query of a tile sees is not read", "", RATPLUS_TEST_BACKENDS) {
  // Such keys and values are NaN: any use of them, even with weight zero, would show. Tiles of up to 192 queries.
  using T = typename TestType::scalar;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto n = GENERATE(numbers{16, 3, 2}, numbers{0, 20, 3});
  const index_t rows = 400, poisoned_below = 100, checked_from = 256;
  const auto shape = dims(1, 2, rows, 8);
  auto q = random_array<T>(shape, 1), k = random_array<T>(shape, 2), v = random_array<T>(shape, 3);
  auto expected = oracle::attention(q, k, v, sees(n)).out;
  for (index_t h = 0; h < 2; ++h)
    for (index_t s = 0; s < poisoned_below; ++s)
      for (index_t i = 0; i < 8 && !n.sees(rows - 1, s); ++i) k(0, h, s, i) = v(0, h, s, i) = poison<T>();
  const guarded on_q(ctx, q, layout::strided), on_k(ctx, k, layout::strided), on_v(ctx, v, layout::strided);
  auto out = poisoned<T>(ctx, shape);
  attend_forward_args<T> args;
  args.q = on_q.in(), args.k = on_k.in(), args.v = on_v.in(), args.out = out.out();
  attend_forward(ctx, n.pattern(), args);
  auto got = out.read();
  for_each_index(shape, [&](const extents<4>& at) {
    if (at[2] < checked_from) got(at[0], at[1], at[2], at[3]) = rounded<T>(expected(at[0], at[1], at[2], at[3]) = 0);
  });
  CHECK(difference(got, expected) <= TestType::tolerance);
}
