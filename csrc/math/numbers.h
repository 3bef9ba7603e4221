// Numbers: the arithmetic of one element that all formulas share, conversions between dtypes, rounding to nearest and
// stochastic rounding, random numbers.
//
// The files of this folder hold all arithmetic of the native backends, one functor a formula. Every operation is one
// rounding, in the order of torch.optim's for-loop; `fma` stands where ATen rounds a product and a sum once. The
// compilers must not contract: -ffp-contract=off, -fmad=false. Scalars are float64 until one final cast. T is float for
// float32, bfloat16 and float16, double for float64. Twin of fastsam/ops/numbers.py and
// the reference: a formula changes in both.
//
// Each instruction set has its own namespace. Otherwise the linker might keep one set's copy of an inline function for
// all of them.
#pragma once

#include <cmath>
#include <cstdint>

#include "../tables.h"

#ifdef __CUDACC__
#define FASTSAM_HD __host__ __device__ inline
#else
#define FASTSAM_HD inline
#endif

#ifndef FASTSAM_ISA
#ifdef __CUDACC__
#define FASTSAM_ISA cuda
#else
#define FASTSAM_ISA baseline
#endif
#endif

namespace fastsam::FASTSAM_ISA {

FASTSAM_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FASTSAM_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }
FASTSAM_HD float sqrt(float x) { return ::sqrtf(x); }
FASTSAM_HD double sqrt(double x) { return ::sqrt(x); }
FASTSAM_HD float abs(float x) { return ::fabsf(x); }
FASTSAM_HD double abs(double x) { return ::fabs(x); }
FASTSAM_HD bool is_finite(double x) { return x - x == 0; }

// Whether a group's row has this flag.
FASTSAM_HD bool has(const Row& row, Flag flag) { return static_cast<int>(row.flags) & flag; }

// base^n by repeated squaring: the same bits on every machine, which pow is not.
FASTSAM_HD double ipow(double base, uint32_t n) {
  double result = 1.0;
  for (; n; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

union FloatBits {
  float value;
  uint32_t bits;
};
union DoubleBits {
  double value;
  uint64_t bits;
};
FASTSAM_HD uint32_t to_bits(float x) { return FloatBits{x}.bits; }
FASTSAM_HD uint64_t to_bits(double x) { return DoubleBits{x}.bits; }
FASTSAM_HD float from_bits(uint32_t bits) {
  FloatBits number;
  number.bits = bits;
  return number.value;
}
FASTSAM_HD double from_bits(uint64_t bits) {
  DoubleBits number;
  number.bits = bits;
  return number.value;
}

// flag ? a : b, for flags that are the same for all elements. GCC makes one loop for each value of up to three such
// flags and vectorises it, but it vectorises no loop that still has such a condition in it. Functors with more flags
// use `select`. The value that is not chosen may be anything, also NaN.
template <class T>
FASTSAM_HD T select(bool flag, T a, T b) {
  using Bits = decltype(to_bits(a));
  const Bits mask = Bits(0) - flag;
  return from_bits((to_bits(a) & mask) | (to_bits(b) & ~mask));
}

// a + weight (b - a), from whichever end is nearer.
template <class T>
FASTSAM_HD T lerp(T a, T b, T weight) {
  return select(weight < T(0.5), fma(weight, b - a, a), fma(weight - T(1), b - a, b));
}

// torch.maximum: a NaN on either side stays.
template <class T>
FASTSAM_HD T maximum(T a, T b) {
  return (b > a) | (b != b) ? b : a;
}

// torch.sign: 0 for 0 and for NaN.
template <class T>
FASTSAM_HD T sign(T x) {
  return static_cast<T>((x > 0) - (x < 0));
}

// ---- Low precision is widened exactly, and results are rounded once, to nearest even. NaN payloads are not kept.

enum class bfloat16 : uint16_t {};  // the bits; enumerations, because compilers vectorise no loads of structures
enum class float16 : uint16_t {};

FASTSAM_HD float widen(float x) { return x; }
FASTSAM_HD double widen(double x) { return x; }
FASTSAM_HD float widen(bfloat16 x) { return from_bits(static_cast<uint32_t>(x) << 16); }
FASTSAM_HD float widen(float16 x) {
  const uint32_t bits = static_cast<uint32_t>(x), sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  const uint32_t rebias = magnitude >= 0x7c00 ? 0x70000000 : 0x38000000;  // 224 << 23 for inf and NaN, 112 << 23
  const uint32_t subnormal = to_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return from_bits(sign | (magnitude < 0x0400 ? subnormal : (magnitude << 13) + rebias));
}

FASTSAM_HD void narrow(float x, float& out) { out = x; }
FASTSAM_HD void narrow(double x, double& out) { out = x; }
FASTSAM_HD void narrow(float x, bfloat16& out) {
  const uint32_t bits = to_bits(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out = static_cast<bfloat16>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
FASTSAM_HD void narrow(float x, float16& out) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffff;
  const uint32_t clamped = magnitude < 0x47800000 ? magnitude : 0x47800000;  // 2^16 and beyond are infinity
  const uint32_t normal = ((clamped + 0xfff + (clamped >> 13 & 1)) >> 13) - (112 << 10);
  // The last place of a float between 0.5 and 1 is 2^-24, float16's smallest step: the addition rounds to it.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  out = static_cast<float16>((bits >> 16 & 0x8000) | (magnitude > 0x7f800000 ? 0x7e00 : finite));
}

// ---- Stochastic rounding: up or down, with the odds that make the result right on average. A value that the dtype
// holds stays, and so do infinities and NaN.

// Philox4x32-7 (Salmon et al., SC 2011): four words of random bits for each counter of four words; 7 rounds are the
// fewest that pass the tests of its authors.
constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhilox0 = 0xD2511F53u, kPhilox1 = 0xCD9E8D57u;  // factors
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;      // what a key grows by

struct Random {  // eight numbers of 16 bits
  uint32_t words[4];
  FASTSAM_HD uint32_t operator[](int i) const { return words[i / 2] >> 16 * (i % 2) & 0xffff; }
};
FASTSAM_HD Random philox(Random counter, uint32_t key0, uint32_t key1) {
  uint32_t a = counter.words[0], b = counter.words[1], c = counter.words[2], d = counter.words[3];
  for (int i = 0; i < kPhiloxRounds; i++) {
    const uint64_t first = static_cast<uint64_t>(a) * kPhilox0, second = static_cast<uint64_t>(c) * kPhilox1;
    a = static_cast<uint32_t>(second >> 32) ^ b ^ key0;
    b = static_cast<uint32_t>(second);
    c = static_cast<uint32_t>(first >> 32) ^ d ^ key1;
    d = static_cast<uint32_t>(first);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return {{a, b, c, d}};
}

// A parameter's random numbers in one step: those of elements 8 block to 8 block + 7 in a stream.
struct Noise {
  uint32_t key0, key1, index, step;
  FASTSAM_HD Noise(const Row& row, int32_t index, int64_t step)
      : key0(static_cast<uint32_t>(static_cast<uint64_t>(row.seed))),
        key1(static_cast<uint32_t>(static_cast<uint64_t>(row.seed) >> 32)),
        index(static_cast<uint32_t>(index)),
        step(static_cast<uint32_t>(step)) {}
  FASTSAM_HD Random operator()(int64_t block, int stream) const {
    return philox({{static_cast<uint32_t>(block), index, step, static_cast<uint32_t>(stream)}}, key0, key1);
  }
};

// `noise` is below 2^16. It is added to the bits that are cut off, and may carry into the bits that stay.
FASTSAM_HD void narrow(float x, uint32_t noise, bfloat16& out) {
  const uint32_t bits = to_bits(x);
  out = static_cast<bfloat16>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + noise) >> 16);
}
FASTSAM_HD void narrow(float x, uint32_t noise, float16& out) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffff;
  // Signed numbers, because compilers vectorise their loops. Float16 has 13 bits less than float32, so 13 bits of
  // noise are enough; 2^16 and beyond are infinity.
  const int32_t short_noise = static_cast<int32_t>(noise >> 3);
  const int32_t clamped = static_cast<int32_t>(magnitude < 0x47800000 ? magnitude : 0x47800000);
  const int32_t normal = ((clamped + short_noise) >> 13) - (112 << 10);
  // In units of float16's smallest step. Where the number is normal this is not used; 0 keeps it in range.
  const float steps =
      from_bits(magnitude < 0x38800000 ? magnitude : 0) * 0x1p24f + static_cast<float>(short_noise) * 0x1p-13f;
  const int32_t subnormal = static_cast<int32_t>(steps);
  const int32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  out = static_cast<float16>((bits >> 16 & 0x8000) | static_cast<uint32_t>(magnitude > 0x7f800000 ? 0x7e00 : finite));
}
// A number as wide as the arithmetic is not rounded.
FASTSAM_HD void narrow(float x, uint32_t, float& out) { out = x; }
FASTSAM_HD void narrow(double x, uint32_t, double& out) { out = x; }

template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

}  // namespace fastsam::FASTSAM_ISA
