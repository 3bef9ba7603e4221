#include "update_kernel.h"

namespace fastsam::FASTSAM_ISA {

#define FASTSAM_KERNEL(...) update<Kernel::adagrad, __VA_ARGS__>
const Variants adagrad_kernels[] = FASTSAM_LARGE(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
