#include "ratplus/ops/rope.hpp"

#include "ratplus/ops/scan.hpp"
#include "ratplus/recurrence/none.hpp"
#include "support/backends.hpp"
#include "support/guarded.hpp"
#include "support/oracles.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

template <class Ctx, class S>
array<S, 2> on_host(Ctx& ctx, const tensor<S, 2, typename Ctx::space>& table) {
  array<S, 2> a(table.shape());
  download(ctx, table.as(table.size()), a.data.data());
  return a;
}

}  // namespace

TEMPLATE_TEST_CASE("the rope table holds cosines, then sines, exact far out", "", RATPLUS_TEST_BACKENDS) {
  using A = accumulator_t<typename TestType::scalar>;
  TestType backend;
  const index_t positions = 262144, d = 6;
  const auto table = on_host(backend.ctx, make_rope_table<A>(backend.ctx, positions, d, 10000.0));
  for (const index_t p : {index_t{0}, index_t{1}, index_t{4095}, positions - 1}) {
    array<double, 1> got(dims(d)), expected(dims(d));
    for (index_t i = 0; i < d / 2; ++i) {
      const long double angle =
          static_cast<long double>(p) / std::pow(10000.0L, 2.0L * static_cast<long double>(i) / d);
      expected(i) = static_cast<double>(std::cos(angle));
      expected(d / 2 + i) = static_cast<double>(std::sin(angle));
    }
    for (index_t i = 0; i < d; ++i) got(i) = number(table(p, i));
    CHECK(difference(got, expected) <= (std::is_same_v<A, double> ? 1e-10 : 1e-7));
  }
  CHECK_THROWS_WITH(make_rope_table<A>(backend.ctx, 4, 7, 10000.0), contains("rope: head size 7 is odd"));
}

TEMPLATE_TEST_CASE("rotation alone: q through a scan without other streams", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto check = [&](index_t B, index_t H, index_t rows, index_t d, layout where, double base) {
    CAPTURE(B, H, rows, d, static_cast<int>(where), base);
    const auto q = random_array<T>(dims(B, H, rows, d), 1), dq = random_array<T>(dims(B, H, rows, d), 2);
    const auto table = make_rope_table<A>(ctx, rows + 9, d, base);
    std::vector<token_t> first;
    for (index_t b = 0; b < B; ++b) first.push_back(static_cast<token_t>(b * 4));
    const guarded on_first(ctx, tokens_of(first));
    for (const bool positioned : {false, true}) {
      if (!positioned) first.assign(first.size(), 0);
      guarded on_q(ctx, q, where);
      auto out = poisoned<T>(ctx, q.shape, where);
      scan_forward_args<T> args;
      args.q = on_q.in();
      args.q_out = out.out();
      args.rope = table.view();
      if (positioned) args.spans.first = on_first.in();
      scan_forward(ctx, none{}, args);
      if (positioned)
        for (index_t b = 0; b < B; ++b) first[static_cast<std::size_t>(b)] = static_cast<token_t>(b * 4);
      CHECK(difference(out.read(), oracle::rope(q.template to<double>(), base, first)) <= TestType::tolerance);
      args.q_out = on_q.out();  // in place
      scan_forward(ctx, none{}, args);
      CHECK(same_bits(on_q.read(), out.read()));

      // The gradient is the rotation back, which is the adjoint: <dq', R q> = <Rᵀ dq', q>.
      const guarded on_dq(ctx, dq, where);
      auto back = poisoned<T>(ctx, q.shape, where);
      scan_backward_args<T> backward;
      backward.dq_out = on_dq.in();
      backward.dq = back.out();
      backward.rope = table.view();
      if (positioned) backward.spans.first = on_first.in();
      scan_backward(ctx, none{}, backward);
      const double scale = std::sqrt(inner(q, q) * inner(dq, dq));
      CHECK(std::abs(inner(dq, out.read()) - inner(back.read(), q)) <= TestType::tolerance * scale);
      CHECK(difference(inner(back.read(), back.read()), inner(dq, dq)) <= TestType::tolerance);
    }
  };
  for (const index_t n : awkward_sizes) check(2, 3, n, 8, layout::strided, 10000);
  for (const index_t d : {2, 6, 16, 64, 128}) check(2, 2, 17, d, layout::strided, 10000);
  check(1, 1, 65, 64, layout::packed, 500000);
}
