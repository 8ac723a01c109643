// Generating text with a whole model: tokens per second of decoding at a long context, batch 1 and 8, dense and
// dilated, in float32 and with a bfloat16 cache. Checked first: decoding step by step gives the logits of the full
// forward pass. The floor counts the weights and the visited keys and values once, at the measured read bandwidth.

#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "machine.hpp"
#include "models.hpp"
#include "ratplus/ratplus.hpp"

using namespace ratplus;

namespace {

constexpr index_t context_length = 16384;

constexpr index_t vocabulary = 256;

model_config config_of(index_t d, index_t layers, index_t heads) {
  return bench::model_of(vocabulary, d, layers, heads, context_length + 1024);
}

void check() {
  cpu::context cpu;
  language_model<gated_average> model(cpu, config_of(32, 2, 2));
  model.initialise(cpu, 3);
  const auto ids = bench::random_tokens(60, vocabulary, 11);
  const auto tokens = as_view(ids.data(), 1, 60);
  const dilated_local<8, 5> pattern;
  const auto full = model.forward(cpu, pattern, tokens);
  kv_cache<float> cache(cpu, model.config(), pattern, 1, 60);
  tensor<float, 2> logits(1, 256);
  for (index_t t = 0; t < 60; ++t) {
    model.extend(cpu, pattern, cache, tokens.slice(1, t, t + 1), std::nullopt, logits.view());
    for (index_t v = 0; v < 256; ++v)
      if (!(std::fabs(logits.view()(0, v) - full.view()(0, t, v)) <= 1e-5f)) {
        std::fprintf(stderr, "generate: position %d token %d: decoded %g, forward %g\n", static_cast<int>(t),
                     static_cast<int>(v), static_cast<double>(logits.view()(0, v)),
                     static_cast<double>(full.view()(0, t, v)));
        std::exit(1);
      }
  }
}

template <class KV>
void decode(benchmark::State& state, const any_sparse& pattern, index_t batch) {
  cpu::context cpu(2);
  language_model<gated_average> model(cpu, config_of(512, 8, 8));
  const model_config& c = model.config();
  model.initialise(cpu, 1);
  kv_cache<KV> cache(cpu, c, pattern, batch, context_length + 1024);
  const auto ids = bench::random_tokens(batch * context_length, vocabulary, 11);
  const auto tokens = as_view(ids.data(), batch, context_length);
  tensor<float, 2> logits(batch, c.vocab_size);
  for (index_t begin = 0; begin < context_length; begin += 512)
    model.extend(cpu, pattern, cache, tokens.slice(1, begin, begin + 512), std::nullopt, logits.view());
  index_t steps = 0;
  for (auto _ : state) {
    model.extend(cpu, pattern, cache, tokens.slice(1, steps, steps + 1), std::nullopt, logits.view());
    ++steps;
  }
  const auto visited = static_cast<double>(pattern.keys(context_length).keys());
  const double keys = static_cast<double>(batch * c.num_layers * 2 * c.d_model) * visited * sizeof(KV);
  const double weights = 4.0 * static_cast<double>(model.layout().count());
  using benchmark::Counter;
  state.counters["tokens/s"] = Counter(static_cast<double>(batch), Counter::kIsIterationInvariantRate);
  state.counters["visited"] = visited;
  state.counters["floor_ms"] = 1e3 * (keys + weights) / bench::read_bandwidth(2);
  state.counters["GB/s"] = Counter((keys + weights) * 1e-9, Counter::kIsIterationInvariantRate);
  state.counters["cache_MiB"] = static_cast<double>(cache.bytes()) / (1 << 20);
}

}  // namespace

int main(int argc, char** argv) {
  check();
  for (const char* text : {"dense", "dilated:16", "dilated:64", "dilated:16+local:256+sinks:4"})
    for (const index_t batch : {1, 8}) {
      const std::string name = std::string("decode/") + text + "/batch:" + std::to_string(batch);
      const any_sparse pattern = parse_pattern(text);
      benchmark::RegisterBenchmark((name + "/float").c_str(), decode<float>, pattern, batch)
          ->Unit(benchmark::kMillisecond)
          ->UseRealTime()
          ->Iterations(50);
      benchmark::RegisterBenchmark((name + "/bfloat16").c_str(), decode<bfloat16>, pattern, batch)
          ->Unit(benchmark::kMillisecond)
          ->UseRealTime()
          ->Iterations(50);
    }
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
