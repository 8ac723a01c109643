// The scan on a device: gate, recurrence and RoPE over the slices q, k, v, g of a (B, T, 5 d) projection, forward and
// backward. Each needed byte counts once: 4 streams in and 3 out forward, 8 in and 4 out backward.

#include <cmath>

#include "device.cuh"
#include "ratplus/ops/rope.hpp"
#include "ratplus/recurrence/gated_average.hpp"

using namespace bench;
using namespace ratplus;

/// The same cell without its associativity: walked row by row, the check on the tiles.
struct walked_average {
  static constexpr bool gated = true;
  template <class S>
  RATPLUS_HD S step(S h, S x, S g, index_t t) const {
    return gated_average{}.step(h, x, g, t);
  }
  template <class S>
  RATPLUS_HD cell_gradient<S> adjoint(S h, S x, S g, index_t t, S dh) const {
    return gated_average{}.adjoint(h, x, g, t, dh);
  }
};

namespace {

struct scan_problem {
  index_t B, T, H = 32, d = 128;
  index_t C = H * d;
  device_tensor<bfloat16, 3> projection, out, dout, din;
  view<const float, 2> rope;

  scan_problem(device_context& ctx, view<const float, 2> rope_, index_t B_, index_t T_, index_t H_, bool backward)
      : B(B_),
        T(T_),
        H(H_),
        projection(random_tensor<bfloat16>(ctx, extents<3>{{B, T, 5 * C}}, 1)),
        out(extents<3>{{B, T, 3 * C}}),
        rope(rope_) {
    if (!backward) return;
    dout = random_tensor<bfloat16>(ctx, extents<3>{{B, T, 3 * C}}, 2);
    din = device_tensor<bfloat16, 3>(extents<3>{{B, T, 4 * C}});
  }

  template <class V>
  auto slice(V all, index_t i) const {
    return all.slice(2, i * C, (i + 1) * C).split_last(H).swap(1, 2);  // (B, H, T, d)
  }
  [[nodiscard]] scan_forward_args<bfloat16> forward() {
    scan_forward_args<bfloat16> p;
    const view<const bfloat16, 3> in = std::as_const(projection).view();
    p.q = slice(in, 1), p.k = slice(in, 2), p.v = slice(in, 3), p.gate = slice(in, 4);
    p.q_out = slice(out.view(), 0), p.k_out = slice(out.view(), 1), p.v_out = slice(out.view(), 2);
    p.rope = rope;
    return p;
  }
  [[nodiscard]] scan_backward_args<bfloat16> backward() {
    scan_backward_args<bfloat16> p;
    const view<const bfloat16, 3> in = std::as_const(projection).view(), results = std::as_const(out).view(),
                                  gradients = std::as_const(dout).view();
    p.k = slice(in, 2), p.v = slice(in, 3), p.gate = slice(in, 4);
    p.k_out = slice(results, 1), p.v_out = slice(results, 2);
    p.dq_out = slice(gradients, 0), p.dk_out = slice(gradients, 1), p.dv_out = slice(gradients, 2);
    p.dq = slice(din.view(), 0), p.dk = slice(din.view(), 1), p.dv = slice(din.view(), 2);
    p.dgate = slice(din.view(), 3);
    p.rope = rope;
    return p;
  }
};

double ratio(const std::vector<float>& got, const std::vector<float>& expected) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double x = got[i], y = expected[i];
    error += (x - y) * (x - y);
    norm += y * y;
  }
  return std::sqrt(error / norm);
}

/// Tiles against rows in order; false when they differ.
bool check(device_context& ctx, view<const float, 2> rope, index_t B, index_t T, index_t H) {
  scan_problem p(ctx, rope, B, T, H, true);
  const auto run = [&](const auto& cell) {
    scan_forward(ctx, cell, p.forward());
    scan_backward(ctx, cell, p.backward());
    return std::pair(on_host(ctx, p.out), on_host(ctx, p.din));
  };
  const auto tiles = run(gated_average{});
  const auto rows = run(walked_average{});
  const double forward = ratio(tiles.first, rows.first), backward = ratio(tiles.second, rows.second);
  std::printf("check B=%lld T=%lld H=%lld: tiles against rows, forward %.1e, backward %.1e\n",
              static_cast<long long>(B), static_cast<long long>(T), static_cast<long long>(H), forward, backward);
  return forward <= 1e-3 && backward <= 1e-3;
}

}  // namespace

int main() try {
  device_context ctx;
  const auto table = make_rope_table<float>(ctx, 1048576, 128, 10000.0);
  if (!check(ctx, table, 3, 777, 5) || !check(ctx, table, 1, 16411, 2)) return 1;
  const double copy = copy_bandwidth(ctx);
  std::printf("%s, copy %.2f TB/s; bfloat16, 32 heads of 128\n", ctx.properties().name, copy);
  std::printf("%8s %4s  %-8s %9s %7s %9s %7s\n", "T", "B", "pass", "ms", "TB/s", "floor ms", "of copy");
  const index_t shapes[][2] = {{4096, 64}, {32768, 8}, {262144, 1}, {1048576, 1}};
  for (const auto& [T, B] : shapes)
    for (const bool backward : {false, true}) {
      if (backward && T * B > 262144) continue;
      scan_problem p(ctx, table, B, T, 32, backward);
      scan_forward(ctx, gated_average{}, p.forward());
      const double ms = milliseconds(ctx, 9, [&] {
        if (backward)
          scan_backward(ctx, gated_average{}, p.backward());
        else
          scan_forward(ctx, gated_average{}, p.forward());
      });
      const double bytes = static_cast<double>(B * T * p.C) * (backward ? 12 : 7) * sizeof(bfloat16);
      std::printf("%8lld %4lld  %-8s %9.3f %7.2f %9.3f %6.0f%%\n", static_cast<long long>(T), static_cast<long long>(B),
                  backward ? "backward" : "forward", ms, bytes / ms * 1e-9, bytes / copy * 1e-9,
                  100 * bytes / ms * 1e-9 / copy);
    }
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "scan: %s\n", e.what());
  return 1;
}
