#include "kernel_tables.h"

namespace fastsam::FASTSAM_ISA {

template <class S, class G, int kWords>
__global__ void FASTSAM_BOUNDS((kNormBlocks<S, G>)) grad_norm(const __grid_constant__ Arguments<kWords> args) {
  __shared__ NormShared<G> shared;
  DeviceContext ctx;
  norm_block<S, G>(ctx, args, shared);
}

#define FASTSAM_KERNEL(...) grad_norm<__VA_ARGS__>
const Variants norm_kernels[kPairs] = FASTSAM_PAIRS(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
