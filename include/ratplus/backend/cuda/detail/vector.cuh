#pragma once
// Data in registers: V consecutive elements of a row are one memory access of up to 16 bytes and are computed with as
// floats. `lane` is the scalar that recurrence cells see on the device: a float with the fast exponential.

#include <cuda_bf16.h>

#include <cstdint>

#include "ratplus/core/scalar.hpp"
#include "ratplus/core/view.hpp"

namespace ratplus::cuda::detail {

template <class T, int V>
struct alignas(sizeof(T) * V) packed {
  T at[V];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <class T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    bfloat16 y;
    y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    return y;
  } else {
    return x;
  }
}

template <class T, int V>
__device__ packed<T, V> load(const T* p) {
  return *reinterpret_cast<const packed<T, V>*>(p);
}

template <class T, int V>
__device__ void widen(const packed<T, V>& x, float (&y)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] = to_float(x.at[i]);
}

template <class T, int V>
__device__ void load(const T* p, float (&y)[V]) {
  widen(load<T, V>(p), y);
}

template <class T, int V>
__device__ packed<T, V> narrow(const float (&x)[V]) {
  packed<T, V> y;
  if constexpr (std::is_same_v<T, bfloat16> && V % 2 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i], x[i + 1]);
      y.at[i].bits = __bfloat16_as_ushort(pair.x);
      y.at[i + 1].bits = __bfloat16_as_ushort(pair.y);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) y.at[i] = from_float<T>(x[i]);
  }
  return y;
}

template <class T, int V>
__device__ void store(T* p, const float (&x)[V]) {
  *reinterpret_cast<packed<T, V>*>(p) = narrow<T, V>(x);
}

/// Largest access of T.
template <class T>
inline constexpr int widest = 16 / static_cast<int>(sizeof(T));

/// Whether every row of `v` may be read V elements at a time from its beginning.
template <class T, int R>
[[nodiscard]] bool aligned(const view<T, R>& v, int V) {
  if (reinterpret_cast<std::uintptr_t>(v.data()) % (sizeof(T) * static_cast<unsigned>(V)) != 0) return false;
  for (int i = 0; i < R - 1; ++i)
    if (v.extent(i) > 1 && v.stride(i) % V != 0) return false;
  return true;
}

/// x to the power e, sigmoid: MUFU-based, relative error a few 2⁻²².
__device__ inline float fast_sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

/// The scalar of a cell on the device.
struct lane {
  float x;

  lane() = default;
  RATPLUS_HD constexpr lane(float value) : x(value) {}
  RATPLUS_HD constexpr explicit lane(double value) : x(static_cast<float>(value)) {}
  RATPLUS_HD constexpr explicit lane(int value) : x(static_cast<float>(value)) {}

  RATPLUS_HD friend constexpr lane operator+(lane a, lane b) { return {a.x + b.x}; }
  RATPLUS_HD friend constexpr lane operator-(lane a, lane b) { return {a.x - b.x}; }
  RATPLUS_HD friend constexpr lane operator*(lane a, lane b) { return {a.x * b.x}; }
  RATPLUS_HD friend constexpr lane operator/(lane a, lane b) { return {a.x / b.x}; }
  RATPLUS_HD friend constexpr lane operator-(lane a) { return {-a.x}; }
  RATPLUS_HD constexpr lane& operator+=(lane b) { return *this = *this + b; }
  RATPLUS_HD constexpr lane& operator-=(lane b) { return *this = *this - b; }
  RATPLUS_HD constexpr lane& operator*=(lane b) { return *this = *this * b; }
  RATPLUS_HD constexpr lane& operator/=(lane b) { return *this = *this / b; }
  __device__ friend lane sigmoid(lane a) { return {fast_sigmoid(a.x)}; }
};

}  // namespace ratplus::cuda::detail
