#pragma once
// The one way in which the benchmarks of the CPU backend check, time and report: medians, against the ceilings of
// machine.hpp.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "machine.hpp"
#include "ratplus/core/tensor.hpp"

namespace bench {

using ratplus::index_t;

/// Seconds that f takes.
template <class F>
double seconds(F&& f) {
  const auto begin = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

inline double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

/// The same normally distributed numbers every time.
template <int Rank>
void fill_random(const ratplus::tensor<float, Rank>& x, unsigned seed) {
  std::mt19937 source(seed);
  std::normal_distribution<float> normal;
  std::generate_n(x.data(), x.size(), [&] { return normal(source); });
}

/// ‖a − b‖ / ‖b‖.
inline double difference(const float* a, const float* b, index_t n) {
  double error = 0, norm = 0;
  for (index_t i = 0; i < n; ++i) {
    const double y = static_cast<double>(b[i]), gap = static_cast<double>(a[i]) - y;
    error += gap * gap;
    norm += y * y;
  }
  return std::sqrt(error / norm);
}

/// Times f once per iteration, `prepare` before it untimed, and returns the median in seconds. The first call, which
/// allocates, is not timed. cpu_ms is the least processor time of a call, over all threads: of one thread's runs it is
/// right on a busy machine too.
template <class F, class Prepare>
double run(benchmark::State& state, F&& f, Prepare&& prepare) {
  std::vector<double> times;
  double processor = std::numeric_limits<double>::infinity();
  prepare();
  f();
  for (auto _ : state) {
    prepare();
    const std::clock_t before = std::clock();
    times.push_back(seconds(f));
    processor = std::min(processor, static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC);
    state.SetIterationTime(times.back());
  }
  const double time = median(times);
  state.counters["median_ms"] = time * 1e3;
  state.counters["cpu_ms"] = processor * 1e3;
  return time;
}

template <class F>
double run(benchmark::State& state, F&& f) {
  return run(state, f, [] {});
}

/// Reports arithmetic done in `time` seconds against the peak of `threads` threads.
inline void report_flops(benchmark::State& state, double time, double flops, int threads) {
  state.counters["GFLOP/s"] = flops / time * 1e-9;
  state.counters["floor_ms"] = flops / fma_peak(threads) * 1e3;
  state.counters["of_peak"] = flops / time / fma_peak(threads);
}

/// Reports bytes moved in `time` seconds against a bandwidth.
inline void report_bytes(benchmark::State& state, double time, double bytes, double ceiling) {
  state.counters["GB/s"] = bytes / time * 1e-9;
  state.counters["floor_ms"] = bytes / ceiling * 1e3;
  state.counters["of_ceiling"] = bytes / time / ceiling;
}

/// Ends the benchmark with an error unless `error` is within `bound`; false: do not go on.
inline bool check(benchmark::State& state, const char* what, double error, double bound) {
  if (error <= bound) return true;
  state.SkipWithError((std::string(what) + " is wrong: relative error " + std::to_string(error)).c_str());
  return false;
}

/// Prints the ceilings as the context of the run, then runs what is registered.
inline int run_all(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  for (const int threads : {1, 2})
    benchmark::AddCustomContext(std::to_string(threads) + " thread(s)",
                                ratplus::message("FMA peak ", std::llround(fma_peak(threads) * 1e-9), " GFLOP/s, read ",
                                                 std::llround(read_bandwidth(threads) * 1e-9), " GB/s, copy ",
                                                 std::llround(copy_bandwidth(threads) * 1e-9), " GB/s"));
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace bench
