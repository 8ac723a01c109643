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

/// V consecutive channels as stored, in whole registers: pairs of bfloat16 stay together.
template <class T, int V>
struct raw_channels {
  static constexpr int words = V * static_cast<int>(sizeof(T)) / 4;
  static constexpr int piece = words < 4 ? words : 4;  // of one access
  unsigned word[words];

  __device__ void read(const T* p) {
#pragma unroll
    for (int i = 0; i < words; i += piece) {
      const auto all = reinterpret_cast<const packed<unsigned, piece>*>(p)[i / piece];
#pragma unroll
      for (int j = 0; j < piece; ++j) word[i + j] = all.at[j];
    }
  }
  /// The same from global memory; the second-level cache need not keep it.
  __device__ void read_once(const T* p) {
    if constexpr (piece == 4) {
      std::uint64_t once;
      asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
#pragma unroll
      for (int i = 0; i < words; i += 4)
        asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                     : "=r"(word[i]), "=r"(word[i + 1]), "=r"(word[i + 2]), "=r"(word[i + 3])
                     : "l"(__cvta_generic_to_global(p) + 4 * i), "l"(once));
    } else {
      read(p);
    }
  }
  __device__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(word[i]);
    else
      return __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u);
  }
};
template <>
struct raw_channels<bfloat16, 1> {
  static constexpr int words = 1;
  unsigned word[1];

  __device__ void read(const bfloat16* p) { word[0] = p->bits; }
  __device__ void read_once(const bfloat16* p) { read(p); }
  __device__ float operator[](int) const { return __uint_as_float(word[0] << 16); }
};

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

/// 2^x and 1 / x as the hardware has them: relative error about 2⁻²², denormals are zero.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

inline constexpr float log2_of_e = 1.44269504f;

__device__ inline float fast_sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp2(-log2_of_e * x)); }

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
