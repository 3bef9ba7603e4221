// The compiled kernels, by storage types and size of their arguments.
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

// By pair of dtypes; restore_kernels read no gradients and are by dtype. Mixed ones have the large arguments only.
extern const Variants norm_kernels[kPairs], perturb_kernels[kPairs];
#define FASTSAM_ROW(name, ...) extern const Variants name##_kernels[];
FASTSAM_UPDATE_KERNELS(FASTSAM_ROW)
#undef FASTSAM_ROW

// clang-format off
#define FASTSAM_BOTH(kernel, S) {kernel(S, S, kSmallWords), kernel(S, S, kLargeWords)}
#define FASTSAM_EQUAL(kernel) \
  FASTSAM_BOTH(kernel, float), FASTSAM_BOTH(kernel, double), FASTSAM_BOTH(kernel, bfloat16), FASTSAM_BOTH(kernel, float16)
#define FASTSAM_ONE(kernel, S, G) {nullptr, kernel(S, G, kLargeWords)}
// `kernel(S, G, words)` for every pair, in the order of tables.h.
#define FASTSAM_PAIRS(kernel)                                                              \
  {FASTSAM_EQUAL(kernel),                                                                  \
   FASTSAM_ONE(kernel, float, bfloat16), FASTSAM_ONE(kernel, float, float16),              \
   FASTSAM_ONE(kernel, bfloat16, float), FASTSAM_ONE(kernel, float16, float)}
// clang-format on

// Blocks that a processor holds at least: as many as registers allow without spilling. 16-byte loads under way follow: benchmarks/
// registers.md.
template <class S, class G>
constexpr int kNormBlocks = sizeof(S) == 8 || sizeof(S) != sizeof(G) ? 5 : 6;
template <class S, class G>
constexpr int kPerturbBlocks = sizeof(S) == 8 || sizeof(S) < sizeof(G) ? 5 : 6;
template <Kernel kKernel, class S, class G>
FASTSAM_HD constexpr int update_blocks() {
  const int states = count_states(kKernels[static_cast<int>(kKernel)].states);
  if (sizeof(S) == 8) return states > 1 ? 2 : 3;
  if (kKernel == Kernel::centered) return sizeof(S) == 4 ? 3 : 2;
  if (sizeof(S) < sizeof(G)) return 3;
  if (states == 3) return sizeof(S) == 4 ? 3 : 4;
  return states == 2 && kKernel != Kernel::rmsprop ? 5 : 4;
}
// sm_75 has room for 4.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FASTSAM_BOUNDS(blocks) __launch_bounds__(kThreads, (blocks) < 4 ? (blocks) : 4)
#else
#define FASTSAM_BOUNDS(blocks) __launch_bounds__(kThreads, blocks)
#endif

}  // namespace fastsam::FASTSAM_ISA
