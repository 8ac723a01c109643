// One joint training iteration (sparse half, then dense half, SPEC §5) of the demo's model and of one with d = 512, 8
// layers, T = 1024, in float32. Checked first: the loss and the gradients of the CPU backend against the reference's on
// a small model. Printed: tokens of text per second, the matrix products' share of the FMA ceiling ("floor" counts
// every product and every visited key once, at the measured peak), and the resident memory. Peer:
// bench/peers/train_step_cpu.py.

#include <benchmark/benchmark.h>
#include <sys/resource.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "measure.hpp"
#include "models.hpp"
#include "ratplus/ratplus.hpp"

using namespace ratplus;

namespace {

struct size {
  const char* name;
  index_t d, layers, heads, T, batch;
};
constexpr size sizes[] = {{"demo", 128, 4, 4, 256, 16}, {"mid", 512, 8, 8, 1024, 4}};
constexpr index_t vocabulary = 256;

model_config config_of(const size& s) { return bench::model_of(vocabulary, s.d, s.layers, s.heads, s.T); }

/// Multiply-adds × 2 of one iteration: three products per weight and token (forward, two gradients), attention forward
/// (4) and backward (10) per channel and visited key; sparse and dense half.
double flops_of_iteration(const size& s) {
  const auto tokens = static_cast<double>(s.batch * s.T);
  const auto weights = static_cast<double>(s.layers * (5 + 1 + 8) * s.d * s.d + vocabulary * s.d);
  const auto visited = static_cast<double>(keys_visited(dilated<16>{}, s.T) + keys_visited(dense{}, s.T));
  return 2 * 6 * weights * tokens + 14 * static_cast<double>(s.layers * s.batch * s.d) * visited;
}

void check() {
  const size small{"check", 32, 2, 2, 48, 2};
  const auto tokens = bench::random_tokens(96, vocabulary, 1), labels = bench::random_tokens(96, vocabulary, 2);
  const token_batch batch{as_view(tokens.data(), 2, 48), as_view(labels.data(), 2, 48)};
  cpu::context cpu;
  reference::context reference;
  const auto run = [&](auto& ctx) {
    language_model<gated_average> model(ctx, config_of(small));
    model.initialise(ctx, 3);
    auto g = model.make_gradients(ctx);
    (void)model.loss_and_gradients(ctx, dilated<16>{}, batch, g.view());
    return g;
  };
  const auto a = run(cpu), b = run(reference);
  double difference = 0, norm = 0;
  for (index_t i = 0; i < a.size(); ++i) {
    difference += std::pow(a.data()[i] - b.data()[i], 2);
    norm += std::pow(b.data()[i], 2);
  }
  if (!(std::sqrt(difference / norm) <= 1e-5)) {
    std::fprintf(stderr, "train_step: gradients differ from the reference by %g\n", std::sqrt(difference / norm));
    std::exit(1);
  }
}

void joint_iteration(benchmark::State& state, const size& s, int threads) {
  cpu::context cpu(threads);
  language_model<gated_average> model(cpu, config_of(s));
  model.initialise(cpu, 1);
  training trainer(cpu, model);
  const auto tokens = bench::random_tokens(s.batch * s.T, vocabulary, 4),
             labels = bench::random_tokens(s.batch * s.T, vocabulary, 5);
  const token_batch batch{as_view(tokens.data(), s.batch, s.T), as_view(labels.data(), s.batch, s.T)};
  const double time = bench::run(
      state, [&] { benchmark::DoNotOptimize(trainer.joint_step(cpu, dilated<16>{}, std::span(&batch, 1), 1e-3)); });
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  bench::report_flops(state, time, flops_of_iteration(s), threads);
  state.counters["tokens/s"] = static_cast<double>(s.batch * s.T) / time;
  state.counters["peak_MiB"] = static_cast<double>(usage.ru_maxrss) / 1024;
}

}  // namespace

int main(int argc, char** argv) {
  check();
  for (const size& s : sizes)
    for (const int threads : {1, 2})
      benchmark::RegisterBenchmark(
          ("joint_step/" + std::string(s.name) + "/threads:" + std::to_string(threads)).c_str(), joint_iteration, s,
          threads)
          ->Unit(benchmark::kMillisecond)
          ->UseManualTime()
          ->Iterations(3);
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
