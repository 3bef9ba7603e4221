#include "update_kernel.h"

namespace fastsam::FASTSAM_ISA {

#define FASTSAM_KERNEL(...) update<Kernel::rmsprop, __VA_ARGS__>
const Variants rmsprop_kernels[] = FASTSAM_LARGE(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
