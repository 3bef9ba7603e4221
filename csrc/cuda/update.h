// The kernel of update_, of which each rule's file makes its own.
#pragma once

#include "kernel_tables.h"

namespace fastsam::FASTSAM_ISA {

template <Kernel kKernel, class S, int kWords>
__global__ void FASTSAM_BOUNDS((kUpdateBlocks<kKernel, S>)) update(const __grid_constant__ Arguments<kWords> args) {
  __shared__ UpdateShared<S> shared;
  DeviceContext ctx;
  update_block<kKernel>(ctx, args, shared);
}

// clang-format off
#define FASTSAM_UPDATE_KERNELS(kernel)                                                                       \
  {{update<kernel, float, kSmallWords>, update<kernel, float, kLargeWords>},                                 \
   {update<kernel, double, kSmallWords>, update<kernel, double, kLargeWords>},                               \
   {update<kernel, bfloat16, kSmallWords>, update<kernel, bfloat16, kLargeWords>},                           \
   {update<kernel, float16, kSmallWords>, update<kernel, float16, kLargeWords>}}
// clang-format on

}  // namespace fastsam::FASTSAM_ISA
