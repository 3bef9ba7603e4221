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

// torch.nn.utils.clip_grad_norm_: the factor, at most 1, that brings gradients of this squared norm down to max_norm.
// NaN where the norm is not finite, so that it shows.
FASTSAM_HD double clip_factor(double max_norm, double sum, const float* grad_scale) {
  double norm = sqrt(sum);
  if (grad_scale) norm *= 1.0 / static_cast<double>(*grad_scale);
  const double factor = max_norm / (norm + kClipEps);
  return !is_finite(norm) ? norm - norm : factor < 1.0 ? factor : 1.0;
}

}  // namespace fastsam::FASTSAM_ISA
