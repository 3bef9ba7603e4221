// grad_norm and perturb_ for another norm than the second: one element at a time, in float64.
#pragma once

#include "kernels.h"

namespace fastsam::FASTSAM_ISA {

struct PowerNormShared {
  double largest[1][kWarps], sums[1][kWarps];
  bool last;
};

template <class S>
FASTSAM_DEVICE auto load_widened(const S* from) {
  return Pack<S>::widened(load_bits<S, Hint::kKeep>(from));
}

// The q-norm of the numbers x with which `each(t, f)` calls f(x) in thread t; in all threads.
template <class Ctx, class Each>
FASTSAM_DEVICE double block_norm(Ctx& ctx, PowerNormShared& shared, double q, const Each& each) {
  typename Ctx::template PerThread<Several<double, 1>> numbers;
  const auto largest_of = [&] {
    ctx.threads([&](int t) {
      double own = 0;
      each(t, [&](double x) { own = maximum(own, x); });
      numbers[t].each[0] = own;
    });
    fold_warps<Maximum>(ctx, numbers, shared.largest);
    double largest = 0;
    FASTSAM_UNROLL
    for (int warp = 0; warp < kWarps; warp++) largest = maximum(largest, shared.largest[0][warp]);
    return largest;
  };
  const auto sum_of = [&](const auto& term) {
    ctx.threads([&](int t) {
      double own = 0;
      each(t, [&](double x) { own += term(x); });
      numbers[t].each[0] = own;
    });
    fold_warps(ctx, numbers, shared.sums);
    return pair_sum<kWarps>(shared.sums[0]);
  };
  return q_norm_of(q, largest_of, sum_of);
}

template <class F, class Ctx, class A>
FASTSAM_DEVICE void power_norm_block(Ctx& ctx, const A& args, PowerNormShared& shared) {
  using S = typename F::Source;
  using G = typename F::Grad;
  using T = typename F::T;
  double norm = 0;
  if (ctx.block() < args.n_chunks) {
    const Chunk chunk = args.chunks[ctx.block()];
    const int64_t address = args.grad(chunk.segment);
    if (address) {
      const Segment* const segment = args.segments + chunk.segment;
      const PowerSteepest<T> steepest(args.row(segment->group));
      const S* const w = element_of<const S>(args.masters ? segment->master : segment->weight, chunk, 0);
      const G* const g = element_of<const G>(address, chunk, 0);
      norm = block_norm(ctx, shared, args.q, [&](int t, const auto& f) {
        FASTSAM_ROLLED
        for (int i = t; i < chunk.length; i += kThreads) {
          f(abs(steepest(load_widened(w + i), static_cast<T>(load_widened(g + i)))));
        }
      });
    }
  }
  ctx.threads([&](int t) {
    if (t == 0 && ctx.block() < args.n_chunks) args.partials[ctx.block()] = norm;
  });
  if (!arrive_last(ctx, args, shared)) return;
  norm = block_norm(ctx, shared, args.q, [&](int t, const auto& f) {
    FASTSAM_ROLLED
    for (int i = t; i < args.n_chunks; i += kThreads) f(ctx.load_other(args.partials + i));
  });
  ctx.threads([&](int t) {
    if (t == 0) args.sums[args.slot] = norm;
  });
}

// The norm over all buckets.
template <class A>
FASTSAM_DEVICE double total_norm(const A& args) {
  return q_norm(args.q, [&](const auto& f) {
    FASTSAM_ROLLED
    for (int i = 0; i < args.n_sums; i++) f(args.sums[i]);
  });
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
  count_overflow(ctx, args, [](const A& a) { return total_norm(a); });
  if (!grad || n == 0) return;
  const PerturbOperands<F> own(args, part, chunk, grad);
  ctx.threads([&](int t) {
    if (t != 0) return;
    const Row row = args.row(own.segment->group);
    shared.perturb.put(PowerPerturb<T>(row, total_norm(args), args.q));
    if constexpr (F::kDrawsWeights) shared.noise.put(Noise(row, own.segment->index, *args.rounding));
  });
  ctx.sync();
  ctx.threads([&](int t) {
    const PowerPerturb<T> perturb = shared.perturb.get();
    if (perturb.scale == 0) {
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
