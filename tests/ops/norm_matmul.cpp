// What a layer begins with is norm, product and activation one after the other, whatever way a backend does it.

#include "ratplus/ops/norm_matmul.hpp"

#include "support/backends.hpp"
#include "support/guarded.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

template <class TC, class Backend>
void check_layer(Backend& backend, index_t M, index_t N, index_t K, bool activate, layout where) {
  using T = typename Backend::scalar;
  using A = accumulator_t<T>;
  CAPTURE(M, N, K, activate, static_cast<int>(where));
  auto& ctx = backend.ctx;
  using Ctx = std::remove_reference_t<decltype(ctx)>;
  const guarded x(ctx, random_array<A>(dims(M, K), 1, 3), where);
  const guarded norm(ctx, random_array<A>(dims(K), 2));
  const guarded b(ctx, random_array<T>(dims(N, K), 3), where);
  auto scratch = poisoned<T>(ctx, dims(M, K)), normed = poisoned<T>(ctx, dims(M, K));
  auto rstd = poisoned<A>(ctx, dims(M)), rstd_apart = poisoned<A>(ctx, dims(M));
  auto c = poisoned<TC>(ctx, dims(M, N), where), c_apart = poisoned<TC>(ctx, dims(M, N));
  auto activated = poisoned<T>(ctx, dims(M, N)), activated_apart = poisoned<T>(ctx, dims(M, N));
  norm_matmul_args<T, TC> p{
      .x = x.in(), .norm = norm.in(), .b = b.in(), .normed = scratch.out(), .rstd = rstd.out(), .c = c.out()};
  if (activate) p.activated = activated.out();
  norm_matmul(ctx, p);

  rms_norm_forward(ctx, rms_norm_forward_args<T>{x.in(), norm.in(), normed.out(), rstd_apart.out()});
  matmul(ctx, matmul_args<T, TC>{.a = normed.in(), .b = b.in(), .c = c_apart.out(), .transpose_b = true});
  CHECK(difference(rstd.read(), rstd_apart.read()) <= tolerance_of<A>);
  CHECK(difference(c.read(), c_apart.read()) <= tolerance_of<TC>);
  if constexpr (std::same_as<T, TC>)
    if (activate) {
      gelu_forward<Ctx, T>(ctx, c_apart.in(), activated_apart.out());
      CHECK(difference(activated.read(), activated_apart.read()) <= Backend::tolerance);
    }
}

}  // namespace

TEMPLATE_TEST_CASE("norm_matmul: is its operations one after the other", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const bool activate : {false, true})
    for (const layout where : {layout::packed, layout::strided})
      for (const index_t M : {1, 3, 8, 9})
        for (const index_t K : {40, 256, 768}) check_layer<T>(backend, M, 83, K, activate, where);
  check_layer<accumulator_t<T>>(backend, 1, 300, 512, false, layout::packed);
}

TEMPLATE_TEST_CASE("norm_matmul: a batch of rows, and wide layers", "", RATPLUS_TEST_TUNED_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const bool activate : {false, true})
    for (const index_t M : {16, 17, 33, 63, 64, 65}) {
      check_layer<T>(backend, M, 84, 200, activate, layout::packed);
      check_layer<T>(backend, M, 1026, 264, activate, layout::strided);
    }
  check_layer<T>(backend, 2, 2300, 2048, true, layout::packed);
}
