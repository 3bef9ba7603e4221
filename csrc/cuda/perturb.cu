#include "kernel_tables.h"

namespace fastsam::FASTSAM_ISA {

template <class S, class G, int kWords>
__global__ void FASTSAM_BOUNDS((kPerturbBlocks<S, G>)) perturb(const __grid_constant__ Arguments<kWords> args) {
  __shared__ PerturbShared<S> shared;
  DeviceContext ctx;
  perturb_block<S, G>(ctx, args, shared);
}

#define FASTSAM_KERNEL(...) perturb<__VA_ARGS__>
const Variants perturb_kernels[kPairs] = FASTSAM_PAIRS(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
