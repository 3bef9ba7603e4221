#include "update_kernel.h"

namespace fastsam::FASTSAM_ISA {

#define FASTSAM_KERNEL(...) update<Kernel::radam, __VA_ARGS__>
const Variants radam_kernels[] = FASTSAM_LARGE(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
