// combine_, one thread block at a time: reads n elements for each term that is left, writes n.
#pragma once

#include "../math/combine.h"
#include "operands.h"

namespace fastsam::FASTSAM_ISA {

struct CombineHeader : OperandsHeader {  // the first operand is what is written, the others are the terms'
  double coefficients[kMostTerms];
  const double* addresses[kMostTerms];  // of coefficients that are read on the device; or null
};
template <int kWords>
using CombineArguments = OperandArguments<CombineHeader, kWords>;

// Runs from thread t's first on; out may be one of the terms' operands.
template <int kTerms, class T>
FASTSAM_DEVICE void combine_runs(const Memory<T>& out, const Terms<T, Memory<T>>& terms, int full, int t) {
  constexpr int kElements = kRun<T>, kStride = kThreads * kElements, kUnroll = kTerms > 1 ? 2 : 4;
  FASTSAM_ROLLED
  for (int i = t * kElements; i < full; i += kUnroll * kStride) {
    Vector runs[kMostTerms][kUnroll];
    FASTSAM_UNROLL
    for (int k = 0; k < kTerms; k++) terms.x[k].load(i, kStride, full, runs[k]);
    FASTSAM_UNROLL
    for (int k = 0; k < kTerms; k++) terms.x[k].widen(runs[k]);
    FASTSAM_UNROLL
    for (int u = 0; u < kUnroll; u++) {
      if (i + u * kStride >= full) continue;
      T total[kElements];
      FASTSAM_UNROLL
      for (int e = 0; e < kElements; e++) {
        T x[kMostTerms] = {};
        FASTSAM_UNROLL
        for (int k = 0; k < kTerms; k++) x[k] = Pack<T>::get(runs[k][u], e);
        total[e] = combined<kTerms>(terms.c, x);
      }
      out.store(i + u * kStride, total);
    }
  }
}

template <class T, class Ctx, class A>
FASTSAM_DEVICE void combine_block(Ctx& ctx, const A& args) {
  const Part part = part_of(ctx.block(), args.split_bits);
  const Chunk chunk = args.chunks[part.chunk];
  const int n = part_length(part, chunk);
  if (n == 0 || !args.covers(chunk)) return;
  const Memory<T> out = args.template memory<T>(0, chunk, part.begin);
  if (!out.address) return;
  Terms<T, Memory<T>> terms;
  bool aligned = out.aligned();
  FASTSAM_UNROLL
  for (int k = 0; k < kMostTerms; k++) {
    const Memory<T> x = args.template memory<T>(k + 1, chunk, part.begin);
    terms.add(args.addresses[k] ? *args.addresses[k] : args.coefficients[k], x.address, x);
    aligned = aligned && x.aligned();
  }
  const int full = aligned ? n - n % kRun<T> : 0;
  ctx.threads([&](int t) {
    if (terms.n == 0) combine_runs<0>(out, terms, full, t);
    if (terms.n == 1) combine_runs<1>(out, terms, full, t);
    if (terms.n == 2) combine_runs<2>(out, terms, full, t);
    if (terms.n == 3) combine_runs<3>(out, terms, full, t);
    FASTSAM_ROLLED
    for (int i = full + t; i < n; i += kThreads) {
      T x[kMostTerms] = {};
      FASTSAM_UNROLL
      for (int k = 0; k < kMostTerms; k++) {
        if (k < terms.n) x[k] = terms.x[k].load_one(i);
      }
      out.store_one(i, terms.n == 0   ? combined<0>(terms.c, x)
                       : terms.n == 1 ? combined<1>(terms.c, x)
                       : terms.n == 2 ? combined<2>(terms.c, x)
                                      : combined<3>(terms.c, x));
    }
  });
}

}  // namespace fastsam::FASTSAM_ISA
