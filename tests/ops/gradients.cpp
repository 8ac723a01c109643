// Finite differences in double through every differentiable operation of the reference backend: the gradient of
// Σ c ⊙ output, element by element, against central differences.

#include <functional>

#include "ratplus/backend/reference/backend.hpp"
#include "ratplus/ops/rope.hpp"
#include "ratplus/recurrence/chunked.hpp"
#include "ratplus/recurrence/none.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/patterns.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

template <int R>
view<double, R> of(array<double, R>& a) {
  return {a.data.data(), a.shape};
}
template <int R>
view<const double, R> in(const array<double, R>& a) {
  return {a.data.data(), a.shape};
}

// `gradient` against the slopes of `value()` as the elements of x move.
template <int R>
void check_slopes(const char* name, array<double, R>& x, const array<double, R>& gradient,
                  const std::function<double()>& value) {
  CAPTURE(name);
  array<double, R> slopes(x.shape);
  const double step = 1e-5;
  for (std::size_t i = 0; i < x.data.size(); ++i) {
    const double kept = x.data[i];
    x.data[i] = kept + step;
    const double above = value();
    x.data[i] = kept - step;
    const double below = value();
    x.data[i] = kept;
    slopes.data[i] = (above - below) / (2 * step);
  }
  CHECK(difference(gradient, slopes) <= 1e-8);
}

reference::context ctx;

}  // namespace

TEST_CASE("slopes of matmul") {
  for (const bool ta : {false, true})
    for (const bool tb : {false, true}) {
      auto a = random_array<double>(ta ? dims(4, 3) : dims(3, 4), 1),
           b = random_array<double>(tb ? dims(5, 4) : dims(4, 5), 2);
      const auto weight = random_array<double>(dims(3, 5), 3);
      array<double, 2> c(weight.shape), da(a.shape), db(b.shape);
      const auto value = [&] {
        matmul(ctx, matmul_args<double>{in(a), in(b), of(c), {}, ta, tb});
        return inner(c, weight);
      };
      // dA = dC op(B)ᵀ, dB = op(A)ᵀ dC, transposed where the operand was.
      if (ta)
        matmul(ctx, matmul_args<double>{in(b), in(weight), of(da), {}, tb, true});
      else
        matmul(ctx, matmul_args<double>{in(weight), in(b), of(da), {}, false, !tb});
      if (tb)
        matmul(ctx, matmul_args<double>{in(weight), in(a), of(db), {}, true, ta});
      else
        matmul(ctx, matmul_args<double>{in(a), in(weight), of(db), {}, !ta, false});
      check_slopes("a", a, da, value);
      check_slopes("b", b, db, value);
    }
}

TEST_CASE("slopes of rms_norm") {
  auto x = random_array<double>(dims(3, 5), 1);
  auto w = random_array<double>(dims(5), 2);
  const auto weight = random_array<double>(dims(3, 5), 3);
  array<double, 2> y(x.shape), dx(x.shape);
  array<double, 1> rstd(dims(3)), dw(dims(5));
  const auto value = [&] {
    rms_norm_forward(ctx, rms_norm_forward_args<double>{in(x), in(w), of(y), of(rstd)});
    return inner(y, weight);
  };
  value();
  rms_norm_backward(ctx, rms_norm_backward_args<double>{in(x), in(w), in(rstd), in(weight), of(dx), of(dw)});
  check_slopes("x", x, dx, value);
  check_slopes("weight", w, dw, value);
}

TEST_CASE("slopes of gate and gelu") {
  auto a = random_array<double>(dims(3, 5), 1), o = random_array<double>(dims(3, 5), 2, 2);
  const auto weight = random_array<double>(dims(3, 5), 3);
  array<double, 2> y(a.shape), da(a.shape), d_o(a.shape), dx(a.shape);
  const auto gated = [&] {
    gate_forward(ctx, in(a), in(o), of(y));
    return inner(y, weight);
  };
  gate_backward(ctx, in(a), in(o), in(weight), of(da), of(d_o));
  check_slopes("a", a, da, gated);
  check_slopes("o", o, d_o, gated);
  const auto activated = [&] {
    gelu_forward(ctx, in(o), of(y));
    return inner(y, weight);
  };
  gelu_backward(ctx, in(o), in(weight), of(dx));
  check_slopes("x", o, dx, activated);
}

TEST_CASE("slopes of embed and cross entropy") {
  auto table = random_array<double>(dims(4, 3), 1);
  const auto tokens = tokens_of({2, 0, 2, 3, 2});
  const auto weight = random_array<double>(dims(5, 3), 2);
  const view<const token_t, 1> ids(tokens.data.data(), tokens.shape);
  array<double, 2> x(weight.shape), dtable(table.shape);
  embed_backward(ctx, ids, in(weight), of(dtable));
  check_slopes("table", table, dtable, [&] {
    embed_forward(ctx, ids, in(table), of(x));
    return inner(x, weight);
  });

  auto logits = random_array<double>(dims(5, 7), 3, 2);
  const auto labels = tokens_of({6, -100, 0, 3, 3});
  array<double, 2> dlogits(logits.shape);
  array<double, 1> loss(dims(1));
  cross_entropy_args<double> args{in(logits), {labels.data.data(), labels.shape}, 0.3, of(loss), of(dlogits)};
  cross_entropy(ctx, args);
  args.dlogits = {};
  check_slopes("logits", logits, dlogits, [&] {
    loss(0) = 0;
    cross_entropy(ctx, args);
    return loss(0);
  });
}

TEST_CASE("slopes of scan: every cell, states, rotation, spans") {
  const auto check = [](const auto& cell, bool spans) {
    using Cell = std::remove_cvref_t<decltype(cell)>;
    CAPTURE(cell.name(), spans);
    const auto shape = dims(2, 1, 7, 4);
    const auto state = dims(2, 1, 4);
    auto q = random_array<double>(shape, 1), k = random_array<double>(shape, 2), v = random_array<double>(shape, 3),
         gate = random_array<double>(shape, 4, 2);
    auto k_first = random_array<double>(state, 5), v_first = random_array<double>(state, 6);
    const auto wq = random_array<double>(shape, 7), wk = random_array<double>(shape, 8),
               wv = random_array<double>(shape, 9);
    const auto wk_last = random_array<double>(state, 10), wv_last = random_array<double>(state, 11);
    const auto first = tokens_of({3, 0}), length = tokens_of({4, 7});
    const auto table = make_rope_table<double>(ctx, 12, 4, 10000.0);
    array<double, 4> q_out(shape), k_out(shape), v_out(shape), dq(shape), dk(shape), dv(shape), dgate(shape);
    array<double, 3> k_last(state), v_last(state), dk_first(state), dv_first(state);
    scan_forward_args<double> f{in(q),        in(k),       in(v),       in(gate),   of(q_out),  of(k_out), of(v_out),
                                table.view(), in(k_first), in(v_first), of(k_last), of(v_last), {}};
    scan_backward_args<double> b;
    b.k = in(k), b.v = in(v), b.gate = in(gate), b.k_out = in(k_out), b.v_out = in(v_out);
    b.dq_out = in(wq), b.dk_out = in(wk), b.dv_out = in(wv), b.rope = table.view();
    b.k_first = in(k_first), b.v_first = in(v_first), b.dk_last = in(wk_last), b.dv_last = in(wv_last);
    b.dq = of(dq), b.dk = of(dk), b.dv = of(dv), b.dgate = of(dgate);
    b.dk_first = of(dk_first), b.dv_first = of(dv_first);
    if (spans) {
      f.spans = {{first.data.data(), first.shape}, {length.data.data(), length.shape}};
      b.spans = f.spans;
    }
    const auto value = [&] {
      scan_forward(ctx, cell, f);
      return inner(q_out, wq) + inner(k_out, wk) + inner(v_out, wv) + inner(k_last, wk_last) + inner(v_last, wv_last);
    };
    value();
    scan_backward(ctx, cell, b);
    check_slopes("q", q, dq, value);
    check_slopes("k", k, dk, value);
    check_slopes("v", v, dv, value);
    if (Cell::gated) check_slopes("gate", gate, dgate, value);
    check_slopes("k_first", k_first, dk_first, value);
    check_slopes("v_first", v_first, dv_first, value);
  };
  for (const bool spans : {false, true}) {
    check(gated_average{}, spans);
    check(basic_gated_average<given_gate>{}, spans);
    check(none{}, spans);
    check(chunked<>(3), spans);
    check(squashed_average{}, spans);
    check(leaky_sum{}, spans);
  }
}

TEST_CASE("slopes of attend: every kind of pattern") {
  const auto check = [](const auto& pattern, bool spans) {
    CAPTURE(spans);
    const auto shape = dims(2, 2, 9, 3);
    auto q = random_array<double>(shape, 1), k = random_array<double>(shape, 2), v = random_array<double>(shape, 3);
    auto weight = random_array<double>(shape, 4);
    const auto length = tokens_of({9, 6});
    array<double, 4> out(shape), dq(shape), dk(shape), dv(shape);
    array<double, 3> lse(dims(2, 2, 9));
    attend_forward_args<double> f{in(q), in(k), in(v), of(out), of(lse), {}, {}};
    attend_backward_args<double> b{in(q), in(k), in(v), in(out), in(weight), in(lse), of(dq), of(dk), of(dv), {}};
    if (spans) f.spans.length = b.spans.length = {length.data.data(), length.shape};
    const auto value = [&] {
      attend_forward(ctx, pattern, f);
      return inner(out, weight);
    };
    value();
    attend_backward(ctx, pattern, b);
    check_slopes("q", q, dq, value);
    check_slopes("k", k, dk, value);
    check_slopes("v", v, dv, value);
  };
  for (const bool spans : {false, true}) {
    check(dense{}, spans);
    check(dilated<3>{}, spans);
    check(sparse<4, 1, 1>{}, spans);
    check(streaming<2, 1>{}, spans);
    check(blocks<4>{}, spans);
    check(by_head<dense, dilated_local<4, 2>>{}, spans);
  }
}
