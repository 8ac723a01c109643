// The operations of the reference cases.

#include "support/golden.hpp"
#include "ratplus/ops/attend.hpp"
#include "ratplus/ops/rope.hpp"
#include "ratplus/ops/scan.hpp"
#include "ratplus/pattern/parse.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "ratplus/recurrence/none.hpp"
#include "support/backends.hpp"
#include "support/guarded.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

// The stored values are float32: that is all that agreement in double can mean.
template <class T>
inline constexpr double golden_tolerance = std::is_same_v<T, bfloat16> ? 5e-3 : 2e-6;

const std::vector<std::string> sets{"golden", "golden-attention"};

// (B, T, C) as one head.
template <class T>
array<T, 4> one_head(const array<T, 3>& a) {
  return a.as(dims(a.shape[0], 1, a.shape[1], a.shape[2]));
}

}  // namespace

TEMPLATE_TEST_CASE("golden scan, its state from an initial one, and its gradients", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  const basic_gated_average<given_gate> cell;
  for (const std::string& set : sets) {
    const auto file = golden("ops", set);
    const auto tensor3 = [&](const std::string& name) { return one_head(golden_array<T, 3>(file, "scan/" + name)); };
    const guarded x(ctx, tensor3("input"), layout::strided), gate(ctx, tensor3("gate"), layout::strided),
        dh(ctx, tensor3("grad_state"), layout::strided);
    const auto shape = x.in().shape();
    const auto initial = golden_array<A, 2>(file, "scan/initial").as(dims(shape[0], 1, shape[3]));
    const guarded first(ctx, initial);
    for (const bool from_initial : {false, true}) {
      auto h = poisoned<T>(ctx, shape);
      scan_forward_args<T> f;
      f.k = x.in(), f.gate = gate.in(), f.k_out = h.out();
      if (from_initial) f.k_first = first.in();
      scan_forward(ctx, cell, f);
      const auto expected = tensor3(from_initial ? "state_from_initial" : "state");
      CHECK(difference(h.read(), expected) <= golden_tolerance<T>);
      if (from_initial) continue;
      auto dx = poisoned<T>(ctx, shape), dgate = poisoned<T>(ctx, shape);
      scan_backward_args<T> b;
      b.k = x.in(), b.gate = gate.in(), b.k_out = h.in(), b.dk_out = dh.in(), b.dk = dx.out(), b.dgate = dgate.out();
      scan_backward(ctx, cell, b);
      CHECK(difference(dx.read(), tensor3("grad_input")) <= golden_tolerance<T>);
      CHECK(difference(dgate.read(), tensor3("grad_gate")) <= golden_tolerance<T>);
    }
  }
}

TEMPLATE_TEST_CASE("golden rope", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  for (const std::string& set : sets) {
    const auto file = golden("ops", set);
    const guarded q(ctx, golden_array<T, 4>(file, "attention/q"), layout::strided);
    auto out = poisoned<T>(ctx, q.in().shape());
    const auto table = make_rope_table<A>(ctx, q.in().extent(2), q.in().extent(3), 10000.0);
    scan_forward_args<T> args;
    args.q = q.in(), args.q_out = out.out(), args.rope = table.view();
    scan_forward(ctx, none{}, args);
    CHECK(difference(out.read(), golden_array<float, 4>(file, "rope/q_rotated")) <= golden_tolerance<T>);
  }
}

TEMPLATE_TEST_CASE("golden attention, its log-sum-exp and its gradients under every pattern", "",
                   RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  std::size_t patterns = 0;
  for (const std::string& set : sets) {
    const auto file = golden("ops", set);
    const auto stored = [&](const std::string& name) { return golden_array<T, 4>(file, "attention/" + name); };
    const guarded q(ctx, stored("q"), layout::strided), k(ctx, stored("k"), layout::strided),
        v(ctx, stored("v"), layout::strided), dout(ctx, stored("grad_out"), layout::strided);
    const auto shape = q.in().shape();
    for (const std::string& text : golden_names(file, "attention/", "/out")) {
      CAPTURE(set, text);
      ++patterns;
      const any_by_head pattern = parse_schedule(text).layer(0);
      auto out = poisoned<T>(ctx, shape, layout::strided), dq = poisoned<T>(ctx, shape), dk = poisoned<T>(ctx, shape),
           dv = poisoned<T>(ctx, shape);
      auto lse = poisoned<A>(ctx, dims(shape[0], shape[1], shape[2]));
      attend_forward_args<T> f;
      f.q = q.in(), f.k = k.in(), f.v = v.in(), f.out = out.out(), f.lse = lse.out();
      attend_forward(ctx, pattern, f);
      attend_backward_args<T> b;
      b.q = q.in(), b.k = k.in(), b.v = v.in(), b.out = out.in(), b.dout = dout.in(), b.lse = lse.in();
      b.dq = dq.out(), b.dk = dk.out(), b.dv = dv.out();
      attend_backward(ctx, pattern, b);
      const std::string here = "attention/" + text;
      CHECK(difference(out.read(), golden_array<float, 4>(file, here + "/out")) <= golden_tolerance<T>);
      CHECK(difference(lse.read(), golden_array<float, 3>(file, here + "/lse")) <= golden_tolerance<T>);
      CHECK(difference(dq.read(), golden_array<float, 4>(file, here + "/grad_q")) <= golden_tolerance<T>);
      CHECK(difference(dk.read(), golden_array<float, 4>(file, here + "/grad_k")) <= golden_tolerance<T>);
      CHECK(difference(dv.read(), golden_array<float, 4>(file, here + "/grad_v")) <= golden_tolerance<T>);
    }
  }
  CHECK(patterns == 8);
}
