// grad_norm and perturb_ for another norm than the second: one element at a time, in float64.
#pragma once

#include "kernels.h"

namespace fastsam::FASTSAM_ISA {

struct PowerNormShared {
  double warps[1][kWarps], slots[1][kWarps];
  bool last;
};

template <class S>
FASTSAM_DEVICE auto load_widened(const S* from) {
  return Pack<S>::widened(load_bits<S, Hint::kKeep>(from));
}

template <class F, class Ctx, class A>
FASTSAM_DEVICE void power_norm_block(Ctx& ctx, const A& args, PowerNormShared& shared) {
  using S = typename F::Source;
  using G = typename F::Grad;
  using T = typename F::T;
  int64_t address = 0;
  if (ctx.block() < args.n_chunks) {
    const Chunk chunk = args.chunks[ctx.block()];
    address = args.grad(chunk.segment);
    if (address) {
      const Segment* const segment = args.segments + chunk.segment;
      const Steepest<T> steepest(args.row(segment->group));
      const S* const w = element_of<const S>(args.masters ? segment->master : segment->weight, chunk, 0);
      const G* const g = element_of<const G>(address, chunk, 0);
      typename Ctx::template PerThread<Several<double, 1>> sums;
      ctx.threads([&](int t) {
        double sum = 0;
        FASTSAM_ROLLED
        for (int i = t; i < chunk.length; i += kThreads) {
          sum += power(abs(steepest(load_widened(w + i), static_cast<T>(load_widened(g + i)))), args.q);
        }
        sums[t].each[0] = sum;
      });
      fold_warps(ctx, sums, shared.warps);
    }
  }
  sum_partials(ctx, args, shared, [&] { return address ? pair_sum<kWarps>(shared.warps[0]) : 0.0; });
}

template <class F>
struct PowerPerturbShared {
  Broadcast<PowerPerturb<typename F::T>> perturb;
  Broadcast<Noise> noise;  // where weights are drawn
};

template <class F, class Ctx, class A>
FASTSAM_DEVICE void power_perturb_block(Ctx& ctx, const A& args, PowerPerturbShared<F>& shared) {
  using S = typename F::Source;
  using C = typename F::Weight;
  using T = typename F::T;
  const Part part = part_of(ctx.blocks() - 1 - ctx.block(), args.split_bits);
  const Chunk chunk = args.chunks[part.chunk];
  const int64_t grad = args.grad(chunk.segment);
  const int n = part_length(part, chunk);
  count_overflow(ctx, args);
  if (!grad || n == 0) return;
  const PerturbOperands<F> own(args, part, chunk, grad);
  ctx.threads([&](int t) {
    if (t != 0) return;
    const Row row = args.row(own.segment->group);
    shared.perturb.put(PowerPerturb<T>(row, ordered_sum(args), args.q));
    if constexpr (F::kDrawsWeights) shared.noise.put(Noise(row, own.segment->index, *args.rounding));
  });
  ctx.sync();
  ctx.threads([&](int t) {
    const PowerPerturb<T> perturb = shared.perturb.get();
    if (perturb.rho == 0) {
      if constexpr (!F::kMasters) copy_part(own.kept, own.w, n, t);
      return;
    }
    FASTSAM_ROLLED
    for (int i = t; i < n; i += kThreads) {
      const uint64_t old = load_bits<S, Hint::kOnce>(own.source + i);
      if constexpr (!F::kMasters) store_bits<S, Hint::kOnce>(own.kept + i, old);
      const T x = perturb(Pack<S>::widened(old), static_cast<T>(load_widened(own.g + i)));
      const uint64_t bits = rounded<C, F::kDrawsWeights>(x, shared.noise, own.first, i, kClimbStream);
      store_bits<C, Hint::kKeep>(own.w + i, bits);
    }
  });
}

}  // namespace fastsam::FASTSAM_ISA
