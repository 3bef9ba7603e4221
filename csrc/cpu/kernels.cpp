// The loops, compiled once for each instruction set (FASTSAM_ISA names it). No templates of std, everything in the
// set's namespace: the linker could keep the AVX-512 copy of a shared inline function for processors that cannot run
// it.
#include "../math/combine.h"
#include "../math/perturb.h"
#include "../math/rules.h"
#include "launch.h"
#include "tile.h"

namespace fastsam::FASTSAM_ISA {

using cpu::Launch;

static Elements at(int64_t address, Dtype dtype, const Chunk& chunk) {
  return Elements{reinterpret_cast<char*>(address), dtype} + static_cast<int64_t>(chunk.start) * kUnit;
}

// How many of n elements the tile that starts there has.
static int tile_size(int start, int n) { return n - start < kTile ? n - start : kTile; }

// ---- grad_norm: reads n (adaptive: 2n) elements, writes one partial sum a chunk; for q != 2 a norm, and reads twice.

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

template <class T>
static double chunk_sum(Elements w, Elements g, int n, const Row& row, bool times_weight) {
  const Steepest<T> steepest(row);
  alignas(kLine) T lanes[kLanes], pairs[kLanes / 2], w_tile[kTile], g_tile[kTile];
  const int width = tree_width(n, kLanes);
  for (int i = 0; i < width; i++) lanes[i] = 0;
  for (int start = 0; start < n; start += kTile) {  // a tile lies within one row
    const int m = tile_size(start, n);
    T* const acc = lanes + start % kLanes;
    const T* const gt = load(g + start, g_tile, m);
    if (times_weight) {
      const T* const wt = load(w + start, w_tile, m);
      for (int i = 0; i < m; i++) {
        const T x = steepest(wt[i], gt[i]);
        acc[i] = fma(x, x, acc[i]);
      }
    } else {
      for (int i = 0; i < m; i++) acc[i] = fma(gt[i], gt[i], acc[i]);
    }
  }
  return fold(lanes, pairs, width);
}

// The q-norm of T g.
template <class T>
static double chunk_norm(Elements w, Elements g, int n, const Row& row, double q) {
  const PowerSteepest<T> steepest(row);
  return q_norm(q, [&](const auto& f) {
    alignas(kLine) T w_tile[kTile], g_tile[kTile];
    for (int start = 0; start < n; start += kTile) {
      const int m = tile_size(start, n);
      const T* const wt = load(w + start, w_tile, m);
      const T* const gt = load(g + start, g_tile, m);
      for (int i = 0; i < m; i++) f(abs(steepest(wt[i], gt[i])));
    }
  });
}

template <class T>
static void grad_norm(const Launch& launch, int64_t begin, int64_t end) {
  const Format& format = launch.format;
  for (int64_t c = begin; c < end; c++) {
    const Chunk& chunk = launch.chunks[c];
    const Segment& segment = launch.segments[chunk.segment];
    const Row& row = launch.rows[segment.group];
    const int64_t address = launch.grads[chunk.segment];
    if (!address) {
      launch.partials[c] = 0;
      continue;
    }
    const Elements w = at(format.masters() ? segment.master : segment.weight, format.source, chunk);
    const Elements g = at(address, format.grad, chunk);
    const bool times_weight = needs_weight(row) && !launch.plain;
    launch.partials[c] = launch.q != 2 ? chunk_norm<T>(w, g, chunk.length, row, launch.q)
                                       : chunk_sum<T>(w, g, chunk.length, row, times_weight);
  }
}

// ---- perturb_: reads 2n, writes 2n elements; n where there are masters, which are the backup.

// What a chunk's results are rounded with: random numbers of the tile at `start`, or null for the nearest.
class Rounding {
 public:
  Rounding(const Launch& launch, const Segment& segment, const Chunk& chunk)
      : noise_(launch.rows[segment.group], segment.index, launch.rounding ? *launch.rounding : 0),
        first_(static_cast<int64_t>(chunk.start) * kUnit),
        weights_(launch.format.stochastic && !launch.format.masters() && is_low(launch.format.weight)),
        states_(launch.format.stochastic && is_low(launch.format.state)) {}
  const uint16_t* weights(int start, int stream, uint16_t* tile) const {
    return weights_ ? draw(noise_, first_ + start, stream, tile) : nullptr;
  }
  const uint16_t* states(int start, int slot, uint16_t* tile) const {
    return states_ ? draw(noise_, first_ + start, kStateStream + slot, tile) : nullptr;
  }

 private:
  const Noise noise_;
  const int64_t first_;
  const bool weights_, states_;
};

template <class T, class P>
static void perturb_chunk(const Launch& launch, const Segment& segment, const Chunk& chunk, const P& perturb,
                          bool nothing) {
  const Format& format = launch.format;
  const bool masters = format.masters();
  const Elements w = at(segment.weight, format.weight, chunk);
  const Elements backup = at(segment.backup, format.weight, chunk);
  const Elements source = masters ? at(segment.master, format.source, chunk) : w;
  const Elements g = at(launch.grads[chunk.segment], format.grad, chunk);
  if (nothing && masters) return;  // the weights are the masters, rounded
  if (nothing) return store(backup, w.address, chunk.length, launch.stream);
  const Rounding rounding(launch, segment, chunk);
  alignas(kLine) T w_tile[kTile], g_tile[kTile], w_results[kTile];
  alignas(kLine) uint16_t noise[kTile];
  for (int start = 0; start < chunk.length; start += kTile) {
    const int m = tile_size(start, chunk.length);
    const T* const wt = load(source + start, w_tile, m);
    const T* const gt = load(g + start, g_tile, m);
    T* const new_w = results(w + start, w_results, launch.stream);
    if (!masters) store(backup + start, (w + start).address, m, launch.stream);
#pragma GCC ivdep  // new_w may be wt
    for (int i = 0; i < m; i++) new_w[i] = perturb(wt[i], gt[i]);
    const uint16_t* const noise_or_null = rounding.weights(start, kClimbStream, noise);
    write(new_w, noise_or_null, w + start, m, launch.stream);
  }
}

template <class T>
static void perturb(const Launch& launch, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c++) {
    const Chunk& chunk = launch.chunks[c];
    const Segment& segment = launch.segments[chunk.segment];
    if (!launch.grads[chunk.segment]) continue;
    const Row& row = launch.rows[segment.group];
    if (launch.q == 2) {
      const Perturb<T> perturb(row, launch.total);
      perturb_chunk<T>(launch, segment, chunk, perturb, perturb.scale == 0);
    } else if (launch.q == 1) {
      const SignPerturb<T> perturb(row);
      perturb_chunk<T>(launch, segment, chunk, perturb, perturb.scale == 0);
    } else {
      const PowerPerturb<T> perturb(row, launch.total, launch.q);
      perturb_chunk<T>(launch, segment, chunk, perturb, perturb.scale == 0);
    }
  }
  store_fence(launch.stream);
}

// ---- update_: reads 2n and the states, writes n (2n where there are masters) and the states.

struct Update {  // what all rules are given of one chunk
  const Segment& segment;
  const Chunk& chunk;
  const Row& row;
  Elements source, g;
};

template <class T, int kStates, class R>
static void update_tile(const T* w, const T* g, T* __restrict s0, T* __restrict s1, T* __restrict s2, T* new_w, int n,
                        const R& rule) {
#pragma GCC ivdep  // new_w may be w
  for (int i = 0; i < n; i++) {
    T state[kMaxStates];
    if (kStates & 1) state[0] = s0[i];
    if (kStates & 2) state[1] = s1[i];
    if (kStates & 4) state[2] = s2[i];
    new_w[i] = rule(w[i], g[i], state);
    if (kStates & 1) s0[i] = state[0];
    if (kStates & 2) s1[i] = state[1];
    if (kStates & 4) s2[i] = state[2];
  }
}

template <Rule kRule, int kStates, class T>
static void update_chunk(const Launch& launch, const Update& update) {
  const Format& format = launch.format;
  const Segment& segment = update.segment;
  const Chunk& chunk = update.chunk;
  const typename RuleOf<kRule>::template Functor<T, kStates> rule(update.row,
                                                                  *reinterpret_cast<const Progress*>(segment.progress));
  const Gradient<T> gradient(update.row, launch.grad_scale, launch.clip);
  const Rounding rounding(launch, segment, chunk);
  const Elements w = at(segment.weight, format.weight, chunk);
  alignas(kLine) T w_tile[kTile], g_tile[kTile], state_tile[kMaxStates][kTile], w_results[kTile];
  alignas(kLine) uint16_t noise[kTile];
  for (int start = 0; start < chunk.length; start += kTile) {
    const int m = tile_size(start, chunk.length);
    const T* const wt = load(update.source + start, w_tile, m);
    const T* gt = load(update.g + start, g_tile, m);
    if (!gradient.identity()) {
      for (int i = 0; i < m; i++) g_tile[i] = gradient(gt[i]);
      gt = g_tile;
    }
    Elements memory[kMaxStates];
    T* state[kMaxStates] = {};
    for (int k = 0; k < kMaxStates; k++) {
      if (!(kStates >> k & 1)) continue;
      memory[k] = at(segment.state[k], format.state, chunk) + start;
      state[k] = load(memory[k], state_tile[k], m);
    }
    T* const new_w = results(w + start, w_results, launch.stream);
    update_tile<T, kStates>(wt, gt, state[0], state[1], state[2], new_w, m, rule);
    for (int k = 0; k < kMaxStates; k++) {
      if (kStates >> k & 1) unload(state[k], rounding.states(start, k, noise), memory[k], m);
    }
    if (format.masters()) write(new_w, nullptr, update.source + start, m, launch.stream);
    const uint16_t* const noise_or_null = rounding.weights(start, kStepStream, noise);
    write(new_w, noise_or_null, w + start, m, launch.stream);
  }
}

template <Rule kRule, class T>
static void apply_rule(const Launch& launch, const Update& update) {
  constexpr int kAll = (1 << kMaxStates) - 1;
  RuleOf<kRule>::template with_states<kAll>(
      update.row, [&](auto set) { update_chunk<kRule, decltype(set)::value, T>(launch, update); });
}

// Weights as they were before the perturbation: the backup's bits, or the masters, rounded.
template <class T>
static void restore_chunk(const Launch& launch, Elements w, Elements source, int n) {
  if (!launch.format.masters()) return store(w, source.address, n, launch.stream);
  alignas(kLine) T tile[kTile];
  for (int start = 0; start < n; start += kTile) {
    const int m = tile_size(start, n);
    const T* const wt = load(source + start, tile, m);
    write(wt, nullptr, w + start, m, launch.stream);
  }
}

template <class T>
static void update(const Launch& launch, int64_t begin, int64_t end) {
  const Format& format = launch.format;
  const bool found_inf = launch.found_inf && *launch.found_inf != 0;
  for (int64_t c = begin; c < end; c++) {
    const Chunk& chunk = launch.chunks[c];
    const Segment& segment = launch.segments[chunk.segment];
    const int64_t grad = launch.grads[chunk.segment];
    const bool has_grad = launch.rule != kNoRule && grad;
    const Decision decision = decide(launch.perturbed[chunk.segment], has_grad, found_inf);
    if (decision.source == Source::kNone) continue;
    const int64_t address = format.masters()                     ? segment.master
                            : decision.source == Source::kBackup ? segment.backup
                                                                 : segment.weight;
    const Elements source = at(address, format.source, chunk);
    if (decision.rule) {
      const Update update{segment, chunk, launch.rows[segment.group], source, at(grad, format.grad, chunk)};
#define FASTSAM_ROW(code, ...) \
  if (launch.rule == code) apply_rule<code, T>(launch, update);
      FASTSAM_RULES(FASTSAM_ROW)
#undef FASTSAM_ROW
    } else {
      restore_chunk<T>(launch, at(segment.weight, format.weight, chunk), source, chunk.length);
    }
  }
  store_fence(launch.stream);
}

// ---- dot: reads 2n elements, writes three partial sums a chunk.

// Add to the lanes what a tile, which lies within one row, has for them.
template <class T>
static void add_squares(const T* x, T* __restrict lanes, int n) {
  for (int i = 0; i < n; i++) lanes[i] = fma(x[i], x[i], lanes[i]);
}

// The same for all three products at once: one after the other they take a sixth longer. x may be y.
template <class T>
static void add_products(const T* x, const T* y, T* __restrict xx, T* __restrict xy, T* __restrict yy, int n) {
  for (int i = 0; i < n; i++) {
    xx[i] = fma(x[i], x[i], xx[i]);
    xy[i] = fma(x[i], y[i], xy[i]);
    yy[i] = fma(y[i], y[i], yy[i]);
  }
}

// An operand's elements in a chunk; no address where the segment has none.
static Elements elements_of(const Operand& operand, const Chunk& chunk) {
  const int64_t address = operand.addresses ? operand.addresses[chunk.segment] : 0;
  return address ? at(address, operand.dtype, chunk) : Elements{nullptr, operand.dtype};
}

template <class T>
static void dot(const cpu::Dot& launch, int64_t begin, int64_t end) {
  alignas(kLine) T lanes[kProducts][kLanes], pairs[kLanes / 2], x_tile[kTile], y_tile[kTile];
  for (int64_t c = begin; c < end; c++) {
    const Chunk& chunk = launch.chunks[c];
    const int n = chunk.length, width = tree_width(n, kLanes);
    const Elements x = elements_of(launch.a, chunk), y = elements_of(launch.b, chunk);
    const bool there[kProducts] = {x.address != nullptr, x.address && y.address, y.address != nullptr};
    for (int k = 0; k < kProducts; k++) {
      if (!there[k]) continue;
      for (int i = 0; i < width; i++) lanes[k][i] = 0;
    }
    for (int start = 0; start < n; start += kTile) {
      const int m = tile_size(start, n), lane = start % kLanes;
      const T* const xt = x.address ? load(x + start, x_tile, m) : nullptr;
      const T* const yt = y.address ? load(y + start, y_tile, m) : nullptr;
      if (xt && yt) {
        add_products(xt, yt, lanes[0] + lane, lanes[1] + lane, lanes[2] + lane, m);
      } else if (xt) {
        add_squares(xt, lanes[0] + lane, m);
      } else if (yt) {
        add_squares(yt, lanes[2] + lane, m);
      }
    }
    for (int k = 0; k < kProducts; k++) {
      launch.partials[k * launch.n_chunks + c] = there[k] ? fold(lanes[k], pairs, width) : 0;
    }
  }
}

// ---- combine_: reads n elements for each term that is left, writes n.

template <int kTerms, class T>
static void combine_tile(const T* c, const T* x0, const T* x1, const T* x2, T* out, int n) {
  const T own[kMostTerms] = {c[0], c[1], c[2]};
#pragma GCC ivdep  // out may be one of the operands
  for (int i = 0; i < n; i++) {
    T x[kMostTerms];
    if (kTerms > 0) x[0] = x0[i];
    if (kTerms > 1) x[1] = x1[i];
    if (kTerms > 2) x[2] = x2[i];
    out[i] = combined<kTerms>(own, x);
  }
}

template <int kTerms, class T>
static void combine_chunk(const Terms<T, Elements>& terms, Elements out, int n, bool stream) {
  alignas(kLine) T tiles[kMostTerms][kTile], out_results[kTile];
  for (int start = 0; start < n; start += kTile) {
    const int m = tile_size(start, n);
    const T* x[kMostTerms] = {};
    for (int k = 0; k < kTerms; k++) x[k] = load(terms.x[k] + start, tiles[k], m);
    T* const result = results(out + start, out_results, stream);
    combine_tile<kTerms>(terms.c, x[0], x[1], x[2], result, m);
    write(result, nullptr, out + start, m, stream);
  }
}

template <class T>
static void combine(const cpu::Combination& launch, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c++) {
    const Chunk& chunk = launch.chunks[c];
    const Elements out = elements_of(launch.out, chunk);
    if (!out.address) continue;
    Terms<T, Elements> terms;
    for (const Term& term : launch.terms) {
      const Elements x = elements_of(term.operand, chunk);
      terms.add(term.coefficient, x.address, x);
    }
    if (terms.n == 0) combine_chunk<0>(terms, out, chunk.length, launch.stream);
    if (terms.n == 1) combine_chunk<1>(terms, out, chunk.length, launch.stream);
    if (terms.n == 2) combine_chunk<2>(terms, out, chunk.length, launch.stream);
    if (terms.n == 3) combine_chunk<3>(terms, out, chunk.length, launch.stream);
  }
  store_fence(launch.stream);
}

#define FASTSAM_NAME_(isa) #isa
#define FASTSAM_NAME(isa) FASTSAM_NAME_(isa)

extern const cpu::Kernels kernels = {
    FASTSAM_NAME(FASTSAM_ISA),         {grad_norm<float>, grad_norm<double>},
    {perturb<float>, perturb<double>}, {update<float>, update<double>},
    {dot<float>, dot<double>},         {combine<float>, combine<double>},
};

}  // namespace fastsam::FASTSAM_ISA
