// grad_norm and perturb_, one thread block at a time, in phases: `ctx.threads` runs a phase for each thread, `ctx.sync`
// lies between two. The GPU runs them with DeviceContext, the tests on a CPU with a context of their own. All
// arithmetic is csrc/math's.
//
// A block issues its first loads before the barrier behind which the scalars are ready: about a hundred dependent
// float64 operations of one thread, a microsecond or more.
#pragma once

#include "../math/perturb.h"
#include "../walk.h"

namespace fastsam::FASTSAM_ISA {

// All formats for which there are kernels: `one(kernel, types)`, or `both` for the usual ones, whose kernels come with
// small arguments, too.
// clang-format off
#define FASTSAM_FORMATS(both, one, kernel)                                        \
  both(kernel, float, float), both(kernel, double, double),                       \
  both(kernel, bfloat16, bfloat16), both(kernel, float16, float16),               \
  one(kernel, float, bfloat16), one(kernel, float, float16),                      \
  one(kernel, bfloat16, float), one(kernel, float16, float),                      \
  both(kernel, float, bfloat16, bfloat16), both(kernel, float, float16, float16), \
  one(kernel, float, float, bfloat16), one(kernel, float, float, float16),        \
  both(kernel, bfloat16, bfloat16, bfloat16, bfloat16, true),                     \
  one(kernel, float16, float16, float16, float16, true),                          \
  both(kernel, float, float, float, bfloat16, true),                              \
  both(kernel, float, bfloat16, bfloat16, bfloat16, true),                        \
  one(kernel, float, float16, float16, bfloat16, true)
// clang-format on

template <class S>
constexpr Dtype kDtypeOf = std::is_same<S, float>::value      ? kFloat32
                           : std::is_same<S, double>::value   ? kFloat64
                           : std::is_same<S, bfloat16>::value ? kBFloat16
                                                              : kFloat16;
template <class F>
constexpr Format format_of() {
  return {kDtypeOf<typename F::Weight>, kDtypeOf<typename F::Grad>, kDtypeOf<typename F::Source>,
          kDtypeOf<typename F::State>, F::kDraws};
}
#define FASTSAM_ROW(_, ...) format_of<Types<__VA_ARGS__>>()
constexpr Format kFormats[] = {FASTSAM_FORMATS(FASTSAM_ROW, FASTSAM_ROW, )};
#undef FASTSAM_ROW
constexpr int kKnownFormats = sizeof(kFormats) / sizeof(Format);

// A format's index among them, kKnownFormats if there is no kernel for it.
inline int format_index(const Format& format) {
  const auto same = [&](const Format& other) {
    return format.weight == other.weight && format.grad == other.grad && format.source == other.source &&
           format.state == other.state && format.stochastic == other.stochastic;
  };
  int index = 0;
  while (index < kKnownFormats && !same(kFormats[index])) index++;
  return index;
}

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
  int32_t masters;     // grad_norm: whether the weights are those
  int32_t n_sums, slot;
  double* partials;  // grad_norm: [n_chunks]
  double* sums;      // [n_sums], the squared norm in parts (for q != 2 norms); grad_norm writes that in `slot`
  double q;          // grad_norm, perturb_: the norm's exponent
  double max_norm;   // grad_norm, where it writes a clip factor
  double* clip;      // [1] or null, as the two below: grad_norm writes it, update_ reads it
  const float* grad_scale;
  const float* found_inf;  // update_
  int64_t* overflows;      // [2] or null: steps without a perturbation, steps without an update
  int64_t* rounding;       // [1] where rounding is stochastic: the step of the random numbers
};

// Rows of kRowColumns words each, then one word a segment: the address of its gradient, 0 for none, plus 1 if the
// backup holds the weights. Addresses of numbers are even.
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
    return {number(0), number(1), number(2), number(3), number(4), number(5),
            number(6), number(7), number(8), number(9), number(10)};
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

// n values as another type, rounded to nearest where that is narrower.
template <class C, class S, int n>
FASTSAM_DEVICE Values<C, n> converted(const Values<S, n>& values) {
  if constexpr (std::is_same<C, S>::value) {
    return values;
  } else {
    Values<C, n> result;
    FASTSAM_UNROLL
    for (int at = 0; at < n; at += 2) {
      const float x[2] = {Pack<S>::get(values, at), Pack<S>::get(values, at + 1)};
      put<C, false, 2>(result, at, x, {});
    }
    return result;
  }
}

// Copy n elements to a type that may be narrower: thread t's share. Up to 4 loads are under way.
template <class C, class S>
FASTSAM_DEVICE void copy_part(C* to, const S* from, int n, int t) {
  constexpr int kElements = Pack<S>::kElements, kStride = kThreads * kElements, kUnroll = 4;
  using Copy = Values<C, kElements>;
  const int full = n - n % kElements, to_width = width_at(to, Copy::kWidth), from_width = width_at(from);
  int i = t * kElements;
  if (to_width == Copy::kWidth && from_width == kVector) {
    FASTSAM_ROLLED
    for (; i < full; i += kUnroll * kStride) {
      Vector tile[kUnroll];
      FASTSAM_UNROLL
      for (int u = 0; u < kUnroll; u++) {
        if (i + u * kStride < full) tile[u] = load_words<Vector, Hint::kOnce>(from + i + u * kStride);
      }
      FASTSAM_UNROLL
      for (int u = 0; u < kUnroll; u++) {
        if (i + u * kStride < full) store_words<Hint::kKeep>(to + i + u * kStride, converted<C, S, kElements>(tile[u]));
      }
    }
  } else {
    FASTSAM_ROLLED
    for (; i < full; i += kStride) {
      store_words<Hint::kKeep>(
          to + i, converted<C, S, kElements>(load_words<Vector, Hint::kOnce>(from + i, from_width)), to_width);
    }
  }
  if (full + t >= n) return;
  const uint64_t bits = load_bits<S, Hint::kOnce>(from + full + t);
  if constexpr (std::is_same<C, S>::value) {
    store_bits<C, Hint::kKeep>(to + full + t, bits);
  } else {
    store_bits<C, Hint::kKeep>(to + full + t, Pack<C>::narrowed(Pack<S>::widened(bits)));
  }
}

// Where a part lies in its segment's random numbers, of which there are eight in a block.
FASTSAM_DEVICE uint32_t first_block(const Chunk& chunk, int begin) {
  return static_cast<uint32_t>(chunk.start) * (kUnit / 8) + begin / 8;
}

// The random numbers of the eight elements from i on, a multiple of 8. Without kDrawn they are not used.
template <bool kDrawn>
FASTSAM_DEVICE Random random_at(const Broadcast<Noise>& noise, uint32_t first, int i, int stream) {
  if constexpr (kDrawn) {
    return noise.get()(first + i / 8, stream);
  } else {
    return {};
  }
}

// The bits of element i.
template <class S, bool kDrawn, class T>
FASTSAM_DEVICE uint64_t rounded(T x, const Broadcast<Noise>& noise, uint32_t first, int i, int stream) {
  if constexpr (kDrawn) {
    return Pack<S>::drawn(x, number_of(noise.get()(first + i / 8, stream), i % 8));
  } else {
    return Pack<S>::narrowed(x);
  }
}

// ---- grad_norm: reads n (2n adaptive) elements; ascending, as backward wrote the first layers' gradients last.
// Thread t has of every group of 256 vectors of gradients the t-th; the group of a 16-bit type is a whole row of the
// canonical tree, that of float a half, that of double a quarter. S is the weights' type, G the gradients'.

template <class G>
struct NormShared {
  using T = typename Compute<G>::type;
  static constexpr int kGroups = kLanes / (kThreads * Pack<G>::kElements);
  T warps[kResidentNorm ? 2 : 1][kGroups][kWarps];  // of a chunk and of the next
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
  using Weights = Values<S, kElements>;
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

struct Plus {
  template <class T>
  FASTSAM_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Maximum {
  template <class T>
  FASTSAM_DEVICE T operator()(T a, T b) const {
    return maximum(a, b);
  }
};

// Before: a number a thread. After: one a warp in `warps`, the sum, or what else Combine makes of its threads' numbers.
template <class Combine = Plus, class Ctx, class T, int kGroups, class PerThread>
FASTSAM_DEVICE void fold_warps(Ctx& ctx, PerThread& numbers, T (&warps)[kGroups][kWarps]) {
  ctx.fold_warp(numbers, Combine());
  ctx.threads([&](int t) {
    FASTSAM_UNROLL
    for (int j = 0; j < kGroups; j++) {
      if (t % kWarp == 0) warps[j][t / kWarp] = numbers[t].each[j];
    }
  });
  ctx.sync();
}

// After thread 0 has written the block's partial sums: true in the last block to arrive, which then sees all blocks'.
template <class Shared, class Ctx, class A>
FASTSAM_DEVICE bool arrive_last(Ctx& ctx, const A& args, Shared& shared) {
  ctx.threads([&](int t) {
    if (t == 0) shared.last = ctx.is_last(ctx.arrive(args.ticket));
  });
  ctx.sync();
  return shared.last;
}

// Thread t's lanes of the sum over chunks, folded to one value: lane i mod 1024 takes the partial sums in order.
template <class Ctx>
FASTSAM_DEVICE double slot_lanes(Ctx& ctx, const double* partials, int n_chunks, int t) {
  constexpr int kEach = kSlots / kThreads, kUnroll = 3;
  const bool aligned = reinterpret_cast<uintptr_t>(partials) % 16 == 0;  // dot's second and third need not be
  double acc[kEach] = {};
  int i = kEach * t;
  FASTSAM_ROLLED
  for (; aligned && i + (kUnroll - 1) * kSlots + kEach <= n_chunks; i += kUnroll * kSlots) {
    double x[kUnroll][kEach];  // as many as keep the memory's latency from being waited for one by one
    FASTSAM_UNROLL
    for (int u = 0; u < kUnroll; u++) {
      FASTSAM_UNROLL
      for (int e = 0; e < kEach; e += 2) ctx.load_others(partials + i + u * kSlots + e, x[u] + e);
    }
    FASTSAM_UNROLL
    for (int u = 0; u < kUnroll; u++) {
      FASTSAM_UNROLL
      for (int e = 0; e < kEach; e++) acc[e] += x[u][e];
    }
  }
  FASTSAM_ROLLED
  for (; i < n_chunks; i += kSlots) {
    FASTSAM_UNROLL
    for (int e = 0; e < kEach; e++) {
      if (i + e < n_chunks) acc[e] += ctx.load_other(partials + i + e);
    }
  }
  return pair_sum<kEach>(acc);
}

// The last block adds all partial sums.
template <class Shared, class Ctx, class A>
FASTSAM_DEVICE void sum_partials(Ctx& ctx, const A& args, Shared& shared) {
  typename Ctx::template PerThread<Several<double, 1>> sums;
  ctx.threads([&](int t) { sums[t].each[0] = slot_lanes(ctx, args.partials, args.n_chunks, t); });
  fold_warps(ctx, sums, shared.slots);
  ctx.threads([&](int t) {
    if (t != 0) return;
    args.sums[args.slot] = pair_sum<kWarps>(shared.slots[0]);
    if (args.clip) *args.clip = clip_factor(args.max_norm, ordered_sum(args), args.grad_scale);
  });
}

template <class F, class Ctx, class A>
FASTSAM_DEVICE void norm_block(Ctx& ctx, const A& args, NormShared<typename F::Grad>& shared) {
  using S = typename F::Source;
  using G = typename F::Grad;
  using T = typename F::T;
  using Shared = NormShared<G>;
  int buffer = 0;
  for (int index = ctx.block(); index < args.n_chunks; index += ctx.blocks()) {
    const Chunk chunk = args.chunks[index];
    const int64_t address = args.grad(chunk.segment);
    auto& warps = shared.warps[buffer];
    if (address) {
      if (kResidentNorm) buffer ^= 1;  // thread 0 may still read this one when the others are at the next chunk
      const G* const g = element_of<const G>(address, chunk, 0);
      const Segment* const segment = args.segments + chunk.segment;
      typename Ctx::template PerThread<Several<T, Shared::kGroups>> sums;
      Row row{};
      if (args.adaptive) row = args.row(segment->group);  // spares the others the wait for two dependent reads
      const Steepest<T> steepest(row);
      if (needs_weight(row)) {
        const S* const w = element_of<const S>(args.masters ? segment->master : segment->weight, chunk, 0);
        ctx.threads([&](int t) { sums[t] = lane_sums<S, G, true>(w, g, chunk.length, steepest, t); });
      } else {
        ctx.threads([&](int t) { sums[t] = lane_sums<S, G, false>(nullptr, g, chunk.length, steepest, t); });
      }
      fold_warps(ctx, sums, warps);
    }
    ctx.threads([&](int t) {
      if (t != 0) return;
      T groups[Shared::kGroups];
      FASTSAM_UNROLL
      for (int j = 0; j < Shared::kGroups; j++) groups[j] = address ? pair_sum<kWarps>(warps[j]) : T(0);
      args.partials[index] = static_cast<double>(pair_sum<Shared::kGroups>(groups));
    });
    if (!kResidentNorm) break;  // a block a chunk
  }
  if (arrive_last(ctx, args, shared)) sum_partials(ctx, args, shared);
}

// ---- perturb_: reads 2n, writes 2n elements, n where a master is the backup; descending: starts on what grad_norm
// read last and ends on what the next forward reads first.

template <class F>
struct PerturbShared {
  Broadcast<Perturb<typename F::T>> perturb;
  Broadcast<Noise> noise;  // where weights are drawn
};

constexpr int kPerturbUnroll = 2;

template <class F>
struct PerturbTile {
  Values<typename F::Source, F::kElements> w;
  Values<typename F::Grad, F::kElements> g;
};

// One block of the grid counts a norm that is not finite.
template <class Ctx, class A, class Total>
FASTSAM_DEVICE void count_overflow(Ctx& ctx, const A& args, const Total& total) {
  if (!args.overflows || ctx.block() != 0) return;
  ctx.threads([&](int t) {
    if (t == 0 && !is_finite(total(args))) args.overflows[0]++;
  });
}

// Where a block of perturb_ finds its part of a segment.
template <class F>
struct PerturbOperands {
  const Segment* segment;
  typename F::Weight* w;             // the model's weights
  typename F::Source* kept;          // where the old weights are kept: the masters, or the backup
  const typename F::Source* source;  // where the old weights are read: the masters, or the weights
  const typename F::Grad* g;
  uint32_t first;  // block of the segment's random numbers

  template <class A>
  FASTSAM_DEVICE PerturbOperands(const A& args, const Part& part, const Chunk& chunk, int64_t grad)
      : segment(args.segments + chunk.segment) {
    w = element_of<typename F::Weight>(segment->weight, chunk, part.begin);
    kept = element_of<typename F::Source>(F::kMasters ? segment->master : segment->backup, chunk, part.begin);
    source = kept;
    if constexpr (!F::kMasters) source = w;
    g = element_of<const typename F::Grad>(grad, chunk, part.begin);
    first = first_block(chunk, part.begin);
  }
};

template <class F, class Ctx, class A>
FASTSAM_DEVICE void perturb_block(Ctx& ctx, const A& args, PerturbShared<F>& shared) {
  using S = typename F::Source;
  using G = typename F::Grad;
  using C = typename F::Weight;
  using T = typename F::T;
  constexpr int kElements = F::kElements, kStride = kThreads * kElements, kUnroll = kPerturbUnroll;
  using Tile = PerturbTile<F>;
  using Sources = Values<S, kElements>;
  using Direction = Values<G, kElements>;
  using Weights = Values<C, kElements>;
  const Part part = part_of(ctx.blocks() - 1 - ctx.block(), args.split_bits);
  const Chunk chunk = args.chunks[part.chunk];
  const int64_t grad = args.grad(chunk.segment);
  const int n = part_length(part, chunk), full = n - n % kElements;
  count_overflow(ctx, args, [](const A& a) { return ordered_sum(a); });
  if (!grad || n == 0) return;
  const PerturbOperands<F> own(args, part, chunk, grad);
  const int w_width = width_at(own.w, Weights::kWidth), g_width = width_at(own.g, Direction::kWidth);
  const int source_width = F::kMasters ? Sources::kWidth : w_width;
  const bool aligned = w_width == Weights::kWidth && g_width == Direction::kWidth;

  typename Ctx::template PerThread<Several<Tile, kUnroll>> tiles;
  const auto load_tile = [&](Tile& tile, int i, int source_bytes, int g_bytes) {
    if (i >= full) return;
    tile.w = load_words<Sources, Hint::kOnce>(own.source + i, source_bytes);
    tile.g = load_words<Direction, Hint::kOnce>(own.g + i, g_bytes);
  };
  ctx.threads([&](int t) {
    const auto load_tiles = [&] {
      FASTSAM_UNROLL
      for (int u = 0; u < kUnroll; u++) {
        if (aligned) load_tile(tiles[t].each[u], t * kElements + u * kStride, Sources::kWidth, Direction::kWidth);
      }
    };
    if (kPrefetch) load_tiles();  // ahead of the scalars they would take a processor's sixth block
    if (t == 0) {
      const Row row = args.row(own.segment->group);
      shared.perturb.put(Perturb<T>(row, ordered_sum(args)));
      if constexpr (F::kDrawsWeights) shared.noise.put(Noise(row, own.segment->index, *args.rounding));
    }
    if (!kPrefetch) load_tiles();
  });
  ctx.sync();
  ctx.threads([&](int t) {
    const Perturb<T> perturb = shared.perturb.get();
    if (perturb.scale == 0) {  // the weights stay as they are; without masters the backup is written all the same
      if constexpr (!F::kMasters) copy_part(own.kept, own.w, n, t);
      return;
    }
    const auto climb_and_store = [&](Tile& tile, int i, int width) {
      if (i >= full) return;
      if constexpr (!F::kMasters) store_words<Hint::kOnce>(own.kept + i, tile.w);
      const Random random = random_at<F::kDrawsWeights>(shared.noise, own.first, i, kClimbStream);
      FASTSAM_UNROLL
      for (int at = 0; at < kElements; at += F::kPiece) {  // in place, which spares registers
        T x[F::kPiece];
        FASTSAM_UNROLL
        for (int e = 0; e < F::kPiece; e++) {
          x[e] = perturb(Pack<S>::get(tile.w, at + e), Pack<G>::get(tile.g, at + e));
        }
        put<S, F::kDrawsWeights, F::kPiece>(tile.w, at, x, random);
      }
      store_words<Hint::kKeep>(own.w + i, converted<C, S, kElements>(tile.w), width);
    };
    const auto load_next = [&](int u, int i) {
      load_tile(tiles[t].each[u], i + (u + kUnroll) * kStride, Sources::kWidth, Direction::kWidth);
    };
    int i = t * kElements;
    if (aligned) {
      FASTSAM_ROLLED
      while (i < full) {
        FASTSAM_UNROLL
        for (int u = 0; u < kUnroll; u++) {
          climb_and_store(tiles[t].each[u], i + u * kStride, Weights::kWidth);
          if (kPrefetch) load_next(u, i);
        }
        FASTSAM_UNROLL
        for (int u = 0; u < kUnroll; u++) {
          if (!kPrefetch) load_next(u, i);
        }
        i += kUnroll * kStride;
      }
    } else {
      FASTSAM_ROLLED
      for (; i < full; i += kStride) {
        Tile tile;
        load_tile(tile, i, source_width, g_width);
        climb_and_store(tile, i, w_width);
      }
    }
    if (full + t < n) {
      const int at = full + t;
      const uint64_t old = load_bits<S, Hint::kOnce>(own.source + at);
      const T x = perturb(Pack<S>::widened(old), Pack<G>::widened(load_bits<G, Hint::kOnce>(own.g + at)));
      if constexpr (!F::kMasters) store_bits<S, Hint::kOnce>(own.kept + at, old);
      const uint64_t bits = rounded<C, F::kDrawsWeights>(x, shared.noise, own.first, at, kClimbStream);
      store_bits<C, Hint::kKeep>(own.w + at, bits);
    }
  });
}

}  // namespace fastsam::FASTSAM_ISA
