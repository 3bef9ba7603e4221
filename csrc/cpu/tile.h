// How elements reach the arithmetic and how results reach memory: tiles on the stack, and the CPU kernels' only
// intrinsics. Here alone the loops know dtypes.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastsam::FASTSAM_ISA {

// Elements. With all operands a tile stays far below an L1 cache; 256 is no faster, 1024 loses 20 % in perturb_, and so
// do software prefetches: the processor's own run ahead across tiles.
constexpr int kTile = 512;
constexpr int kLine = 64;  // bytes

// Elements of some dtype in memory.
struct Elements {
  char* address;
  Dtype dtype;
  Elements operator+(int64_t n) const { return {address + n * kSizes[dtype], dtype}; }
};
inline bool is_low(Dtype dtype) { return kSizes[dtype] == 2; }

// ---- Load: n elements in the arithmetic's precision, where they are or in a tile. What is not for it comes back as it
// is: checks.h keeps float64 by itself.

inline void widen_all(const bfloat16* from, float* tile, int n) {
  for (int i = 0; i < n; i++) tile[i] = widen(from[i]);
}
inline void widen_all(const float16* from, float* tile, int n) {
  int i = 0;
#if defined(__F16C__)  // widen() in a loop takes three times as long
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(tile + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < n; i++) tile[i] = widen(from[i]);
}

inline double* load(Elements from, double*, int) { return reinterpret_cast<double*>(from.address); }
inline float* load(Elements from, float* tile, int n) {
  if (!is_low(from.dtype)) return reinterpret_cast<float*>(from.address);
  if (from.dtype == kBFloat16) {
    widen_all(reinterpret_cast<const bfloat16*>(from.address), tile, n);
  } else {
    widen_all(reinterpret_cast<const float16*>(from.address), tile, n);
  }
  return tile;
}

// ---- Random numbers of 16 bits for the elements of a tile that starts at `first` in its segment, a multiple of 8.

inline const uint16_t* draw(const Noise& noise, int64_t first, int stream, uint16_t* tile) {
  alignas(kLine) uint32_t words[kTile / 2];
  for (int i = 0; i < kTile / 8; i++) {
    const Random random = noise(first / 8 + i, stream);
    for (int k = 0; k < 4; k++) words[4 * i + k] = random.words[k];
  }
  for (int i = 0; i < kTile / 2; i++) {
    tile[2 * i] = static_cast<uint16_t>(words[i]);
    tile[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
  }
  return tile;
}

// ---- Unload: a tile of results in storage precision, where it is or in `to`; rounded to nearest if `noise` is null.

template <class S>
inline void narrow_all(const float* tile, const uint16_t* noise, S* to, int n) {
  for (int i = 0; i < n; i++) narrow(tile[i], static_cast<uint32_t>(noise[i]), to[i]);
}
inline void narrow_all(const float* tile, bfloat16* to, int n) {
  for (int i = 0; i < n; i++) narrow(tile[i], to[i]);
}
inline void narrow_all(const float* tile, float16* to, int n) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(tile + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), rounded);
  }
#endif
  for (; i < n; i++) narrow(tile[i], to[i]);
}

inline const char* unload(const double* tile, const uint16_t*, Elements, int) {
  return reinterpret_cast<const char*>(tile);
}
inline const char* unload(const float* tile, const uint16_t* noise, Elements to, int n) {
  if (!is_low(to.dtype)) return reinterpret_cast<const char*>(tile);
  if (to.dtype == kBFloat16) {
    bfloat16* const out = reinterpret_cast<bfloat16*>(to.address);
    noise ? narrow_all(tile, noise, out, n) : narrow_all(tile, out, n);
  } else {
    float16* const out = reinterpret_cast<float16*>(to.address);
    noise ? narrow_all(tile, noise, out, n) : narrow_all(tile, out, n);
  }
  return to.address;
}

// ---- Store.

// Write one cache line around the caches; `to` is aligned to it.
inline void stream_line(char* to, const char* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  for (int i = 0; i < kLine; i += 32) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), half);
  }
#elif defined(__x86_64__)
  for (int i = 0; i < kLine; i += 16) {
    const __m128i quarter = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), quarter);
  }
#else
  memcpy(to, from, kLine);
#endif
}

// Copy n elements of the same dtype, with streaming stores from the first whole cache line on. They spare the read of
// lines that are only written, but evict them: launch.cpp decides. In perturb_, which has read w, streaming it still
// gains 15 %.
inline void store(Elements to, const char* from, int n, bool stream) {
  const int64_t bytes = static_cast<int64_t>(n) * kSizes[to.dtype];
  const int64_t head = -reinterpret_cast<int64_t>(to.address) & (kLine - 1);
  if (!stream || bytes < head + kLine) {
    memcpy(to.address, from, bytes);
    return;
  }
  memcpy(to.address, from, head);
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine) stream_line(to.address + i, from + i);
  memcpy(to.address + i, from + i, bytes - i);
}

// Streamed stores are weakly ordered: make them visible before another thread is told that they are done.
inline void store_fence(bool stream) {
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#else
  (void)stream;
#endif
}

}  // namespace fastsam::FASTSAM_ISA
