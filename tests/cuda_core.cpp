// The CUDA kernels' own bodies on a CPU: a grid of blocks in any order, on any number of threads, a block's threads in
// any order. A library for test_cuda_core.py; with -DFASTSAM_MAIN a program for ThreadSanitizer. -DFASTSAM_FEW_RULES
// leaves out what takes long to compile: the kernels of all rules but sgd, adam and lion.
#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "../csrc/cuda/combine.h"
#include "../csrc/cuda/dot.h"
#include "../csrc/cuda/power.h"
#include "../csrc/cuda/update.h"

#ifndef FASTSAM_TICKET_ORDER  // a weaker one is a race, for ThreadSanitizer to find
#define FASTSAM_TICKET_ORDER __ATOMIC_ACQ_REL
#endif

namespace fastsam::FASTSAM_ISA {

class HostContext {
 public:
  template <class R>
  struct PerThread {
    R own[kThreads];
    R& operator[](int t) { return own[t]; }
  };

  HostContext(int block, int blocks, unsigned seed) : block_(block), blocks_(blocks), seed_(seed) {}
  int block() const { return block_; }
  int blocks() const { return blocks_; }

  // Between two barriers no order is promised: every phase takes another one.
  template <class F>
  void threads(const F& phase) {
    seed_ = seed_ * 1664525 + 1013904223;
    const int first = seed_ >> 8 & (kThreads - 1), stride = seed_ >> 16 | 1;
    for (int i = 0; i < kThreads; i++) phase((first + i * stride) & (kThreads - 1));
  }
  void sync() {}

  template <class T, int n, class Combine>
  void fold_warp(PerThread<Several<T, n>>& numbers, const Combine& combine) {
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const PerThread<Several<T, n>> before = numbers;
      for (int t = 0; t < kThreads; t++) {
        for (int j = 0; j < n; j++) {
          numbers.own[t].each[j] = combine(before.own[t].each[j], before.own[t ^ offset].each[j]);
        }
      }
    }
  }

  uint32_t arrive(uint32_t* ticket) {
    const uint32_t last = blocks_ - 1;
    uint32_t before = __atomic_load_n(ticket, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(ticket, &before, before >= last ? 0 : before + 1, false, FASTSAM_TICKET_ORDER,
                                        __ATOMIC_RELAXED)) {
    }
    return before;
  }
  bool is_last(uint32_t before) const { return before == static_cast<uint32_t>(blocks_ - 1); }
  double load_other(const double* from) { return *from; }
  void load_others(const double* from, double* x) {
    if (reinterpret_cast<uintptr_t>(from) % 16) std::abort();  // as a GPU would
    x[0] = from[0];
    x[1] = from[1];
  }

 private:
  int block_, blocks_;
  unsigned seed_;
};

struct Launch {  // what the test hands over; the same in test_cuda_core.py
  const Chunk* chunks;
  const Segment* segments;
  const Row* rows;
  const int64_t* grads;
  const uint8_t* perturbed;  // or null
  uint32_t* ticket;
  double* partials;
  double* sums;
  const float* grad_scale;
  const float* found_inf;
  double* clip;
  int64_t* overflows;
  int64_t* rounding;
  double q, max_norm;
  int64_t n_chunks, n_segments, n_groups, n_sums, slot;
  int64_t split_bits, by_value, seed, threads, rule;
};

struct OperandLaunch {  // of dot and combine_; the same in test_cuda_core.py
  const Chunk* chunks;
  const int64_t* addresses[kMostTerms + 1];
  const double* coefficient_addresses[kMostTerms];
  uint32_t* ticket;
  double* partials;
  double* out;
  double coefficients[kMostTerms];
  int64_t dtypes[kMostTerms + 1];
  int64_t n_operands, n_chunks, n_segments;
  int64_t most;  // segments that one launch serves
  int64_t split_bits, seed, threads;
};

template <class L, class Body>
void run_grid(int blocks, const L& launch, const Body& body) {
  std::vector<int> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(static_cast<unsigned>(launch.seed));
  if (launch.seed) std::shuffle(order.begin(), order.end(), random);
  const int threads = static_cast<int>(launch.threads);
  const auto work = [&](int first) {
    for (int i = first; i < blocks; i += threads) {
      HostContext ctx(order[i], blocks, static_cast<unsigned>(launch.seed) + i);
      body(ctx);
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
}

template <class F, class Body>
void run(const Launch& launch, const Body& body, int most_blocks = 1 << 30) {
  auto args = std::make_unique<Arguments<4096>>();
  static_cast<Header&>(*args) = Header{};
  std::vector<int64_t> words(launch.n_segments);
  for (int64_t i = 0; i < launch.n_segments; i++) {
    words[i] = launch.grads[i] | (launch.perturbed && launch.perturbed[i] ? kPerturbed : 0);
  }
  args->chunks = launch.chunks;
  args->segments = launch.segments;
  args->ticket = launch.ticket;
  args->n_chunks = static_cast<int32_t>(launch.n_chunks);
  args->n_segments = static_cast<int32_t>(launch.n_segments);
  args->n_groups = static_cast<int32_t>(launch.n_groups);
  args->split_bits = static_cast<int32_t>(launch.split_bits);
  args->slot = static_cast<int32_t>(launch.slot);
  args->q = launch.q;
  args->max_norm = launch.max_norm;
  args->adaptive = !(launch.max_norm > 0) && std::any_of(launch.rows, launch.rows + launch.n_groups,
                                                         [](const Row& row) { return needs_weight(row); });
  args->masters = F::kMasters;
  args->n_sums = static_cast<int32_t>(launch.n_sums);
  args->partials = launch.partials;
  args->sums = launch.sums;
  args->grad_scale = launch.grad_scale;
  args->found_inf = launch.found_inf;
  args->clip = launch.clip;
  args->overflows = launch.overflows;
  args->rounding = launch.rounding;
  int64_t* next = args->words;
  if (launch.by_value & 1) {
    std::memcpy(next, launch.rows, launch.n_groups * sizeof(Row));
    next += launch.n_groups * kRowColumns;
  } else {
    args->rows = launch.rows;
  }
  if (launch.by_value & 2) {
    std::copy(words.begin(), words.end(), next);
  } else {
    args->grads = words.data();
  }
  const int blocks = std::max(1, std::min(args->n_chunks << args->split_bits, most_blocks));
  run_grid(blocks, launch, [&](HostContext& ctx) { body(ctx, *args); });
}

template <class F>
void grad_norm(const Launch& launch) {
  const auto body = [](HostContext& ctx, const auto& args) {
    NormShared<typename F::Grad> shared;
    norm_block<typename F::Norm>(ctx, args, shared);
  };
  run<F>(launch, body, kResidentNorm ? 3 : 1 << 30);
}

template <class F>
void power_norm(const Launch& launch) {
  run<F>(launch, [](HostContext& ctx, const auto& args) {
    PowerNormShared shared;
    power_norm_block<typename F::Norm>(ctx, args, shared);
  });
}

template <class F>
void power_perturb(const Launch& launch) {
  if (launch.n_chunks == 0) return;
  run<F>(launch, [](HostContext& ctx, const auto& args) {
    PowerPerturbShared<F> shared;
    power_perturb_block<F>(ctx, args, shared);
  });
}

template <class F>
void perturb(const Launch& launch) {
  if (launch.n_chunks == 0) return;
  run<F>(launch, [](HostContext& ctx, const auto& args) {
    PerturbShared<F> shared;
    perturb_block<F>(ctx, args, shared);
  });
}

template <Kernel kKernel, class F>
void update(const Launch& launch) {
  run<F>(launch, [](HostContext& ctx, const auto& args) {
    UpdateShared<kKernels[static_cast<int>(kKernel)].rule, F> shared;
    update_block<kKernel, F>(ctx, args, shared);
  });
}

template <Kernel kKernel, class F>
constexpr auto updater() -> void (*)(const Launch&) {
#ifdef FASTSAM_FEW_RULES
  constexpr Rule kRule = kKernels[static_cast<int>(kKernel)].rule;
  if constexpr (kRule != kSgd && kRule != kAdam && kRule != kLion) {
    return nullptr;
  } else
#endif
    return update<kKernel, F>;
}

template <class Header, class Body>
void run_ranges(const OperandLaunch& launch, Header header, const Body& body) {
  header.chunks = launch.chunks;
  header.n_chunks = static_cast<int32_t>(launch.n_chunks);
  header.split_bits = static_cast<int32_t>(launch.split_bits);
  header.n_operands = static_cast<int32_t>(launch.n_operands);
  for (int k = 0; k < launch.n_operands; k++) header.dtypes[k] = static_cast<Dtype>(launch.dtypes[k]);
  int64_t first = 0;
  do {
    const int64_t n = std::min(launch.n_segments - first, launch.most);
    auto args = std::make_unique<OperandArguments<Header, 4096>>();
    static_cast<Header&>(*args) = header;
    args->first_segment = static_cast<int32_t>(first);
    args->n_segments = static_cast<int32_t>(n);
    for (int k = 0; k < launch.n_operands; k++) std::copy_n(launch.addresses[k] + first, n, args->words + k * n);
    first += n;
    if constexpr (std::is_same<Header, DotHeader>::value) {
      args->ticket = first == launch.n_segments ? launch.ticket : nullptr;
    }
    const int blocks = std::max(1, args->n_chunks << args->split_bits);
    run_grid(blocks, launch, [&](HostContext& ctx) { body(ctx, *args); });
  } while (first < launch.n_segments);
}

template <class T>
void dot(const OperandLaunch& launch) {
  DotHeader header{};
  header.partials = launch.partials;
  header.out = launch.out;
  run_ranges(launch, header, [](HostContext& ctx, const auto& args) {
    DotShared<T> shared;
    dot_block<T>(ctx, args, shared);
  });
}

template <class T>
void combine(const OperandLaunch& launch) {
  if (launch.n_chunks == 0) return;
  CombineHeader header{};
  std::copy_n(launch.coefficients, kMostTerms, header.coefficients);
  std::copy_n(launch.coefficient_addresses, kMostTerms, header.addresses);
  run_ranges(launch, header, [](HostContext& ctx, const auto& args) { combine_block<T>(ctx, args); });
}

template <class F>
void run_operation(int operation, const Launch& launch) {
  using Climb = typename F::Climb;
  switch (operation) {
    case 0:
      return launch.q == 2 ? grad_norm<F>(launch) : power_norm<F>(launch);
    case 1:
      return launch.q == 2 ? perturb<Climb>(launch) : power_perturb<Climb>(launch);
  }
  if (launch.rule == kNoRule) return update<Kernel::restore, typename F::Restore>(launch);
  using Update = void (*)(const Launch&);
#define FASTSAM_ROW(name, ...) updater<Kernel::name, F>(),
  static const Update kernels[] = {FASTSAM_UPDATE_KERNELS(FASTSAM_ROW)};
#undef FASTSAM_ROW
  kernels[kernel_for(static_cast<Rule>(launch.rule), launch.rows, launch.n_groups)](launch);
}

// The sanitizer's program needs few formats, and takes long to compile.
template <class F>
constexpr auto runner() -> void (*)(int, const Launch&) {
#ifdef FASTSAM_MAIN
  if constexpr (!std::is_same<typename F::Source, float>::value || !std::is_same<typename F::Grad, float>::value) {
    return nullptr;
  } else
#endif
    return run_operation<F>;
}

}  // namespace fastsam::FASTSAM_ISA

using namespace fastsam;
using namespace fastsam::FASTSAM_ISA;

// `format`: weight, grad, source, state, stochastic. Returns whether there are kernels for it.
extern "C" bool fastsam_run(int operation, const int* format, const FASTSAM_ISA::Launch* launch) {
  const auto dtype = [&](int i) { return static_cast<Dtype>(format[i]); };
  const int index = format_index(Format{dtype(0), dtype(1), dtype(2), dtype(3), format[4] != 0});
  if (index == kKnownFormats) return false;
#define FASTSAM_ROW(_, ...) runner<Types<__VA_ARGS__>>()
  static void (*const runs[])(int, const FASTSAM_ISA::Launch&) = {FASTSAM_FORMATS(FASTSAM_ROW, FASTSAM_ROW, )};
#undef FASTSAM_ROW
  runs[index](operation, *launch);
  return true;
}

extern "C" void fastsam_dot(const OperandLaunch* launch) {
  launch->dtypes[0] == kFloat64 ? dot<double>(*launch) : dot<float>(*launch);
}
extern "C" void fastsam_combine(const OperandLaunch* launch) {
  launch->dtypes[0] == kFloat64 ? combine<double>(*launch) : combine<float>(*launch);
}

extern "C" int fastsam_part(int64_t block, int split_bits, int length, int* begin) {
  const Part part = part_of(static_cast<int>(block), split_bits);
  *begin = part.begin;
  return part_length(part, Chunk{0, 0, length, 0});
}
extern "C" int fastsam_width(int64_t address, int itemsize) {
  return itemsize == 2 ? width_at(reinterpret_cast<const bfloat16*>(address))
                       : width_at(reinterpret_cast<const float*>(address));
}

#ifdef FASTSAM_MAIN
#include <cstdio>

namespace {

// A bucket of many small segments, so that tickets are what the threads fight for.
struct Problem {
  static constexpr int kSegments = 60, kMost = 3 * kChunk + 5;
  std::vector<Segment> segments = std::vector<Segment>(kSegments);
  std::vector<Chunk> chunks;
  std::vector<std::vector<float>> memory;
  std::vector<int64_t> grads = std::vector<int64_t>(kSegments);
  std::vector<uint8_t> perturbed = std::vector<uint8_t>(kSegments, 1);
  std::vector<Progress> progress = std::vector<Progress>(kSegments, Progress{0, 1});
  std::vector<double> partials;
  Row row{0.1, 0.01, 0.9, 0.99, 1e-8, 0.05, 0.0, 0.0, 0.0, 0.0, 7.0};
  double sum = 0;
  double products[kProducts] = {};
  uint32_t tickets[3] = {};
  int64_t rounding = 0;
  const int* const format;

  explicit Problem(const int* format) : format(format) {
    const int sizes[] = {0, 1, 65, 2047, 8192, 300};
    for (int i = 0; i < kSegments; i++) {
      const int n = sizes[i % 6];
      for (int k = 0; k < 5; k++) {
        memory.emplace_back(n + 64, 0.5f + 0.001f * i);
        int64_t address = reinterpret_cast<int64_t>(memory.back().data());
        address += -address & 63;
        if (k == 0) segments[i].weight = address;
        if (k == 1) segments[i].backup = segments[i].master = address;
        if (k == 2) segments[i].state[0] = address;
        if (k == 3) segments[i].state[1] = address;
        if (k == 4) grads[i] = i % 7 == 3 ? 0 : address;
      }
      segments[i].index = i;
      segments[i].progress = reinterpret_cast<int64_t>(&progress[i]);
      for (int start = 0; start < n; start += kChunk)
        chunks.push_back({i, start / kUnit, std::min(n - start, kChunk), 0});
    }
    partials.resize(kProducts * chunks.size());
  }

  // Two numbers of 16 bits may make a NaN, which equals nothing.
  std::vector<uint32_t> bits() const {
    std::vector<uint32_t> all;
    for (const auto& floats : memory) {
      for (const float x : floats) all.push_back(to_bits(x));
    }
    return all;
  }

  FASTSAM_ISA::Launch launch(unsigned seed, int threads, int split_bits) {
    FASTSAM_ISA::Launch launch{};
    launch.chunks = chunks.data();
    launch.segments = segments.data();
    launch.rows = &row;
    launch.grads = grads.data();
    launch.partials = partials.data();
    launch.sums = &sum;
    launch.rounding = &rounding;
    launch.n_chunks = static_cast<int64_t>(chunks.size());
    launch.n_segments = kSegments;
    launch.n_groups = launch.n_sums = 1;
    launch.q = 2;
    launch.by_value = 3;
    launch.split_bits = split_bits;
    launch.seed = seed;
    launch.threads = threads;
    return launch;
  }

  // Of gradients and masters (or backups), in two launches.
  void dot(unsigned seed, int threads) {
    std::vector<int64_t> masters;
    for (const Segment& segment : segments) masters.push_back(segment.master);
    OperandLaunch launch{};
    launch.chunks = chunks.data();
    launch.addresses[0] = grads.data();
    launch.addresses[1] = masters.data();
    launch.n_operands = 2;
    launch.ticket = &tickets[2];
    launch.partials = partials.data();
    launch.out = products;
    launch.n_chunks = static_cast<int64_t>(chunks.size());
    launch.n_segments = kSegments;
    launch.most = kSegments / 2;
    launch.seed = seed;
    launch.threads = threads;
    fastsam_dot(&launch);
  }

  bool step(unsigned seed, int threads, int split_bits, int rule) {
    dot(seed, threads);
    FASTSAM_ISA::Launch l = launch(seed, threads, 0);
    l.ticket = &tickets[0];
    fastsam_run(0, format, &l);
    l.split_bits = split_bits;
    fastsam_run(1, format, &l);
    l.ticket = &tickets[1];
    l.perturbed = perturbed.data();
    l.rule = rule;
    fastsam_run(2, format, &l);
    return tickets[0] == 0 && tickets[1] == 0 && tickets[2] == 0;
  }
};

}  // namespace

int main() {
  const int formats[][5] = {{kFloat32, kFloat32, kFloat32, kFloat32, 0},
                            {kFloat32, kFloat32, kFloat32, kBFloat16, 1},
                            {kBFloat16, kFloat32, kFloat32, kFloat32, 0}};
  for (const int i : {0, 1, 2, 3, 4, 5}) {
    const int rule = i % 2 ? kAdam : kSgd;
    Problem alone(formats[i / 2]), together(formats[i / 2]);
    for (int round = 0; round < 6; round++) {
      alone.step(0, 1, 0, rule);
      if (!together.step(round + 1, 4, round % 3, rule)) return std::puts("a ticket is left"), 1;
      if (alone.sum != together.sum) return std::puts("sums differ"), 1;
      for (int k = 0; k < kProducts; k++) {  // bits, because weights may become NaN
        if (to_bits(alone.products[k]) != to_bits(together.products[k])) return std::puts("products differ"), 1;
      }
      if (alone.bits() != together.bits()) return std::puts("weights or states differ"), 1;
      if (together.rounding != (formats[i / 2][4] ? round + 1 : 0)) return std::puts("a draw is wrong"), 1;
      for (int i = 0; i < Problem::kSegments; i++) {
        if (together.progress[i].step != (together.grads[i] ? round + 1 : 0)) return std::puts("a count is wrong"), 1;
      }
    }
  }
  return std::puts("the same bits in every order"), 0;
}
#endif
