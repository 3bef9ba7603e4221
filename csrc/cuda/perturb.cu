#include "kernel_tables.h"

namespace fastsam::FASTSAM_ISA {

template <class S, int kWords>
__global__ void FASTSAM_BOUNDS(kPerturbBlocks<S>) perturb(const __grid_constant__ Arguments<kWords> args) {
  __shared__ PerturbShared<S> shared;
  DeviceContext ctx;
  perturb_block<S>(ctx, args, shared);
}

const Variants perturb_kernels[kDtypes] = {{perturb<float, kSmallWords>, perturb<float, kLargeWords>},
                                           {perturb<double, kSmallWords>, perturb<double, kLargeWords>},
                                           {perturb<bfloat16, kSmallWords>, perturb<bfloat16, kLargeWords>},
                                           {perturb<float16, kSmallWords>, perturb<float16, kLargeWords>}};

}  // namespace fastsam::FASTSAM_ISA
