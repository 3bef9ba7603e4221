// Linear combinations: which terms are left of one in a segment, and what they make of an element.
#pragma once

#include "numbers.h"

namespace fastsam::FASTSAM_ISA {

// The terms that are left, in order. X: where an operand's elements are found.
template <class T, class X>
struct Terms {
  int n = 0;
  T c[kMostTerms] = {};
  X x[kMostTerms] = {};

  // The coefficient is cast once. With 0, as without the operand, the term is left out, so that 0 * inf is 0.
  FASTSAM_HD void add(double coefficient, bool there, const X& where) {
    const T cast = static_cast<T>(coefficient);
    if (cast == 0 || !there) return;
    for (int k = 0; k < kMostTerms; k++) {  // indexed by constants only: a GPU's registers have no addresses
      if (k != n) continue;
      c[k] = cast;
      x[k] = where;
    }
    n++;
  }
};

// c0 x0 + c1 x1 + c2 x2 of the first kTerms: a product, then fused; 0 of none.
template <int kTerms, class T>
FASTSAM_HD T combined(const T* c, const T* x) {
  T total = kTerms > 0 ? c[0] * x[0] : T(0);
  for (int k = 1; k < kTerms; k++) total = fma(c[k], x[k], total);
  return total;
}

}  // namespace fastsam::FASTSAM_ISA
