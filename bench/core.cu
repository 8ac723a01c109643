// The whole core of a layer on a device: gate, recurrence and RoPE over the projection's output, then attention;
// forward for inference, bfloat16, 32 heads of 128, 256 Ki tokens. The floor moves q, k, v, gate, q', k', v', reads the
// latter three again and writes the result, without k' where queries see no neighbours, at the bandwidth of a copy, or
// multiplies the visited keys at the matrix rate that dense attention reaches in the same run.
// bench/peers/attention_cuda.py gives cuDNN's dense attention alone.

#include "device.cuh"
#include "ratplus/ops/rope.hpp"
#include "ratplus/ops/scan_attend.hpp"
#include "ratplus/pattern/facts.hpp"
#include "ratplus/pattern/parse.hpp"
#include "ratplus/recurrence/gated_average.hpp"

namespace {

using namespace bench;
using namespace ratplus;

constexpr index_t H = 32, d = 128, C = H * d;

struct core {
  index_t B, T;
  device_tensor<bfloat16, 3> projection, keys, values, out;  // (B, T, 5 C): o, q, k, v, g; (B, T, C)
  device_tensor<float, 3> scores;                            // (B, H, T)
  view<const float, 2> rope;

  core(device_context& ctx, view<const float, 2> angles, index_t B_, index_t T_)
      : B(B_),
        T(T_),
        projection(random_tensor<bfloat16>(ctx, extents<3>{{B, T, 5 * C}}, 1)),
        keys(B, T, C),
        values(B, T, C),
        out(B, T, C),
        scores(B, H, T),
        rope(angles) {}

  [[nodiscard]] view<bfloat16, 4> heads(device_tensor<bfloat16, 3>& x, index_t slice = 0) const {
    return x.view().slice(2, slice * C, (slice + 1) * C).split_last(H).swap(1, 2);
  }

  /// As a layer does it: q is rotated in place.
  void run(device_context& ctx, const any_sparse& pattern) {
    const auto q = heads(projection, 1), k = heads(keys), v = heads(values);
    scan_attend_args<bfloat16> p{.scores = scores};
    p.scan.q = q, p.scan.k = heads(projection, 2), p.scan.v = heads(projection, 3), p.scan.gate = heads(projection, 4);
    p.scan.q_out = q, p.scan.k_out = k, p.scan.v_out = v, p.scan.rope = rope;
    p.attend.q = q, p.attend.k = k, p.attend.v = v, p.attend.out = heads(out);
    scan_attend(ctx, gated_average{}, pattern, p);
  }
};

}  // namespace

int main() try {
  device_context ctx;
  const auto table = make_rope_table<float>(ctx, 262144, d, 10000.0);
  const double copy = copy_bandwidth(ctx);
  std::printf("%s, copy %.2f TB/s; gate, recurrence, RoPE and attention, forward, bfloat16, 32 heads of 128\n",
              ctx.properties().name, copy);
  std::printf("%7s %3s  %-22s %9s %9s %7s\n", "T", "B", "pattern", "ms", "floor ms", "of it");
  for (const index_t T : {4096, 32768, 262144}) {
    core c(ctx, std::as_const(table).view(), 262144 / T, T);
    double rate = 0;  // FLOPs a millisecond
    for (const char* text : {"dense", "dilated:16", "dilated:64", "dilated:16+local:256"}) {
      const any_sparse pattern = parse_pattern(text);
      rest();
      const double ms = milliseconds(ctx, T > 100000 ? 3 : 9, [&] { c.run(ctx, pattern); });
      const auto flops = static_cast<double>(attention_flops(pattern, T, c.B * H, d));
      if (pattern.dense()) rate = flops / ms;
      const bool neighbours = pattern.dense() || pattern.window() > 0;
      const double bytes = 2.0 * (neighbours ? 11 : 9) * static_cast<double>(c.out.size());
      const double floor = std::max(bytes / copy * 1e-9, flops / rate);
      std::printf("%7lld %3lld  %-22s %9.3f %9.3f %6.0f%%\n", static_cast<long long>(T), static_cast<long long>(c.B),
                  text, ms, floor, 100 * floor / ms);
      std::fflush(stdout);
    }
  }
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "core: %s\n", e.what());
  return 1;
}
