// The three kernels, one thread block at a time, in phases: `ctx.threads` runs a phase for each thread, `ctx.sync` lies
// between two. The GPU runs them with DeviceContext, the tests on a CPU with a context of their own. All arithmetic is
// math.h's.
//
// A block issues its first loads before the barrier behind which the scalars are ready: about a hundred dependent
// float64 operations of one thread, a microsecond or more.
#pragma once

#include "../walk.h"

namespace fastsam::FASTSAM_ISA {

// What a launch is told by value.
struct Header {
  const Chunk* chunks;
  const Segment* segments;
  const Row* rows;       // null: the rows are in the arguments' words, those of a capturing stream never
  const int64_t* grads;  // null: so are the gradients
  uint32_t* ticket;      // 0 before and after
  int32_t n_chunks, n_segments, n_groups;
  int32_t split_bits;  // a chunk has 2^split_bits blocks, one for the norm
  int32_t adaptive;    // grad_norm: whether any group may be
  int32_t n_sums, slot;
  double* partials;  // grad_norm: [n_chunks]
  double* sums;      // [n_sums], the squared norm in parts; grad_norm writes that in `slot`
  double q;          // grad_norm, perturb_: the norm's exponent
  double max_norm;   // grad_norm, where it writes a clip factor
  double* clip;      // [1] or null, as the two below: grad_norm writes it, update_ reads it
  const float* grad_scale;
  const float* found_inf;  // update_
  int64_t* overflows;      // [2] or null: steps without a perturbation, steps without an update
};

// Rows of 10 words each, then one word a segment: the address of its gradient, 0 for none, plus 1 if the backup holds
// the weights. Addresses of numbers are even.
constexpr int64_t kPerturbed = 1;

// A tensor lr is read where it is: whoever changes it need not tell a captured graph.
FASTSAM_DEVICE Row with_lr(Row row) {
  const auto address = static_cast<int64_t>(row.lr_address);
  if (address) {
    row.lr = has(row, kLrFloat64) ? *reinterpret_cast<const double*>(address)
                                  : static_cast<double>(*reinterpret_cast<const float*>(address));
  }
  return row;
}

template <int kWords>
struct Arguments : Header {
  int64_t words[kWords];

  FASTSAM_DEVICE Row row(int64_t group) const {
    if (rows) return rows[group];
    const int64_t* const w = words + kRowColumns * group;
    const auto number = [&](int i) { return from_bits(static_cast<uint64_t>(w[i])); };
    return {number(0), number(1), number(2), number(3), number(4),
            number(5), number(6), number(7), number(8), number(9)};
  }
  FASTSAM_DEVICE int64_t grad(int64_t segment) const {
    return grads ? grads[segment] : words[(rows ? 0 : kRowColumns * n_groups) + segment];
  }
};

// Of all buckets: this launch's own is there, or was written by an earlier one.
template <class A>
FASTSAM_DEVICE double ordered_sum(const A& args) {
  double sum = 0;
  FASTSAM_ROLLED
  for (int i = 0; i < args.n_sums; i++) sum += args.sums[i];
  return sum;
}

template <class T, int n>
struct Several {
  T each[n];
};

// In adjacent pairs; n is a power of two.
template <int n, class T>
FASTSAM_DEVICE T pair_sum(const T* x) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    return pair_sum<n / 2>(x) + pair_sum<n / 2>(x + n / 2);
  }
}

// Copy n elements: thread t's share. Up to 4 loads are under way.
template <class S>
FASTSAM_DEVICE void copy_part(S* to, const S* from, int n, int t) {
  constexpr int kElements = Pack<S>::kElements, kStride = kThreads * kElements, kUnroll = 4;
  const int full = n - n % kElements, to_width = width_at(to), from_width = width_at(from);
  int i = t * kElements;
  if (to_width == kVector && from_width == kVector) {
    FASTSAM_ROLLED
    for (; i < full; i += kUnroll * kStride) {
      Vector tile[kUnroll];
      FASTSAM_UNROLL
      for (int u = 0; u < kUnroll; u++) {
        if (i + u * kStride < full) tile[u] = load_words<Vector, Hint::kOnce>(from + i + u * kStride);
      }
      FASTSAM_UNROLL
      for (int u = 0; u < kUnroll; u++) {
        if (i + u * kStride < full) store_vector<Hint::kKeep>(to + i + u * kStride, tile[u]);
      }
    }
  } else {
    FASTSAM_ROLLED
    for (; i < full; i += kStride) {
      store_vector<Hint::kKeep>(to + i, load_words<Vector, Hint::kOnce>(from + i, from_width), to_width);
    }
  }
  if (full + t < n) store_bits<S, Hint::kKeep>(to + full + t, load_bits<S, Hint::kOnce>(from + full + t));
}

// ---- grad_norm: reads n (2n adaptive) elements; ascending, as backward wrote the first layers' gradients last.
// Thread t has of every group of 256 vectors of gradients the t-th; the group of a 16-bit type is a whole row of the
// canonical tree, that of float a half, that of double a quarter. S is the weights' type, G the gradients'.

template <class G>
struct NormShared {
  using T = typename Compute<G>::type;
  static constexpr int kGroups = kLanes / (kThreads * Pack<G>::kElements);
  T warps[kGroups][kWarps];
  double slots[1][kWarps];
  bool last;
};

// Thread t's lanes, folded to one value a group.
template <class S, class G, bool kTimesWeight>
FASTSAM_DEVICE auto lane_sums(const S* w, const G* g, int n, const Steepest<typename Compute<S>::type>& steepest,
                              int t) {
  using T = typename Compute<S>::type;
  constexpr int kGroups = NormShared<G>::kGroups, kElements = Pack<G>::kElements, kStride = kThreads * kElements;
  constexpr int kRows = kChunk / kLanes;
  using Weights = Run<S, kElements>;
  const int full = n - n % kElements;
  const int w_width = kTimesWeight ? width_at(w, Weights::kWidth) : Weights::kWidth, g_width = width_at(g);
  T acc[kGroups][kElements] = {};
  const auto add = [&](int j, const Weights& wv, const Vector& gv) {
    FASTSAM_UNROLL
    for (int e = 0; e < kElements; e++) {
      const T x = kTimesWeight ? steepest(Pack<S>::get(wv, e), Pack<G>::get(gv, e)) : Pack<G>::get(gv, e);
      acc[j][e] = fma(x, x, acc[j][e]);
    }
  };
  if (!kTimesWeight && g_width == kVector) {
    FASTSAM_UNROLL
    for (int i = 0; i < kRows * kGroups; i++) {
      const int at = i * kStride + t * kElements;
      Vector gv{};
      if (at < full) gv = load_words<Vector, Hint::kKeep>(g + at);
      add(i % kGroups, Weights{}, gv);
    }
  } else if (kTimesWeight && g_width == kVector && w_width == Weights::kWidth) {
    constexpr int kRowsAtOnce = kGroups == 1 ? 2 : 1;
    FASTSAM_ROLLED
    for (int k = 0; k < kRows * kLanes; k += kRowsAtOnce * kLanes) {
      Weights wv[kRowsAtOnce * kGroups] = {};
      Vector gv[kRowsAtOnce * kGroups] = {};
      FASTSAM_UNROLL
      for (int i = 0; i < kRowsAtOnce * kGroups; i++) {
        const int at = k + i * kStride + t * kElements;
        if (at < full) {
          wv[i] = load_words<Weights, Hint::kKeep>(w + at);
          gv[i] = load_words<Vector, Hint::kKeep>(g + at);
        }
      }
      FASTSAM_UNROLL
      for (int i = 0; i < kRowsAtOnce * kGroups; i++) add(i % kGroups, wv[i], gv[i]);
    }
  } else {
    FASTSAM_ROLLED
    for (int k = 0; k < kRows * kLanes; k += kLanes) {
      FASTSAM_UNROLL
      for (int j = 0; j < kGroups; j++) {
        const int at = k + j * kStride + t * kElements;
        if (at < full) {
          Weights wv{};
          if (kTimesWeight) wv = load_words<Weights, Hint::kKeep>(w + at, w_width);
          add(j, wv, load_words<Vector, Hint::kKeep>(g + at, g_width));
        }
      }
    }
  }
  const int lane = full % kLanes;  // of the vector that n cuts
  if (full < n && lane % kStride == t * kElements) {
    FASTSAM_UNROLL
    for (int e = 0; e < kElements - 1; e++) {
      T x = 0;
      if (full + e < n) x = Pack<G>::widened(load_bits<G, Hint::kKeep>(g + full + e));
      if (kTimesWeight && full + e < n) x = steepest(Pack<S>::widened(load_bits<S, Hint::kKeep>(w + full + e)), x);
      FASTSAM_UNROLL
      for (int j = 0; j < kGroups; j++) {  // indexed by constants only: registers have no addresses
        const T own = j == lane / kStride ? x : T(0);
        acc[j][e] = fma(own, own, acc[j][e]);
      }
    }
  }
  Several<T, kGroups> sums;
  FASTSAM_UNROLL
  for (int j = 0; j < kGroups; j++) sums.each[j] = pair_sum<kElements>(acc[j]);
  return sums;
}

// Before: a sum a thread. After and a barrier: one a warp in `warps`.
template <class Ctx, class T, int kGroups, class PerThread>
FASTSAM_DEVICE void fold_warps(Ctx& ctx, PerThread& sums, T (&warps)[kGroups][kWarps]) {
  ctx.warp_sums(sums);
  ctx.threads([&](int t) {
    FASTSAM_UNROLL
    for (int j = 0; j < kGroups; j++) {
      if (t % kWarp == 0) warps[j][t / kWarp] = sums[t].each[j];
    }
  });
  ctx.sync();
}

// Thread 0 knows the block's partial sum; the last block to arrive sees those of all: lane i mod 1024 takes them in
// order.
template <class Shared, class Ctx, class A, class Partial>
FASTSAM_DEVICE void sum_partials(Ctx& ctx, const A& args, Shared& shared, const Partial& partial) {
  ctx.threads([&](int t) {
    if (t != 0) return;
    if (ctx.block() < args.n_chunks) args.partials[ctx.block()] = partial();
    shared.last = ctx.arrive(args.ticket);
  });
  ctx.sync();
  if (!shared.last) return;
  constexpr int kEach = kSlots / kThreads;
  typename Ctx::template PerThread<Several<double, 1>> sums;
  ctx.threads([&](int t) {
    double acc[kEach] = {};
    FASTSAM_ROLLED
    for (int i = kEach * t; i < args.n_chunks; i += kSlots) {
      FASTSAM_UNROLL
      for (int e = 0; e < kEach; e++) {
        if (i + e < args.n_chunks) acc[e] += ctx.load_other(args.partials + i + e);
      }
    }
    sums[t].each[0] = pair_sum<kEach>(acc);
  });
  fold_warps(ctx, sums, shared.slots);
  ctx.threads([&](int t) {
    if (t != 0) return;
    args.sums[args.slot] = pair_sum<kWarps>(shared.slots[0]);
    if (args.clip) *args.clip = clip_factor(args.max_norm, ordered_sum(args), args.grad_scale);
  });
}

template <class S, class G, class Ctx, class A>
FASTSAM_DEVICE void norm_block(Ctx& ctx, const A& args, NormShared<G>& shared) {
  using T = typename Compute<S>::type;
  using Shared = NormShared<G>;
  int64_t address = 0;
  if (ctx.block() < args.n_chunks) {
    const Chunk chunk = args.chunks[ctx.block()];
    address = args.grad(chunk.segment);
    if (address) {
      const G* const g = element_of<const G>(address, chunk, 0);
      const Segment* const segment = args.segments + chunk.segment;
      typename Ctx::template PerThread<Several<T, Shared::kGroups>> sums;
      Row row{};
      if (args.adaptive) row = args.row(segment->group);  // spares the others the wait for two dependent reads
      const Steepest<T> steepest(row);
      if (needs_weight(row)) {
        const S* const w = element_of<const S>(segment->weight, chunk, 0);
        ctx.threads([&](int t) { sums[t] = lane_sums<S, G, true>(w, g, chunk.length, steepest, t); });
      } else {
        ctx.threads([&](int t) { sums[t] = lane_sums<S, G, false>(nullptr, g, chunk.length, steepest, t); });
      }
      fold_warps(ctx, sums, shared.warps);
    }
  }
  sum_partials(ctx, args, shared, [&] {
    T groups[Shared::kGroups];
    FASTSAM_UNROLL
    for (int j = 0; j < Shared::kGroups; j++) groups[j] = address ? pair_sum<kWarps>(shared.warps[j]) : T(0);
    return static_cast<double>(pair_sum<Shared::kGroups>(groups));
  });
}

// ---- perturb_: reads 2n, writes 2n elements; descending: starts on what grad_norm read last and ends on what the next
// forward reads first.

template <class S>
using PerturbShared = Slot<Perturb<typename Compute<S>::type>>;

constexpr int kPerturbUnroll = 2;

template <class S, class G, int n>
struct PerturbTile {
  Vector w[n];
  Run<G, Pack<S>::kElements> g[n];
};

// One block of the grid tells whether the norm was finite.
template <class Ctx, class A>
FASTSAM_DEVICE void count_overflow(Ctx& ctx, const A& args) {
  if (!args.overflows || ctx.block() != 0) return;
  ctx.threads([&](int t) {
    if (t == 0 && !is_finite(ordered_sum(args))) args.overflows[0]++;
  });
}

template <class S, class G, class Ctx, class A>
FASTSAM_DEVICE void perturb_block(Ctx& ctx, const A& args, PerturbShared<S>& shared) {
  using P = Pack<S>;
  using T = typename Compute<S>::type;
  constexpr int kElements = P::kElements, kStride = kThreads * kElements, kUnroll = kPerturbUnroll;
  using Tile = PerturbTile<S, G, kUnroll>;
  using Direction = Run<G, kElements>;
  const Part part = part_of(ctx.blocks() - 1 - ctx.block(), args.split_bits);
  const Chunk chunk = args.chunks[part.chunk];
  const int64_t address = args.grad(chunk.segment);
  const int n = part_length(part, chunk), full = n - n % kElements;
  count_overflow(ctx, args);
  if (!address || n == 0) return;
  const Segment* const segment = args.segments + chunk.segment;
  S* const w = element_of<S>(segment->weight, chunk, part.begin);
  S* const backup = element_of<S>(segment->backup, chunk, part.begin);
  const G* const g = element_of<const G>(address, chunk, part.begin);
  const int w_width = width_at(w), g_width = width_at(g, Direction::kWidth);
  const bool aligned = w_width == kVector && g_width == Direction::kWidth;

  typename Ctx::template PerThread<Tile> tiles;
  const auto load_tile = [&](Tile& tile, int i) {
    FASTSAM_UNROLL
    for (int u = 0; u < kUnroll; u++) {
      if (i + u * kStride < full) {
        tile.w[u] = load_words<Vector, Hint::kOnce>(w + i + u * kStride);
        tile.g[u] = load_words<Direction, Hint::kOnce>(g + i + u * kStride);
      }
    }
  };
  ctx.threads([&](int t) {
    if (t == 0) {
      shared.put(Perturb<T>(args.row(segment->group), ordered_sum(args)));
    }
    if (aligned) load_tile(tiles[t], t * kElements);
  });
  ctx.sync();
  ctx.threads([&](int t) {
    const Perturb<T> perturb = shared.get();
    if (perturb.scale == 0) {  // the weights stay; the backup is written whatever the norm is
      copy_part(backup, w, n, t);
      return;
    }
    const auto climb = [&](Vector& wv, const Direction& gv) {  // in place, which spares registers
      FASTSAM_UNROLL
      for (int piece = 0; piece < kElements / P::kPiece; piece++) {
        T x[P::kPiece];
        FASTSAM_UNROLL
        for (int e = 0; e < P::kPiece; e++) {
          x[e] = perturb(P::get(wv, piece * P::kPiece + e), Pack<G>::get(gv, piece * P::kPiece + e));
        }
        P::set(wv, piece, x);
      }
    };
    int i = t * kElements;
    if (aligned) {
      Tile& tile = tiles[t];
      FASTSAM_ROLLED
      while (i < full) {
        FASTSAM_UNROLL
        for (int u = 0; u < kUnroll; u++) {
          if (i + u * kStride < full) {
            store_vector<Hint::kOnce>(backup + i + u * kStride, tile.w[u]);
            climb(tile.w[u], tile.g[u]);
            store_vector<Hint::kKeep>(w + i + u * kStride, tile.w[u]);
          }
        }
        i += kUnroll * kStride;
        load_tile(tile, i);
      }
    } else {
      FASTSAM_ROLLED
      for (; i < full; i += kStride) {
        Vector wv = load_words<Vector, Hint::kOnce>(w + i, w_width);
        const Direction gv = load_words<Direction, Hint::kOnce>(g + i, g_width);
        store_vector<Hint::kOnce>(backup + i, wv);
        climb(wv, gv);
        store_vector<Hint::kKeep>(w + i, wv, w_width);
      }
    }
    if (full + t < n) {
      const uint64_t old = load_bits<S, Hint::kOnce>(w + full + t);
      const T x = perturb(P::widened(old), Pack<G>::widened(load_bits<G, Hint::kOnce>(g + full + t)));
      store_bits<S, Hint::kOnce>(backup + full + t, old);
      store_bits<S, Hint::kKeep>(w + full + t, P::narrowed(x));
    }
  });
}

// ---- update_: reads 2n and the states, writes n and the states; ascending, as grad_norm.

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
constexpr int kUpdateKernels = sizeof(kKernels) / sizeof(KernelRow);

inline int kernel_for(Rule rule, const Row* rows, int64_t n_groups) {
  int states = 0;
  for (int64_t i = 0; i < n_groups; i++) states |= states_of(rule, rows[i]);
  int kernel = 0;
  while (kKernels[kernel].rule != rule || (states & ~kKernels[kernel].states)) kernel++;
  return kernel;
}

template <Rule kRule, class S>
struct UpdateShared {
  using T = typename Compute<S>::type;
  Slot<Gradient<T>> gradient;
  Slot<typename RuleOf<kRule>::template Functor<T, 0>> rule;  // of the same members for all sets of states
  bool last;

  template <class R>
  FASTSAM_DEVICE Slot<R>& rule_as() {
    static_assert(sizeof(Slot<R>) == sizeof(rule), "the functor fits");
    return reinterpret_cast<Slot<R>&>(rule);
  }
};
template <class S>
struct UpdateShared<kNoRule, S> {
  bool last;
};

struct UpdatePart {  // of one chunk
  const Segment* segment;
  Chunk chunk;
  int begin, n;
  int64_t source, grad;  // addresses
  Progress progress;
};

template <class S, class G>
struct UpdateTile {
  Vector w;
  Run<G, Pack<S>::kElements> g;
  Vector state[kMaxStates];  // those not used take no registers
};
template <int kStates>
constexpr int kUpdateUnroll = kStates > 1 ? 1 : 2;  // of one state at most

// kVectors: in 16 bytes at a time where the addresses allow it, kAnywhere: elsewhere as wide as they allow. Otherwise one
// element at a time, which is much less code to compile.
template <Rule kRule, int kStates, bool kVectors, bool kAnywhere, class G, class S, class Ctx, class A>
FASTSAM_DEVICE void update_part(Ctx& ctx, const A& args, const UpdatePart& part, const Row& row,
                                UpdateShared<kRule, S>& shared) {
  using P = Pack<S>;
  using T = typename Compute<S>::type;
  using R = typename RuleOf<kRule>::template Functor<T, kStates>;
  using Tile = UpdateTile<S, G>;
  constexpr int kElements = P::kElements, kStride = kThreads * kElements, kUnroll = kUpdateUnroll<kStates>;
  using Direction = Run<G, kElements>;
  const int n = part.n, full = n - n % kElements;
  S* const w = element_of<S>(part.segment->weight, part.chunk, part.begin);
  const S* const source = element_of<const S>(part.source, part.chunk, part.begin);
  const G* const g = element_of<const G>(part.grad, part.chunk, part.begin);
  S* state[kMaxStates];
  FASTSAM_UNROLL
  for (int k = 0; k < kMaxStates; k++) {
    if (kStates >> k & 1) state[k] = element_of<S>(part.segment->state[k], part.chunk, part.begin);
  }
  const int w_width = width_at(w), source_width = width_at(source), g_width = width_at(g, Direction::kWidth);
  const bool aligned = kVectors && w_width == kVector && source_width == kVector && g_width == Direction::kWidth;

  typename Ctx::template PerThread<Several<Tile, kUnroll>> tiles;
  const auto load_tile = [&](Tile& tile, int i, int w_bytes, int g_bytes) {
    if (i >= full) return;
    tile.w = load_words<Vector, Hint::kOnce>(source + i, w_bytes);
    tile.g = load_words<Direction, Hint::kOnce>(g + i, g_bytes);
    FASTSAM_UNROLL
    for (int k = 0; k < kMaxStates; k++) {
      if (kStates >> k & 1) tile.state[k] = load_words<Vector, Hint::kKeep>(state[k] + i);
    }
  };
  ctx.threads([&](int t) {
    if (t == 0) {
      shared.gradient.put(Gradient<T>(row, args.grad_scale, args.clip));
      shared.template rule_as<R>().put(R(with_lr(row), part.progress));
    }
    FASTSAM_UNROLL
    for (int u = 0; u < kUnroll; u++) {
      if (aligned) load_tile(tiles[t].each[u], t * kElements + u * kStride, kVector, Direction::kWidth);
    }
  });
  ctx.sync();
  ctx.threads([&](int t) {
    const Gradient<T> gradient = shared.gradient.get();
    const R rule = shared.template rule_as<R>().get();
    const auto step_and_store = [&](Tile& tile, int i, int width) {
      if (i >= full) return;
      FASTSAM_UNROLL
      for (int piece = 0; piece < kElements / P::kPiece; piece++) {  // in place, which spares registers
        T x[P::kPiece], states[kMaxStates][P::kPiece];
        FASTSAM_UNROLL
        for (int e = 0; e < P::kPiece; e++) {
          const int at = piece * P::kPiece + e;
          T each[kMaxStates];
          FASTSAM_UNROLL
          for (int k = 0; k < kMaxStates; k++) {
            if (kStates >> k & 1) each[k] = P::get(tile.state[k], at);
          }
          x[e] = rule(P::get(tile.w, at), gradient(Pack<G>::get(tile.g, at)), each);
          FASTSAM_UNROLL
          for (int k = 0; k < kMaxStates; k++) {
            if (kStates >> k & 1) states[k][e] = each[k];
          }
        }
        P::set(tile.w, piece, x);
        FASTSAM_UNROLL
        for (int k = 0; k < kMaxStates; k++) {
          if (kStates >> k & 1) P::set(tile.state[k], piece, states[k]);
        }
      }
      store_vector<Hint::kKeep>(w + i, tile.w, width);
      FASTSAM_UNROLL
      for (int k = 0; k < kMaxStates; k++) {
        if (kStates >> k & 1) store_vector<Hint::kKeep>(state[k] + i, tile.state[k]);
      }
    };
    int i = t * kElements, single = full + t;
    if (aligned) {
      FASTSAM_ROLLED
      while (i < full) {
        FASTSAM_UNROLL
        for (int u = 0; u < kUnroll; u++) step_and_store(tiles[t].each[u], i + u * kStride, kVector);
        i += kUnroll * kStride;
        FASTSAM_UNROLL
        for (int u = 0; u < kUnroll; u++) load_tile(tiles[t].each[u], i + u * kStride, kVector, Direction::kWidth);
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
        if (kStates >> k & 1) each[k] = P::widened(load_bits<S, Hint::kKeep>(state[k] + at));
      }
      const T x = rule(P::widened(load_bits<S, Hint::kOnce>(source + at)),
                       gradient(Pack<G>::widened(load_bits<G, Hint::kOnce>(g + at))), each);
      store_bits<S, Hint::kKeep>(w + at, P::narrowed(x));
      FASTSAM_UNROLL
      for (int k = 0; k < kMaxStates; k++) {
        if (kStates >> k & 1) store_bits<S, Hint::kKeep>(state[k] + at, P::narrowed(each[k]));
      }
    }
  });
}

template <Kernel kKernel, class S, class G, class Ctx, class A>
FASTSAM_DEVICE void update_block(Ctx& ctx, const A& args,
                                 UpdateShared<kKernels[static_cast<int>(kKernel)].rule, S>& shared) {
  constexpr Rule kRule = kKernels[static_cast<int>(kKernel)].rule;
  constexpr int kMost = kKernels[static_cast<int>(kKernel)].states;
  const Part share = part_of(ctx.block(), args.split_bits);
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
    part.source = decision.source == Source::kBackup ? part.segment->backup : part.segment->weight;
  }
  if (kRule != kNoRule) {
    // Whoever arrives last knows that all have read their segment's step count, and may change the counts.
    ctx.threads([&](int t) {
      if (t != 0) return;
      if (part.n > 0) part.progress = *reinterpret_cast<const Progress*>(part.segment->progress);
      shared.last = ctx.arrive(args.ticket);
    });
  }
  bool updated = false;
  if constexpr (kRule != kNoRule) {
    if (decision.rule && part.n > 0) {
      const Row row = args.row(part.segment->group);
      RuleOf<kRule>::template with_states<kMost>(
          row, [&](auto set) {
            constexpr int kStates = decltype(set)::value;
            constexpr bool kUsual = kRule == kSgd || kRule == kAdam, kSame = sizeof(S) == sizeof(G);
            constexpr bool kVectors = kStates == kMost && (kUsual || kSame), kAnywhere = kUsual && kMost != 7;
            update_part<kRule, kStates, kVectors, kAnywhere, G>(ctx, args, part, row, shared);
          });
      updated = true;
    }
  }
  if (!updated) {
    ctx.sync();
    if (decision.source == Source::kBackup && part.n > 0) {
      S* const w = element_of<S>(part.segment->weight, part.chunk, part.begin);
      const S* const backup = element_of<const S>(part.source, part.chunk, part.begin);
      ctx.threads([&](int t) { copy_part(w, backup, part.n, t); });
    }
  }
  if (kRule == kNoRule || !shared.last) return;
  ctx.threads([&](int t) {  // over segments, because an empty parameter has no chunk and counts too
    if (t == 0 && found_inf && args.overflows) args.overflows[1]++;
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
