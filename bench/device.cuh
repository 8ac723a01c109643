#pragma once
// What the CUDA benchmarks share: times of work on a device, its copy bandwidth as the ceiling that figures are
// compared with, and random data made where it is needed.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "ratplus/cuda.cuh"

namespace bench {

using ratplus::bfloat16;
using ratplus::index_t;
using device_context = ratplus::cuda::context;
template <class T, int R>
using device_tensor = ratplus::tensor<T, R, ratplus::cuda::space>;

/// Median milliseconds of `repeats` runs of f after two that do not count.
template <class F>
double milliseconds(device_context& ctx, int repeats, F&& f) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = -2; i < repeats; ++i) {
    cudaEventRecord(begin, ctx.stream());
    f();
    cudaEventRecord(end, ctx.stream());
    ctx.synchronize();
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (i >= 0) times.push_back(ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

/// A pause before a measurement, whatever is measured. A device that has just multiplied matrices for a second is held
/// at lower clocks by its power limit for a while after: attention that takes 2.5 ms took 2.9 right after dense.
inline void rest() { std::this_thread::sleep_for(std::chrono::milliseconds(300)); }

template <class T>
__global__ void random_kernel(T* x, index_t n, unsigned seed, float deviation) {
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<index_t>(gridDim.x) * blockDim.x) {
    const double u = ratplus::uniform(seed, static_cast<std::uint64_t>(i), 0);
    x[i] = ratplus::cuda::detail::from_float<T>(deviation * static_cast<float>((2 * u - 1) * 1.7320508));
  }
}

/// Elements of mean 0 and the given standard deviation.
template <class T, int R>
device_tensor<T, R> random_tensor(device_context& ctx, ratplus::extents<R> shape, unsigned seed, float deviation = 1) {
  device_tensor<T, R> x(shape);
  random_kernel<<<1024, 256, 0, ctx.stream()>>>(x.data(), x.size(), seed, deviation);
  return x;
}

/// Weights of a model as its `initialise` would draw them, made on the device: a billion normal numbers take a host
/// long.
template <class Model>
void initialise(device_context& ctx, Model& model) {
  for (const auto& e : model.layout().entries()) {
    const ratplus::view<float, 1> x = model.parameters().slice(0, e.offset, e.offset + e.size());
    if (e.is_norm())
      ratplus::fill(ctx, x, 1.0f);
    else
      random_kernel<<<1024, 256, 0, ctx.stream()>>>(x.data(), x.size(), static_cast<unsigned>(e.offset), 0.02f);
  }
  model.parameters_changed(ctx);
}

template <class T, int R>
std::vector<float> on_host(device_context& ctx, const device_tensor<T, R>& x) {
  std::vector<T> all(static_cast<std::size_t>(x.size()));
  ratplus::download(ctx, x.as(x.size()), all.data());
  return {all.begin(), all.end()};
}

/// Bytes read and written per second by copying `bytes`, in TB/s.
inline double copy_bandwidth(device_context& ctx, std::size_t bytes = std::size_t{4} << 30) {
  auto from = ratplus::make_tensor<char, ratplus::cuda::space>(bytes),
       to = ratplus::make_tensor<char, ratplus::cuda::space>(bytes);
  cudaMemsetAsync(from.data(), 1, bytes, ctx.stream());
  const double ms = milliseconds(
      ctx, 9, [&] { cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, ctx.stream()); });
  return 2 * static_cast<double>(bytes) / ms * 1e-9;
}

}  // namespace bench
