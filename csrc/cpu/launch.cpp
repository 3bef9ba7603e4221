// The operations on the CPU: one parallel region each over the chunk table, and what is done once a launch.
#include "launch.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "../math.h"

namespace fastsam::cpu {

namespace {

constexpr int64_t kGrain = 32768 / kUnit;  // below this many elements a second thread costs more than it saves

int64_t units(const Launch& launch) {
  if (launch.n_chunks == 0) return 0;
  const Chunk& last = launch.chunks[launch.n_chunks - 1];
  return last.position + (last.length + kUnit - 1) / kUnit;
}

// Each thread takes a contiguous range of chunks with about the same number of elements.
void run(const Launch& launch, Loop loop) {
  const auto first_at = [&](int64_t position) {
    const auto before = [](const Chunk& chunk, int64_t value) { return chunk.position < value; };
    return std::lower_bound(launch.chunks, launch.chunks + launch.n_chunks, position, before) - launch.chunks;
  };
  torch::stable::parallel_for(0, units(launch), kGrain,
                              [&](int64_t begin, int64_t end) { loop(launch, first_at(begin), first_at(end)); });
}

// What update_ reads and writes per element, in the first group: the others' states are of about the same number.
int elements(const Launch& launch) {
  if (launch.rule == kNoRule) return 2;
  const Row& row = launch.rows[launch.segments[launch.chunks[0].segment].group];
  return 3 + 2 * baseline::count_states(baseline::states_of(launch.rule, row));
}

// Streaming stores win a few percent beyond the last-level cache and cost a factor of 3 to 4 inside it.
bool beyond_cache(const Launch& launch, int elements) {
  constexpr int kSizes[kDtypes] = {4, 8, 2, 2};
  return units(launch) * kUnit * elements * kSizes[launch.dtype] > cache_size();
}

}  // namespace

double grad_norm(const Launch& launch) {
  run(launch, kernels().grad_norm[launch.pair]);
  double lanes[kSlots];
  const int width = baseline::tree_width(launch.n_chunks, kSlots);
  std::fill(lanes, lanes + width, 0.0);
  for (int64_t i = 0; i < launch.n_chunks; i++) lanes[i % kSlots] += launch.partials[i];
  for (int half = width / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
  }
  return lanes[0];
}

void perturb(Launch& launch) {
  for (int64_t i = 0; i < launch.n_segments; i++) {
    if (launch.grads[i]) launch.perturbed[i] = true;
  }
  if (launch.overflows && !baseline::is_finite(launch.sum)) launch.overflows[0]++;
  launch.stream = beyond_cache(launch, 4);
  run(launch, kernels().perturb[launch.pair]);
}

void update(Launch& launch) {
  launch.stream = launch.n_chunks > 0 && beyond_cache(launch, elements(launch));
  run(launch, kernels().update[launch.pair]);
  const bool found_inf = launch.found_inf && *launch.found_inf != 0;
  if (launch.overflows && found_inf) launch.overflows[1]++;
  // After all chunks, which read the counts; over segments, because an empty parameter has no chunk and counts too.
  for (int64_t i = 0; i < launch.n_segments; i++) {
    const Segment& segment = launch.segments[i];
    const bool has_grad = launch.rule != kNoRule && launch.grads[i];
    if (baseline::decide(launch.perturbed[i], has_grad, found_inf).count) {
      baseline::advance(launch.rule, launch.rows[segment.group], *reinterpret_cast<Progress*>(segment.progress));
    }
    launch.perturbed[i] = false;
  }
}

}  // namespace fastsam::cpu
