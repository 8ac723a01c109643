// What the CUDA backend has and no other does: a device that may be missing or full, memory ordered with the work on
// it, a counter of launches, and scratch memory that is shared by operations.

#include "ratplus/backend/cuda/matmul.cuh"
#include "ratplus/backend/cuda/memory.cuh"
#include "ratplus/backend/cuda/norm.cuh"
#include "ratplus/backend/cuda/scan.cuh"
#include "ratplus/recurrence/gated_average.hpp"
#include "support/array.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

using namespace ratplus_tests;
namespace rc = ratplus::cuda;

TEST_CASE("a device that does not exist is named") {
  CHECK_THROWS_WITH(rc::context(1000), contains("no device 1000"));
  CHECK_THROWS_AS(rc::context(-1), rc::cuda_error);
}

TEST_CASE("memory that does not exist is refused with the sizes, and the device remains usable") {
  rc::context ctx;
  const auto asked = static_cast<index_t>(ctx.properties().totalGlobalMem) * 2;
  CHECK_THROWS_WITH((ratplus::make_tensor<char, rc::space>(asked)), contains(std::to_string(asked) + " bytes asked"));
  auto x = ratplus::make_tensor<float, rc::space>(7);
  ratplus::fill(ctx, x.view(), 3.0f);
  std::vector<float> back(7);
  ratplus::download(ctx, std::as_const(x).view(), back.data());
  CHECK(back == std::vector<float>(7, 3.0f));
}

TEST_CASE("failures say what would work") {
  using rc::detail::check;
  CHECK_NOTHROW(check(cudaSuccess, "attend"));
  CHECK_THROWS_WITH(check(cudaErrorNoDevice, "cuda: no device"), contains("compute capability 8.0 or higher"));
  CHECK_THROWS_WITH(check(cudaErrorNoKernelImageForDevice, "attend"), contains("attend: ") && contains("sm_90a"));
  CHECK_THROWS_WITH(check(cudaErrorMisalignedAddress, "scan"), contains("multiples of 16 bytes"));
  CHECK_THROWS_AS(check(cudaErrorInvalidValue, "scan"), rc::cuda_error);
}

TEST_CASE("launches are counted") {
  rc::context ctx;
  auto x = ratplus::make_tensor<float, rc::space>(5);
  const index_t before = ctx.launches();
  ratplus::fill(ctx, x.view(), 1.0f);
  CHECK(ctx.launches() == before + 1);
}

TEST_CASE("a tensor may die before the work on it is done") {
  rc::context ctx;
  constexpr index_t n = 1 << 22;
  auto sum = ratplus::make_tensor<float, rc::space>(n);
  for (int round = 0; round < 20; ++round) {
    auto x = ratplus::make_tensor<float, rc::space>(n);
    ratplus::fill(ctx, x.view(), static_cast<float>(round));
    ratplus::copy(ctx, std::as_const(x).view(), sum.view());
  }  // each x is given back, and handed out again, while its fill and copy are still queued
  std::vector<float> back(n);
  ratplus::download(ctx, std::as_const(sum).view(), back.data());
  CHECK(back == std::vector<float>(n, 19.0f));
}

TEST_CASE("scratch memory grows between operations that use it") {
  rc::context ctx;
  void* small = ctx.scratch(1000);
  CHECK(ctx.scratch(10) == small);
  CHECK(ctx.scratch(std::size_t{1} << 26) != nullptr);
  const unsigned* counters = ctx.counters(10000);
  std::vector<unsigned> back(10000, 1);
  ratplus::download(ctx, ratplus::as_view(counters, 10000), back.data());
  CHECK(back == std::vector<unsigned>(10000, 0));
}

TEST_CASE("a deterministic scan has the same bits in every run") {
  rc::context ctx;
  ctx.deterministic = true;
  constexpr index_t T = 6000, H = 2, d = 64;
  const auto filled = [&](unsigned seed) {
    std::vector<float> host(T * H * d);
    for (float& x : host) x = static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.0f;
    auto there = ratplus::make_tensor<float, rc::space>(1, T, H, d);
    ratplus::upload(ctx, static_cast<const float*>(host.data()), there.as(T * H * d));
    return there;
  };
  const auto k = filled(1), v = filled(2), gate = filled(3);
  const auto run = [&] {
    auto k_out = ratplus::make_tensor<float, rc::space>(1, T, H, d);
    auto v_out = ratplus::make_tensor<float, rc::space>(1, T, H, d);
    ratplus::scan_forward_args<float> p;
    p.k = k.view().swap(1, 2), p.v = v.view().swap(1, 2), p.gate = gate.view().swap(1, 2);
    p.k_out = k_out.view().swap(1, 2), p.v_out = v_out.view().swap(1, 2);
    ratplus::scan_forward(ctx, ratplus::gated_average{}, p);
    std::vector<float> back(2 * T * H * d);
    ratplus::download(ctx, std::as_const(k_out).as(T * H * d), back.data());
    ratplus::download(ctx, std::as_const(v_out).as(T * H * d), back.data() + T * H * d);
    return back;
  };
  const auto first = run();
  for (int i = 0; i < 10; ++i) CHECK(run() == first);
}
