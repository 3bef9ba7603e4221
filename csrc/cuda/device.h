// The context in which the GPU runs the kernels' phases.
#pragma once

#include "kernels.h"

namespace fastsam::FASTSAM_ISA {

struct DeviceContext {
  template <class R>
  struct PerThread {
    R own;
    __device__ __forceinline__ R& operator[](int) { return own; }
  };

  __device__ __forceinline__ int block() const { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ int blocks() const { return static_cast<int>(gridDim.x); }
  template <class F>
  __device__ __forceinline__ void threads(const F& phase) const {
    phase(static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }

  // Combine the numbers of a warp's threads in adjacent pairs, those of the canonical tree: 5 levels.
  template <class T, int n, class Combine>
  __device__ __forceinline__ void fold_warp(PerThread<Several<T, n>>& numbers, const Combine& combine) const {
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
#pragma unroll
      for (int j = 0; j < n; j++) {
        T& own = numbers.own.each[j];
        own = combine(own, __shfl_xor_sync(~0u, own, offset));
      }
    }
  }

  // How many of the grid's blocks arrived before; nothing waits for the answer before `is_last` is asked. The counter
  // wraps to 0 by itself, so that the next launch finds it as this one did.
  __device__ __forceinline__ uint32_t arrive(uint32_t* ticket) const {
    uint32_t before;
    asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(ticket)), "r"(gridDim.x - 1)
                 : "memory");
    return before;
  }

  // True in the block that arrived last, whose thread then sees what the others did before they arrived.
  __device__ __forceinline__ bool is_last(uint32_t before) const {
    const bool last = before == gridDim.x - 1;
    if (last) asm volatile("fence.acq_rel.gpu;" ::: "memory");
    return last;
  }

  // What another block wrote: past this processor's own cache.
  __device__ __forceinline__ double load_other(const double* from) const {
    double x;
    asm volatile("ld.global.cg.f64 %0, [%1];" : "=d"(x) : "l"(__cvta_generic_to_global(from)) : "memory");
    return x;
  }
  __device__ __forceinline__ void load_others(const double* from, double* x) const {  // two, from 16 bytes
    asm volatile("ld.global.cg.v2.f64 {%0, %1}, [%2];"
                 : "=d"(x[0]), "=d"(x[1])
                 : "l"(__cvta_generic_to_global(from))
                 : "memory");
  }
};

}  // namespace fastsam::FASTSAM_ISA
