#include "ratplus/ops/embed.hpp"

#include "support/backends.hpp"
#include "support/guarded.hpp"

using namespace ratplus;
using namespace ratplus_tests;

TEMPLATE_TEST_CASE("embed gathers rows, its gradient adds them up", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto check = [&](index_t N, index_t V, index_t d, layout where) {
    CAPTURE(N, V, d, static_cast<int>(where));
    const auto tokens = random_tokens(N, V, 1);
    const auto table = random_array<T>(dims(V, d), 2), dx = random_array<T>(dims(N, d), 3);
    const auto before = random_array<A>(dims(V, d), 4);
    array<T, 2> x(dims(N, d));
    array<double, 2> dtable = before.template to<double>();
    for (index_t n = 0; n < N; ++n)
      for (index_t i = 0; i < d; ++i) {
        x(n, i) = table(tokens(n), i);
        dtable(tokens(n), i) += number(dx(n, i));
      }
    const guarded on_tokens(ctx, tokens);
    const guarded on_table(ctx, table, where), on_dx(ctx, dx, where);
    auto on_x = poisoned<T>(ctx, dims(N, d), where);
    embed_forward(ctx, on_tokens.in(), on_table.in(), on_x.out());
    CHECK(same_bits(on_x.read(), x));
    guarded on_dtable(ctx, before, where);
    embed_backward(ctx, on_tokens.in(), on_dx.in(), on_dtable.out());
    CHECK(difference(on_dtable.read(), dtable) <= tolerance_of<A>);

    // Repeated calls give the same bits: the order of the sum is fixed.
    guarded again(ctx, before, where);
    embed_backward(ctx, on_tokens.in(), on_dx.in(), again.out());
    CHECK(same_bits(again.read(), on_dtable.read()));
  };
  for (const index_t n : awkward_sizes) {
    check(n, 11, 6, layout::strided);
    check(9, n, 5, layout::packed);
    check(20, 61, n, layout::strided);
  }
  check(1000, 3, 33, layout::packed);  // every row hit hundreds of times
  check(4, 5000, 16, layout::packed);  // most rows never
}
