// All arithmetic of the native backends, one functor a formula.
//
// Every operation is one rounding, in the order of torch.optim's for-loop; `fma` stands where ATen rounds a product and
// a sum once. The compilers must not contract: -ffp-contract=off, -fmad=false. Scalars are float64 until one final
// cast. T is float for float32, bfloat16 and float16, double for float64. Twin of fastsam/ops/reference.py: a formula
// changes in both.
//
// Each instruction set has its own namespace, else the linker may keep one set's copy of an inline function for all.
#pragma once

#include <cmath>
#include <cstdint>

#include "tables.h"

#ifdef __CUDACC__
#define FASTSAM_HD __host__ __device__ inline
#else
#define FASTSAM_HD inline
#endif

#ifndef FASTSAM_ISA
#ifdef __CUDACC__
#define FASTSAM_ISA cuda
#else
#define FASTSAM_ISA baseline
#endif
#endif

namespace fastsam::FASTSAM_ISA {

FASTSAM_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FASTSAM_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }
FASTSAM_HD float sqrt(float x) { return ::sqrtf(x); }
FASTSAM_HD double sqrt(double x) { return ::sqrt(x); }
FASTSAM_HD float abs(float x) { return ::fabsf(x); }
FASTSAM_HD double abs(double x) { return ::fabs(x); }
FASTSAM_HD bool is_finite(double x) { return x - x == 0; }

FASTSAM_HD bool has(const Row& row, Flag flag) { return static_cast<int>(row.flags) & flag; }

// base^n by repeated squaring: the same bits on every machine, which pow is not.
FASTSAM_HD double ipow(double base, uint32_t n) {
  double result = 1.0;
  for (; n; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

union FloatBits {
  float value;
  uint32_t bits;
};
union DoubleBits {
  double value;
  uint64_t bits;
};
FASTSAM_HD uint32_t to_bits(float x) { return FloatBits{x}.bits; }
FASTSAM_HD uint64_t to_bits(double x) { return DoubleBits{x}.bits; }
FASTSAM_HD float from_bits(uint32_t bits) {
  FloatBits both;
  both.bits = bits;
  return both.value;
}
FASTSAM_HD double from_bits(uint64_t bits) {
  DoubleBits both;
  both.bits = bits;
  return both.value;
}

// flag ? a : b, for flags that are the same for all elements. GCC makes a loop for each value of up to three such
// flags, then vectorises it, but no loop that still has such a condition in it: functors with more flags select. The
// value not chosen may be anything, NaN too.
template <class T>
FASTSAM_HD T select(bool flag, T a, T b) {
  using Bits = decltype(to_bits(a));
  const Bits mask = Bits(0) - flag;
  return from_bits((to_bits(a) & mask) | (to_bits(b) & ~mask));
}

// a + weight (b - a), from whichever end is nearer.
template <class T>
FASTSAM_HD T lerp(T a, T b, T weight) {
  return select(weight < T(0.5), fma(weight, b - a, a), fma(weight - T(1), b - a, b));
}

// torch.maximum: a NaN on either side stays.
template <class T>
FASTSAM_HD T maximum(T a, T b) {
  return (b > a) | (b != b) ? b : a;
}

// torch.sign: 0 for 0 and for NaN.
template <class T>
FASTSAM_HD T sign(T x) {
  return static_cast<T>((x > 0) - (x < 0));
}

// ---- Low precision: widened exactly, rounded once to nearest even. NaN payloads are not kept.

enum class bfloat16 : uint16_t {};  // the bits; enumerations, because compilers vectorise no loads of structures
enum class float16 : uint16_t {};

FASTSAM_HD float widen(float x) { return x; }
FASTSAM_HD double widen(double x) { return x; }
FASTSAM_HD float widen(bfloat16 x) { return from_bits(static_cast<uint32_t>(x) << 16); }
FASTSAM_HD float widen(float16 x) {
  const uint32_t bits = static_cast<uint32_t>(x), sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  const uint32_t rebias = magnitude >= 0x7c00 ? 0x70000000 : 0x38000000;  // 224 << 23 for inf and NaN, 112 << 23
  const uint32_t subnormal = to_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return from_bits(sign | (magnitude < 0x0400 ? subnormal : (magnitude << 13) + rebias));
}

FASTSAM_HD void narrow(float x, float& out) { out = x; }
FASTSAM_HD void narrow(double x, double& out) { out = x; }
FASTSAM_HD void narrow(float x, bfloat16& out) {
  const uint32_t bits = to_bits(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out = static_cast<bfloat16>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
FASTSAM_HD void narrow(float x, float16& out) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffff;
  const uint32_t clamped = magnitude < 0x47800000 ? magnitude : 0x47800000;  // 2^16 and beyond are infinity
  const uint32_t normal = ((clamped + 0xfff + (clamped >> 13 & 1)) >> 13) - (112 << 10);
  // The last place of a float between 0.5 and 1 is 2^-24, float16's smallest step: the addition rounds to it.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  out = static_cast<float16>((bits >> 16 & 0x8000) | (magnitude > 0x7f800000 ? 0x7e00 : finite));
}

// ---- Stochastic rounding: up or down, with the odds that make the result right on average. A value that the dtype
// holds stays, and so do infinities and NaN.

// Philox4x32-7 (Salmon et al., SC 2011): four words of random bits for each counter of four words; 7 rounds are the
// fewest that pass the tests of its authors.
constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhilox0 = 0xD2511F53u, kPhilox1 = 0xCD9E8D57u;  // factors
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;      // what a key grows by

struct Random {  // eight numbers of 16 bits
  uint32_t words[4];
  FASTSAM_HD uint32_t operator[](int i) const { return words[i / 2] >> 16 * (i % 2) & 0xffff; }
};
FASTSAM_HD Random philox(Random counter, uint32_t key0, uint32_t key1) {
  uint32_t a = counter.words[0], b = counter.words[1], c = counter.words[2], d = counter.words[3];
  for (int i = 0; i < kPhiloxRounds; i++) {
    const uint64_t first = static_cast<uint64_t>(a) * kPhilox0, second = static_cast<uint64_t>(c) * kPhilox1;
    a = static_cast<uint32_t>(second >> 32) ^ b ^ key0;
    b = static_cast<uint32_t>(second);
    c = static_cast<uint32_t>(first >> 32) ^ d ^ key1;
    d = static_cast<uint32_t>(first);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return {{a, b, c, d}};
}

// A parameter's random numbers in one step: those of elements 8 block to 8 block + 7 in a stream.
struct Noise {
  uint32_t key0, key1, index, step;
  FASTSAM_HD Noise(const Row& row, int32_t index, int64_t step)
      : key0(static_cast<uint32_t>(static_cast<uint64_t>(row.seed))),
        key1(static_cast<uint32_t>(static_cast<uint64_t>(row.seed) >> 32)),
        index(static_cast<uint32_t>(index)),
        step(static_cast<uint32_t>(step)) {}
  FASTSAM_HD Random operator()(int64_t block, int stream) const {
    return philox({{static_cast<uint32_t>(block), index, step, static_cast<uint32_t>(stream)}}, key0, key1);
  }
};

// With `noise` below 2^16, which is added to what is cut off and carries into what stays.
FASTSAM_HD void narrow(float x, uint32_t noise, bfloat16& out) {
  const uint32_t bits = to_bits(x);
  out = static_cast<bfloat16>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + noise) >> 16);
}
FASTSAM_HD void narrow(float x, uint32_t noise, float16& out) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffff;
  // Signed, which loops are vectorised with. Float16 has 13 bits less than float32; 2^16 and beyond are infinity.
  const int32_t own = static_cast<int32_t>(noise >> 3);
  const int32_t clamped = static_cast<int32_t>(magnitude < 0x47800000 ? magnitude : 0x47800000);
  const int32_t normal = ((clamped + own) >> 13) - (112 << 10);
  // In units of float16's smallest step; not used, and kept in range, where the number is normal.
  const float steps = from_bits(magnitude < 0x38800000 ? magnitude : 0) * 0x1p24f + static_cast<float>(own) * 0x1p-13f;
  const int32_t subnormal = static_cast<int32_t>(steps);
  const int32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  out = static_cast<float16>((bits >> 16 & 0x8000) | static_cast<uint32_t>(magnitude > 0x7f800000 ? 0x7e00 : finite));
}
// What is as wide as the arithmetic stays as it is.
FASTSAM_HD void narrow(float x, uint32_t, float& out) { out = x; }
FASTSAM_HD void narrow(double x, uint32_t, double& out) { out = x; }

template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

// ---- The norm: sum of squares in one canonical tree, the same bits whatever the backend, block size and thread count.
// A chunk's lanes take acc = fma(x, x, acc) over its 4 rows, then adjacent pairs are added, 11 levels.

// Lanes beyond the next power of two of n hold zeros, which change no sum of squares.
FASTSAM_HD int tree_width(int64_t n, int most) {
  int width = 1;
  while (width < n && width < most) width *= 2;
  return width;
}

// The gradient of the loss with weight_decay/2 |w|^2 in it, where that is to be perturbed along, as in the paper's
// code.
template <class T>
struct LossGradient {
  T weight_decay;
  bool decays;
  FASTSAM_HD explicit LossGradient(const Row& row)
      : weight_decay(static_cast<T>(has(row, kMaximize) ? -row.weight_decay : row.weight_decay)),
        decays(has(row, kDecays)) {}
  FASTSAM_HD T operator()(T w, T g) const { return decays ? fma(weight_decay, w, g) : g; }
};

// The vector whose length is the norm: T g, T = 1 or |w| + eta (ASAM: Kwon et al., arXiv 2102.11600). w g has the
// square of |w| g.
FASTSAM_HD bool needs_weight(const Row& row) { return has(row, kAdaptive) || has(row, kDecays); }
template <class T>
struct Steepest {
  LossGradient<T> loss_gradient;
  T eta;
  bool adaptive;
  FASTSAM_HD explicit Steepest(const Row& row)
      : loss_gradient(row), eta(static_cast<T>(row.eta)), adaptive(has(row, kAdaptive)) {}
  FASTSAM_HD T operator()(T w, T g) const {
    g = loss_gradient(w, g);
    return !adaptive ? g : eta == 0 ? w * g : (abs(w) + eta) * g;
  }
};

// ---- Perturbation: w + e(w), e = rho g / (|g| + NORM_EPS) (SAM: Foret et al., arXiv 2010.01412, eq. 2) or
// rho T^2 g / (|T g| + NORM_EPS) (ASAM: arXiv 2102.11600). Two roundings from g on: the bits of p.add_(g * scale).

// 0 (no perturbation) where the norm is not finite: such a step is the base optimizer's.
template <class T>
FASTSAM_HD T perturbation_scale(const Row& row, double sum) {
  const double norm = sqrt(sum) + kNormEps;
  if (!is_finite(norm)) return 0;
  const T scale = static_cast<T>(row.rho / norm);
  return has(row, kMaximize) ? -scale : scale;
}

template <class T>
struct Perturb {
  T scale;  // not 0, which the caller must branch on: 0 * inf is NaN
  LossGradient<T> loss_gradient;
  T eta;
  bool adaptive;
  FASTSAM_HD Perturb(const Row& row, double sum)
      : scale(perturbation_scale<T>(row, sum)),
        loss_gradient(row),
        eta(static_cast<T>(row.eta)),
        adaptive(has(row, kAdaptive)) {}
  FASTSAM_HD T operator()(T w, T g) const {
    g = loss_gradient(w, g);
    if (adaptive) {
      const T t = abs(w) + eta;
      g = eta == 0 ? (w * w) * g : t * (t * g);
    }
    const T e = g * scale;
    return w + e;
  }
};

// ---- The same for another norm than the second: e maximises <e, g> where |e / T|_p = rho, p in (1, inf] (arXiv
// 2010.01412, eq. 2), with q = p / (p - 1). In float64: |x|^q underflows float32 for p near 1. Not bit-equal between
// backends, as exp2 and log2 are not.

FASTSAM_HD double power(double x, double exponent) { return x == 0 ? 0 : ::exp2(exponent * ::log2(x)); }

template <class T>
struct PowerPerturb {
  LossGradient<T> loss_gradient;
  T eta;
  bool adaptive;
  double rho, norm,
      exponent;  // rho is 0 where the norm is not finite; exponent = q - 1, 0 for p = inf, which has no norm
  FASTSAM_HD PowerPerturb(const Row& row, double sum, double q)
      : loss_gradient(row),
        eta(static_cast<T>(row.eta)),
        adaptive(has(row, kAdaptive)),
        rho(has(row, kMaximize) ? -row.rho : row.rho),
        norm(1),
        exponent(q - 1) {
    if (q == 1) return;
    norm = power(sum, 1 / q) + kNormEps;
    if (!is_finite(norm)) rho = 0;
  }
  // rho T sign(g) (|T g| / norm)^(q - 1); 0 for an element that is not finite, which only p = inf gets to see.
  FASTSAM_HD T operator()(T w, T g) const {
    const double t = adaptive ? static_cast<double>(abs(w) + eta) : 1.0;
    const double x = static_cast<double>(loss_gradient(w, g)) * t, size = abs(x);
    const double length = exponent == 0 ? (size != 0) : power(size / norm, exponent);
    const double e = is_finite(x) ? rho * t * (x < 0 ? -length : length) : 0;
    return w + static_cast<T>(e);
  }
};

// ---- Update.

// What happens to a segment: where its old weights are, whether the rule runs on them, whether its step count grows.
enum class Source { kNone, kBackup, kWeight };
struct Decision {
  Source source;
  bool rule, count;
};
FASTSAM_HD Decision decide(bool perturbed, bool has_grad, bool found_inf) {
  const bool rule = has_grad && !found_inf;
  return {perturbed ? Source::kBackup : rule ? Source::kWeight : Source::kNone, rule, rule};
}

// torch.nn.utils.clip_grad_norm_: the factor, at most 1, that brings gradients of this squared norm down to max_norm.
// NaN where the norm is not finite, so that it shows.
FASTSAM_HD double clip_factor(double max_norm, double sum, const float* grad_scale) {
  double norm = sqrt(sum);
  if (grad_scale) norm *= 1.0 / static_cast<double>(*grad_scale);
  const double factor = max_norm / (norm + kClipEps);
  return !is_finite(norm) ? norm - norm : factor < 1.0 ? factor : 1.0;
}

// The gradient without its loss scale, times the clip factor, uphill if maximized. Factors of 1 and -1 round nothing; a
// clip factor of 0 clears the gradient, whatever it was.
template <class T>
struct Gradient {
  T inverse, clip;
  FASTSAM_HD Gradient(const Row& row, const float* grad_scale, const double* clip_factor)
      : inverse(grad_scale ? static_cast<T>(1.0 / static_cast<double>(*grad_scale)) : T(1)),
        clip(clip_factor ? static_cast<T>(*clip_factor) : T(1)) {
    if (has(row, kMaximize)) inverse = -inverse;
  }
  FASTSAM_HD bool identity() const { return inverse == 1 && clip == 1; }
  FASTSAM_HD T operator()(T g) const { return select(clip == 0, T(0), (g * inverse) * clip); }
};

// ---- The rules. kStates is the set of state slots that a group of theirs reads and writes, as bits; `states` gives
// it, `advance` is what happens to a segment's progress after all of it was updated.

struct CountsAll {
  static FASTSAM_HD void advance(const Row&, Progress& progress) { progress.step += 1; }
};

// torch.optim.SGD. Without momentum (kStates = 0) there is no buffer and no dampening. It counts the steps with
// momentum: torch's first step is the one that finds no buffer.
template <class T, int kStates>
struct Sgd {
  T neg_lr, weight_decay, momentum, one_minus_dampening;
  bool decay, first, nesterov;
  FASTSAM_HD Sgd(const Row& row, const Progress& progress)
      : neg_lr(static_cast<T>(-row.lr)),
        weight_decay(static_cast<T>(row.weight_decay)),
        momentum(static_cast<T>(row.beta1)),
        one_minus_dampening(static_cast<T>(1.0 - row.beta2)),
        decay(row.weight_decay != 0),
        first(progress.step == 0),
        nesterov(has(row, kNesterov)) {}
  FASTSAM_HD T operator()(T w, T g, T* state) const {
    if (decay) g = fma(weight_decay, w, g);
    if (kStates) {
      const T buf = first ? g : fma(one_minus_dampening, g, state[0] * momentum);
      g = nesterov ? fma(momentum, buf, g) : buf;
      state[0] = buf;
    }
    return fma(neg_lr, g, w);
  }
  static FASTSAM_HD int states(const Row& row) { return row.beta1 != 0; }
  static FASTSAM_HD void advance(const Row& row, Progress& progress) { progress.step += row.beta1 != 0; }
};

// Weight decay of Adam's family: of the weights themselves (decoupled: arXiv 1711.05101), or through the gradient.
template <class T>
struct Decay {
  T factor, weight_decay;
  bool decoupled, coupled;
  FASTSAM_HD explicit Decay(const Row& row)
      : factor(static_cast<T>(1.0 - row.lr * row.weight_decay)),
        weight_decay(static_cast<T>(row.weight_decay)),
        decoupled(row.weight_decay != 0 && has(row, kDecoupled)),
        coupled(row.weight_decay != 0 && !has(row, kDecoupled)) {}
  FASTSAM_HD void operator()(T& w, T& g) const {
    w = select(decoupled, w * factor, w);
    g = select(coupled, fma(weight_decay, w, g), g);
  }
};

// torch.optim.Adam (Kingma & Ba, arXiv 1412.6980), AdamW (Loshchilov & Hutter, arXiv 1711.05101); the third state is
// amsgrad's.
template <class T, int kStates>
struct Adam : CountsAll {
  T step_size, one_minus_beta1, beta2, one_minus_beta2, correction2_sqrt, eps;
  Decay<T> decay;
  FASTSAM_HD Adam(const Row& row, const Progress& progress)
      : one_minus_beta1(static_cast<T>(1.0 - row.beta1)),
        beta2(static_cast<T>(row.beta2)),
        one_minus_beta2(static_cast<T>(1.0 - row.beta2)),
        eps(static_cast<T>(row.eps)),
        decay(row) {
    const uint32_t t = static_cast<uint32_t>(progress.step) + 1;
    const double correction1 = 1.0 - ipow(row.beta1, t);
    const double correction2 = 1.0 - ipow(row.beta2, t);
    step_size = static_cast<T>(-(row.lr / correction1));
    correction2_sqrt = static_cast<T>(sqrt(correction2));
  }
  FASTSAM_HD T operator()(T w, T g, T* state) const {
    decay(w, g);
    const T exp_avg = lerp(state[0], g, one_minus_beta1);
    const T exp_avg_sq = fma(one_minus_beta2 * g, g, state[1] * beta2);
    T second = exp_avg_sq;
    if (kStates & 4) state[2] = second = maximum(state[2], exp_avg_sq);
    state[0] = exp_avg;
    state[1] = exp_avg_sq;
    const T denom = sqrt(second) / correction2_sqrt + eps;
    return w + (step_size * exp_avg) / denom;
  }
  static FASTSAM_HD int states(const Row& row) { return has(row, kAmsgrad) ? 7 : 3; }
};

// torch.optim.RMSprop (Tieleman & Hinton's lecture; centered: Graves, arXiv 1308.0850). States: the averages of
// squares, the momentum, the averages of gradients (centered).
template <class T, int kStates>
struct Rmsprop : CountsAll {
  T neg_lr, weight_decay, momentum, alpha, one_minus_alpha, eps;
  bool decay;
  FASTSAM_HD Rmsprop(const Row& row, const Progress&)
      : neg_lr(static_cast<T>(-row.lr)),
        weight_decay(static_cast<T>(row.weight_decay)),
        momentum(static_cast<T>(row.beta1)),
        alpha(static_cast<T>(row.beta2)),
        one_minus_alpha(static_cast<T>(1.0 - row.beta2)),
        eps(static_cast<T>(row.eps)),
        decay(row.weight_decay != 0) {}
  FASTSAM_HD T operator()(T w, T g, T* state) const {
    g = select(decay, fma(weight_decay, w, g), g);
    T second = state[0] = fma(one_minus_alpha * g, g, state[0] * alpha);
    if (kStates & 4) {
      const T grad_avg = state[2] = lerp(state[2], g, one_minus_alpha);
      second = fma(-grad_avg, grad_avg, second);
    }
    const T denom = sqrt(second) + eps;
    if (kStates & 2) {
      const T buf = state[1] = state[1] * momentum + g / denom;
      return fma(neg_lr, buf, w);
    }
    return w + (neg_lr * g) / denom;
  }
  static FASTSAM_HD int states(const Row& row) { return 1 | (row.beta1 > 0 ? 2 : 0) | (has(row, kCentered) ? 4 : 0); }
};

// torch.optim.Adagrad (Duchi et al., JMLR 12, 2011); lr_decay is the row's `extra`. State: the sum of squares.
template <class T, int kStates>
struct Adagrad : CountsAll {
  T neg_clr, weight_decay, eps;
  bool decay;
  FASTSAM_HD Adagrad(const Row& row, const Progress& progress)
      : neg_clr(static_cast<T>(-(row.lr / (1.0 + static_cast<double>(progress.step) * row.extra)))),
        weight_decay(static_cast<T>(row.weight_decay)),
        eps(static_cast<T>(row.eps)),
        decay(row.weight_decay != 0) {}
  FASTSAM_HD T operator()(T w, T g, T* state) const {
    if (decay) g = fma(weight_decay, w, g);
    const T sum = state[0] = fma(g, g, state[0]);
    const T denom = sqrt(sum) + eps;
    return w + (neg_clr * g) / denom;
  }
  static FASTSAM_HD int states(const Row&) { return 1; }
};

// torch.optim.NAdam (Dozat, ICLR workshop 2016). The momentum of step t is beta1 (1 - 0.96^(t momentum_decay) / 2); the
// row's `extra` is 0.96^momentum_decay.
template <class T, int kStates>
struct Nadam {
  T grad_size, avg_size, one_minus_beta1, beta2, one_minus_beta2, correction2, eps;
  Decay<T> decay;
  FASTSAM_HD Nadam(const Row& row, const Progress& progress)
      : one_minus_beta1(static_cast<T>(1.0 - row.beta1)),
        beta2(static_cast<T>(row.beta2)),
        one_minus_beta2(static_cast<T>(1.0 - row.beta2)),
        eps(static_cast<T>(row.eps)),
        decay(row) {
    const uint32_t t = static_cast<uint32_t>(progress.step) + 1;
    const double mu = momentum(row, t), next_mu = momentum(row, t + 1);
    Progress after = progress;
    advance(row, after);
    const double product = static_cast<double>(after.mu_product);
    grad_size = static_cast<T>((-row.lr * (1.0 - mu)) / (1.0 - product));
    avg_size = static_cast<T>((-row.lr * next_mu) / (1.0 - product * next_mu));
    correction2 = static_cast<T>(1.0 - ipow(row.beta2, t));
  }
  FASTSAM_HD T operator()(T w, T g, T* state) const {
    decay(w, g);
    const T exp_avg = state[0] = lerp(state[0], g, one_minus_beta1);
    const T exp_avg_sq = state[1] = fma(one_minus_beta2 * g, g, state[1] * beta2);
    const T denom = sqrt(exp_avg_sq / correction2) + eps;
    w = w + (grad_size * g) / denom;
    return w + (avg_size * exp_avg) / denom;
  }
  static FASTSAM_HD int states(const Row&) { return 3; }
  static FASTSAM_HD double momentum(const Row& row, uint32_t t) { return row.beta1 * (1.0 - 0.5 * ipow(row.extra, t)); }
  static FASTSAM_HD void advance(const Row& row, Progress& progress) {
    progress.step += 1;
    progress.mu_product *= static_cast<float>(momentum(row, static_cast<uint32_t>(progress.step)));
  }
};

// torch.optim.RAdam (Liu et al., arXiv 1908.03265). While rho_t <= 5 it is momentum without a denominator.
template <class T, int kStates>
struct Radam : CountsAll {
  T lr, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2_sqrt, rect, eps;
  bool rectified;
  Decay<T> decay;
  FASTSAM_HD Radam(const Row& row, const Progress& progress)
      : lr(static_cast<T>(row.lr)),
        one_minus_beta1(static_cast<T>(1.0 - row.beta1)),
        beta2(static_cast<T>(row.beta2)),
        one_minus_beta2(static_cast<T>(1.0 - row.beta2)),
        eps(static_cast<T>(row.eps)),
        decay(row) {
    const uint32_t t = static_cast<uint32_t>(progress.step) + 1;
    const double power2 = ipow(row.beta2, t), bias2 = 1.0 - power2;
    const double rho_inf = 2.0 / (1.0 - row.beta2) - 1.0;
    const double rho_t = rho_inf - 2.0 * t * power2 / bias2;
    const double ratio = (rho_t - 4.0) * (rho_t - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho_t);
    rectified = rho_t > 5.0;
    rect = rectified ? static_cast<T>(sqrt(ratio)) : T(0);
    correction1 = static_cast<T>(1.0 - ipow(row.beta1, t));
    correction2_sqrt = static_cast<T>(sqrt(bias2));
  }
  FASTSAM_HD T operator()(T w, T g, T* state) const {
    decay(w, g);
    const T exp_avg = state[0] = lerp(state[0], g, one_minus_beta1);
    const T exp_avg_sq = state[1] = fma(one_minus_beta2 * g, g, state[1] * beta2);
    const T step = (exp_avg / correction1) * lr;
    const T adaptive = (T(1) / (sqrt(exp_avg_sq) + eps)) * correction2_sqrt;
    return w - select(rectified, (step * adaptive) * rect, step);
  }
  static FASTSAM_HD int states(const Row&) { return 3; }
};

// Lion (Chen et al., arXiv 2302.06675); fastsam/lion.py. State: the momentum.
template <class T, int kStates>
struct Lion : CountsAll {
  T neg_lr, decay_factor, one_minus_beta1, one_minus_beta2;
  FASTSAM_HD Lion(const Row& row, const Progress&)
      : neg_lr(static_cast<T>(-row.lr)),
        decay_factor(static_cast<T>(1.0 - row.lr * row.weight_decay)),
        one_minus_beta1(static_cast<T>(1.0 - row.beta1)),
        one_minus_beta2(static_cast<T>(1.0 - row.beta2)) {}
  FASTSAM_HD T operator()(T w, T g, T* state) const {
    const T c = lerp(state[0], g, one_minus_beta1);
    state[0] = lerp(state[0], g, one_minus_beta2);
    w = w * decay_factor;  // a factor of 1 rounds nothing
    return fma(neg_lr, sign(c), w);
  }
  static FASTSAM_HD int states(const Row&) { return 1; }
};

// ---- The table of rules: functor and all that `states` may give.
#define FASTSAM_RULES(row)                                                                                 \
  row(kSgd, Sgd, 0, 1) row(kAdam, Adam, 3, 7) row(kRmsprop, Rmsprop, 1, 3, 5, 7) row(kAdagrad, Adagrad, 1) \
      row(kNadam, Nadam, 3) row(kRadam, Radam, 3) row(kLion, Lion, 1)

template <int kStates>
struct StateSet {
  static constexpr int value = kStates;
};

template <template <class, int> class kFunctor, int... kSets>
struct RuleRow {
  template <class T, int kStates>
  using Functor = kFunctor<T, kStates>;

  // Call f with the set of states that the group uses, as a type, and no code for sets with more than `kMost`.
  template <int kMost, class F>
  static FASTSAM_HD void with_states(const Row& row, const F& f) {
    const int states = kFunctor<float, 0>::states(row);
    (with_set<kMost, kSets>(states, f), ...);
  }

 private:
  template <int kMost, int kSet, class F>
  static FASTSAM_HD void with_set(int states, const F& f) {
    if constexpr ((kSet & ~kMost) == 0) {
      if (states == kSet) f(StateSet<kSet>());
    }
  }
};

template <Rule kRule>
struct RuleOf;
#define FASTSAM_ROW(rule, Functor, ...) \
  template <>                           \
  struct RuleOf<rule> : RuleRow<Functor, __VA_ARGS__> {};
FASTSAM_RULES(FASTSAM_ROW)
#undef FASTSAM_ROW

// Which states a group uses, and what an update does to a segment's progress, for rules known at run time only.
FASTSAM_HD int states_of(Rule rule, const Row& row) {
#define FASTSAM_ROW(code, Functor, ...) \
  if (rule == code) return Functor<float, 0>::states(row);
  FASTSAM_RULES(FASTSAM_ROW)
#undef FASTSAM_ROW
  return 0;
}
FASTSAM_HD void advance(Rule rule, const Row& row, Progress& progress) {
#define FASTSAM_ROW(code, Functor, ...) \
  if (rule == code) Functor<float, 0>::advance(row, progress);
  FASTSAM_RULES(FASTSAM_ROW)
#undef FASTSAM_ROW
}
FASTSAM_HD constexpr int count_states(int states) { return (states & 1) + (states >> 1 & 1) + (states >> 2 & 1); }

}  // namespace fastsam::FASTSAM_ISA
