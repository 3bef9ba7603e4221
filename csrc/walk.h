// How a thread block walks the tables: which elements are its own, how vectors of 16 bytes reach the arithmetic, and
// the step from one phase to the next. Device code when nvcc compiles it, plain C++ for the tests, which run the
// kernels' own bodies on a CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/choices.h"
#include "math/numbers.h"

#ifdef __CUDACC__
#define FASTSAM_DEVICE __device__ __forceinline__
#define FASTSAM_UNROLL _Pragma("unroll")
#define FASTSAM_ROLLED _Pragma("unroll 1")
#else
#define FASTSAM_DEVICE inline
#define FASTSAM_UNROLL
#define FASTSAM_ROLLED
#endif

namespace fastsam::FASTSAM_ISA {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kVector = 16;  // bytes
constexpr bool kPrefetch = FASTSAM_PREFETCH, kResidentNorm = FASTSAM_RESIDENT_NORM;
constexpr bool kPlainAccess = FASTSAM_PLAIN_ACCESS, kDescendingUpdate = FASTSAM_DESCENDING_UPDATE;

// ---- Which elements.

// A block's share of the chunk table: a chunk in 2^split_bits parts of `size` elements, of which one begins at `begin`.
struct Part {
  int chunk, begin, size;
};
FASTSAM_DEVICE Part part_of(int block, int split_bits) {
  const int size = kChunk >> split_bits;
  return {block >> split_bits, (block & ((1 << split_bits) - 1)) * size, size};
}
FASTSAM_DEVICE int part_length(const Part& part, const Chunk& chunk) {
  const int left = chunk.length - part.begin;
  return left < 0 ? 0 : left < part.size ? left : part.size;
}

// A pointer to a part of a segment. The compiler must not see how it was computed: it would keep all summands in
// registers.
template <class S>
FASTSAM_DEVICE S* element_of(int64_t address, const Chunk& chunk, int begin) {
  S* element = reinterpret_cast<S*>(address) + (static_cast<int64_t>(chunk.start) * kUnit + begin);
#ifdef __CUDA_ARCH__
  asm("" : "+l"(element));
#endif
  return element;
}

// How many bytes a load from there may have: 16 (at most `most`), 8 or 4, or one element of 2. Parts start at multiples
// of 16 bytes from their segment's address, so that it holds for all vectors of a part.
template <class S>
FASTSAM_DEVICE int width_at(const S* from, int most = kVector) {
  const auto address = reinterpret_cast<uintptr_t>(from);
  const int width = address % 16 == 0 ? 16 : address % 8 == 0 ? 8 : address % 4 == 0 ? 4 : 2;
  return width < most ? width : most;
}

// ---- Memory. Hints: kKeep goes through the caches as usual; what has kOnce is not needed again soon.

enum class Hint { kKeep, kOnce };

// Elements as they lie in memory.
template <int n>
struct alignas(n < 4 ? 4 * n : kVector) Words {
  static constexpr int kWords = n, kWidth = n < 4 ? 4 * n : kVector;  // the widest access, in bytes
  uint32_t words[n];
};
using Vector = Words<4>;

template <class W, Hint hint>
FASTSAM_DEVICE W load_word(const void* from) {
#ifdef __CUDA_ARCH__  // the intrinsics say that it is global memory, which an address from a table does not
  if (kPlainAccess && hint == Hint::kKeep) {
    __builtin_assume(__isGlobal(from));
    return *static_cast<const W*>(from);
  }
  return hint == Hint::kOnce ? __ldcs(static_cast<const W*>(from)) : __ldca(static_cast<const W*>(from));
#else
  W word;
  std::memcpy(&word, from, sizeof(W));
  return word;
#endif
}
template <class W, Hint hint>
FASTSAM_DEVICE void store_word(void* to, W word) {
#ifdef __CUDA_ARCH__
  if (kPlainAccess && hint == Hint::kKeep) {
    __builtin_assume(__isGlobal(to));
    *static_cast<W*>(to) = word;
    return;
  }
  if (hint == Hint::kOnce) __stcs(static_cast<W*>(to), word);
  if (hint == Hint::kKeep) __stwb(static_cast<W*>(to), word);
#else
  std::memcpy(to, &word, sizeof(W));
#endif
}

#ifdef __CUDACC__
using Word16 = uint4;
using Word8 = uint2;
#else
struct Word16 {
  uint32_t x, y, z, w;
};
struct Word8 {
  uint32_t x, y;
};
#endif

// Words from memory that is aligned for accesses of `width` bytes, at most W::kWidth.
template <class W, Hint hint>
FASTSAM_DEVICE W load_words(const void* from, int width = W::kWidth) {
  const char* const bytes = static_cast<const char*>(from);
  W v;
  if (width == 16) {
    FASTSAM_UNROLL
    for (int i = 0; i + 4 <= W::kWords; i += 4) {
      const Word16 word = load_word<Word16, hint>(bytes + 4 * i);
      v.words[i] = word.x;
      v.words[i + 1] = word.y;
      v.words[i + 2] = word.z;
      v.words[i + 3] = word.w;
    }
  } else if (width == 8) {
    FASTSAM_UNROLL
    for (int i = 0; i < W::kWords; i += 2) {
      const Word8 word = load_word<Word8, hint>(bytes + 4 * i);
      v.words[i] = word.x;
      v.words[i + 1] = word.y;
    }
  } else if (width == 4) {
    FASTSAM_UNROLL
    for (int i = 0; i < W::kWords; i++) v.words[i] = load_word<unsigned, hint>(bytes + 4 * i);
  } else {
    FASTSAM_UNROLL
    for (int i = 0; i < W::kWords; i++) {
      const uint32_t low = load_word<unsigned short, hint>(bytes + 4 * i);
      v.words[i] = low | static_cast<uint32_t>(load_word<unsigned short, hint>(bytes + 4 * i + 2)) << 16;
    }
  }
  return v;
}
template <Hint hint, class W>
FASTSAM_DEVICE void store_words(void* to, const W& v, int width = W::kWidth) {
  char* const bytes = static_cast<char*>(to);
  if (width == 16) {
    FASTSAM_UNROLL
    for (int i = 0; i + 4 <= W::kWords; i += 4) {
      store_word<Word16, hint>(bytes + 4 * i, Word16{v.words[i], v.words[i + 1], v.words[i + 2], v.words[i + 3]});
    }
  } else if (width == 8) {
    FASTSAM_UNROLL
    for (int i = 0; i < W::kWords; i += 2) store_word<Word8, hint>(bytes + 4 * i, Word8{v.words[i], v.words[i + 1]});
  } else if (width == 4) {
    FASTSAM_UNROLL
    for (int i = 0; i < W::kWords; i++) store_word<unsigned, hint>(bytes + 4 * i, v.words[i]);
  } else {
    FASTSAM_UNROLL
    for (int i = 0; i < W::kWords; i++) {
      store_word<unsigned short, hint>(bytes + 4 * i, static_cast<unsigned short>(v.words[i]));
      store_word<unsigned short, hint>(bytes + 4 * i + 2, static_cast<unsigned short>(v.words[i] >> 16));
    }
  }
}

// One element, its bits in the low end of a word.
template <class S, Hint hint>
FASTSAM_DEVICE uint64_t load_bits(const S* from) {
  if (sizeof(S) == 2) return load_word<unsigned short, hint>(from);
  if (sizeof(S) == 4) return load_word<unsigned, hint>(from);
  return load_word<unsigned long long, hint>(from);
}
template <class S, Hint hint>
FASTSAM_DEVICE void store_bits(S* to, uint64_t bits) {
  if (sizeof(S) == 2) return store_word<unsigned short, hint>(to, static_cast<unsigned short>(bits));
  if (sizeof(S) == 4) return store_word<unsigned, hint>(to, static_cast<unsigned>(bits));
  store_word<unsigned long long, hint>(to, bits);
}

// ---- Between storage and arithmetic. `Pack<S>`: a vector has kElements values and is written in pieces of kPiece
// values, which are whole words. `Values<S, n>`: n values. Values narrower than the arithmetic may be rounded with
// random numbers of 16 bits, of which a word holds two.

template <class S>
struct Pack;

template <>
struct Pack<float> {
  static constexpr int kElements = 4, kPiece = 1;
  template <class W>
  static FASTSAM_DEVICE float get(const W& v, int i) {
    return from_bits(v.words[i]);
  }
  template <class W>
  static FASTSAM_DEVICE void set(W& v, int piece, const float* x) {
    v.words[piece] = to_bits(*x);
  }
  static FASTSAM_DEVICE float widened(uint64_t bits) { return from_bits(static_cast<uint32_t>(bits)); }
  static FASTSAM_DEVICE uint64_t narrowed(float x) { return to_bits(x); }
};

template <>
struct Pack<double> {
  static constexpr int kElements = 2, kPiece = 1;
  template <class W>
  static FASTSAM_DEVICE double get(const W& v, int i) {
    return from_bits(static_cast<uint64_t>(v.words[2 * i + 1]) << 32 | v.words[2 * i]);
  }
  template <class W>
  static FASTSAM_DEVICE void set(W& v, int piece, const double* x) {
    v.words[2 * piece] = static_cast<uint32_t>(to_bits(*x));
    v.words[2 * piece + 1] = static_cast<uint32_t>(to_bits(*x) >> 32);
  }
  static FASTSAM_DEVICE double widened(uint64_t bits) { return from_bits(bits); }
  static FASTSAM_DEVICE uint64_t narrowed(double x) { return to_bits(x); }
};

// The GPU's own conversions have the bits of numbers.h's but for the payload of a NaN, and are one instruction each.
FASTSAM_DEVICE uint32_t rounded_pair(float low, float high, bfloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  bfloat16 a, b;
  narrow(low, a);
  narrow(high, b);
  return static_cast<uint32_t>(a) | static_cast<uint32_t>(b) << 16;
#endif
}
FASTSAM_DEVICE uint32_t rounded_pair(float low, float high, float16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  float16 a, b;
  narrow(low, a);
  narrow(high, b);
  return static_cast<uint32_t>(a) | static_cast<uint32_t>(b) << 16;
#endif
}
FASTSAM_DEVICE float widened_half(uint32_t bits, bfloat16) { return from_bits(bits << 16); }
FASTSAM_DEVICE float widened_half(uint32_t bits, float16) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
#else
  return widen(static_cast<float16>(bits));
#endif
}

template <class S>
struct PackOfHalves {
  static constexpr int kElements = 8, kPiece = 2;
  template <class W>
  static FASTSAM_DEVICE float get(const W& v, int i) {
    return widened_half(i % 2 ? v.words[i / 2] >> 16 : v.words[i / 2] & 0xffff, S());
  }
  template <class W>
  static FASTSAM_DEVICE void set(W& v, int piece, const float* x) {
    v.words[piece] = rounded_pair(x[0], x[1], S());
  }
  template <class W>
  static FASTSAM_DEVICE void set_drawn(W& v, int piece, const float* x, uint32_t noise) {
    v.words[piece] = static_cast<uint32_t>(drawn(x[0], noise & 0xffff) | drawn(x[1], noise >> 16) << 16);
  }
  static FASTSAM_DEVICE float widened(uint64_t bits) { return widened_half(static_cast<uint32_t>(bits), S()); }
  static FASTSAM_DEVICE uint64_t narrowed(float x) { return rounded_pair(x, 0, S()) & 0xffff; }
  static FASTSAM_DEVICE uint32_t drawn(float x, uint32_t noise) {
    S result;
    narrow(x, noise, result);
    return static_cast<uint32_t>(result);
  }
};
template <>
struct Pack<bfloat16> : PackOfHalves<bfloat16> {};
template <>
struct Pack<float16> : PackOfHalves<float16> {};

template <class S, int n>
using Values = Words<n* static_cast<int>(sizeof(S)) / 4>;

// Write the n values from element `at` of a run on.
template <class S, bool kDrawn, int n, class W, class T>
FASTSAM_DEVICE void put(W& run, int at, const T* x, const Random& random) {
  constexpr int kPiece = Pack<S>::kPiece;
  FASTSAM_UNROLL
  for (int e = 0; e < n; e += kPiece) {
    const int piece = (at + e) / kPiece;
    if constexpr (kDrawn) {
      Pack<S>::set_drawn(run, piece, x + e, random.words[piece]);
    } else {
      Pack<S>::set(run, piece, x + e);
    }
  }
}

// The number of one element, by an index that is not a constant: registers have no addresses.
FASTSAM_DEVICE uint32_t number_of(const Random& random, int i) {
  const uint32_t low = i & 2 ? random.words[1] : random.words[0], high = i & 2 ? random.words[3] : random.words[2];
  return (i & 4 ? high : low) >> 16 * (i & 1) & 0xffff;
}

// A Format's types. S: what the formulas take the weights from; G: gradients; C: the model's weights, whose type is
// another where S is the type of their masters; Q: states. With kDraws numbers that are narrower than the arithmetic
// are rounded stochastically, except weights with masters.
template <class S, class G, class C = S, class Q = S, bool kDraws_ = false>
struct Types {
  using Source = S;
  using Grad = G;
  using Weight = C;
  using State = Q;
  using T = typename Compute<S>::type;
  static constexpr bool kDraws = kDraws_;
  static constexpr bool kMasters = !std::is_same<S, C>::value;
  static constexpr bool kDrawsWeights = kDraws_ && !kMasters && sizeof(S) == 2;
  static constexpr bool kUniform = !kMasters && !kDraws && std::is_same<S, Q>::value && sizeof(S) == sizeof(G);
  // Elements of a vector: 16 bytes of the narrowest type that the optimizer owns. So they are eight where random
  // numbers are drawn, which come in eights.
  static constexpr int kElements = Pack<S>::kElements > Pack<Q>::kElements ? Pack<S>::kElements : Pack<Q>::kElements;
  // Elements that are computed at once: a whole word of each type that is written.
  static constexpr int kPiece = sizeof(C) == 2 || sizeof(Q) == 2 ? 2 : 1;

  // The types that matter to each operation. Formats that differ in the others share its kernel.
  using Norm = Types<S, G>;
  using Climb = Types<S, G, C, S, kDrawsWeights>;
  using Restore = Types<S, S, C>;
};

// ---- Values that one thread computes and all read. Functors have no default constructor, shared memory runs none.

template <class T>
struct Broadcast {
  alignas(8) unsigned char bytes[sizeof(T)];
  FASTSAM_DEVICE void put(const T& value) { memcpy(bytes, &value, sizeof(T)); }
  FASTSAM_DEVICE const T& get() const { return *reinterpret_cast<const T*>(bytes); }
};

}  // namespace fastsam::FASTSAM_ISA
