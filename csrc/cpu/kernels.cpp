// The loops, compiled once for each instruction set (FASTSAM_ISA names it). No templates of std, everything in the
// set's namespace: the linker could keep the AVX-512 copy of a shared inline function for processors that cannot run
// it.
#include "../math.h"
#include "launch.h"
#include "tile.h"

namespace fastsam::FASTSAM_ISA {

using cpu::Launch;

template <class S>
static S* at(int64_t address, const Chunk& chunk) {
  return reinterpret_cast<S*>(address) + static_cast<int64_t>(chunk.start) * kUnit;
}

// ---- grad_norm: reads n (adaptive: 2n) elements, writes one partial sum a chunk.

template <class T>
static void add_pairs(const T* __restrict in, T* __restrict out, int n) {
  for (int i = 0; i < n; i++) out[i] = in[2 * i] + in[2 * i + 1];
}

// The sum over the first `width` lanes; `pairs` is as large as half of them.
template <class T>
static T fold(T* lanes, T* pairs, int width) {
  T *in = lanes, *out = pairs;
  for (int half = width / 2; half > 0; half /= 2) {
    add_pairs(in, out, half);
    T* const folded = out;
    out = in;
    in = folded;
  }
  return in[0];
}

template <class S, class G, bool kTimesWeight>
static double chunk_sum(const S* w, const G* g, int n, const Row& row) {
  using T = typename Compute<S>::type;
  const Steepest<T> steepest(row);
  alignas(64) T lanes[kLanes], pairs[kLanes / 2], w_tile[kTile], g_tile[kTile];
  const int width = tree_width(n, kLanes);
  for (int i = 0; i < width; i++) lanes[i] = 0;
  for (int start = 0; start < n; start += kTile) {  // a tile lies within one row
    const int m = n - start < kTile ? n - start : kTile;
    T* const acc = lanes + start % kLanes;
    const auto* const gt = load(g + start, g_tile, m);
    if (kTimesWeight) {
      const auto* const wt = load(w + start, w_tile, m);
      for (int i = 0; i < m; i++) {
        const T x = steepest(widen(wt[i]), widen(gt[i]));
        acc[i] = fma(x, x, acc[i]);
      }
    } else {
      for (int i = 0; i < m; i++) {
        const T x = widen(gt[i]);
        acc[i] = fma(x, x, acc[i]);
      }
    }
  }
  return fold(lanes, pairs, width);
}

// The sum of |T g|^q, in no order that is promised.
template <class S, class G>
static double chunk_power_sum(const S* w, const G* g, int n, const Row& row, double q) {
  using T = typename Compute<S>::type;
  const Steepest<T> steepest(row);
  double sum = 0;
  for (int i = 0; i < n; i++) sum += power(abs(steepest(widen(w[i]), static_cast<T>(widen(g[i])))), q);
  return sum;
}

template <class S, class G>
static void grad_norm(const Launch& launch, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c++) {
    const Chunk& chunk = launch.chunks[c];
    const Segment& segment = launch.segments[chunk.segment];
    const Row& row = launch.rows[segment.group];
    const int64_t address = launch.grads[chunk.segment];
    if (!address) {
      launch.partials[c] = 0;
      continue;
    }
    const G* const g = at<const G>(address, chunk);
    const S* const w = at<const S>(segment.weight, chunk);
    launch.partials[c] = launch.q != 2                        ? chunk_power_sum(w, g, chunk.length, row, launch.q)
                         : needs_weight(row) && !launch.plain ? chunk_sum<S, G, true>(w, g, chunk.length, row)
                                                              : chunk_sum<S, G, false>(w, g, chunk.length, row);
  }
}

// ---- perturb_: reads 2n, writes 2n elements.

template <class S, class G, class P>
static void perturb_chunk(S* w, S* backup, const G* g, int n, const P& perturb, bool nothing, bool stream) {
  using T = typename Compute<S>::type;
  if (nothing) return store(backup, w, n, stream);
  alignas(64) T w_tile[kTile], g_tile[kTile], new_w[kTile];
  alignas(64) S rounded[kTile];
  for (int start = 0; start < n; start += kTile) {
    const int m = n - start < kTile ? n - start : kTile;
    const auto* const wt = load(static_cast<const S*>(w + start), w_tile, m);
    const auto* const gt = load(g + start, g_tile, m);
    for (int i = 0; i < m; i++) new_w[i] = perturb(widen(wt[i]), widen(gt[i]));
    store(backup + start, w + start, m, stream);
    store(w + start, unload(new_w, rounded, m), m, stream);
  }
}

template <class S, class G>
static void perturb(const Launch& launch, int64_t begin, int64_t end) {
  using T = typename Compute<S>::type;
  for (int64_t c = begin; c < end; c++) {
    const Chunk& chunk = launch.chunks[c];
    const Segment& segment = launch.segments[chunk.segment];
    const int64_t address = launch.grads[chunk.segment];
    if (!address) continue;
    const Row& row = launch.rows[segment.group];
    S* const w = at<S>(segment.weight, chunk);
    S* const backup = at<S>(segment.backup, chunk);
    const G* const g = at<const G>(address, chunk);
    if (launch.q == 2) {
      const Perturb<T> perturb(row, launch.sum);
      perturb_chunk(w, backup, g, chunk.length, perturb, perturb.scale == 0, launch.stream);
    } else {
      const PowerPerturb<T> perturb(row, launch.sum, launch.q);
      perturb_chunk(w, backup, g, chunk.length, perturb, perturb.rho == 0, launch.stream);
    }
  }
  store_fence(launch.stream);
}

// ---- update_: reads 2n and the states, writes n and the states.

struct Update {  // what all rules are given of one chunk
  const Segment& segment;
  const Chunk& chunk;
  const Row& row;
  int64_t source, grad;  // addresses
};

template <class T, int kStates, class A, class B, class R>
static void update_tile(const A* w, const B* g, T* __restrict s0, T* __restrict s1, T* __restrict s2,
                        T* __restrict new_w, int n, const R& rule) {
  for (int i = 0; i < n; i++) {
    T state[kMaxStates];
    if (kStates & 1) state[0] = s0[i];
    if (kStates & 2) state[1] = s1[i];
    if (kStates & 4) state[2] = s2[i];
    new_w[i] = rule(widen(w[i]), widen(g[i]), state);
    if (kStates & 1) s0[i] = state[0];
    if (kStates & 2) s1[i] = state[1];
    if (kStates & 4) s2[i] = state[2];
  }
}

template <Rule kRule, int kStates, class S, class G>
static void update_chunk(const Launch& launch, const Update& update) {
  using T = typename Compute<S>::type;
  const Segment& segment = update.segment;
  const Chunk& chunk = update.chunk;
  const typename RuleOf<kRule>::template Functor<T, kStates> rule(update.row,
                                                                  *reinterpret_cast<const Progress*>(segment.progress));
  const Gradient<T> gradient(update.row, launch.grad_scale, launch.clip);
  S* const w = at<S>(segment.weight, chunk);
  const S* const source = at<const S>(update.source, chunk);
  const G* const g = at<const G>(update.grad, chunk);
  alignas(64) T w_tile[kTile], g_tile[kTile], state_tile[kMaxStates][kTile], new_w[kTile];
  alignas(64) S rounded[kTile];
  for (int start = 0; start < chunk.length; start += kTile) {
    const int m = chunk.length - start < kTile ? chunk.length - start : kTile;
    const auto* const wt = load(source + start, w_tile, m);
    const auto* const gt = load(g + start, g_tile, m);
    S* memory[kMaxStates] = {};
    T* state[kMaxStates] = {};
    for (int k = 0; k < kMaxStates; k++) {
      if (!(kStates >> k & 1)) continue;
      memory[k] = at<S>(segment.state[k], chunk) + start;
      state[k] = load(memory[k], state_tile[k], m);
    }
    if (gradient.identity()) {
      update_tile<T, kStates>(wt, gt, state[0], state[1], state[2], new_w, m, rule);
    } else {
      for (int i = 0; i < m; i++) g_tile[i] = gradient(widen(gt[i]));
      update_tile<T, kStates>(wt, g_tile, state[0], state[1], state[2], new_w, m, rule);
    }
    for (int k = 0; k < kMaxStates; k++) {
      if (kStates >> k & 1) unload(state[k], memory[k], m);
    }
    store(w + start, unload(new_w, rounded, m), m, launch.stream);
  }
}

template <Rule kRule, class S, class G>
static void apply_rule(const Launch& launch, const Update& update) {
  constexpr int kAll = (1 << kMaxStates) - 1;
  RuleOf<kRule>::template with_states<kAll>(
      update.row, [&](auto set) { update_chunk<kRule, decltype(set)::value, S, G>(launch, update); });
}

template <class S, class G>
static void update(const Launch& launch, int64_t begin, int64_t end) {
  const bool found_inf = launch.found_inf && *launch.found_inf != 0;
  for (int64_t c = begin; c < end; c++) {
    const Chunk& chunk = launch.chunks[c];
    const Segment& segment = launch.segments[chunk.segment];
    const int64_t grad = launch.grads[chunk.segment];
    const bool has_grad = launch.rule != kNoRule && grad;
    const Decision decision = decide(launch.perturbed[chunk.segment], has_grad, found_inf);
    if (decision.source == Source::kNone) continue;
    const int64_t source = decision.source == Source::kBackup ? segment.backup : segment.weight;
    if (decision.rule) {
      const Update update{segment, chunk, launch.rows[segment.group], source, grad};
#define FASTSAM_ROW(code, ...) \
  if (launch.rule == code) apply_rule<code, S, G>(launch, update);
      FASTSAM_RULES(FASTSAM_ROW)
#undef FASTSAM_ROW
    } else {
      store(at<S>(segment.weight, chunk), at<const S>(source, chunk), chunk.length, launch.stream);
    }
  }
  store_fence(launch.stream);
}

// By pair, as tables.h counts them.
#define FASTSAM_PAIRS(loop)                                                                       \
  {loop<float, float>,    loop<double, double>, loop<bfloat16, bfloat16>, loop<float16, float16>, \
   loop<float, bfloat16>, loop<float, float16>, loop<bfloat16, float>,    loop<float16, float>}
#define FASTSAM_NAME_(isa) #isa
#define FASTSAM_NAME(isa) FASTSAM_NAME_(isa)

extern const cpu::Kernels kernels = {
    FASTSAM_NAME(FASTSAM_ISA),
    FASTSAM_PAIRS(grad_norm),
    FASTSAM_PAIRS(perturb),
    FASTSAM_PAIRS(update),
};

}  // namespace fastsam::FASTSAM_ISA
