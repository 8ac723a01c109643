// A cell of a user's own, not affine, through the scan: forward against the loop, gradients of a whole sequence against
// finite differences, with a carried state and RoPE.

#include <cmath>
#include <vector>

#include "ratplus/backend/reference/scan.hpp"
#include "support/array.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

using namespace ratplus;
using ratplus_tests::array;
using ratplus_tests::difference;
using ratplus_tests::for_each_index;
using ratplus_tests::inner;
using ratplus_tests::random_array;

namespace {

/// h_t = s(z) with z = γ h_{t−1} + (1 − γ) x and s(z) = z sigmoid(z); every third position is skipped.
struct soft_rectified {
  static constexpr bool gated = true;

  template <class S>
  S step(S h, S x, S g, index_t t) const {
    if (t % 3 == 2) return h;
    const S gamma = sigmoid(g), z = gamma * h + (S(1) - gamma) * x;
    return z * sigmoid(z);
  }
  template <class S>
  cell_gradient<S> adjoint(S h, S x, S g, index_t t, S dh) const {
    if (t % 3 == 2) return {dh, S(0), S(0)};
    const S gamma = sigmoid(g), z = gamma * h + (S(1) - gamma) * x, s = sigmoid(z);
    const S dz = dh * s * (S(1) + z * (S(1) - s));
    return {gamma * dz, (S(1) - gamma) * dz, (h - x) * gamma * (S(1) - gamma) * dz};
  }
};

constexpr index_t B = 2, H = 2, T = 7, d = 4;
constexpr extents<4> shape{{B, H, T, d}};
constexpr extents<3> state{{B, H, d}};

template <class T, int R>
view<T, R> of(array<T, R>& a) {
  return {a.data.data(), a.shape};
}
template <class T, int R>
view<const T, R> of(const array<T, R>& a) {
  return {a.data.data(), a.shape};
}

struct sequence {
  array<double, 4> k = random_array<double>(shape, 1), v = random_array<double>(shape, 2);
  array<double, 4> gate = random_array<double>(shape, 3);
  array<double, 3> k_first = random_array<double>(state, 4), v_first = random_array<double>(state, 5);
};
struct outputs {
  array<double, 4> k{shape}, v{shape};
  array<double, 3> k_last{state}, v_last{state};
};

outputs forward(const sequence& in, const view<const double, 2>& rope) {
  outputs out;
  scan_forward_args<double> p;
  p.k = of(in.k);
  p.v = of(in.v);
  p.gate = of(in.gate);
  p.k_first = of(in.k_first);
  p.v_first = of(in.v_first);
  p.rope = rope;
  p.k_out = of(out.k);
  p.v_out = of(out.v);
  p.k_last = of(out.k_last);
  p.v_last = of(out.v_last);
  reference::context ctx;
  scan_forward(ctx, soft_rectified{}, p);
  return out;
}

/// cos | sin of the angles, written out from SPEC §1.
array<double, 2> rope_table() {
  array<double, 2> table(extents<2>{{T, d}});
  for (index_t t = 0; t < T; ++t)
    for (index_t i = 0; i < d / 2; ++i) {
      const double angle =
          static_cast<double>(t) / std::pow(100.0, 2 * static_cast<double>(i) / static_cast<double>(d));
      table(t, i) = std::cos(angle);
      table(t, d / 2 + i) = std::sin(angle);
    }
  return table;
}

}  // namespace

TEST_CASE("the scan of a cell of one's own is the loop of its steps") {
  const sequence in;
  const outputs got = forward(in, {});
  outputs expected;
  for_each_index(state, [&](const extents<3>& at) {
    double k = in.k_first(at[0], at[1], at[2]), v = in.v_first(at[0], at[1], at[2]);
    for (index_t t = 0; t < T; ++t) {
      const double g = in.gate(at[0], at[1], t, at[2]);
      k = soft_rectified{}.step(k, in.k(at[0], at[1], t, at[2]), g, t);
      v = soft_rectified{}.step(v, in.v(at[0], at[1], t, at[2]), g, t);
      expected.k(at[0], at[1], t, at[2]) = k;
      expected.v(at[0], at[1], t, at[2]) = v;
    }
    expected.k_last(at[0], at[1], at[2]) = k;
    expected.v_last(at[0], at[1], at[2]) = v;
  });
  CHECK(difference(got.k, expected.k) <= 0);
  CHECK(difference(got.v, expected.v) <= 0);
  CHECK(difference(got.k_last, expected.k_last) <= 0);
  CHECK(difference(got.v_last, expected.v_last) <= 0);
}

TEST_CASE("gradients through the scan of a cell of one's own are finite differences") {
  const sequence in;
  const array<double, 2> table = rope_table();
  const outputs out = forward(in, of(table));
  const auto dk = random_array<double>(shape, 11), dv = random_array<double>(shape, 12);
  const auto dk_last = random_array<double>(state, 13), dv_last = random_array<double>(state, 14);

  sequence gradient;
  scan_backward_args<double> p;
  p.k = of(in.k);
  p.v = of(in.v);
  p.gate = of(in.gate);
  p.k_out = of(out.k);
  p.v_out = of(out.v);
  p.k_first = of(in.k_first);
  p.v_first = of(in.v_first);
  p.rope = of(table);
  p.dk_out = of(dk);
  p.dv_out = of(dv);
  p.dk_last = of(dk_last);
  p.dv_last = of(dv_last);
  p.dk = of(gradient.k);
  p.dv = of(gradient.v);
  p.dgate = of(gradient.gate);
  p.dk_first = of(gradient.k_first);
  p.dv_first = of(gradient.v_first);
  reference::context ctx;
  scan_backward(ctx, soft_rectified{}, p);

  const auto loss = [&](const sequence& at) {
    const outputs o = forward(at, of(table));
    return inner(o.k, dk) + inner(o.v, dv) + inner(o.k_last, dk_last) + inner(o.v_last, dv_last);
  };
  const auto check = [&](auto member) {
    auto numeric = in.*member;
    const double e = 1e-6;
    for (std::size_t i = 0; i < numeric.data.size(); ++i) {
      sequence above = in, below = in;
      (above.*member).data[i] += e;
      (below.*member).data[i] -= e;
      numeric.data[i] = (loss(above) - loss(below)) / (2 * e);
    }
    CHECK(difference(gradient.*member, numeric) <= 1e-8);
  };
  check(&sequence::k);
  check(&sequence::v);
  check(&sequence::gate);
  check(&sequence::k_first);
  check(&sequence::v_first);
}
