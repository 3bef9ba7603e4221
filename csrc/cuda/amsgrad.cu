#include "update_kernel.h"

namespace fastsam::FASTSAM_ISA {

#define FASTSAM_KERNEL(...) update<Kernel::amsgrad, __VA_ARGS__>
const Variants amsgrad_kernels[] = FASTSAM_LARGE(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
