// The operations on a GPU: which kernel, how many blocks, and how what changes with every step reaches them. Nothing
// here waits for the device or allocates.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "kernel_tables.h"
#include "launch.h"
#include "operand_tables.h"
#include "power.h"

namespace fastsam::FASTSAM_ISA {

namespace {

constexpr int kMostDevices = 64;

struct Words {  // to write into a device table
  int64_t* to;
  int32_t n;
  int64_t words[kLargeWords];
};

__global__ void fill(const __grid_constant__ Words args) {
  for (int i = threadIdx.x; i < args.n; i += blockDim.x) args.to[i] = args.words[i];
}

// What perturb_ has to do for nothing but empty tensors, whose bucket may be the one that counts for all.
__global__ void power_count(const __grid_constant__ Header args) {
  DeviceContext ctx;
  count_overflow(ctx, args, [](const Header& a) { return a.q == 2 ? ordered_sum(a) : total_norm(a); });
}

template <class WordAt>
cudaError_t write_words(int64_t* to, int64_t n, cudaStream_t stream, const WordAt& word_at) {
  Words args;
  for (int64_t i = 0; i < n; i += kLargeWords) {
    args.to = to + i;
    args.n = static_cast<int32_t>(std::min<int64_t>(n - i, kLargeWords));
    for (int32_t j = 0; j < args.n; j++) args.words[j] = word_at(i + j);
    fill<<<1, kThreads, 0, stream>>>(args);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

// The kernels' own memory behind the segments.
template <class L>
gpu::Control* control_of(const L& launch) {
  return reinterpret_cast<gpu::Control*>(const_cast<Segment*>(launch.segments) + launch.n_segments);
}
Row* captured_rows_of(const gpu::Launch& launch) { return reinterpret_cast<Row*>(control_of(launch) + 1); }
Row* row_table_of(const gpu::Launch& launch) { return captured_rows_of(launch) + launch.n_groups; }
int64_t* grad_table_of(const gpu::Launch& launch) {
  return reinterpret_cast<int64_t*>(row_table_of(launch) + launch.n_groups);
}

int64_t row_word(const gpu::Launch& launch, int64_t i) {
  int64_t word;
  std::memcpy(&word, reinterpret_cast<const char*>(launch.rows) + 8 * i, 8);
  return word;
}
int64_t grad_word(const gpu::Launch& launch, int64_t i) {
  return launch.grads[i] | (launch.perturbed && launch.perturbed[i] ? kPerturbed : 0);
}
cudaError_t write_rows(Row* to, const gpu::Launch& launch, cudaStream_t stream) {
  return write_words(reinterpret_cast<int64_t*>(to), launch.n_groups * kRowColumns, stream,
                     [&](int64_t i) { return row_word(launch, i); });
}

int64_t processors_of(int device) {
  static std::atomic<int> processors[kMostDevices];
  std::atomic<int>& known = processors[device % kMostDevices];
  if (known == 0) {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    known = std::max(count, 1);
  }
  return known;
}

constexpr int64_t size_of(Dtype dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// What the two operations read and write of an element: without masters the first has a backup to write, with them the
// second has them to write.
int64_t perturb_bytes(const Format& format) {
  return size_of(format.grad) + size_of(format.weight) + (format.masters() ? 1 : 2) * size_of(format.source);
}
int64_t update_bytes(const Format& format, int states) {
  return size_of(format.grad) + size_of(format.weight) + (format.masters() ? 2 : 1) * size_of(format.source) +
         2 * count_states(states) * size_of(format.state);
}

// Small models fill a GPU better with several blocks a chunk: below some waves of blocks, the last one is a large
// share.
template <class L>
int split_bits_for(const L& launch, int64_t bytes) {
  const int64_t blocks_at_once = 5 * processors_of(launch.device);
  int bits = launch.n_chunks < 6 * blocks_at_once ? 2 : launch.n_chunks < 12 * blocks_at_once ? 1 : 0;
  while (bits > 0 && kChunk * bytes >> bits < 1024 * FASTSAM_LEAST_PART) bits--;
  return bits;
}

template <int kWords>
cudaError_t launch_with(void (*kernel)(const Arguments<kWords>), const Header& header, const gpu::Launch& launch,
                        bool rows, bool grads, unsigned grid, cudaStream_t stream) {
  Arguments<kWords> args;
  static_cast<Header&>(args) = header;
  int64_t* next = args.words;
  for (int64_t i = 0; rows && i < launch.n_groups * kRowColumns; i++) *next++ = row_word(launch, i);
  for (int64_t i = 0; grads && i < launch.n_segments; i++) *next++ = grad_word(launch, i);
  void* pointers[] = {&args};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(kThreads), pointers, 0, stream);
}

const Variants& variants_of(const Variants* kernels, const gpu::Launch& launch) {
  return kernels[format_index(launch.format)];
}

// Run a kernel with what it is told by value, or, where that is too much, from the device's tables.
cudaError_t launch_kernel(const Variants* kernels, const gpu::Launch& launch, Header header, uint32_t* ticket,
                          int split_bits, int64_t most_blocks = INT32_MAX) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaSetDevice(launch.device);
  if (error == cudaSuccess) error = cudaStreamIsCapturing(stream, &status);
  if (error != cudaSuccess) return error;

  const bool capturing = status != cudaStreamCaptureStatusNone;
  const int64_t n = launch.n_segments, row_words = launch.n_groups * kRowColumns;
  const bool grads_fit = n <= kLargeWords, rows_fit = !capturing && row_words + (grads_fit ? n : 0) <= kLargeWords;
  header.chunks = launch.chunks;
  header.segments = launch.segments;
  header.ticket = ticket;
  header.n_chunks = static_cast<int32_t>(launch.n_chunks);
  header.n_segments = static_cast<int32_t>(n);
  header.n_groups = static_cast<int32_t>(launch.n_groups);
  header.split_bits = split_bits;
  if (capturing) {
    header.rows = captured_rows_of(launch);  // where a replay finds what was uploaded since
    header.adaptive = !header.clip;          // in a replay a group may be
  } else if (!rows_fit) {
    header.rows = row_table_of(launch);
    error = write_rows(row_table_of(launch), launch, stream);
  }
  if (!grads_fit && error == cudaSuccess) {
    header.grads = grad_table_of(launch);
    error = write_words(grad_table_of(launch), n, stream, [&](int64_t i) { return grad_word(launch, i); });
  }
  if (error != cudaSuccess) return error;
  // Without a chunk one block still has to sum nothing, or to count the updates of empty parameters.
  const int64_t blocks = std::min(launch.n_chunks << split_bits, most_blocks);
  const unsigned grid = static_cast<unsigned>(std::max<int64_t>(blocks, 1));
  const int64_t words = (rows_fit ? row_words : 0) + (grads_fit ? n : 0);
  const Variants& variants = variants_of(kernels, launch);
  return words <= kSmallWords && variants.small
             ? launch_with(variants.small, header, launch, rows_fit, grads_fit, grid, stream)
             : launch_with(variants.large, header, launch, rows_fit, grads_fit, grid, stream);
}

// One launch for each range of segments whose operands' addresses fit; the last one gets the ticket, if there is any.
template <int kWords, class Header, class L>
cudaError_t launch_ranges(void (*kernel)(const OperandArguments<Header, kWords>), const Header& header, const L& launch,
                          const Operand* const* operands, uint32_t* ticket) {
  const int64_t most = kWords / header.n_operands;
  const unsigned grid = static_cast<unsigned>(std::max<int64_t>(launch.n_chunks << header.split_bits, 1));
  OperandArguments<Header, kWords> args;
  static_cast<Header&>(args) = header;
  int64_t first = 0;
  do {
    const int64_t n = std::min(launch.n_segments - first, most);
    args.first_segment = static_cast<int32_t>(first);
    args.n_segments = static_cast<int32_t>(n);
    for (int k = 0; k < header.n_operands; k++) std::copy_n(operands[k]->addresses + first, n, args.words + k * n);
    first += n;
    if constexpr (std::is_same<Header, DotHeader>::value) args.ticket = first == launch.n_segments ? ticket : nullptr;
    void* pointers[] = {&args};
    const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(kThreads),
                                               pointers, 0, static_cast<cudaStream_t>(launch.stream));
    if (error != cudaSuccess) return error;
  } while (first < launch.n_segments);
  return cudaSuccess;
}

template <class Header, class L>
cudaError_t launch_operands(const OperandVariants<Header>* kernels, Header header, const L& launch,
                            const Operand* const* operands, int n_operands, uint32_t* ticket = nullptr) {
  if (const cudaError_t error = cudaSetDevice(launch.device)) return error;
  header.chunks = launch.chunks;
  header.n_chunks = static_cast<int32_t>(launch.n_chunks);
  header.n_operands = n_operands;
  for (int k = 0; k < n_operands; k++) header.dtypes[k] = operands[k]->dtype;
  const OperandVariants<Header>& variants = kernels[operands[0]->dtype == kFloat64];
  return launch.n_segments * n_operands <= kSmallTable<Header>
             ? launch_ranges(variants.small, header, launch, operands, ticket)
             : launch_ranges(variants.large, header, launch, operands, ticket);
}

const char* message(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // the next operation starts without it
  return cudaGetErrorString(error);
}

cudaError_t grad_norm(const gpu::Launch& launch) {
  Header header{};
  header.partials = launch.partials;
  header.sums = launch.sums;
  header.n_sums = static_cast<int32_t>(launch.n_sums);
  header.slot = static_cast<int32_t>(launch.slot);
  header.max_norm = launch.max_norm;
  header.clip = launch.clip;
  header.grad_scale = launch.grad_scale;
  header.adaptive = !launch.clip && std::any_of(launch.rows, launch.rows + launch.n_groups,
                                                [](const Row& row) { return needs_weight(row); });
  header.masters = launch.format.masters();
  header.q = launch.q;
  uint32_t* const ticket = &control_of(launch)->norm_ticket;
  if (launch.q != 2) return launch_kernel(power_norm_kernels, launch, header, ticket, 0);
  return launch_kernel(norm_kernels, launch, header, ticket, 0,
                       kResidentNorm ? kMostNormBlocks * processors_of(launch.device) : INT32_MAX);
}

cudaError_t perturb(const gpu::Launch& launch) {
  Header header{};
  header.sums = launch.sums;
  header.n_sums = static_cast<int32_t>(launch.n_sums);
  header.overflows = launch.overflows;
  header.rounding = launch.rounding;
  header.q = launch.q;
  if (launch.n_chunks == 0) {
    if (!launch.overflows) return cudaSuccess;
    if (const cudaError_t error = cudaSetDevice(launch.device)) return error;
    power_count<<<1, 1, 0, static_cast<cudaStream_t>(launch.stream)>>>(header);
    return cudaGetLastError();
  }
  return launch_kernel(launch.q == 2 ? perturb_kernels : power_perturb_kernels, launch, header, nullptr,
                       split_bits_for(launch, perturb_bytes(launch.format)));
}

const Variants* update_kernels(int kernel) {
#define FASTSAM_ROW(name, ...) name##_kernels,
  static const Variants* const kernels[] = {FASTSAM_UPDATE_KERNELS(FASTSAM_ROW)};
#undef FASTSAM_ROW
  return kernels[kernel];
}

cudaError_t update(const gpu::Launch& launch) {
  Header header{};
  header.grad_scale = launch.grad_scale;
  header.found_inf = launch.found_inf;
  header.clip = launch.clip;
  header.overflows = launch.overflows;
  header.rounding = launch.rounding;
  const int kernel = kernel_for(launch.rule, launch.rows, launch.n_groups);
  return launch_kernel(update_kernels(kernel), launch, header, &control_of(launch)->update_ticket,
                       split_bits_for(launch, update_bytes(launch.format, kKernels[kernel].states)));
}

cudaError_t dot(const gpu::Dot& launch) {
  DotHeader header{};
  header.partials = launch.partials;
  header.out = launch.out;
  const Operand* const operands[] = {&launch.a, &launch.b};
  return launch_operands(dot_kernels, header, launch, operands, launch.b.addresses ? 2 : 1,
                         &control_of(launch)->dot_ticket);
}

cudaError_t combine(const gpu::Combination& launch) {
  if (launch.n_chunks == 0) return cudaSuccess;
  CombineHeader header{};
  int64_t bytes = size_of(launch.out.dtype);
  for (const Term& term : launch.terms) bytes += term.operand.addresses ? size_of(term.operand.dtype) : 0;
  header.split_bits = split_bits_for(launch, bytes);
  const Operand* operands[kMostTerms + 1] = {&launch.out};
  int n_terms = 0;
  for (const Term& term : launch.terms) {
    if (!term.operand.addresses) continue;
    header.coefficients[n_terms] = term.coefficient;
    header.addresses[n_terms] = term.address;
    operands[++n_terms] = &term.operand;
  }
  return launch_operands(combine_kernels, header, launch, operands, n_terms + 1);
}

// CUDA loads a kernel when it is first asked for, which may not be while capturing: ask for it, once on each device.
cudaError_t load_kernel(const void* kernel, int device) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> loaded;
  const std::lock_guard<std::mutex> guard(mutex);
  if (!kernel || loaded.count({device, kernel})) return cudaSuccess;
  cudaFuncAttributes unused;
  if (const cudaError_t error = cudaFuncGetAttributes(&unused, kernel)) return error;
  loaded.insert({device, kernel});
  return cudaSuccess;
}

template <class V>
cudaError_t load_variants(const V& variants, int device) {
  if (const cudaError_t error = load_kernel(reinterpret_cast<const void*>(variants.small), device)) return error;
  return load_kernel(reinterpret_cast<const void*>(variants.large), device);
}

// Loads what a step will launch, too.
cudaError_t upload_rows(const gpu::Launch& launch) {
  if (const cudaError_t error = cudaSetDevice(launch.device)) return error;
  const bool power = launch.q != 2;
  std::vector<const Variants*> used = {norm_kernels, power ? power_perturb_kernels : perturb_kernels};
  if (power) used.push_back(power_norm_kernels);  // the other one is what gradients are clipped by
  used.push_back(update_kernels(kernel_for(launch.rule, launch.rows, launch.n_groups)));
  for (const Variants* kernels : used) {
    if (const cudaError_t error = load_variants(variants_of(kernels, launch), launch.device)) return error;
  }
  const bool in_double = launch.format.source == kFloat64;
  if (const cudaError_t error = load_variants(dot_kernels[in_double], launch.device)) return error;
  if (const cudaError_t error = load_variants(combine_kernels[in_double], launch.device)) return error;
  return write_rows(captured_rows_of(launch), launch, static_cast<cudaStream_t>(launch.stream));
}

// All files are compiled for the same GPUs, so that the smallest kernel answers for all.
cudaError_t probe(int device) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  cudaFuncAttributes unused;
  return cudaFuncGetAttributes(&unused, fill);
}

}  // namespace

}  // namespace fastsam::FASTSAM_ISA

namespace fastsam::gpu {

using namespace fastsam::FASTSAM_ISA;

bool has_kernels(const Format& format) { return format_index(format) < kKnownFormats; }
const char* grad_norm(const Launch& launch) { return message(FASTSAM_ISA::grad_norm(launch)); }
const char* perturb(const Launch& launch) { return message(FASTSAM_ISA::perturb(launch)); }
const char* update(const Launch& launch) { return message(FASTSAM_ISA::update(launch)); }
const char* dot(const Dot& launch) { return message(FASTSAM_ISA::dot(launch)); }
const char* combine(const Combination& launch) { return message(FASTSAM_ISA::combine(launch)); }
const char* upload_rows(const Launch& launch) { return message(FASTSAM_ISA::upload_rows(launch)); }
const char* probe(int device) { return message(FASTSAM_ISA::probe(device)); }

}  // namespace fastsam::gpu
