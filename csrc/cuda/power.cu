#include "kernel_tables.h"
#include "power.h"

namespace fastsam::FASTSAM_ISA {

template <class S, class G, int kWords>
__global__ void FASTSAM_BOUNDS(3) power_norm(const __grid_constant__ Arguments<kWords> args) {
  __shared__ PowerNormShared shared;
  DeviceContext ctx;
  power_norm_block<S, G>(ctx, args, shared);
}

template <class S, class G, int kWords>
__global__ void FASTSAM_BOUNDS(3) power_perturb(const __grid_constant__ Arguments<kWords> args) {
  __shared__ PowerPerturbShared<S> shared;
  DeviceContext ctx;
  power_perturb_block<S, G>(ctx, args, shared);
}

#define FASTSAM_NORM(...) power_norm<__VA_ARGS__>
#define FASTSAM_PERTURB(...) power_perturb<__VA_ARGS__>
const Variants power_norm_kernels[kPairs] = FASTSAM_LARGE(FASTSAM_NORM);
const Variants power_perturb_kernels[kPairs] = FASTSAM_LARGE(FASTSAM_PERTURB);

}  // namespace fastsam::FASTSAM_ISA
