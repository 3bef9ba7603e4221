// The operations on the CPU: one parallel region each over the chunk table, and what is done once a launch.
#include "launch.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "../math/norm.h"
#include "../math/rules.h"

namespace fastsam::cpu {

namespace {

constexpr int64_t kGrain = 32768 / kUnit;  // below this many elements a second thread costs more than it saves

template <class L>
int64_t units(const L& launch) {
  if (launch.n_chunks == 0) return 0;
  const Chunk& last = launch.chunks[launch.n_chunks - 1];
  return last.position + (last.length + kUnit - 1) / kUnit;
}

// Each thread takes a contiguous range of chunks with about the same number of elements.
template <class L>
void run_loop(const L& launch, LoopOver<L> loop) {
  const auto first_at = [&](int64_t position) {
    const auto before = [](const Chunk& chunk, int64_t value) { return chunk.position < value; };
    return std::lower_bound(launch.chunks, launch.chunks + launch.n_chunks, position, before) - launch.chunks;
  };
  torch::stable::parallel_for(0, units(launch), kGrain,
                              [&](int64_t begin, int64_t end) { loop(launch, first_at(begin), first_at(end)); });
}

void run_loop(const Launch& launch, const Loop (&loops)[2]) {
  run_loop(launch, loops[launch.format.source == kFloat64]);
}

// Partial sums of chunks: lane i mod 1024 takes them in order.
double slot_sum(const double* partials, int64_t n) {
  double lanes[kSlots];
  const int width = baseline::tree_width(n, kSlots);
  std::fill(lanes, lanes + width, 0.0);
  for (int64_t i = 0; i < n; i++) lanes[i % kSlots] += partials[i];
  for (int half = width / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
  }
  return lanes[0];
}

// What perturb_ reads and writes of an element.
int perturb_bytes(const Format& format) {
  const int backup = format.masters() ? 0 : kSizes[format.weight];
  return kSizes[format.source] + kSizes[format.grad] + backup + kSizes[format.weight];
}

// The same for update_, in the first group: the others' states are of about the same number.
int update_bytes(const Launch& launch) {
  const Format& format = launch.format;
  const int weights = kSizes[format.source] + kSizes[format.weight];
  if (launch.rule == kNoRule) return weights;
  const Row& row = launch.rows[launch.segments[launch.chunks[0].segment].group];
  const int states = baseline::count_states(baseline::states_of(launch.rule, row));
  const int masters = format.masters() ? kSizes[format.source] : 0;
  return weights + masters + kSizes[format.grad] + 2 * states * kSizes[format.state];
}

// Streaming stores win a few percent beyond the last-level cache and cost a factor of 3 to 4 inside it.
template <class L>
bool beyond_cache(const L& launch, int bytes) {
  return units(launch) * kUnit * bytes > cache_size();
}

}  // namespace

double grad_norm(const Launch& launch) {
  run_loop(launch, kernels().grad_norm);
  if (launch.q != 2) {
    return baseline::q_norm(launch.q, [&](const auto& f) {
      for (int64_t i = 0; i < launch.n_chunks; i++) f(launch.partials[i]);
    });
  }
  return slot_sum(launch.partials, launch.n_chunks);
}

void perturb(Launch& launch) {
  for (int64_t i = 0; i < launch.n_segments; i++) {
    if (launch.grads[i]) launch.perturbed[i] = true;
  }
  if (launch.overflows && !baseline::is_finite(launch.total)) launch.overflows[0]++;
  launch.stream = beyond_cache(launch, perturb_bytes(launch.format));
  run_loop(launch, kernels().perturb);
}

void update(Launch& launch) {
  launch.stream = launch.n_chunks > 0 && beyond_cache(launch, update_bytes(launch));
  run_loop(launch, kernels().update);
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
  if (launch.rounding && launch.rule != kNoRule) ++*launch.rounding;
}

void dot(const Dot& launch, double* out) {
  run_loop(launch, kernels().dot[launch.a.dtype == kFloat64]);
  for (int i = 0; i < kProducts; i++) out[i] = slot_sum(launch.partials + i * launch.n_chunks, launch.n_chunks);
}

void combine(Combination& launch) {
  int bytes = kSizes[launch.out.dtype];
  for (Term& term : launch.terms) {
    if (term.address) term.coefficient = *term.address;
    if (term.operand.addresses) bytes += kSizes[term.operand.dtype];
  }
  launch.stream = beyond_cache(launch, bytes);
  run_loop(launch, kernels().combine[launch.out.dtype == kFloat64]);
}

}  // namespace fastsam::cpu
