// What dot and combine_ have in common: operands whose addresses come by value, and whose dtypes are values, too. T is
// what is computed in: float64 is, and stands alone, everything else is widened to float32.
#pragma once

#include "kernels.h"

namespace fastsam::FASTSAM_ISA {

// A launch serves the segments [first_segment, first_segment + n_segments), of which it is told the addresses, and
// leaves the chunks of others to other launches.
struct OperandsHeader {
  const Chunk* chunks;
  int32_t n_chunks;
  int32_t split_bits;  // a chunk has 2^split_bits blocks
  int32_t first_segment, n_segments;
  int32_t n_operands;
  Dtype dtypes[kMostTerms + 1];
};

// Elements to access at once.
template <class T>
constexpr int kRun = kVector / static_cast<int>(sizeof(T));

// An operand's elements in a part of a segment; no address where it has none there.
template <class T>
struct Memory {
  char* address;
  Dtype dtype;

  FASTSAM_DEVICE bool is(Dtype other) const { return std::is_same<T, float>::value ? dtype == other : false; }
  FASTSAM_DEVICE int size() const { return sizeof(T) == 8 ? 8 : is(kFloat32) ? 4 : 2; }
  template <class S>
  FASTSAM_DEVICE S* element(int i) const {
    return reinterpret_cast<S*>(address) + i;
  }

  // Whether runs that begin at multiples of a run are loaded and stored at once, in 16 bytes, or 8 of 2-byte types.
  FASTSAM_DEVICE bool aligned() const { return reinterpret_cast<uintptr_t>(address) % (kRun<T> * size()) == 0; }

  // The runs that begin at `first`, first + stride, ..., as they are stored; those from `end` on stay as they were.
  // Each type has loads of its own, as one load that waits for another to the same registers would be alone under way.
  template <int n>
  FASTSAM_DEVICE void load(int first, int stride, int end, Vector (&runs)[n]) const {
    if (sizeof(T) == 8 || is(kFloat32)) {
      FASTSAM_UNROLL
      for (int u = 0; u < n; u++) {
        if (first + u * stride < end) runs[u] = load_words<Vector, Hint::kKeep>(element<T>(first + u * stride));
      }
    } else {
      FASTSAM_UNROLL
      for (int u = 0; u < n; u++) {
        if (first + u * stride >= end) continue;
        const Words<2> half = load_words<Words<2>, Hint::kKeep>(element<bfloat16>(first + u * stride));
        runs[u].words[0] = half.words[0];
        runs[u].words[1] = half.words[1];
      }
    }
  }
  // From storage to arithmetic, in place.
  template <int n>
  FASTSAM_DEVICE void widen(Vector (&runs)[n]) const {
    if (sizeof(T) == 8 || is(kFloat32)) return;
    is(kBFloat16) ? widen_as<bfloat16>(runs) : widen_as<float16>(runs);
  }
  FASTSAM_DEVICE void store(int i, const T* x) const {
    if (sizeof(T) == 8 || is(kFloat32)) {
      Vector run;
      FASTSAM_UNROLL
      for (int e = 0; e < kRun<T>; e++) Pack<T>::set(run, e, x + e);
      store_words<Hint::kKeep>(element<T>(i), run);
    } else {
      is(kBFloat16) ? store_as<bfloat16>(i, x) : store_as<float16>(i, x);
    }
  }

  // One element.
  FASTSAM_DEVICE T load_one(int i) const {
    if constexpr (sizeof(T) == 8) {
      return Pack<double>::widened(load_bits<double, Hint::kKeep>(element<double>(i)));
    } else if (is(kFloat32)) {
      return Pack<float>::widened(load_bits<float, Hint::kKeep>(element<float>(i)));
    } else {
      const uint64_t bits = load_bits<bfloat16, Hint::kKeep>(element<bfloat16>(i));
      return is(kBFloat16) ? Pack<bfloat16>::widened(bits) : Pack<float16>::widened(bits);
    }
  }
  FASTSAM_DEVICE void store_one(int i, T x) const {
    if constexpr (sizeof(T) == 8) {
      store_bits<double, Hint::kKeep>(element<double>(i), Pack<double>::narrowed(x));
    } else if (is(kFloat32)) {
      store_bits<float, Hint::kKeep>(element<float>(i), Pack<float>::narrowed(x));
    } else {
      const uint64_t bits = is(kBFloat16) ? Pack<bfloat16>::narrowed(x) : Pack<float16>::narrowed(x);
      store_bits<bfloat16, Hint::kKeep>(element<bfloat16>(i), bits);
    }
  }

 private:
  template <class S, int n>
  FASTSAM_DEVICE static void widen_as(Vector (&runs)[n]) {
    if constexpr (sizeof(T) == 4) {
      FASTSAM_UNROLL
      for (int u = 0; u < n; u++) {
        FASTSAM_UNROLL
        for (int e = kRun<T> - 1; e >= 0; e--) runs[u].words[e] = to_bits(Pack<S>::get(runs[u], e));
      }
    }
  }
  template <class S>
  FASTSAM_DEVICE void store_as(int i, const T* x) const {
    if constexpr (sizeof(T) == 4) {
      Words<2> run;
      FASTSAM_UNROLL
      for (int e = 0; e < kRun<T>; e += 2) Pack<S>::set(run, e / 2, x + e);
      store_words<Hint::kKeep>(element<S>(i), run);
    }
  }
};

template <class Header, int kWords>
struct OperandArguments : Header {
  int64_t words[kWords];  // addresses: a row of n_segments for each operand

  FASTSAM_DEVICE bool covers(const Chunk& chunk) const {
    return chunk.segment >= this->first_segment && chunk.segment - this->first_segment < this->n_segments;
  }
  // Operand k in a part of a chunk that is covered.
  template <class T>
  FASTSAM_DEVICE Memory<T> memory(int k, const Chunk& chunk, int begin) const {
    Memory<T> found{nullptr, this->dtypes[k]};
    if (k >= this->n_operands) return found;
    const int64_t address = words[k * this->n_segments + chunk.segment - this->first_segment];
    const int64_t offset = (static_cast<int64_t>(chunk.start) * kUnit + begin) * found.size();
    if (address) found.address = element_of<char>(address + offset, Chunk{}, 0);
    return found;
  }
};

}  // namespace fastsam::FASTSAM_ISA
