// A user's own recurrence cell, not affine in its state, and a user's own kind of pattern, in a .cu: the same types as
// on the host, against the reference backend.

#include "ratplus/backend/cuda/attend.cuh"
#include "ratplus/backend/cuda/memory.cuh"
#include "ratplus/backend/cuda/scan.cuh"
#include "ratplus/backend/reference/backend.hpp"
#include "support/catch.hpp"
#include "support/guarded.hpp"

using namespace ratplus;
using namespace ratplus_tests;

// Not in an anonymous namespace: kernels are instantiated with these types.
namespace own {

/// h + s (x − h³ / 10), s = sigmoid(g).
struct damped {
  static constexpr bool gated = true;
  template <class S>
  RATPLUS_HD S step(S h, S x, S g, index_t) const {
    return h + sigmoid(g) * (x - S(0.1f) * h * h * h);
  }
  template <class S>
  RATPLUS_HD cell_gradient<S> adjoint(S h, S x, S g, index_t, S dh) const {
    const S s = sigmoid(g);
    return {dh * (S(1) - s * S(0.3f) * h * h), s * dh, (x - S(0.1f) * h * h * h) * s * (S(1) - s) * dh};
  }
};
static_assert(Cell<damped> && !AssociativeCell<damped>);

/// Every third key from the first on, and the query's own.
struct thirds {
  RATPLUS_HD constexpr bool sees(index_t q, index_t k) const { return k <= q && (k % 3 == 0 || k == q); }
  RATPLUS_HD constexpr key_runs keys(index_t q) const { return {{{0, q, 3}, {q, q + 1, 1}, {0, 0, 1}}}; }
  RATPLUS_HD constexpr index_t last_query(index_t k, index_t T) const { return k % 3 == 0 ? T - 1 : k; }
};
static_assert(consistent(thirds{}, 20));

template <class Ctx>
std::vector<array<float, 4>> scan_both_ways(index_t T) {
  Ctx ctx;
  const auto shape = dims(2, 3, T, 6);
  const auto in = [&](int seed) { return guarded(ctx, random_array<float>(shape, seed), layout::strided); };
  const auto out = [&] { return poisoned<float>(ctx, shape); };
  const auto k = in(1), v = in(2), gate = in(3), dk_out = in(4), dv_out = in(5);
  auto k_out = out(), v_out = out(), dk = out(), dv = out(), dgate = out();
  scan_forward_args<float> f;
  f.k = k.in(), f.v = v.in(), f.gate = gate.in(), f.k_out = k_out.out(), f.v_out = v_out.out();
  scan_forward(ctx, damped{}, f);
  scan_backward_args<float> b;
  b.k = k.in(), b.v = v.in(), b.gate = gate.in(), b.k_out = k_out.in(), b.v_out = v_out.in();
  b.dk_out = dk_out.in(), b.dv_out = dv_out.in(), b.dk = dk.out(), b.dv = dv.out(), b.dgate = dgate.out();
  scan_backward(ctx, damped{}, b);
  return {k_out.read(), v_out.read(), dk.read(), dv.read(), dgate.read()};
}

template <class Ctx, class P>
array<float, 4> attended(const P& pattern, index_t T) {
  Ctx ctx;
  const auto shape = dims(2, 4, T, 16);
  const auto in = [&](int seed) { return guarded(ctx, random_array<float>(shape, seed), layout::strided); };
  const auto q = in(1), k = in(2), v = in(3);
  auto out = poisoned<float>(ctx, shape);
  attend_forward_args<float> p;
  p.q = q.in(), p.k = k.in(), p.v = v.in(), p.out = out.out();
  attend_forward(ctx, pattern, p);
  return out.read();
}

}  // namespace own

TEST_CASE("a cell of one's own scans on the device") {
  for (const index_t T : {1, 17, 100}) {
    const auto got = own::scan_both_ways<ratplus::cuda::context>(T);
    const auto expected = own::scan_both_ways<reference::context>(T);
    for (std::size_t i = 0; i < got.size(); ++i) {
      CAPTURE(T, i);
      CHECK(difference(got[i], expected[i]) <= 2e-6);
    }
  }
}

TEST_CASE("a pattern of one's own attends on the device, alone and beside others") {
  for (const index_t T : {1, 17, 100}) {
    CAPTURE(T);
    const own::thirds alone;
    CHECK(difference(own::attended<ratplus::cuda::context>(alone, T), own::attended<reference::context>(alone, T)) <=
          2e-6);
    // One of the library's, too: this program is built for every architecture.
    const sparse<4, 2> plain;
    CHECK(difference(own::attended<ratplus::cuda::context>(plain, T), own::attended<reference::context>(plain, T)) <=
          2e-6);
    const by_head<own::thirds, sparse<4, 2>> beside{};
    CHECK(difference(own::attended<ratplus::cuda::context>(beside, T), own::attended<reference::context>(beside, T)) <=
          2e-6);
  }
}
