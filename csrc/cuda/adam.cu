#include "update.h"

namespace fastsam::FASTSAM_ISA {

#define FASTSAM_KERNEL(...) update<Kernel::kAdam, __VA_ARGS__>
const Variants adam_kernels[kPairs] = FASTSAM_PAIRS(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
