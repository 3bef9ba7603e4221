#include "update_kernel.h"

namespace fastsam::FASTSAM_ISA {

#define FASTSAM_KERNEL(...) update<Kernel::centered, __VA_ARGS__>
const Variants centered_kernels[] = FASTSAM_LARGE(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
