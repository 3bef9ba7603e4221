#include "kernel_tables.h"
#include "power.h"

namespace fastsam::FASTSAM_ISA {

template <int kWords, class F>
__global__ void FASTSAM_BOUNDS(3) power_norm(const __grid_constant__ Arguments<kWords> args) {
  __shared__ PowerNormShared shared;
  DeviceContext ctx;
  power_norm_block<F>(ctx, args, shared);
}

template <int kWords, class F>
__global__ void FASTSAM_BOUNDS(3) power_perturb(const __grid_constant__ Arguments<kWords> args) {
  __shared__ PowerPerturbShared<F> shared;
  DeviceContext ctx;
  power_perturb_block<F>(ctx, args, shared);
}

#define FASTSAM_NORM(words, ...) power_norm<words, __VA_ARGS__::Norm>
#define FASTSAM_PERTURB(words, ...) power_perturb<words, __VA_ARGS__::Climb>
const Variants power_norm_kernels[] = FASTSAM_LARGE(FASTSAM_NORM);
const Variants power_perturb_kernels[] = FASTSAM_LARGE(FASTSAM_PERTURB);

}  // namespace fastsam::FASTSAM_ISA
