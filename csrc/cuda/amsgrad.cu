#include "update.h"

namespace fastsam::FASTSAM_ISA {

const Variants amsgrad_kernels[kDtypes] = FASTSAM_UPDATE_KERNELS(Kernel::kAdamAmsgrad);

}  // namespace fastsam::FASTSAM_ISA
