// The products of a model's training step on the CPU, d = 512 and F = 2048 with 4096 tokens, and of the demo's, d =
// 128: forward (x Wᵀ), gradient of x (dy W) and of W (dyᵀ x), against the machine's FMA peak; and the same as one
// product of Eigen's on one thread, which shows what cutting it into blocks costs.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics, as Eigen uses them
#endif
#include <Eigen/Dense>

#include "measure.hpp"
#include "ratplus/backend/cpu/backend.hpp"

using namespace ratplus;

namespace {

struct shape {
  const char* name;
  index_t M, N, K;
  bool transpose_a, transpose_b;
};

struct operands {
  tensor<float, 2> a, b, c;

  explicit operands(const shape& s)
      : a(s.transpose_a ? make_tensor<float>(s.K, s.M) : make_tensor<float>(s.M, s.K)),
        b(s.transpose_b ? make_tensor<float>(s.N, s.K) : make_tensor<float>(s.K, s.N)),
        c(make_tensor<float>(s.M, s.N)) {
    bench::fill_random(a, 1);
    bench::fill_random(b, 2);
  }
};

template <class Ctx>
void multiply(Ctx& ctx, const shape& s, operands& o) {
  matmul_args<float> p{o.a, o.b, o.c, {}, s.transpose_a, s.transpose_b};
  matmul(ctx, p);
}

void product(benchmark::State& state, const shape& s, int threads) {
  cpu::context ctx(threads);
  {
    const shape small{s.name, 131, 67, 301, s.transpose_a, s.transpose_b};
    operands fast(small), slow(small);
    reference::context reference;
    multiply(ctx, small, fast);
    multiply(reference, small, slow);
    if (!bench::check(state, "matmul", bench::difference(fast.c.data(), slow.c.data(), fast.c.size()), 2e-6)) return;
  }
  operands o(s);
  const double time = bench::run(state, [&] { multiply(ctx, s, o); });
  bench::report_flops(state, time, 2.0 * static_cast<double>(s.M * s.N) * static_cast<double>(s.K), threads);
}

void eigen(benchmark::State& state, const shape& s) {
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Eigen::setNbThreads(1);
  operands o(s);
  const Eigen::Map<const matrix> a(o.a.data(), o.a.extent(0), o.a.extent(1)),
      b(o.b.data(), o.b.extent(0), o.b.extent(1));
  Eigen::Map<matrix> c(o.c.data(), s.M, s.N);
  const double time = bench::run(state, [&] {
    if (s.transpose_a)
      c.noalias() = a.transpose() * b;
    else if (s.transpose_b)
      c.noalias() = a * b.transpose();
    else
      c.noalias() = a * b;
  });
  bench::report_flops(state, time, 2.0 * static_cast<double>(s.M * s.N) * static_cast<double>(s.K), 1);
}

}  // namespace

int main(int argc, char** argv) {
  for (const shape& s :
       {shape{"d512/forward", 4096, 2048, 512, false, true}, shape{"d512/dx", 4096, 512, 2048, false, false},
        shape{"d512/dW", 2048, 512, 4096, true, false}, shape{"d128/forward", 4096, 640, 128, false, true},
        shape{"d128/dx", 4096, 128, 640, false, false}, shape{"d128/dW", 640, 128, 4096, true, false}}) {
    for (const int threads : {1, 2})
      benchmark::RegisterBenchmark(message(s.name, "/threads:", threads).c_str(),
                                   [=](benchmark::State& state) { product(state, s, threads); })
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
    benchmark::RegisterBenchmark(message(s.name, "/eigen/threads:1").c_str(),
                                 [=](benchmark::State& state) { eigen(state, s); })
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
  }
  return bench::run_all(argc, argv);
}
