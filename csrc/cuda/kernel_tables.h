// The compiled kernels, by storage types and size of their arguments.
#pragma once

#include "device.h"
#include "update.h"

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

// By a format's index in kFormats; formats that an operation need not tell apart have the same kernels.
extern const Variants norm_kernels[], perturb_kernels[], power_norm_kernels[], power_perturb_kernels[];
#define FASTSAM_ROW(name, ...) extern const Variants name##_kernels[];
FASTSAM_UPDATE_KERNELS(FASTSAM_ROW)
#undef FASTSAM_ROW

// clang-format off
#define FASTSAM_BOTH(kernel, ...) \
  {kernel(kSmallWords, Types<__VA_ARGS__>), kernel(kLargeWords, Types<__VA_ARGS__>)}
#define FASTSAM_ONE(kernel, ...) {nullptr, kernel(kLargeWords, Types<__VA_ARGS__>)}
// `kernel(words, types)` for every format: with both sizes of arguments for the usual formats, or, of a kernel that few
// use, for none, as every variant lengthens the build.
#define FASTSAM_MOST(kernel) {FASTSAM_FORMATS(FASTSAM_BOTH, FASTSAM_ONE, kernel)}
#define FASTSAM_LARGE(kernel) {FASTSAM_FORMATS(FASTSAM_ONE, FASTSAM_ONE, kernel)}
// clang-format on

#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__;
#else
constexpr int kArch = 0;
#endif
// Blocks that a processor holds at least: as many as registers allow without spilling. Bytes under way follow:
// benchmarks/registers.md.
template <class F>
constexpr int kSourceSize = sizeof(typename F::Source);
template <class F>
constexpr int kGradSize = sizeof(typename F::Grad);
constexpr int kMostNormBlocks = 6;
template <class F>
constexpr int kNormBlocks = kSourceSize<F> == 8              ? 4
                            : kSourceSize<F> != kGradSize<F> ? 5
                            // sm_120's code of bfloat16 takes a few registers more.
                            : kArch >= 1200 && kGradSize<F> == 2 ? 5
                                                                 : kMostNormBlocks;
template <class F>
constexpr int kPerturbBlocks = (kSourceSize<F> == 8                               ? 4
                                : kSourceSize<F> != kGradSize<F> && !F::kMasters ? 5
                                                                                 : 6) -
                               kPrefetch;
template <Kernel kKernel, class F>
FASTSAM_HD constexpr int update_blocks() {
  const int states = count_states(kKernels[static_cast<int>(kKernel)].states);
  if (kSourceSize<F> == 8) return states > 1 ? 2 : 3;
  if (kSourceSize<F> < kGradSize<F> || states == 3 || kKernel == Kernel::radam) return 3;
  // sm_120's code takes a few registers more.
  if (F::kDraws) return kArch < 1200 ? 4 : kKernel == Kernel::adam && kSourceSize<F> == 2 ? 2 : 3;
  if (kKernel != Kernel::adam) return 4;
  return F::kMasters ? 3 : F::kUniform && !kSecondTile<kAdam, F> ? 5 : 4;
}
// sm_75 has room for 4.
#define FASTSAM_BOUNDS(blocks) __launch_bounds__(kThreads, kArch < 800 && (blocks) > 4 ? 4 : (blocks))

}  // namespace fastsam::FASTSAM_ISA
