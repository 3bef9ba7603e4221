#include "update.h"

namespace fastsam::FASTSAM_ISA {

#define FASTSAM_RESTORE(...) update<Kernel::kRestore, __VA_ARGS__>
#define FASTSAM_KERNEL(...) update<Kernel::kSgd, __VA_ARGS__>
const Variants restore_kernels[kDtypes] = {FASTSAM_EQUAL(FASTSAM_RESTORE)};
const Variants sgd_kernels[kPairs] = FASTSAM_PAIRS(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
