#include "operand_tables.h"

namespace fastsam::FASTSAM_ISA {

template <int kWords, class T>
__global__ void FASTSAM_BOUNDS(kDotBlocks<T>) dot(const __grid_constant__ DotArguments<kWords> args) {
  __shared__ DotShared<T> shared;
  DeviceContext ctx;
  dot_block<T>(ctx, args, shared);
}

const DotVariants dot_kernels[] = FASTSAM_OPERANDS(dot, DotHeader);

}  // namespace fastsam::FASTSAM_ISA
