#pragma once
// The ceilings of the machine a benchmark runs on, measured when first asked for: float32 multiply-adds per second from
// registers, and the bandwidths of reading and copying memory far larger than the caches. The best of several short
// runs: a ceiling, not a mean.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <map>
#include <thread>
#include <vector>

namespace bench {

namespace detail {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
#elif defined(__AVX__)
inline constexpr int vector_bytes = 32;
#else
inline constexpr int vector_bytes = 16;
#endif
using vector [[gnu::vector_size(vector_bytes)]] = float;
inline constexpr int lanes = vector_bytes / 4;

/// Seconds of the slowest of `threads` threads running work(thread) at once, best of `runs`.
template <class Work>
double best_seconds(int threads, int runs, Work work) {
  double best = 1e30;
  for (int run = 0; run < runs; ++run) {
    std::vector<std::thread> team;
    const auto start = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; ++t) team.emplace_back(work, t);
    for (auto& one : team) one.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

inline volatile float sink;

/// Twelve independent chains hide the latency of one.
inline void multiply_add(long repeats) {
  constexpr int chains = 12;
  vector sum[chains];
  const float start = sink;
  for (int i = 0; i < chains; ++i) sum[i] = vector{} + (start + static_cast<float>(i));
  const vector a = vector{} + (0.999f + start), b = vector{} + 0.001f;
  for (long n = 0; n < repeats; ++n)
    for (int i = 0; i < chains; ++i) sum[i] = sum[i] * a + b;
  vector total{};
  for (const vector& s : sum) total += s;
  sink = sink * 0 + total[0] * 0;
}

}  // namespace detail

/// FLOP/s (a multiply-add is two) of float32 on `threads` threads.
inline double fma_peak(int threads) {
  static std::map<int, double> known;
  if (!known.contains(threads)) {
    constexpr long repeats = 4'000'000;
    const double seconds = detail::best_seconds(threads, 7, [](int) { detail::multiply_add(repeats); });
    known[threads] = 2.0 * 12 * detail::lanes * static_cast<double>(repeats) * threads / seconds;
  }
  return known[threads];
}

namespace detail {
inline constexpr std::size_t floats = std::size_t{1} << 26;  // 256 MiB
inline std::vector<float>& memory(int which) {
  static std::vector<float> data[2] = {std::vector<float>(floats, 1.0f), std::vector<float>(floats, 2.0f)};
  return data[which];
}
}  // namespace detail

/// Bytes per second read.
inline double read_bandwidth(int threads) {
  static std::map<int, double> known;
  if (!known.contains(threads)) {
    const float* data = detail::memory(0).data();
    const std::size_t part = detail::floats / static_cast<std::size_t>(threads) / 256 * 256;
    const double seconds = detail::best_seconds(threads, 7, [=](int t) {
      const float* from = data + static_cast<std::size_t>(t) * part;
      detail::vector sum[8] = {};
      for (std::size_t i = 0; i < part; i += 8 * detail::lanes)
        for (int j = 0; j < 8; ++j) {
          detail::vector x;
          __builtin_memcpy(&x, from + i + static_cast<std::size_t>(j * detail::lanes), sizeof x);
          sum[j] += x;
        }
      for (int j = 1; j < 8; ++j) sum[0] += sum[j];
      detail::sink = sum[0][0] * 0;
    });
    known[threads] = 4.0 * static_cast<double>(part) * threads / seconds;
  }
  return known[threads];
}

/// Bytes per second, read plus written.
inline double copy_bandwidth(int threads) {
  static std::map<int, double> known;
  if (!known.contains(threads)) {
    const float* from = detail::memory(0).data();
    float* to = detail::memory(1).data();
    const std::size_t part = detail::floats / static_cast<std::size_t>(threads);
    const double seconds = detail::best_seconds(threads, 7, [=](int t) {
      const std::size_t begin = static_cast<std::size_t>(t) * part;
      std::copy(from + begin, from + begin + part, to + begin);
    });
    known[threads] = 8.0 * static_cast<double>(part) * threads / seconds;
  }
  return known[threads];
}

}  // namespace bench
