// The kernel of update_, of which each rule's file makes its own.
#pragma once

#include "kernel_tables.h"

namespace fastsam::FASTSAM_ISA {

template <Kernel kKernel, class S, class G, int kWords>
__global__ void FASTSAM_BOUNDS((update_blocks<kKernel, S, G>()))
    update(const __grid_constant__ Arguments<kWords> args) {
  __shared__ UpdateShared<kKernels[static_cast<int>(kKernel)].rule, S> shared;
  DeviceContext ctx;
  update_block<kKernel, S, G>(ctx, args, shared);
}

}  // namespace fastsam::FASTSAM_ISA
