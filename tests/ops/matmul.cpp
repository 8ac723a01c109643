#include "ratplus/ops/matmul.hpp"

#include "support/backends.hpp"
#include "support/guarded.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

// C = op(A) op(B) + addend, in double.
template <class T, class TC>
array<double, 2> product(const array<T, 2>& a, const array<T, 2>& b, const array<TC, 2>* addend, bool transpose_a,
                         bool transpose_b) {
  const index_t M = a.shape[transpose_a ? 1 : 0], K = a.shape[transpose_a ? 0 : 1], N = b.shape[transpose_b ? 0 : 1];
  array<double, 2> c(dims(M, N));
  for (index_t m = 0; m < M; ++m)
    for (index_t n = 0; n < N; ++n) {
      double sum = addend ? number((*addend)(m, n)) : 0.0;
      for (index_t k = 0; k < K; ++k)
        sum += number(transpose_a ? a(k, m) : a(m, k)) * number(transpose_b ? b(n, k) : b(k, n));
      c(m, n) = sum;
    }
  return c;
}

enum class plus { nothing, other, itself };

template <class TC, class Backend>
void check_product(Backend& backend, index_t M, index_t N, index_t K, bool transpose_a, bool transpose_b, plus what,
                   layout where) {
  using T = typename Backend::scalar;
  CAPTURE(M, N, K, transpose_a, transpose_b, static_cast<int>(what), static_cast<int>(where));
  auto& ctx = backend.ctx;
  const auto a = random_array<T>(transpose_a ? dims(K, M) : dims(M, K), 1);
  const auto b = random_array<T>(transpose_b ? dims(N, K) : dims(K, N), 2);
  const auto addend = random_array<TC>(dims(M, N), 3);
  const guarded on_a(ctx, a, where), on_b(ctx, b, where);
  const guarded on_addend(ctx, addend, where);
  auto c = what == plus::itself ? guarded(ctx, addend, where) : poisoned<TC>(ctx, dims(M, N), where);
  matmul_args<T, TC> args{on_a.in(), on_b.in(), c.out(), {}, transpose_a, transpose_b};
  if (what == plus::other) args.addend = on_addend.in();
  if (what == plus::itself) args.addend = c.in();
  matmul(ctx, args);
  CHECK(difference(c.read(), product(a, b, what == plus::nothing ? nullptr : &addend, transpose_a, transpose_b)) <=
        tolerance_of<TC>);
}

}  // namespace

TEMPLATE_TEST_CASE("matmul: every size, transposition and addend", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const bool transpose_a : {false, true})
    for (const bool transpose_b : {false, true}) {
      for (const index_t n : awkward_sizes) {
        check_product<T>(backend, n, 17, 33, transpose_a, transpose_b, plus::nothing, layout::strided);
        check_product<T>(backend, 13, n, 16, transpose_a, transpose_b, plus::other, layout::packed);
        check_product<T>(backend, 31, 5, n, transpose_a, transpose_b, plus::itself, layout::strided);
      }
      for (const plus what : {plus::nothing, plus::other, plus::itself})
        for (const layout where : {layout::packed, layout::strided})
          check_product<T>(backend, 65, 63, 127, transpose_a, transpose_b, what, where);
    }
  check_product<T>(backend, 1, 1, 1, false, false, plus::nothing, layout::packed);
}

TEMPLATE_TEST_CASE("matmul: a few rows by rows, as in decoding, and a batch of rows", "", RATPLUS_TEST_TUNED_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const index_t M : {1, 2, 3, 4, 5})
    for (const index_t K : {8, 200, 2048, 2056, 4104})
      for (const plus what : {plus::nothing, plus::itself})
        check_product<T>(backend, M, 19, K, false, true, what, layout::packed);
  check_product<T>(backend, 8, 2501, 256, false, true, plus::other, layout::packed);
  check_product<T>(backend, 7, 40, 8192, false, true, plus::nothing, layout::packed);
  for (const index_t M : {9, 16, 17, 33, 63, 64, 65})
    for (const auto& [N, K] : {std::pair<index_t, index_t>{130, 72}, {18, 1000}, {330, 264}, {257, 64}, {2048, 136}})
      for (const plus what : {plus::nothing, plus::itself})
        check_product<T>(backend, M, N, K, false, true, what, layout::packed);
  check_product<T>(backend, 64, 1024, 520, false, true, plus::other, layout::strided);
}

TEMPLATE_TEST_CASE("matmul: an empty sum is zero, or the addend", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  auto& ctx = backend.ctx;
  const guarded a(ctx, array<T, 2>(dims(5, 0))), b(ctx, array<T, 2>(dims(0, 7)));
  auto c = poisoned<T>(ctx, dims(5, 7), layout::strided);
  matmul(ctx, matmul_args<T, T>{a.in(), b.in(), c.out(), {}});
  CHECK(same_bits(c.read(), array<T, 2>(dims(5, 7))));
  const auto addend = random_array<T>(dims(5, 7), 1);
  const guarded on_addend(ctx, addend);
  matmul(ctx, matmul_args<T, T>{a.in(), b.in(), c.out(), on_addend.in()});
  CHECK(same_bits(c.read(), addend));

  auto none = poisoned<T>(ctx, dims(0, 7));
  const guarded no_rows(ctx, array<T, 2>(dims(0, 3))), three(ctx, random_array<T>(dims(3, 7), 2));
  CHECK_NOTHROW(matmul(ctx, matmul_args<T, T>{no_rows.in(), three.in(), none.out(), {}}));
}

TEMPLATE_TEST_CASE("matmul: the result may be wider than the data", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  using TC = accumulator_t<T>;
  for (const plus what : {plus::nothing, plus::other, plus::itself}) {
    check_product<TC>(backend, 33, 65, 40, true, false, what, layout::strided);  // a weight's gradient
    check_product<TC>(backend, 33, 65, 40, false, true, what, layout::strided);  // added to the residual stream
    check_product<TC>(backend, 1, 64, 128, false, true, what, layout::packed);   // the same, decoding
    check_product<TC>(backend, 33, 514, 648, false, true, what, layout::packed);
  }
}

TEMPLATE_TEST_CASE("matmul: transposition is the adjoint", "", RATPLUS_TEST_BACKENDS) {
  // <dC, A B> = <dC Bᵀ, A> = <Aᵀ dC, B>
  using T = typename TestType::scalar;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto a = random_array<T>(dims(37, 29), 1), b = random_array<T>(dims(29, 41), 2),
             dc = random_array<T>(dims(37, 41), 3);
  const guarded on_a(ctx, a), on_b(ctx, b), on_dc(ctx, dc);
  auto c = poisoned<T>(ctx, dims(37, 41)), da = poisoned<T>(ctx, a.shape), db = poisoned<T>(ctx, b.shape);
  matmul(ctx, matmul_args<T, T>{on_a.in(), on_b.in(), c.out(), {}});
  matmul(ctx, matmul_args<T, T>{on_dc.in(), on_b.in(), da.out(), {}, false, true});
  matmul(ctx, matmul_args<T, T>{on_a.in(), on_dc.in(), db.out(), {}, true, false});
  const double size = std::sqrt(inner(dc, dc) * inner(c.read(), c.read()));
  CHECK(std::abs(inner(dc, c.read()) - inner(da.read(), a)) / size <= TestType::tolerance);
  CHECK(std::abs(inner(dc, c.read()) - inner(db.read(), b)) / size <= TestType::tolerance);
}
