// Training on a device in mixed precision: iterations of a language model of 124M parameters and of the 1.5B model of
// SPEC §5, T = 4096. One line for a sparse half, one for a dense half and one for the joint iteration of the two: time,
// tokens of text per second, the share of the card's matrix rate that the model's own arithmetic takes (every product
// once forward and twice backward, attention over visited keys alone), and the memory in use. The gradients of a small
// model are first compared with float32's.
//
//     train_step_cuda [124M|1.5B] [BATCH]

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "device.cuh"
#include "models.hpp"
#include "ratplus/model/language_model.hpp"
#include "ratplus/pattern/facts.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "ratplus/train/joint_step.hpp"

namespace {

using namespace bench;
using namespace ratplus;

struct size {
  const char* name;
  index_t d, layers, heads, batch;
};
constexpr size sizes[] = {{"124M", 768, 12, 6, 32}, {"1.5B", 2048, 24, 16, 8}};
constexpr index_t length = 4096, vocabulary = 32000;

model_config config_of(const size& s, index_t T) { return model_of(vocabulary, s.d, s.layers, s.heads, T); }

/// ‖g − g32‖ / ‖g32‖ of a small model's gradients, products in bfloat16 and in float32.
double check(device_context& ctx) {
  const size small{"check", 128, 2, 2, 2};
  const index_t T = 256;
  const auto tokens = random_tokens(small.batch * T, vocabulary, 1),
             labels = random_tokens(small.batch * T, vocabulary, 2);
  const token_batch batch{as_view(tokens.data(), small.batch, T), as_view(labels.data(), small.batch, T)};
  const auto run = [&](auto type) {
    language_model<gated_average, decltype(type), ratplus::cuda::space> model(ctx, config_of(small, T));
    model.initialise(ctx, 3);
    auto g = model.make_gradients(ctx);
    (void)model.loss_and_gradients(ctx, dilated<16>{}, batch, g.view());
    return on_host(ctx, g);
  };
  const auto a = run(bfloat16{}), b = run(float{});
  double gap = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    gap += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(gap / norm);
}

/// FLOPs of one forward and backward pass: three products per weight and token, attention forward (4 per channel and
/// visited key) and backward (10).
template <class P>
double flops_of(const size& s, index_t batch, const P& pattern) {
  const auto weights = static_cast<double>(s.layers * (5 + 1 + 8) * s.d * s.d + vocabulary * s.d);
  return 6 * weights * static_cast<double>(batch * length) +
         14 * static_cast<double>(s.layers * batch * s.d) * static_cast<double>(keys_visited(pattern, length));
}

/// FLOPs per second of a bfloat16 product of random matrices, 8192 × 8192 × 8192.
double matrix_rate(device_context& ctx) {
  const extents<2> n{{8192, 8192}};
  const auto a = random_tensor<bfloat16>(ctx, n, 1), b = random_tensor<bfloat16>(ctx, n, 2);
  device_tensor<bfloat16, 2> c(n);
  const double ms = milliseconds(ctx, 20, [&] {
    matmul(ctx, matmul_args<bfloat16>{.a = a.view(), .b = b.view(), .c = c.view(), .transpose_b = true});
  });
  return 2 * std::pow(8192.0, 3) / ms * 1e3;
}

double gibibytes_in_use() {
  std::size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  return static_cast<double>(total - free) / (1 << 30);
}

void measure(device_context& ctx, const size& s, index_t batch, double rate) {
  language_model<gated_average, bfloat16, ratplus::cuda::space> model(ctx, config_of(s, length));
  initialise(ctx, model);
  training trainer(ctx, model);
  const auto tokens = random_tokens(batch * length, vocabulary, 4),
             labels = random_tokens(batch * length, vocabulary, 5);
  const token_batch text{as_view(tokens.data(), batch, length), as_view(labels.data(), batch, length)};
  double loss = 0;
  // Median of five steps, each waited for, after two.
  const auto seconds = [&](const auto& pattern) {
    std::vector<double> times;
    for (int i = -2; i < 5; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      loss = trainer.step(ctx, pattern, std::span(&text, 1), 1e-4).loss;
      ctx.synchronize();
      if (i >= 0) times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  };
  const auto report = [&](const char* what, double time, double flops) {
    const auto count = static_cast<double>(batch * length);
    std::printf(
        "%-5s B %-3lld %-10s %9.1f ms %9.0f tokens/s %7.1f TFLOP/s %5.1f%% of the matrix rate  loss %.3f  %6.1f GiB\n",
        s.name, static_cast<long long>(batch), what, 1e3 * time, count / time, flops / time * 1e-12,
        100 * flops / time / rate, loss, gibibytes_in_use());
    std::fflush(stdout);
  };
  const double sparse = seconds(dilated<64>{});
  report("dilated:64", sparse, flops_of(s, batch, dilated<64>{}));
  const double dense = seconds(ratplus::dense{});
  report("dense", dense, flops_of(s, batch, ratplus::dense{}));
  report("joint", sparse + dense, flops_of(s, batch, dilated<64>{}) + flops_of(s, batch, ratplus::dense{}));
  std::printf("%-5s sparse half / dense half %.3f, of the arithmetic %.3f; %.0f parameters\n", s.name, sparse / dense,
              flops_of(s, batch, dilated<64>{}) / flops_of(s, batch, ratplus::dense{}),
              static_cast<double>(model.layout().count()));
}

}  // namespace

int main(int argc, char** argv) try {
  device_context ctx;
  const double error = check(ctx);
  std::printf("check: gradients of bfloat16 against float32 %.1e\n", error);
  if (!(error <= 3e-2)) return 1;
  const double rate = matrix_rate(ctx);
  std::printf("%s, matrix rate %.0f TFLOP/s (8192³, bfloat16, random); T = %lld, V = %lld\n", ctx.properties().name,
              rate * 1e-12, static_cast<long long>(length), static_cast<long long>(vocabulary));
  for (const size& s : sizes)
    if (argc < 2 || std::strcmp(argv[1], s.name) == 0) measure(ctx, s, argc < 3 ? s.batch : std::atoll(argv[2]), rate);
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "train_step: %s\n", e.what());
  return 1;
}
