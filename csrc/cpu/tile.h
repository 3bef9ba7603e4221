// How elements reach the arithmetic and how results reach memory: tiles on the stack, and the CPU kernels' only
// intrinsics. Here alone the loops know dtypes.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/numbers.h"

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

// ---- Load: n elements in the arithmetic's precision. Low precision is widened into a tile; other elements are used
// where they are. float64 is computed in float64, and checks.h lets no other dtype stand beside it.

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

// Noise's own loop takes two to three times as long as the intrinsics, which keep a counter's words in 64-bit lanes:
// products need their lower halves only, so that a word may have anything in its upper half.
#if defined(__AVX512F__)
inline const uint16_t* draw(const Noise& noise, int64_t first, int stream, uint16_t* tile) {
  const auto lanes = [](uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); };
  const __m512i ascending = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i low = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), high = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  for (int i = 0; i < kTile / 8; i += 8) {
    __m512i a = _mm512_add_epi64(lanes(first / 8 + i), ascending), b = lanes(noise.index), c = lanes(noise.step);
    __m512i d = lanes(stream);
    uint32_t key0 = noise.key0, key1 = noise.key1;
    for (int round = 0; round < kPhiloxRounds; round++) {
      const __m512i first_product = _mm512_mul_epu32(a, lanes(kPhilox0)), second = _mm512_mul_epu32(c, lanes(kPhilox1));
      a = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(second, 32), b), lanes(key0));
      b = second;
      c = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(first_product, 32), d), lanes(key1));
      d = first_product;
      key0 += kWeyl0;
      key1 += kWeyl1;
    }
    const __m512i ab = _mm512_mask_blend_epi32(0xaaaa, a, _mm512_slli_epi64(b, 32));
    const __m512i cd = _mm512_mask_blend_epi32(0xaaaa, c, _mm512_slli_epi64(d, 32));
    _mm512_storeu_si512(tile + 8 * i, _mm512_permutex2var_epi64(ab, low, cd));
    _mm512_storeu_si512(tile + 8 * i + 32, _mm512_permutex2var_epi64(ab, high, cd));
  }
  return tile;
}
#elif defined(__AVX2__)
inline const uint16_t* draw(const Noise& noise, int64_t first, int stream, uint16_t* tile) {
  const auto lanes = [](uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); };
  for (int i = 0; i < kTile / 8; i += 4) {
    __m256i a = _mm256_add_epi64(lanes(first / 8 + i), _mm256_set_epi64x(3, 2, 1, 0)), b = lanes(noise.index);
    __m256i c = lanes(noise.step), d = lanes(stream);
    uint32_t key0 = noise.key0, key1 = noise.key1;
    for (int round = 0; round < kPhiloxRounds; round++) {
      const __m256i first_product = _mm256_mul_epu32(a, lanes(kPhilox0)), second = _mm256_mul_epu32(c, lanes(kPhilox1));
      a = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(second, 32), b), lanes(key0));
      b = second;
      c = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(first_product, 32), d), lanes(key1));
      d = first_product;
      key0 += kWeyl0;
      key1 += kWeyl1;
    }
    const __m256i ab = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa);
    const __m256i cd = _mm256_blend_epi32(c, _mm256_slli_epi64(d, 32), 0xaa);
    const __m256i even = _mm256_unpacklo_epi64(ab, cd), odd = _mm256_unpackhi_epi64(ab, cd);
    __m256i* const to = reinterpret_cast<__m256i*>(tile + 8 * i);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
  }
  return tile;
}
#else
inline const uint16_t* draw(const Noise& noise, int64_t first, int stream, uint16_t* tile) {
  for (int i = 0; i < kTile / 8; i++) {
    const Random random = noise(first / 8 + i, stream);
    for (int k = 0; k < 8; k++) tile[8 * i + k] = static_cast<uint16_t>(random[k]);
  }
  return tile;
}
#endif

// ---- Unload: results in storage precision. Low precision is rounded into `to`, to nearest if `noise` is null; other
// results stay in their tile. Returns where they are.

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

// Where a loop puts its results for `to`: directly there, or in a tile that write() takes.
template <class T>
inline T* results(Elements to, T* tile, bool stream) {
  return stream || is_low(to.dtype) ? tile : reinterpret_cast<T*>(to.address);
}

// Round results, to nearest if `noise` is null, and write them to `to`, unless they are there already.
template <class T>
inline void write(const T* tile, const uint16_t* noise, Elements to, int n, bool stream) {
  if (reinterpret_cast<const char*>(tile) == to.address) return;
  alignas(kLine) char rounded[2 * kTile];
  if (!stream && is_low(to.dtype)) {
    unload(tile, noise, to, n);
  } else {
    store(to, unload(tile, noise, {rounded, to.dtype}, n), n, stream);
  }
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
