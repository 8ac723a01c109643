// The CPU backend gives the same bits with one, two and three threads. Sizes are large enough that a team works.

#include "ratplus/backend/cpu/backend.hpp"
#include "ratplus/ops/rope.hpp"
#include "ratplus/pattern/names.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "support/catch.hpp"
#include "support/guarded.hpp"
#include "support/patterns.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

// Runs `compute(ctx)`, which returns arrays, with 1, 2 and 3 threads.
template <class F>
void check_threads(F&& compute) {
  cpu::context one(1);
  const auto expected = compute(one);
  for (const int threads : {2, 3}) {
    CAPTURE(threads);
    cpu::context ctx(threads);
    for (int run = 0; run < 3; ++run) {
      const auto got = compute(ctx);
      for (std::size_t i = 0; i < expected.size(); ++i) {
        CAPTURE(i);
        CHECK(same_bits(got[i], expected[i]));
      }
    }
  }
}

// Everything as one flat row, so that results of several shapes fit one list.
template <class Buffer>
array<float, 1> flat(const Buffer& b) {
  const auto a = b.read();
  return a.template as<1>(dims(a.size())).template to<float>();
}

using results = std::vector<array<float, 1>>;

}  // namespace

TEST_CASE("threads: matmul") {
  for (const bool ta : {false, true})
    for (const bool tb : {false, true})
      for (const auto& size : {dims(257, 129, 65), dims(64, 64, 2051), dims(1, 1000, 300), dims(300, 7, 129)}) {
        const index_t M = size[0], N = size[1], K = size[2];
        CAPTURE(ta, tb, M, N, K);
        const auto a = random_array<float>(ta ? dims(K, M) : dims(M, K), 1),
                   b = random_array<float>(tb ? dims(N, K) : dims(K, N), 2), c0 = random_array<float>(dims(M, N), 3);
        check_threads([&](auto& ctx) {
          const guarded on_a(ctx, a, layout::strided), on_b(ctx, b, layout::strided);
          auto c = poisoned<float>(ctx, dims(M, N));
          guarded sum(ctx, c0);
          matmul(ctx, matmul_args<float>{on_a.in(), on_b.in(), c.out(), {}, ta, tb});
          matmul(ctx, matmul_args<float>{on_a.in(), on_b.in(), sum.out(), sum.in(), ta, tb});
          return results{flat(c), flat(sum)};
        });
      }
}

TEST_CASE("threads: norm, gate, gelu") {
  const auto x = random_array<float>(dims(3000, 129), 1), dy = random_array<float>(dims(3000, 129), 2);
  const auto w = random_array<float>(dims(129), 3);
  check_threads([&](auto& ctx) {
    const guarded on_x(ctx, x), on_dy(ctx, dy);
    const guarded on_w(ctx, w);
    auto y = poisoned<float>(ctx, x.shape), g = poisoned<float>(ctx, x.shape), da = poisoned<float>(ctx, x.shape),
         d_o = poisoned<float>(ctx, x.shape), u = poisoned<float>(ctx, x.shape), du = poisoned<float>(ctx, x.shape);
    auto rstd = poisoned<float>(ctx, dims(3000));
    guarded dx(ctx, array<float, 2>(x.shape));
    guarded dw(ctx, array<float, 1>(dims(129)));
    rms_norm_forward(ctx, rms_norm_forward_args<float>{on_x.in(), on_w.in(), y.out(), rstd.out()});
    rms_norm_backward(ctx,
                      rms_norm_backward_args<float>{on_x.in(), on_w.in(), rstd.in(), on_dy.in(), dx.out(), dw.out()});
    gate_forward(ctx, on_x.in(), on_dy.in(), g.out());
    gate_backward(ctx, on_x.in(), on_dy.in(), on_dy.in(), da.out(), d_o.out());
    gelu_forward(ctx, on_x.in(), u.out());
    gelu_backward(ctx, on_x.in(), on_dy.in(), du.out());
    return results{flat(y), flat(rstd), flat(dx), flat(dw), flat(g), flat(da), flat(d_o), flat(u), flat(du)};
  });
}

TEST_CASE("threads: embed, cross entropy, optimiser") {
  const auto tokens = random_tokens(5000, 61, 1);
  auto labels = random_tokens(5000, 61, 2);
  labels(17) = -100;
  const auto table = random_array<float>(dims(61, 65), 3), dx = random_array<float>(dims(5000, 65), 4),
             logits = random_array<float>(dims(5000, 61), 5, 2);
  const auto many = random_array<float>(dims(400001), 6), grads = random_array<float>(dims(400001), 7);
  check_threads([&](auto& ctx) {
    const guarded ids(ctx, tokens), on_labels(ctx, labels);
    const guarded on_table(ctx, table), on_dx(ctx, dx), on_logits(ctx, logits);
    auto x = poisoned<float>(ctx, dx.shape), dlogits = poisoned<float>(ctx, logits.shape);
    guarded dtable(ctx, array<float, 2>(table.shape));
    guarded loss(ctx, array<double, 1>(dims(1)));
    embed_forward(ctx, ids.in(), on_table.in(), x.out());
    embed_backward(ctx, ids.in(), on_dx.in(), dtable.out());
    cross_entropy(ctx, cross_entropy_args<float>{on_logits.in(), on_labels.in(), 0.1, loss.out(), dlogits.out()});
    guarded p(ctx, many), m(ctx, array<float, 1>(many.shape)), v(ctx, array<float, 1>(many.shape));
    const guarded g(ctx, grads);
    adamw_coefficients c;
    c.lr = 0.01;
    adamw(ctx, adamw_args<float>{p.out(), g.in(), m.out(), v.out()}, c);
    // The double sums, whole, as two floats each.
    const auto halves = [](double s) {
      array<float, 1> a(dims(2));
      a(0) = static_cast<float>(s);
      a(1) = static_cast<float>(s - static_cast<double>(a(0)));
      return a;
    };
    return results{flat(x), flat(dtable), flat(dlogits), halves(loss.read()(0)), halves(squared_norm(ctx, g.in())),
                   flat(p), flat(m),      flat(v)};
  });
}

TEST_CASE("threads: scan forward and backward") {
  const auto shape = dims(2, 4, 700, 16);
  const auto q = random_array<float>(shape, 1), k = random_array<float>(shape, 2), v = random_array<float>(shape, 3),
             gate = random_array<float>(shape, 4, 2);
  check_threads([&](auto& ctx) {
    const guarded on_q(ctx, q, layout::strided), on_k(ctx, k, layout::strided), on_v(ctx, v, layout::strided),
        on_gate(ctx, gate, layout::strided);
    const auto out = [&] { return poisoned<float>(ctx, shape, layout::strided); };
    auto q_out = out(), k_out = out(), v_out = out(), dq = out(), dk = out(), dv = out(), dgate = out();
    auto k_last = poisoned<float>(ctx, dims(2, 4, 16));
    const auto table = make_rope_table<float>(ctx, 700, 16, 10000.0);
    scan_forward_args<float> f;
    f.q = on_q.in(), f.k = on_k.in(), f.v = on_v.in(), f.gate = on_gate.in();
    f.q_out = q_out.out(), f.k_out = k_out.out(), f.v_out = v_out.out(), f.rope = table.view(), f.k_last = k_last.out();
    scan_forward(ctx, gated_average{}, f);
    scan_backward_args<float> b;
    b.k = on_k.in(), b.v = on_v.in(), b.gate = on_gate.in(), b.k_out = k_out.in(), b.v_out = v_out.in();
    b.dq_out = on_q.in(), b.dk_out = on_k.in(), b.dv_out = on_v.in(), b.rope = table.view();
    b.dq = dq.out(), b.dk = dk.out(), b.dv = dv.out(), b.dgate = dgate.out();
    scan_backward(ctx, gated_average{}, b);
    return results{flat(q_out), flat(k_out), flat(v_out), flat(k_last), flat(dq), flat(dk), flat(dv), flat(dgate)};
  });
}

TEST_CASE("threads: attend forward, backward and with a past") {
  const index_t rows = 300;
  const auto shape = dims(2, 3, rows, 16);
  const auto q = random_array<float>(shape, 1), k = random_array<float>(shape, 2), v = random_array<float>(shape, 3),
             dout = random_array<float>(shape, 4);
  for (const numbers& n : {numbers{1, 0, 0}, numbers{16, 33, 4}, numbers{0, 50, 3}, numbers{64, 0, 0}}) {
    CAPTURE(n.text());
    array<head_slots, 1> slots(dims(3));
    const residency each(n.pattern(), 2 * rows);
    for (index_t h = 0; h < 3; ++h) slots(h) = {h * each.slots(), each};
    check_threads([&](auto& ctx) {
      const guarded on_q(ctx, q, layout::strided), on_k(ctx, k, layout::strided), on_v(ctx, v, layout::strided),
          on_dout(ctx, dout, layout::strided);
      const auto out = [&] { return poisoned<float>(ctx, shape, layout::strided); };
      auto o = out(), dq = out(), dk = out(), dv = out(), later = out();
      auto lse = poisoned<float>(ctx, dims(2, 3, rows));
      attend_forward_args<float> f;
      f.q = on_q.in(), f.k = on_k.in(), f.v = on_v.in(), f.out = o.out(), f.lse = lse.out();
      attend_forward(ctx, n.pattern(), f);
      attend_backward_args<float> b;
      b.q = on_q.in(), b.k = on_k.in(), b.v = on_v.in(), b.out = o.in(), b.dout = on_dout.in(), b.lse = lse.in();
      b.dq = dq.out(), b.dk = dk.out(), b.dv = dv.out();
      attend_backward(ctx, n.pattern(), b);

      auto k_pool = poisoned<float>(ctx, dims(2, 3 * each.slots(), 16));
      auto v_pool = poisoned<float>(ctx, dims(2, 3 * each.slots(), 16));
      const guarded heads(ctx, slots);
      const guarded start(ctx, tokens_of({0, 0})),
          next(ctx, tokens_of({static_cast<token_t>(rows), static_cast<token_t>(rows)}));
      cache_append(ctx, cache_append_args<float>{
                            on_k.in(), on_v.in(), k_pool.out(), v_pool.out(), heads.in(), {start.in(), {}}});
      f.past = {k_pool.in(), v_pool.in(), heads.in()};
      f.spans.first = next.in();
      f.out = later.out();
      f.lse = {};
      attend_forward(ctx, n.pattern(), f);
      return results{flat(o), flat(lse), flat(dq), flat(dk), flat(dv), flat(later), flat(k_pool)};
    });
  }
}
