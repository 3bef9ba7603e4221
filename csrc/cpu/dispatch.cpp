// Which instruction set runs, and how large the last-level cache is: both asked once.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <string>

#include <unistd.h>

#include "launch.h"

namespace fastsam {

namespace baseline {
extern const cpu::Kernels kernels;
}
namespace avx2 {
extern const cpu::Kernels kernels;
}
namespace avx512 {
extern const cpu::Kernels kernels;
}

namespace cpu {

namespace {

constexpr int kMostIsas = 3;

struct Available {
  const Kernels* kernels[kMostIsas] = {&baseline::kernels};
  const char* names[kMostIsas + 1] = {baseline::kernels.isa};
  int count = 1;

  Available() {
#if defined(__x86_64__)
    // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      add(avx2::kernels);
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      add(avx512::kernels);
    }
#endif
  }

  void add(const Kernels& more) {
    kernels[count] = &more;
    names[count++] = more.isa;
  }

  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; i++) {
      if (std::strcmp(names[i], name) == 0) return kernels[i];
    }
    return nullptr;
  }
};

const Available& available() {
  static const Available instance;
  return instance;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> instance = available().kernels[available().count - 1];
  return instance;
}

// "32768K" or "1M" in bytes, 0 where the file is missing.
int64_t sysfs_cache(int index) {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
  int64_t size = 0;
  char unit = 0;
  file >> size >> unit;
  return unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

const char* const* isas() { return available().names; }

bool use_isa(const char* name) {
  const Kernels* const found = available().find(name);
  if (found) current().store(found, std::memory_order_relaxed);
  return found;
}

int64_t cache_size() {
  static const int64_t size = [] {
    constexpr int64_t kUsual = 32 << 20;
    int64_t largest = 0;
    for (int index = 0; index < 5; index++) largest = std::max(largest, sysfs_cache(index));
    if (largest > 0) return largest;
#ifdef _SC_LEVEL3_CACHE_SIZE
    // Some virtual machines report the whole package's cache here (320 MB for a share of 32 MB).
    if (const int64_t reported = sysconf(_SC_LEVEL3_CACHE_SIZE); reported > 0) return std::min(reported, kUsual);
#endif
    return kUsual;
  }();
  return size;
}

}  // namespace cpu
}  // namespace fastsam
