#include "update.h"

namespace fastsam::FASTSAM_ISA {

const Variants adam_kernels[kDtypes] = FASTSAM_UPDATE_KERNELS(Kernel::kAdam);

}  // namespace fastsam::FASTSAM_ISA
