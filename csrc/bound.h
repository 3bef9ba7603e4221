// A bucket's operands, checked and bound once, so that a whole pass over all buckets is one call from Python: what
// ops.cpp and cuda/ops.cpp fill and reader.cpp, which must not see torch's stable headers, runs.
#pragma once

#include <new>
#include <type_traits>

namespace fastsam {

struct Bound {
  // Each returns null, or what went wrong.
  using Run = const char* (*)(Bound&);
  Run grad_norm, perturb, update;
  alignas(16) unsigned char operands[384];  // the backend's own

  template <class T>
  T& as() {
    static_assert(sizeof(T) <= sizeof(operands) && std::is_trivially_copyable<T>::value, "plain data that fits");
    return *reinterpret_cast<T*>(operands);
  }
};

}  // namespace fastsam
