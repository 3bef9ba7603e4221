// update_, one thread block at a time: reads 2n and the states, writes n (2n with masters) and the states; ascending,
// as grad_norm.
#pragma once

#include "../math/rules.h"
#include "kernels.h"

namespace fastsam::FASTSAM_ISA {

// The kernels: name, rule, and the states that a group may have in it. A launch takes the first one of its rule that
// has the states of all its groups; each has registers for what it may need.
// clang-format off
#define FASTSAM_UPDATE_KERNELS(row) \
  row(restore, kNoRule, 0)          \
  row(plain, kSgd, 0)               \
  row(sgd, kSgd, 1)                 \
  row(adam, kAdam, 3)               \
  row(amsgrad, kAdam, 7)            \
  row(rmsprop, kRmsprop, 3)         \
  row(centered, kRmsprop, 7)        \
  row(adagrad, kAdagrad, 1)         \
  row(nadam, kNadam, 3)             \
  row(radam, kRadam, 3)             \
  row(lion, kLion, 1)
// clang-format on

#define FASTSAM_ROW(name, ...) name,
enum class Kernel { FASTSAM_UPDATE_KERNELS(FASTSAM_ROW) };
#undef FASTSAM_ROW

struct KernelRow {
  Rule rule;
  int states;
};
#define FASTSAM_ROW(name, rule, states) {rule, states},
constexpr KernelRow kKernels[] = {FASTSAM_UPDATE_KERNELS(FASTSAM_ROW)};
#undef FASTSAM_ROW

inline int kernel_for(Rule rule, const Row* rows, int64_t n_groups) {
  int states = 0;
  for (int64_t i = 0; i < n_groups; i++) states |= states_of(rule, rows[i]);
  int kernel = 0;
  while (kKernels[kernel].rule != rule || (states & ~kKernels[kernel].states)) kernel++;
  return kernel;
}

template <Rule kRule, class F>
struct UpdateShared {
  using T = typename F::T;
  Broadcast<Gradient<T>> gradient;
  Broadcast<Noise> noise;                                          // where something is drawn
  Broadcast<typename RuleOf<kRule>::template Functor<T, 0>> rule;  // of the same members for all sets of states
  bool last;

  template <class R>
  FASTSAM_DEVICE Broadcast<R>& rule_as() {
    static_assert(sizeof(Broadcast<R>) == sizeof(rule), "the functor fits");
    return reinterpret_cast<Broadcast<R>&>(rule);
  }
};
template <class F>
struct UpdateShared<kNoRule, F> {
  bool last;
};

struct UpdatePart {  // of one chunk
  const Segment* segment;
  Chunk chunk;
  int begin, n;
  int64_t source, grad;  // addresses
};

template <class F>
struct UpdateTile {
  Values<typename F::Source, F::kElements> w;
  Values<typename F::Grad, F::kElements> g;
  Values<typename F::State, F::kElements> state[kMaxStates];  // those not used take no registers
};
// Whether Adam has a second tile to be loaded while the first is computed; in 16 bits it would spill.
template <Rule kRule, class F>
constexpr bool kSecondTile = kPrefetch && kRule == kAdam && F::kUniform && sizeof(typename F::Source) == 4;
// Vectors at once: two of few loads.
template <Rule kRule, class F, int kStates>
constexpr int kUpdateUnroll =
    count_states(kStates) > (F::kMasters || kSecondTile<kRule, F> ? 2 : 1) ||
            F::kElements > Pack<typename F::Source>::kElements
        ? 1
        : 2;

// kVectors: in 16 bytes at a time where the addresses allow it, kAnywhere: elsewhere as wide as they allow. Otherwise
// one element at a time, which is much less code to compile.
// `arrive()` takes the block's ticket, in thread 0.
template <Rule kRule, int kStates, bool kVectors, bool kAnywhere, class F, class Ctx, class A, class Arrive>
FASTSAM_DEVICE void update_part(Ctx& ctx, const A& args, const UpdatePart& part, const Row& row,
                                UpdateShared<kRule, F>& shared, const Arrive& arrive) {
  using S = typename F::Source;
  using G = typename F::Grad;
  using C = typename F::Weight;
  using Q = typename F::State;
  using T = typename F::T;
  using R = typename RuleOf<kRule>::template Functor<T, kStates>;
  using Tile = UpdateTile<F>;
  constexpr int kElements = F::kElements, kStride = kThreads * kElements, kUnroll = kUpdateUnroll<kRule, F, kStates>;
  using Sources = Values<S, kElements>;
  using Direction = Values<G, kElements>;
  using Weights = Values<C, kElements>;
  using States = Values<Q, kElements>;
  const int n = part.n, full = n - n % kElements;
  C* const w = element_of<C>(part.segment->weight, part.chunk, part.begin);
  S* const source = element_of<S>(part.source, part.chunk, part.begin);  // a master is written, too
  const G* const g = element_of<const G>(part.grad, part.chunk, part.begin);
  const uint32_t first = first_block(part.chunk, part.begin);
  Q* state[kMaxStates];
  FASTSAM_UNROLL
  for (int k = 0; k < kMaxStates; k++) {
    if (kStates >> k & 1) state[k] = element_of<Q>(part.segment->state[k], part.chunk, part.begin);
  }
  const int w_width = width_at(w, Weights::kWidth), g_width = width_at(g, Direction::kWidth);
  const int source_width = F::kMasters ? Sources::kWidth : width_at(source, Sources::kWidth);
  const bool aligned =
      kVectors && w_width == Weights::kWidth && source_width == Sources::kWidth && g_width == Direction::kWidth;

  typename Ctx::template PerThread<Several<Tile, kUnroll>> tiles;
  const auto load_weights = [&](Tile& tile, int i, int source_bytes, int g_bytes) {
    if (i >= full) return;
    tile.w = load_words<Sources, Hint::kOnce>(source + i, source_bytes);
    tile.g = load_words<Direction, Hint::kOnce>(g + i, g_bytes);
  };
  const auto load_states = [&](Tile& tile, int i) {
    if (i >= full) return;
    FASTSAM_UNROLL
    for (int k = 0; k < kMaxStates; k++) {
      if (kStates >> k & 1) tile.state[k] = load_words<States, Hint::kKeep>(state[k] + i);
    }
  };
  const auto load_tile = [&](Tile& tile, int i, int source_bytes, int g_bytes) {
    load_weights(tile, i, source_bytes, g_bytes);
    load_states(tile, i);
  };
  ctx.threads([&](int t) {
    const auto each_tile = [&](const auto& load) {
      FASTSAM_UNROLL
      for (int u = 0; u < kUnroll; u++) {
        if (aligned) load(tiles[t].each[u], t * kElements + u * kStride);
      }
    };
    constexpr bool kAhead = kRule != kRmsprop && !F::kDraws;  // sm_80 and sm_120 have no register left for these
    const auto load_ahead = [&](Tile& tile, int i) { load_weights(tile, i, Sources::kWidth, Direction::kWidth); };
    if (kAhead) each_tile(load_ahead);
    if (t == 0) {
      const Progress progress = *reinterpret_cast<const Progress*>(part.segment->progress);
      shared.gradient.put(Gradient<T>(row, args.grad_scale, args.clip));
      shared.template rule_as<R>().put(R(with_lr(row), progress));
      if constexpr (F::kDraws) shared.noise.put(Noise(row, part.segment->index, *args.rounding));
      arrive(t);
    }
    if (!kAhead) each_tile(load_ahead);
    each_tile(load_states);  // after the scalars, which need the registers
  });
  ctx.sync();
  ctx.threads([&](int t) {
    const Gradient<T> gradient = shared.gradient.get();
    const R rule = shared.template rule_as<R>().get();
    const auto step_and_store = [&](Tile& tile, int i, int width) {
      if (i >= full) return;
      const Random weight_random = random_at<F::kDrawsWeights>(shared.noise, first, i, kStepStream);
      Random state_random[kMaxStates];
      FASTSAM_UNROLL
      for (int k = 0; k < kMaxStates; k++) {
        if (kStates >> k & 1) state_random[k] = random_at<F::kDraws>(shared.noise, first, i, kStateStream + k);
      }
      FASTSAM_UNROLL
      for (int at = 0; at < kElements; at += F::kPiece) {  // in place, which spares registers
        T x[F::kPiece], states[kMaxStates][F::kPiece];
        FASTSAM_UNROLL
        for (int e = 0; e < F::kPiece; e++) {
          T each[kMaxStates];
          FASTSAM_UNROLL
          for (int k = 0; k < kMaxStates; k++) {
            if (kStates >> k & 1) each[k] = Pack<Q>::get(tile.state[k], at + e);
          }
          x[e] = rule(Pack<S>::get(tile.w, at + e), gradient(Pack<G>::get(tile.g, at + e)), each);
          FASTSAM_UNROLL
          for (int k = 0; k < kMaxStates; k++) {
            if (kStates >> k & 1) states[k][e] = each[k];
          }
        }
        put<S, F::kDrawsWeights, F::kPiece>(tile.w, at, x, weight_random);
        FASTSAM_UNROLL
        for (int k = 0; k < kMaxStates; k++) {
          if (kStates >> k & 1) put<Q, F::kDraws, F::kPiece>(tile.state[k], at, states[k], state_random[k]);
        }
      }
      FASTSAM_UNROLL
      for (int k = 0; k < kMaxStates; k++) {
        if (kStates >> k & 1) store_words<Hint::kKeep>(state[k] + i, tile.state[k]);
      }
      if constexpr (F::kMasters) store_words<Hint::kOnce>(source + i, tile.w);
      store_words<Hint::kKeep>(w + i, converted<C, S, kElements>(tile.w), width);
    };
    const auto load_next = [&](int u, int i) {
      load_tile(tiles[t].each[u], i + (u + kUnroll) * kStride, Sources::kWidth, Direction::kWidth);
    };
    int i = t * kElements, single = full + t;
    if (aligned) {
      FASTSAM_ROLLED
      while (i < full) {
        FASTSAM_UNROLL
        for (int u = 0; u < kUnroll; u++) {
          step_and_store(tiles[t].each[u], i + u * kStride, Weights::kWidth);
          if (kPrefetch) load_next(u, i);
        }
        FASTSAM_UNROLL
        for (int u = 0; u < kUnroll; u++) {
          if (!kPrefetch) load_next(u, i);
        }
        i += kUnroll * kStride;
      }
    } else if (kVectors && kAnywhere) {
      FASTSAM_ROLLED
      for (; i < full; i += kStride) {
        Tile tile;
        load_tile(tile, i, source_width, g_width);
        step_and_store(tile, i, w_width);
      }
    } else {
      single = t;
    }
    FASTSAM_ROLLED
    for (int at = single; at < n; at += kThreads) {
      T each[kMaxStates];
      FASTSAM_UNROLL
      for (int k = 0; k < kMaxStates; k++) {
        if (kStates >> k & 1) each[k] = Pack<Q>::widened(load_bits<Q, Hint::kKeep>(state[k] + at));
      }
      const T x = rule(Pack<S>::widened(load_bits<S, Hint::kOnce>(source + at)),
                       gradient(Pack<G>::widened(load_bits<G, Hint::kOnce>(g + at))), each);
      if constexpr (F::kMasters) store_bits<S, Hint::kOnce>(source + at, Pack<S>::narrowed(x));
      store_bits<C, Hint::kKeep>(w + at, rounded<C, F::kDrawsWeights>(x, shared.noise, first, at, kStepStream));
      FASTSAM_UNROLL
      for (int k = 0; k < kMaxStates; k++) {
        if (kStates >> k & 1) {
          const uint64_t bits = rounded<Q, F::kDraws>(each[k], shared.noise, first, at, kStateStream + k);
          store_bits<Q, Hint::kKeep>(state[k] + at, bits);
        }
      }
    }
  });
}

template <Kernel kKernel, class F, class Ctx, class A>
FASTSAM_DEVICE void update_block(Ctx& ctx, const A& args,
                                 UpdateShared<kKernels[static_cast<int>(kKernel)].rule, F>& shared) {
  using S = typename F::Source;
  using C = typename F::Weight;
  constexpr Rule kRule = kKernels[static_cast<int>(kKernel)].rule;
  constexpr int kMost = kKernels[static_cast<int>(kKernel)].states;
  const Part share = part_of(kDescendingUpdate ? ctx.blocks() - 1 - ctx.block() : ctx.block(), args.split_bits);
  const bool found_inf = args.found_inf && *args.found_inf != 0;
  UpdatePart part{};
  Decision decision{};
  if (share.chunk < args.n_chunks) {
    part.chunk = args.chunks[share.chunk];
    part.segment = args.segments + part.chunk.segment;
    part.begin = share.begin;
    part.n = part_length(share, part.chunk);
    const int64_t word = args.grad(part.chunk.segment);
    part.grad = word & ~kPerturbed;
    decision = decide(word & kPerturbed, part.grad != 0, found_inf);
    part.source = F::kMasters                          ? part.segment->master
                  : decision.source == Source::kBackup ? part.segment->backup
                                                       : part.segment->weight;
  }
  // Whoever arrives last knows that all have read their segment's step count and the step of the random numbers, and
  // may change them.
  typename Ctx::template PerThread<uint32_t> arrived;
  const auto arrive = [&](int t) { arrived[t] = ctx.arrive(args.ticket); };
  bool updated = false;
  if constexpr (kRule != kNoRule) {
    if (decision.rule && part.n > 0) {
      const Row row = args.row(part.segment->group);
      RuleOf<kRule>::template with_states<kMost>(row, [&](auto set) {
        constexpr int kStates = decltype(set)::value;
        constexpr bool kAmsgrad = kKernel == Kernel::amsgrad;
        constexpr bool kUsual = (kRule == kSgd || kRule == kAdam) && !(kAmsgrad && F::kDraws);
        constexpr bool kVectors = kStates == kMost && (kUsual || F::kUniform), kAnywhere = kUsual && !kAmsgrad;
        update_part<kRule, kStates, kVectors, kAnywhere, F>(ctx, args, part, row, shared, arrive);
      });
      updated = true;
    }
  }
  if (!updated) {
    ctx.threads([&](int t) {
      if (t == 0 && kRule != kNoRule) arrive(t);
    });
    if (decision.source == Source::kBackup && part.n > 0) {
      C* const w = element_of<C>(part.segment->weight, part.chunk, part.begin);
      const S* const kept = element_of<const S>(part.source, part.chunk, part.begin);
      ctx.threads([&](int t) { copy_part(w, kept, part.n, t); });
    }
  }
  if (kRule == kNoRule) return;
  ctx.threads([&](int t) {
    if (t == 0) shared.last = ctx.is_last(arrived[t]);
  });
  ctx.sync();
  if (!shared.last) return;
  ctx.threads([&](int t) {  // over segments, because an empty parameter has no chunk and counts too
    if (t == 0 && found_inf && args.overflows) args.overflows[1]++;
    if (F::kDraws && t == 0) ++*args.rounding;
    FASTSAM_ROLLED
    for (int i = t; i < args.n_segments; i += kThreads) {
      const int64_t word = args.grad(i);
      const Segment* const segment = args.segments + i;
      const bool count = decide(word & kPerturbed, (word & ~kPerturbed) != 0, found_inf).count;
      if (count) advance(kRule, args.row(segment->group), *reinterpret_cast<Progress*>(segment->progress));
    }
  });
}

}  // namespace fastsam::FASTSAM_ISA
