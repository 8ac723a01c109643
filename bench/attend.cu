// Attention on a device, bfloat16, 32 heads of 128, forward and backward: time, TFLOP/s of the visited keys, the floor
// (what the visited keys predict from dense attention in the same run, or the bytes at the bandwidth of a copy,
// whichever is longer) and its share of the time. The tiled kernels are first checked against attention by rows.
//
//     attend_cuda          256 Ki tokens at T = 4096, 32768 and 262144
//     attend_cuda check    the check alone
//     attend_cuda short    without T = 262144

#include <cmath>
#include <cstring>

#include "device.cuh"
#include "ratplus/pattern/facts.hpp"
#include "ratplus/pattern/parse.hpp"

namespace {

using namespace bench;
using namespace ratplus;
namespace kernels = ratplus::cuda::detail;

struct attention {
  index_t B, H, T, d;
  device_tensor<bfloat16, 4> q, k, v, out, dout, dq, dk, dv;  // (B, T, H, d)
  device_tensor<float, 3> lse;

  attention(device_context& ctx, index_t B_, index_t H_, index_t T_, index_t d_) : B(B_), H(H_), T(T_), d(d_) {
    unsigned seed = 1;
    for (auto* x : {&q, &k, &v, &dout, &out, &dq, &dk, &dv})
      *x = random_tensor<bfloat16>(ctx, extents<4>{{B, T, H, d}}, seed++);
    lse = make_tensor<float, ratplus::cuda::space>(B, H, T);
  }

  static view<bfloat16, 4> heads(device_tensor<bfloat16, 4>& x) { return x.view().swap(1, 2); }
  [[nodiscard]] attend_forward_args<bfloat16> forward_args() {
    attend_forward_args<bfloat16> p;
    p.q = heads(q), p.k = heads(k), p.v = heads(v), p.out = heads(out), p.lse = lse.view();
    return p;
  }
  [[nodiscard]] attend_backward_args<bfloat16> backward_args() {
    attend_backward_args<bfloat16> p;
    p.q = heads(q), p.k = heads(k), p.v = heads(v), p.out = heads(out), p.dout = heads(dout);
    p.lse = std::as_const(lse).view(), p.dq = heads(dq), p.dk = heads(dk), p.dv = heads(dv);
    return p;
  }
};

/// ‖a − b‖ / ‖b‖, where b that is nearly zero (gradients of a softmax over one key) counts as 0.01 an element.
double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double gap = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    gap += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    norm += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(gap / std::max(norm, 1e-4 * static_cast<double>(b.size())));
}

/// The largest relative difference between tiles and rows of out, dq, dk and dv.
double check(device_context& ctx, const any_sparse& pattern, index_t T, index_t d) {
  attention a(ctx, 2, 3, T, d);
  attend_forward(ctx, pattern, a.forward_args());
  attend_backward(ctx, pattern, a.backward_args());
  std::vector<float> tiled[4];
  int i = 0;
  for (auto* x : {&a.out, &a.dq, &a.dk, &a.dv}) tiled[i++] = on_host(ctx, *x);

  const auto heads = kernels::on_device(pattern, a.H);
  using heads_t = std::remove_const_t<decltype(heads)>;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const auto forward = a.forward_args();
  const auto backward = a.backward_args();
  const unsigned blocks = kernels::row_blocks(forward.q.shape()), threads = 32 * kernels::warps_per_block;
  kernels::launch(ctx, "rows", kernels::attend_forward_rows<heads_t, bfloat16, bfloat16>, blocks, threads, 0, heads,
                  forward, scale);
  const auto statistics = kernels::statistics_of(ctx, backward);
  kernels::launch(ctx, "rows", kernels::attend_backward_queries<heads_t, bfloat16>, blocks, threads, 0, heads, backward,
                  statistics, scale);
  kernels::launch(ctx, "rows", kernels::attend_backward_keys<heads_t, bfloat16>, blocks, threads, 0, heads, backward,
                  statistics, scale);
  double worst = 0;
  i = 0;
  for (auto* x : {&a.out, &a.dq, &a.dk, &a.dv}) {
    const double error = difference(tiled[i++], on_host(ctx, *x));
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

void measure(device_context& ctx, index_t T, double copy) {
  attention a(ctx, std::max<index_t>(262144 / T, 1), 32, T, 128);
  const double tensor = 2.0 * static_cast<double>(a.q.size());  // bytes
  double dense[2] = {};                                         // FLOPs a millisecond
  for (const char* text :
       {"dense", "dilated:16", "dilated:64", "dilated:16+local:256", "dilated:16+sinks:4", "local:1024+sinks:4"}) {
    const any_sparse pattern = parse_pattern(text);
    const int repeats = T > 100000 ? 3 : 9;
    rest();
    const double forward_ms = milliseconds(ctx, repeats, [&] { attend_forward(ctx, pattern, a.forward_args()); });
    rest();
    const double ms[2] = {forward_ms,
                          milliseconds(ctx, repeats, [&] { attend_backward(ctx, pattern, a.backward_args()); })};
    const double forward = static_cast<double>(attention_flops(pattern, T, a.B * a.H, a.d));
    const double flops[2] = {forward, 2.5 * forward};
    // Forward reads q, k, v and writes out; backward reads those four and dout and writes three.
    const double bytes[2] = {4 * tensor, 8 * tensor};
    std::printf("%7lld %3lld  %-22s", static_cast<long long>(T), static_cast<long long>(a.B), text);
    for (int i = 0; i < 2; ++i) {
      if (pattern.dense()) dense[i] = flops[i] / ms[i];
      const double floor = std::max(flops[i] / dense[i], bytes[i] / copy * 1e-9);
      std::printf(" %10.3f %8.1f %9.3f %5.0f%%", ms[i], flops[i] / ms[i] * 1e-9, floor, 100 * floor / ms[i]);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) try {
  device_context ctx;
  for (const char* text :
       {"dense", "dilated:16", "dilated:16", "dilated:16+local:50+sinks:4", "local:100+sinks:4", "dilated:3+sinks:130"})
    for (const index_t d : {64, 128})
      for (const index_t T : {2, 63, 65, 127, 129, 191, 193, 1000}) {
        const double error = check(ctx, parse_pattern(text), T, d);
        std::printf("check %-28s T %4lld d %3lld  %.1e\n", text, static_cast<long long>(T), static_cast<long long>(d),
                    error);
        std::fflush(stdout);
        if (!(error <= 5e-3)) return 1;
      }
  if (argc > 1 && std::strcmp(argv[1], "check") == 0) return 0;
  const double copy = copy_bandwidth(ctx);
  std::printf("%s, copy %.2f TB/s; bfloat16, 32 heads of 128\n", ctx.properties().name, copy);
  std::printf("%7s %3s  %-22s %10s %8s %9s %6s %10s %8s %9s %6s\n", "T", "B", "pattern", "forward ms", "TFLOP/s",
              "floor ms", "of it", "backward", "TFLOP/s", "floor ms", "of it");
  for (const index_t T : {4096, 32768, 262144})
    if (T < 100000 || argc < 2) measure(ctx, T, copy);
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "attend: %s\n", e.what());
  return 1;
}
