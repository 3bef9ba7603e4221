#include "kernel_tables.h"

namespace fastsam::FASTSAM_ISA {

template <class S, int kWords>
__global__ void FASTSAM_BOUNDS(kNormBlocks<S>) grad_norm(const __grid_constant__ Arguments<kWords> args) {
  __shared__ NormShared<S> shared;
  DeviceContext ctx;
  norm_block<S>(ctx, args, shared);
}

const Variants norm_kernels[kDtypes] = {{grad_norm<float, kSmallWords>, grad_norm<float, kLargeWords>},
                                        {grad_norm<double, kSmallWords>, grad_norm<double, kLargeWords>},
                                        {grad_norm<bfloat16, kSmallWords>, grad_norm<bfloat16, kLargeWords>},
                                        {grad_norm<float16, kSmallWords>, grad_norm<float16, kLargeWords>}};

}  // namespace fastsam::FASTSAM_ISA
