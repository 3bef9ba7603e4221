// How elements reach the arithmetic and how results reach memory: tiles on the stack, and the CPU kernels' only
// intrinsics.
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

// ---- Load: n elements for a loop to widen(), where they are or in a tile.

inline const float* load(const float* from, float*, int) { return from; }
inline const double* load(const double* from, double*, int) { return from; }
inline const bfloat16* load(const bfloat16* from, float*, int) { return from; }
inline const float* load(const float16* from, float* tile, int n) {
  int i = 0;
#if defined(__F16C__)  // widen() in a loop takes three times as long
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(tile + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < n; i++) tile[i] = widen(from[i]);
  return tile;
}

// The same for states, which the loop overwrites: in place, or in a tile that unload() brings back.
inline float* load(float* from, float*, int) { return from; }
inline double* load(double* from, double*, int) { return from; }
inline float* load(bfloat16* from, float* tile, int n) {
  for (int i = 0; i < n; i++) tile[i] = widen(from[i]);
  return tile;
}
inline float* load(float16* from, float* tile, int n) {
  load(static_cast<const float16*>(from), tile, n);
  return tile;
}

// ---- Unload: a tile of results in storage precision, where it is or in `to`.
inline const float* unload(const float* tile, float*, int) { return tile; }
inline const double* unload(const double* tile, double*, int) { return tile; }
inline const bfloat16* unload(const float* tile, bfloat16* to, int n) {
  for (int i = 0; i < n; i++) narrow(tile[i], to[i]);
  return to;
}
inline const float16* unload(const float* tile, float16* to, int n) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(tile + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), rounded);
  }
#endif
  for (; i < n; i++) narrow(tile[i], to[i]);
  return to;
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

// Copy n elements, with streaming stores from the first whole cache line on. They spare the read of lines that are only
// written, but evict them: launch.cpp decides. In perturb_, which has read w, streaming it still gains 15 %.
template <class S>
inline void store(S* to, const S* from, int n, bool stream) {
  char* const dst = reinterpret_cast<char*>(to);
  const char* const src = reinterpret_cast<const char*>(from);
  const int64_t bytes = n * static_cast<int64_t>(sizeof(S));
  const int64_t head = -reinterpret_cast<int64_t>(to) & (kLine - 1);
  if (!stream || bytes < head + kLine) {
    memcpy(dst, src, bytes);
    return;
  }
  memcpy(dst, src, head);
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine) stream_line(dst + i, src + i);
  memcpy(dst + i, src + i, bytes - i);
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
