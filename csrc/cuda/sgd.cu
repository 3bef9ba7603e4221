#include "update.h"

namespace fastsam::FASTSAM_ISA {

const Variants restore_kernels[kDtypes] = FASTSAM_UPDATE_KERNELS(Kernel::kRestore);
const Variants sgd_kernels[kDtypes] = FASTSAM_UPDATE_KERNELS(Kernel::kSgd);

}  // namespace fastsam::FASTSAM_ISA
