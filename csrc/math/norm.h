// The norm: the vector whose length it is, the tree in which squares are added, and the factor that clips by it.
#pragma once

#include "numbers.h"

namespace fastsam::FASTSAM_ISA {

// ---- The norm: sum of squares in one canonical tree, the same bits whatever the backend, block size and thread count.
// A chunk's lanes take acc = fma(x, x, acc) over its 4 rows, then adjacent pairs are added, 11 levels.

// How many lanes a sum of n numbers needs. Lanes beyond the next power of two of n hold zeros, which change no sum.
FASTSAM_HD int tree_width(int64_t n, int most) {
  int width = 1;
  while (width < n && width < most) width *= 2;
  return width;
}

// The gradient to perturb along. With kDecays it is that of the loss with weight_decay/2 |w|^2 in it, as in the paper's
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

// ---- The norm for another exponent than 2: (sum |T g|^q)^(1/q). Where q is large (p near 1) |T g|^q leaves even
// float64's range. So each level, the elements of a chunk, the chunks of a bucket and the buckets, takes the norm of
// what it gets: the norm of norms is the norm of all. In float64, and not bit-equal between backends, as exp2 and log2
// are not.

// x^exponent for x >= 0.
FASTSAM_HD double power(double x, double exponent) { return x == 0 ? 0 : ::exp2(exponent * ::log2(x)); }

// T g. In float64: rounded to less, it might be longer than the norm, and the power q - 1 would show it.
template <class T>
struct PowerSteepest {
  LossGradient<T> loss_gradient;
  T eta;
  bool adaptive;
  FASTSAM_HD explicit PowerSteepest(const Row& row)
      : loss_gradient(row), eta(static_cast<T>(row.eta)), adaptive(has(row, kAdaptive)) {}
  FASTSAM_HD double metric(T w) const { return adaptive ? static_cast<double>(abs(w) + eta) : 1.0; }
  FASTSAM_HD double operator()(T w, T g) const { return static_cast<double>(loss_gradient(w, g)) * metric(w); }
};

// The q-norm of numbers >= 0, as m (sum (x / m)^q)^(1/q) where m is the largest; m where that is 0, infinite or NaN.
// `largest_of()` gives m, `sum_of(f)` the sum of f(x).
template <class LargestOf, class SumOf>
FASTSAM_HD double q_norm_of(double q, const LargestOf& largest_of, const SumOf& sum_of) {
  const double largest = largest_of();
  if (largest == 0 || !is_finite(largest)) return largest;
  return largest * power(sum_of([&](double x) { return power(x / largest, q); }), 1 / q);
}
// The same on one thread: `each(f)` calls f(x) for each number.
template <class Each>
FASTSAM_HD double q_norm(double q, const Each& each) {
  const auto largest_of = [&] {
    double largest = 0;
    each([&](double x) { largest = maximum(largest, x); });
    return largest;
  };
  const auto sum_of = [&](const auto& term) {
    double sum = 0;
    each([&](double x) { sum += term(x); });
    return sum;
  };
  return q_norm_of(q, largest_of, sum_of);
}

// torch.nn.utils.clip_grad_norm_: the factor, at most 1, that brings gradients of this squared norm down to max_norm.
// NaN where the norm is not finite, so that it shows.
FASTSAM_HD double clip_factor(double max_norm, double sum, const float* grad_scale) {
  double norm = sqrt(sum);
  if (grad_scale) norm *= 1.0 / static_cast<double>(*grad_scale);
  const double factor = max_norm / (norm + kClipEps);
  return !is_finite(norm) ? norm - norm : factor < 1.0 ? factor : 1.0;
}

}  // namespace fastsam::FASTSAM_ISA
