#include "update_kernel.h"

namespace fastsam::FASTSAM_ISA {

#define FASTSAM_RESTORE(words, ...) update<Kernel::restore, words, __VA_ARGS__::Restore>
#define FASTSAM_KERNEL(...) update<Kernel::sgd, __VA_ARGS__>
#define FASTSAM_PLAIN(...) update<Kernel::plain, __VA_ARGS__>
const Variants restore_kernels[] = FASTSAM_MOST(FASTSAM_RESTORE);
const Variants plain_kernels[] = FASTSAM_LARGE(FASTSAM_PLAIN);
const Variants sgd_kernels[] = FASTSAM_MOST(FASTSAM_KERNEL);

}  // namespace fastsam::FASTSAM_ISA
