// The kernel of update_, of which each rule's file makes its own.
#pragma once

#include "kernel_tables.h"
#include "update.h"

namespace fastsam::FASTSAM_ISA {

template <Kernel kKernel, int kWords, class F>
__global__ void FASTSAM_BOUNDS((update_blocks<kKernel, F>())) update(const __grid_constant__ Arguments<kWords> args) {
  __shared__ UpdateShared<kKernels[static_cast<int>(kKernel)].rule, F> shared;
  DeviceContext ctx;
  update_block<kKernel, F>(ctx, args, shared);
}

}  // namespace fastsam::FASTSAM_ISA
