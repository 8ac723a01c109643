// One decoding step's attention on a device, over a cache kept under the pattern: 32 heads of 128, bfloat16. The floor
// is the visited keys and values, read once at the bandwidth of a copy.

#include <cmath>

#include "device.cuh"
#include "ratplus/pattern/parse.hpp"

namespace {

using namespace bench;
using namespace ratplus;

struct decode_problem {
  index_t B, H = 32, d = 128, context;
  any_sparse pattern;
  device_tensor<bfloat16, 4> q, k, v, out;
  device_tensor<bfloat16, 3> k_pool, v_pool;
  device_tensor<head_slots, 1> heads;
  device_tensor<token_t, 1> first;

  decode_problem(device_context& ctx, const any_sparse& pattern_, index_t B_, index_t context_)
      : B(B_), context(context_), pattern(pattern_) {
    const residency where(pattern, context + 1);
    const extents<4> rows{{B, H, 1, d}};
    q = random_tensor<bfloat16>(ctx, rows, 1);
    k = random_tensor<bfloat16>(ctx, rows, 2);
    v = random_tensor<bfloat16>(ctx, rows, 3);
    out = device_tensor<bfloat16, 4>(rows);
    k_pool = random_tensor<bfloat16>(ctx, extents<3>{{B, H * where.slots(), d}}, 4);
    v_pool = random_tensor<bfloat16>(ctx, extents<3>{{B, H * where.slots(), d}}, 5);
    std::vector<head_slots> slots;
    for (index_t h = 0; h < H; ++h) slots.push_back({h * where.slots(), where});
    heads = make_tensor<head_slots, ratplus::cuda::space>(H);
    upload(ctx, slots.data(), heads.view());
    const std::vector<token_t> firsts(static_cast<std::size_t>(B), static_cast<token_t>(context));
    first = make_tensor<token_t, ratplus::cuda::space>(B);
    upload(ctx, firsts.data(), first.view());
  }

  void run(device_context& ctx) {
    attend_forward_args<bfloat16> p;
    p.q = std::as_const(q).view(), p.k = std::as_const(k).view(), p.v = std::as_const(v).view(), p.out = out.view();
    p.past = {std::as_const(k_pool).view(), std::as_const(v_pool).view(), std::as_const(heads).view()};
    p.spans.first = std::as_const(first).view();
    attend_forward(ctx, pattern, p);
  }

  [[nodiscard]] double bytes() const {
    return 2.0 * sizeof(bfloat16) * static_cast<double>(B * H * d * pattern.keys(context).keys());
  }

  /// ‖out − softmax over the visible keys in double‖ / ‖…‖ of one sequence and head.
  [[nodiscard]] double error(device_context& ctx, index_t b, index_t h) {
    const auto all_q = on_host(ctx, q), all_k = on_host(ctx, k), all_v = on_host(ctx, v), got = on_host(ctx, out);
    const auto k_rows = on_host(ctx, k_pool), v_rows = on_host(ctx, v_pool);
    const residency where(pattern, context + 1);
    const auto* query = all_q.data() + (b * H + h) * d;
    std::vector<double> sum(static_cast<std::size_t>(d));
    double total = 0;
    for (index_t s = 0; s <= context; ++s) {
      if (!pattern.sees(context, s)) continue;
      const float *key = all_k.data() + (b * H + h) * d, *value = all_v.data() + (b * H + h) * d;
      if (s < context) {
        // A position may lie in several slots, whose random rows differ here: sinks before the window before anchors.
        const auto [sink, anchor, ring] = where.homes(s).slot;
        const index_t slot = sink >= 0 ? sink : where.in_ring(s, context) && ring >= 0 ? ring : anchor;
        const index_t row = (b * H + h) * where.slots() + slot;
        key = k_rows.data() + row * d;
        value = v_rows.data() + row * d;
      }
      double score = 0;
      for (index_t i = 0; i < d; ++i) score += static_cast<double>(query[i]) * static_cast<double>(key[i]);
      const double weight = std::exp(score / std::sqrt(static_cast<double>(d)));
      total += weight;
      for (index_t i = 0; i < d; ++i) sum[static_cast<std::size_t>(i)] += weight * static_cast<double>(value[i]);
    }
    double gap = 0, norm = 0;
    for (index_t i = 0; i < d; ++i) {
      const double x = got[static_cast<std::size_t>((b * H + h) * d + i)], y = sum[static_cast<std::size_t>(i)] / total;
      gap += (x - y) * (x - y);
      norm += y * y;
    }
    return std::sqrt(gap / norm);
  }
};

}  // namespace

int main() try {
  device_context ctx;
  const char* patterns[] = {"dense", "dilated:16", "dilated:64", "dilated:16+local:256"};
  for (const char* text : patterns) {
    decode_problem p(ctx, parse_pattern(text), 2, 1111);
    p.run(ctx);
    const double error = p.error(ctx, 1, 7);
    std::printf("check %-22s %.1e\n", text, error);
    if (!(error <= 5e-3)) return 1;
  }
  const double copy = copy_bandwidth(ctx);
  std::printf("%s, copy %.2f TB/s; bfloat16, 32 heads of 128, one row a sequence\n", ctx.properties().name, copy);
  std::printf("%8s %4s  %-22s %9s %7s %9s %7s\n", "context", "B", "pattern", "ms", "TB/s", "floor ms", "of copy");
  const index_t shapes[][2] = {{4096, 64}, {32768, 64}, {32768, 1}, {262144, 1}};
  for (const auto& [context, B] : shapes)
    for (const char* text : patterns) {
      decode_problem p(ctx, parse_pattern(text), B, context);
      const double ms = milliseconds(ctx, 15, [&] { p.run(ctx); });
      std::printf("%8lld %4lld  %-22s %9.4f %7.2f %9.4f %6.0f%%\n", static_cast<long long>(context),
                  static_cast<long long>(B), text, ms, p.bytes() / ms * 1e-9, p.bytes() / copy * 1e-9,
                  100 * p.bytes() / ms * 1e-9 / copy);
    }
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "decode: %s\n", e.what());
  return 1;
}
