// The compiled kernels, by storage type and size of their arguments.
#pragma once

#include "device.h"

namespace fastsam::FASTSAM_ISA {

// Most models fit the small arguments; the large ones take some 4,000 tensors and cost the host a microsecond more.
constexpr int kSmallBytes = 4096, kLargeBytes = 32764;
constexpr int kSmallWords = (kSmallBytes - static_cast<int>(sizeof(Header))) / 8;
#if CUDART_VERSION >= 12010
constexpr int kLargeWords = (kLargeBytes - static_cast<int>(sizeof(Header))) / 8;
#else  // which allows no more
constexpr int kLargeWords = kSmallWords;
#endif

struct Variants {
  void (*small)(const Arguments<kSmallWords>);
  void (*large)(const Arguments<kLargeWords>);
};

extern const Variants norm_kernels[kDtypes], perturb_kernels[kDtypes], restore_kernels[kDtypes], sgd_kernels[kDtypes],
    adam_kernels[kDtypes], amsgrad_kernels[kDtypes];

// Blocks that a processor holds at least: as many as registers allow without spilling. 16-byte loads under way follow: benchmarks/
// registers.md.
template <class S>
constexpr int kNormBlocks = sizeof(S) == 8 ? 5 : 6;
template <class S>
constexpr int kPerturbBlocks = sizeof(S) == 8 ? 5 : 6;
template <Kernel kKernel, class S>
constexpr int kUpdateBlocks = sizeof(S) == 8                    ? (kKernel == Kernel::kSgd ? 3 : 2)
                              : kKernel == Kernel::kAdam        ? 5
                              : kKernel != Kernel::kAdamAmsgrad ? 4
                              : sizeof(S) == 4                  ? 3
                                                                : 4;
// sm_75 has room for 4.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FASTSAM_BOUNDS(blocks) __launch_bounds__(kThreads, (blocks) < 4 ? (blocks) : 4)
#else
#define FASTSAM_BOUNDS(blocks) __launch_bounds__(kThreads, blocks)
#endif

}  // namespace fastsam::FASTSAM_ISA
