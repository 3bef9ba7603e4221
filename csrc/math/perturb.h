// The perturbation of one weight, for the second norm and for all others.
#pragma once

#include "norm.h"

namespace fastsam::FASTSAM_ISA {

// ---- Perturbation: w + e(w), e = rho g / (|g| + NORM_EPS) (SAM: Foret et al., arXiv 2010.01412, eq. 2) or
// rho T^2 g / (|T g| + NORM_EPS) (ASAM: arXiv 2102.11600). Two roundings from g on: the bits of p.add_(g * scale).

// The factor of the gradient. 0 (no perturbation) where the norm is not finite: such a step is the base optimizer's.
template <class T>
FASTSAM_HD T perturbation_scale(const Row& row, double sum) {
  const double norm = sqrt(sum) + kNormEps;
  if (!is_finite(norm)) return 0;
  const T scale = static_cast<T>(row.rho / norm);
  return has(row, kMaximize) ? -scale : scale;
}

template <class T>
struct Perturb {
  T scale;  // where it is 0 the caller must not use this functor: 0 * inf is NaN
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
// 2010.01412, eq. 2), with q = p / (p - 1). In float64.

// The length of e: rho, shortened by kNormEps as for p = 2. 0 (no perturbation) where the norm is 0 or not finite.
// kNormEps is not added to the norm itself, because the power q - 1 would enlarge its share a thousandfold.
FASTSAM_HD double power_scale(const Row& row, double norm, double q) {
  const double rho = has(row, kMaximize) ? -row.rho : row.rho;
  return q == 1 ? rho : is_finite(norm) ? rho * (norm / (norm + kNormEps)) : 0;
}

template <class T>
struct PowerPerturb {
  PowerSteepest<T> steepest;
  double scale;     // where it is 0 the caller must not use this functor
  double norm;      // 1 for p = inf, which needs none
  double exponent;  // q - 1, 0 for p = inf
  FASTSAM_HD PowerPerturb(const Row& row, double norm, double q)
      : steepest(row), scale(power_scale(row, norm, q)), norm(q == 1 ? 1 : norm), exponent(q - 1) {}
  // scale T sign(g) (|T g| / norm)^(q - 1); 0 for an element that is not finite, which only p = inf gets to see.
  FASTSAM_HD T operator()(T w, T g) const {
    const double t = steepest.metric(w), x = steepest(w, g), size = abs(x);
    const double length = exponent == 0 ? (size != 0) : power(size / norm, exponent);
    const double e = is_finite(x) ? scale * t * (x < 0 ? -length : length) : 0;
    return w + static_cast<T>(e);
  }
};

// PowerPerturb for p = inf: without its function in the loop, a CPU's compiler vectorises it.
template <class T>
struct SignPerturb {
  PowerSteepest<T> steepest;
  double scale;
  FASTSAM_HD explicit SignPerturb(const Row& row) : steepest(row), scale(power_scale(row, 1, 1)) {}
  FASTSAM_HD T operator()(T w, T g) const {
    const double x = steepest(w, g), e = scale * steepest.metric(w) * sign(x);
    return w + static_cast<T>(select(is_finite(x), e, 0.0));
  }
};

}  // namespace fastsam::FASTSAM_ISA
