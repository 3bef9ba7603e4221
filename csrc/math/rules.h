// The update: what happens to a parameter, the gradient as the rules take it, and the rules, which are the formulas of
// the base optimizers.
#pragma once

#include "numbers.h"

namespace fastsam::FASTSAM_ISA {

// What update_ does to a segment: where it finds the old weights, whether the rule runs on them, whether the step count
// grows.
enum class Source { kNone, kBackup, kWeight };
struct Decision {
  Source source;
  bool rule, count;
};
FASTSAM_HD Decision decide(bool perturbed, bool has_grad, bool found_inf) {
  const bool rule = has_grad && !found_inf;
  return {perturbed ? Source::kBackup : rule ? Source::kWeight : Source::kNone, rule, rule};
}

// The gradient that the rules take: without its loss scale, times the clip factor, with the opposite sign if the loss
// is maximized. Factors of 1 and -1 round nothing. A clip factor of 0 makes the gradient 0, whatever it was.
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

// ---- The rules. kStates is the set of state slots that a group reads and writes, as bits; `states` gives that set.
// `advance` changes a segment's progress after all of the segment was updated.

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

// Lion (Chen et al., arXiv 2302.06675); fastsam/bases/lion.py. State: the momentum.
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

// The same two functions for a rule that is known at run time only.
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
