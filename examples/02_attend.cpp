// One attention call under several patterns: the same queries, keys and values; the pattern is an argument of the call.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <ratplus/ratplus.hpp>

using namespace ratplus;

constexpr index_t B = 1, H = 4, T = 2048, d = 64;

tensor<float, 4> random_heads(unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  auto x = make_tensor<float>(B, H, T, d);
  for (index_t i = 0; i < x.size(); ++i) x.data()[i] = normal(engine);
  return x;
}

int main() {
  cpu::context ctx;  // all threads; reference::context runs the same calls as plain loops, also in double
  auto q = random_heads(1), k = random_heads(2), v = random_heads(3);
  auto out = make_tensor<float>(B, H, T, d), full = make_tensor<float>(B, H, T, d);

  // Calls attention; returns the milliseconds of the fastest of a few calls.
  const auto attend = [&](const auto& pattern, view<float, 4> result) {
    attend_forward_args<float> p;
    p.q = q;
    p.k = k;
    p.v = v;
    p.out = result;
    double fastest = 1e30;
    for (int repeat = 0; repeat < 7; ++repeat) {
      const auto start = std::chrono::steady_clock::now();
      attend_forward(ctx, pattern, p);
      const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
      fastest = std::fmin(fastest, took.count());
    }
    return fastest;
  };

  double dense_ms = 0;
  bool fine = true;
  const auto report = [&](const auto& pattern, tensor<float, 4>& result) {
    const double ms = attend(pattern, result);
    if (dense_ms == 0) dense_ms = ms;  // dense comes first
    double gap = 0, norm = 0;
    for (index_t i = 0; i < full.size(); ++i) {
      gap += std::pow(result.data()[i] - full.data()[i], 2.0);
      norm += std::pow(full.data()[i], 2.0);
    }
    const double share = static_cast<double>(keys_visited(pattern, T)) / static_cast<double>(keys_visited(dense{}, T));
    std::printf("%-27s %6.2f %% of the keys %8.2f ms, %5.2f of dense   differs from dense by %.2f\n",
                to_string(pattern).c_str(), 100 * share, ms, ms / dense_ms, std::sqrt(gap / norm));
    fine = fine && std::isfinite(gap);
  };

  // Random keys carry nothing of their neighbours, so leaving some out changes the result a lot. In a RAT+ model the
  // recurrence puts a summary of D positions into each key that a dilation of D keeps.
  report(dense{}, full);
  report(dilated<16>{}, out);
  report(dilated_local<16, 64>{}, out);
  report(parse_pattern("local:256+sinks:4"), out);
  return fine ? 0 : 1;
}
