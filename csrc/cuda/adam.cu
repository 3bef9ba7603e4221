#include "update_kernel.h"

namespace fastsam::FASTSAM_ISA {

#define FASTSAM_KERNEL(...) update<Kernel::adam, __VA_ARGS__>
const Variants adam_kernels[] = FASTSAM_MOST(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
