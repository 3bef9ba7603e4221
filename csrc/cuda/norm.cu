#include "kernel_tables.h"

namespace fastsam::FASTSAM_ISA {

template <int kWords, class F>
__global__ void FASTSAM_BOUNDS(kNormBlocks<F>) grad_norm(const __grid_constant__ Arguments<kWords> args) {
  __shared__ NormShared<typename F::Grad> shared;
  DeviceContext ctx;
  norm_block<F>(ctx, args, shared);
}

#define FASTSAM_KERNEL(words, ...) grad_norm<words, __VA_ARGS__::Norm>
const Variants norm_kernels[] = FASTSAM_MOST(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
