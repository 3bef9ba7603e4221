// a[i] = b[i] + s * c[i] with streaming stores: what this machine's memory gives to 8 bytes read and 4 written, the
// yardstick of benchmarks/step.py. Compiled by rivals.py when it is needed.

#include <cstdint>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

// Floats in one store, and whether that store goes past the caches.
#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;
void store_triad(float* a, const float* b, const float* c, float s) {
  _mm512_stream_ps(a, _mm512_add_ps(_mm512_load_ps(b), _mm512_mul_ps(_mm512_set1_ps(s), _mm512_load_ps(c))));
}
#elif defined(__AVX__)
constexpr int64_t kWidth = 8;
void store_triad(float* a, const float* b, const float* c, float s) {
  _mm256_stream_ps(a, _mm256_add_ps(_mm256_load_ps(b), _mm256_mul_ps(_mm256_set1_ps(s), _mm256_load_ps(c))));
}
#elif defined(__SSE__)
constexpr int64_t kWidth = 4;
void store_triad(float* a, const float* b, const float* c, float s) {
  _mm_stream_ps(a, _mm_add_ps(_mm_load_ps(b), _mm_mul_ps(_mm_set1_ps(s), _mm_load_ps(c))));
}
#else
constexpr int64_t kWidth = 1;
void store_triad(float* a, const float* b, const float* c, float s) { *a = *b + s * *c; }
#endif

}  // namespace

extern "C" int triad_streams() { return kWidth > 1; }

// a, b, c: n floats, 64-byte aligned; n a multiple of 16.
extern "C" void triad(float* a, const float* b, const float* c, float s, int64_t n, int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < n / kWidth; ++i) store_triad(a + i * kWidth, b + i * kWidth, c + i * kWidth, s);
#if defined(__SSE__)
    _mm_sfence();  // before the barrier that ends the region
#endif
  }
}
