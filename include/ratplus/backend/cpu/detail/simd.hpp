#pragma once
// pack: as many floats as one register of the target holds, on the vector extensions of GCC and clang, which compile to
// the same arithmetic on every processor. No intrinsics, no run-time dispatch: the width follows the compiler's target.
//
// Cells of the recurrence are called with packs as their scalar, so pack has arithmetic, construction from a float and
// `sigmoid`. Elementary functions are accurate to a few units in the last place; no fast-math is assumed.

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "ratplus/core/index.hpp"
#include "ratplus/core/scalar.hpp"

#define RATPLUS_INLINE inline __attribute__((always_inline))
// For lambdas inside kernels: [&](…) RATPLUS_INLINE_LAMBDA { … }
#define RATPLUS_INLINE_LAMBDA __attribute__((always_inline))

namespace ratplus::cpu::detail {

#if defined(__AVX512F__)
inline constexpr int pack_width = 16;
#elif defined(__AVX__)
inline constexpr int pack_width = 8;
#else
inline constexpr int pack_width = 4;
#endif

struct pack {
  using floats = float __attribute__((vector_size(4 * pack_width)));
  using ints = std::int32_t __attribute__((vector_size(4 * pack_width)));
  floats v;

  pack() = default;
  RATPLUS_INLINE pack(floats x) : v(x) {}
  RATPLUS_INLINE explicit pack(float x) : v(x - floats{}) {}  // x − 0: keeps the sign of a zero

  friend RATPLUS_INLINE pack operator+(pack a, pack b) { return a.v + b.v; }
  friend RATPLUS_INLINE pack operator-(pack a, pack b) { return a.v - b.v; }
  friend RATPLUS_INLINE pack operator*(pack a, pack b) { return a.v * b.v; }
  friend RATPLUS_INLINE pack operator/(pack a, pack b) { return a.v / b.v; }
  friend RATPLUS_INLINE pack operator-(pack a) { return -a.v; }
  RATPLUS_INLINE pack& operator+=(pack b) { return *this = *this + b; }
  RATPLUS_INLINE pack& operator*=(pack b) { return *this = *this * b; }
};

/// Lanes chosen by a comparison.
using mask = pack::ints;

RATPLUS_INLINE pack select(mask chosen, pack yes, pack no) { return chosen ? yes.v : no.v; }

// One expression, so that both compilers contract it where the target has the instruction.
RATPLUS_INLINE pack multiply_add(pack a, pack b, pack c) { return a.v * b.v + c.v; }
RATPLUS_INLINE pack maximum(pack a, pack b) { return a.v > b.v ? a.v : b.v; }

RATPLUS_INLINE pack::ints bits(pack x) { return reinterpret_cast<pack::ints>(x.v); }
RATPLUS_INLINE pack from_bits(pack::ints x) { return reinterpret_cast<pack::floats>(x); }
RATPLUS_INLINE pack absolute(pack x) { return from_bits(bits(x) & 0x7fffffff); }

RATPLUS_INLINE pack load(const float* p) {
  pack x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
RATPLUS_INLINE void store(float* p, pack x) { std::memcpy(p, &x, sizeof x); }
RATPLUS_INLINE pack::ints load(const std::int32_t* p) {
  pack::ints x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

RATPLUS_INLINE pack load(const bfloat16* p) {
  using halves = std::uint16_t __attribute__((vector_size(2 * pack_width)));
  halves x;
  std::memcpy(&x, p, sizeof x);
  return from_bits(__builtin_convertvector(x, pack::ints) << 16);
}

/// The first `count` lanes, the others zero. Never touches memory beyond them.
template <class T>
RATPLUS_INLINE pack load_part(const T* p, index_t count) {
  T part[pack_width] = {};
  std::memcpy(part, p, static_cast<std::size_t>(count) * sizeof(T));
  return load(part);
}
RATPLUS_INLINE void store_part(float* p, pack x, index_t count) {
  std::memcpy(p, &x, static_cast<std::size_t>(count) * sizeof(float));
}

RATPLUS_INLINE float sum(pack x) {
  float part[pack_width];
  store(part, x);
  for (int half = pack_width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}
RATPLUS_INLINE float maximum(pack x) {
  float part[pack_width];
  store(part, x);
  for (int half = pack_width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
  return part[0];
}

/// Calls f(0), …, f(N − 1) with compile-time numbers, so that arrays of packs stay in registers.
template <int N, class F>
RATPLUS_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) RATPLUS_INLINE_LAMBDA { (f(std::integral_constant<int, I>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

/// c₀ + x (c₁ + x (c₂ + …)).
template <class... C>
RATPLUS_INLINE pack polynomial(pack x, float c0, C... more) {
  if constexpr (sizeof...(more) == 0)
    return pack(c0);
  else
    return multiply_add(polynomial(x, more...), x, pack(c0));
}

/// p · 2^n, for an n that was found by adding 1.5 · 2^23 and so stands in the low bits of `shifted`: they are added to
/// the exponent. Unsigned, because the higher bits are pushed out.
RATPLUS_INLINE pack times_power_of_2(pack p, pack shifted) {
  using words = std::uint32_t __attribute__((vector_size(4 * pack_width)));
  const words sum = reinterpret_cast<words>(p.v) + (reinterpret_cast<words>(shifted.v) << 23);
  return reinterpret_cast<pack::floats>(sum);
}

/// 2^x, relative error below 2e-7; x < −126 gives 2^−126, x > 127.99 is the caller's to avoid. NaN stays NaN.
///
/// x = n + r with n the nearest integer; a polynomial gives 2^r.
RATPLUS_INLINE pack exp2(pack x) {
  const pack floor(-126.0f), magic(12582912.0f);
  x = select(x.v < floor.v, floor, x);
  const pack shifted = x + magic;
  const pack r = x - (shifted - magic);
  const pack p = polynomial(r, 1.0f, 6.931472029e-1f, 2.402264791e-1f, 5.550332470e-2f, 9.618437366e-3f,
                            1.339887487e-3f, 1.535336063e-4f);
  return times_power_of_2(p, shifted);
}

inline constexpr float log2_e = 1.44269504088896341f;
inline constexpr float ln_2 = 0.693147180559945309f;

/// e^x, relative error below 2e-7; x < −87.3 gives 2^−126, x > 88 is the caller's to avoid. NaN stays NaN.
RATPLUS_INLINE pack exp(pack x) {
  const pack floor(-87.3f), magic(12582912.0f);
  x = select(x.v < floor.v, floor, x);
  const pack shifted = multiply_add(x, pack(log2_e), magic), n = shifted - magic;
  // ln 2 in two pieces, the product of n with the first of which is exact.
  const pack r = multiply_add(n, pack(2.12194440e-4f), multiply_add(n, pack(-0.693359375f), x));
  const pack p =
      polynomial(r, 1.0f, 1.0f, 4.999999345e-1f, 1.666652064e-1f, 4.166838793e-2f, 8.368715412e-3f, 1.381459986e-3f);
  return times_power_of_2(p, shifted);
}

/// 1 / (1 + e^{−x}), without overflow for any x. Found by argument-dependent lookup from cells.
RATPLUS_INLINE pack sigmoid(pack x) {
  const pack e = exp(-absolute(x)), one(1.0f);
  return select(x.v >= pack::floats{}, one, e) / (one + e);
}

/// Lanes of `a` and `b` alternating, from their lower (0) or upper (1) halves.
template <int half, int... I>
RATPLUS_INLINE pack interleave(pack a, pack b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a.v, b.v, ((I + half * pack_width) / 2 + (I % 2) * pack_width)...);
}

/// Rows and columns exchanged: log2(pack_width) stages, each interleaving the rows of one half with those of the other.
template <int stage = 1>
RATPLUS_INLINE void transpose(pack (&x)[pack_width]) {
  if constexpr (stage < pack_width) {
    constexpr int half = pack_width / 2;
    constexpr auto lanes = std::make_integer_sequence<int, pack_width>{};
    pack y[pack_width];
    unroll<half>([&](auto i) RATPLUS_INLINE_LAMBDA {
      y[2 * i] = interleave<0>(x[i], x[i + half], lanes);
      y[2 * i + 1] = interleave<1>(x[i], x[i + half], lanes);
    });
    transpose<2 * stage>(y);
    unroll<pack_width>([&](auto i) RATPLUS_INLINE_LAMBDA { x[i] = y[i]; });
  }
}

}  // namespace ratplus::cpu::detail
