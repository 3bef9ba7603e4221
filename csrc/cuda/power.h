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

template <class S, class G, class Ctx, class A>
FASTSAM_DEVICE void power_norm_block(Ctx& ctx, const A& args, PowerNormShared& shared) {
  using T = typename Compute<S>::type;
  int64_t address = 0;
  if (ctx.block() < args.n_chunks) {
    const Chunk chunk = args.chunks[ctx.block()];
    address = args.grad(chunk.segment);
    if (address) {
      const Segment* const segment = args.segments + chunk.segment;
      const Steepest<T> steepest(args.row(segment->group));
      const S* const w = element_of<const S>(segment->weight, chunk, 0);
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

template <class S>
using PowerPerturbShared = Slot<PowerPerturb<typename Compute<S>::type>>;

template <class S, class G, class Ctx, class A>
FASTSAM_DEVICE void power_perturb_block(Ctx& ctx, const A& args, PowerPerturbShared<S>& shared) {
  using P = Pack<S>;
  using T = typename Compute<S>::type;
  const Part part = part_of(ctx.blocks() - 1 - ctx.block(), args.split_bits);
  const Chunk chunk = args.chunks[part.chunk];
  const int64_t address = args.grad(chunk.segment);
  const int n = part_length(part, chunk);
  count_overflow(ctx, args);
  if (!address || n == 0) return;
  const Segment* const segment = args.segments + chunk.segment;
  S* const w = element_of<S>(segment->weight, chunk, part.begin);
  S* const backup = element_of<S>(segment->backup, chunk, part.begin);
  const G* const g = element_of<const G>(address, chunk, part.begin);
  ctx.threads([&](int t) {
    if (t == 0) shared.put(PowerPerturb<T>(args.row(segment->group), ordered_sum(args), args.q));
  });
  ctx.sync();
  ctx.threads([&](int t) {
    const PowerPerturb<T> perturb = shared.get();
    if (perturb.rho == 0) {
      copy_part(backup, w, n, t);
      return;
    }
    FASTSAM_ROLLED
    for (int i = t; i < n; i += kThreads) {
      const uint64_t old = load_bits<S, Hint::kOnce>(w + i);
      store_bits<S, Hint::kOnce>(backup + i, old);
      store_bits<S, Hint::kKeep>(w + i, P::narrowed(perturb(P::widened(old), static_cast<T>(load_widened(g + i)))));
    }
  });
}

}  // namespace fastsam::FASTSAM_ISA
