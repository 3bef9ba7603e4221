#include "operand_tables.h"

namespace fastsam::FASTSAM_ISA {

template <int kWords, class T>
__global__ void FASTSAM_BOUNDS(kCombineBlocks<T>) combine(const __grid_constant__ CombineArguments<kWords> args) {
  DeviceContext ctx;
  combine_block<T>(ctx, args);
}

const CombineVariants combine_kernels[] = FASTSAM_OPERANDS(combine, CombineHeader);

}  // namespace fastsam::FASTSAM_ISA
