// The recurrence with gate and RoPE on the CPU, forward and backward, as the model runs it: inputs and their gradients
// are slices of a (B, T, 5·H·d) projection, q is rotated in place and so are the gradients of q, k and v replaced.
// Bytes per second, counting every input read and every output written once, against the machine's copy bandwidth.

#include <array>

#include "measure.hpp"
#include "ratplus/backend/cpu/backend.hpp"
#include "ratplus/ops/rope.hpp"
#include "ratplus/recurrence/gated_average.hpp"

using namespace ratplus;

namespace {

struct recurrence {
  index_t B, H, T, d;
  tensor<float, 3> projected, dprojected;  // (B, T, 5·H·d): o, q, k, v, g
  tensor<float, 3> keys, values;           // (B, T, H·d)
  tensor<float, 2> rope;

  recurrence(index_t b, index_t h, index_t t, index_t c) : B(b), H(h), T(t), d(c) {
    for (auto* x : {&projected, &dprojected}) *x = make_tensor<float>(B, T, 5 * H * d);
    for (auto* x : {&keys, &values}) *x = make_tensor<float>(B, T, H * d);
    unsigned seed = 1;
    for (auto* x : {&projected, &dprojected, &keys, &values}) bench::fill_random(*x, seed++);
    reference::context ctx;
    rope = make_rope_table<float>(ctx, T, d, 10000);
  }

  /// Heads of slice i of the rows of x.
  view<float, 4> heads(tensor<float, 3>& x, index_t i) const {
    const index_t row = x.extent(2);
    return {x.data() + i * H * d, {{B, H, T, d}}, {{T * row, d, row, 1}}};
  }

  template <class Ctx>
  void forward(Ctx& ctx) {
    scan_forward_args<float> p;
    p.q = heads(projected, 1), p.k = heads(projected, 2), p.v = heads(projected, 3), p.gate = heads(projected, 4);
    p.q_out = heads(projected, 1), p.k_out = heads(keys, 0), p.v_out = heads(values, 0);
    p.rope = rope.view();
    scan_forward(ctx, gated_average{}, p);
  }
  template <class Ctx>
  void backward(Ctx& ctx) {
    scan_backward_args<float> p;
    p.k = heads(projected, 2), p.v = heads(projected, 3), p.gate = heads(projected, 4);
    p.k_out = heads(keys, 0), p.v_out = heads(values, 0);
    p.dq_out = heads(dprojected, 1), p.dk_out = heads(dprojected, 2), p.dv_out = heads(dprojected, 3);
    p.dq = heads(dprojected, 1), p.dk = heads(dprojected, 2), p.dv = heads(dprojected, 3);
    p.dgate = heads(dprojected, 4);
    p.rope = rope.view();
    scan_backward(ctx, gated_average{}, p);
  }
};

void scan(benchmark::State& state, index_t B, index_t H, index_t T, index_t d, int threads, bool backward) {
  cpu::context ctx(threads);
  {
    recurrence fast(2, 2, 61, d), slow(2, 2, 61, d);
    reference::context reference;
    fast.forward(ctx), slow.forward(reference);
    fast.backward(ctx), slow.backward(reference);
    double error = 0;
    for (const auto& [a, b] : {std::pair(&fast.projected, &slow.projected), std::pair(&fast.keys, &slow.keys),
                               std::pair(&fast.values, &slow.values), std::pair(&fast.dprojected, &slow.dprojected)})
      error = std::max(error, bench::difference(a->data(), b->data(), a->size()));
    if (!bench::check(state, "scan", error, 2e-6)) return;
  }
  recurrence r(B, H, T, d);
  r.forward(ctx);
  // Every run replaces the gradients by smaller ones, so they are given anew each time.
  const recurrence given(B, H, T, d);
  const auto give = [&] {
    if (backward) std::copy_n(given.dprojected.data(), r.dprojected.size(), r.dprojected.data());
  };
  const double time = bench::run(
      state, [&] { backward ? r.backward(ctx) : r.forward(ctx); }, give);
  // Forward: q k v g → q k v. Backward: k v g, the outputs k v, dq dk dv → dq dk dv dg.
  const index_t bytes = (backward ? 12 : 7) * B * H * T * d * static_cast<index_t>(sizeof(float));
  bench::report_bytes(state, time, static_cast<double>(bytes), bench::copy_bandwidth(threads));
}

}  // namespace

int main(int argc, char** argv) {
  for (const bool backward : {false, true})
    for (const auto& [B, H, T, d] : {std::array<index_t, 4>{1, 8, 16384, 64}, {8, 8, 1024, 64}, {4, 8, 2048, 128}})
      for (const int threads : {1, 2})
        benchmark::RegisterBenchmark(
            message(backward ? "backward" : "forward", "/B:", B, "/H:", H, "/T:", T, "/d:", d, "/threads:", threads)
                .c_str(),
            [=, B = B, H = H, T = T, d = d](benchmark::State& state) { scan(state, B, H, T, d, threads, backward); })
            ->UseManualTime()
            ->Unit(benchmark::kMillisecond);
  return bench::run_all(argc, argv);
}
