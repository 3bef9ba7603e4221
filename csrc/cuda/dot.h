// dot, a thread block a chunk: reads 2n elements, writes three partial sums a chunk. Thread t has of every group of 256
// runs the t-th; two groups of float, four of double are a row of the canonical tree.
#pragma once

#include "operands.h"

namespace fastsam::FASTSAM_ISA {

struct DotHeader : OperandsHeader {
  uint32_t* ticket;  // 0 before and after; null: a later launch adds the partial sums
  double* partials;  // [kProducts, n_chunks]
  double* out;       // [kProducts]
};
template <int kWords>
using DotArguments = OperandArguments<DotHeader, kWords>;

template <class T>
struct DotShared {
  static constexpr int kGroups = kLanes / (kThreads * kRun<T>);
  T warps[kProducts * kGroups][kWarps];
  double slots[kProducts][kWarps];
  bool last;
};

// Thread t's lanes of each product, folded to one value a group. What has an operand that is not there is of no use.
template <class T>
FASTSAM_DEVICE auto lane_products(const Memory<T>& a, const Memory<T>& b, int n, int t) {
  constexpr int kGroups = DotShared<T>::kGroups, kElements = kRun<T>, kStride = kThreads * kElements;
  constexpr int kAtOnce = 2 * kLanes / kStride;  // two rows
  const int full = a.aligned() && b.aligned() ? n - n % kElements : 0;
  T acc[kProducts][kGroups][kElements] = {};
  const auto add = [&](int j, int e, T x, T y) {
    acc[0][j][e] = fma(x, x, acc[0][j][e]);
    acc[1][j][e] = fma(x, y, acc[1][j][e]);
    acc[2][j][e] = fma(y, y, acc[2][j][e]);
  };
  FASTSAM_ROLLED
  for (int k = 0; k < full; k += kAtOnce * kStride) {
    Vector x_runs[kAtOnce] = {}, y_runs[kAtOnce] = {};
    if (a.address) a.load(k + t * kElements, kStride, full, x_runs);
    if (b.address) b.load(k + t * kElements, kStride, full, y_runs);
    a.widen(x_runs);
    b.widen(y_runs);
    FASTSAM_UNROLL
    for (int i = 0; i < kAtOnce; i++) {
      FASTSAM_UNROLL
      for (int e = 0; e < kElements; e++) add(i % kGroups, e, Pack<T>::get(x_runs[i], e), Pack<T>::get(y_runs[i], e));
    }
  }
  // One element at a time: all where addresses allow no more, else the run that n cuts, in the last row there is.
  FASTSAM_ROLLED
  for (int k = full - full % kLanes; k < n; k += kLanes) {
    FASTSAM_UNROLL
    for (int j = 0; j < kGroups; j++) {
      FASTSAM_UNROLL
      for (int e = 0; e < kElements; e++) {
        const int at = k + j * kStride + t * kElements + e;
        if (at >= full && at < n) add(j, e, a.address ? a.load_one(at) : T(0), b.address ? b.load_one(at) : T(0));
      }
    }
  }
  Several<T, kProducts * kGroups> sums;
  FASTSAM_UNROLL
  for (int i = 0; i < kProducts * kGroups; i++) sums.each[i] = pair_sum<kElements>(acc[i / kGroups][i % kGroups]);
  return sums;
}

template <class T, class Ctx, class A>
FASTSAM_DEVICE void dot_block(Ctx& ctx, const A& args, DotShared<T>& shared) {
  constexpr int kGroups = DotShared<T>::kGroups;
  Memory<T> a{}, b{};
  bool covered = false;
  if (ctx.block() < args.n_chunks) {
    const Chunk chunk = args.chunks[ctx.block()];
    covered = args.covers(chunk);
    if (covered) {
      a = args.template memory<T>(0, chunk, 0);
      b = args.template memory<T>(1, chunk, 0);
    }
    if (a.address || b.address) {
      typename Ctx::template PerThread<Several<T, kProducts * kGroups>> sums;
      ctx.threads([&](int t) { sums[t] = lane_products(a, b, chunk.length, t); });
      fold_warps(ctx, sums, shared.warps);
    }
  }
  const bool there[kProducts] = {a.address != nullptr, a.address && b.address, b.address != nullptr};
  ctx.threads([&](int t) {
    if (t != 0) return;
    FASTSAM_UNROLL
    for (int k = 0; k < kProducts; k++) {
      T groups[kGroups];
      FASTSAM_UNROLL
      for (int j = 0; j < kGroups; j++) groups[j] = there[k] ? pair_sum<kWarps>(shared.warps[k * kGroups + j]) : T(0);
      const double partial = static_cast<double>(pair_sum<kGroups>(groups));
      if (covered) args.partials[static_cast<int64_t>(k) * args.n_chunks + ctx.block()] = partial;
    }
    shared.last = args.ticket && ctx.is_last(ctx.arrive(args.ticket));
  });
  ctx.sync();
  if (!shared.last) return;
  typename Ctx::template PerThread<Several<double, kProducts>> sums;
  ctx.threads([&](int t) {
    FASTSAM_UNROLL
    for (int k = 0; k < kProducts; k++) {
      sums[t].each[k] = slot_lanes(ctx, args.partials + static_cast<int64_t>(k) * args.n_chunks, args.n_chunks, t);
    }
  });
  fold_warps(ctx, sums, shared.slots);
  ctx.threads([&](int t) {
    if (t < kProducts) args.out[t] = pair_sum<kWarps>(shared.slots[t]);
  });
}

}  // namespace fastsam::FASTSAM_ISA
