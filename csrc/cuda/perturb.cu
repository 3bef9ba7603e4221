#include "kernel_tables.h"

namespace fastsam::FASTSAM_ISA {

template <int kWords, class F>
__global__ void FASTSAM_BOUNDS(kPerturbBlocks<F>) perturb(const __grid_constant__ Arguments<kWords> args) {
  __shared__ PerturbShared<F> shared;
  DeviceContext ctx;
  perturb_block<F>(ctx, args, shared);
}

#define FASTSAM_KERNEL(words, ...) perturb<words, __VA_ARGS__::Climb>
const Variants perturb_kernels[] = FASTSAM_MOST(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
