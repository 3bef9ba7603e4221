// One operation over one bucket on a GPU: what ops.cpp hands over. No CUDA headers here.
#pragma once

#include "../tables.h"

namespace fastsam::gpu {

// What follows the segments in their table, on the device: the kernels' own memory.
struct Control {
  uint32_t norm_ticket, update_ticket, dot_ticket;
  uint32_t unused[13];
};
static_assert(sizeof(Control) == sizeof(Segment), "one row of the table");
// Then, in rows of the segments' table: a Row for each group, which captured graphs read; the same again, for launches
// with more groups than they can be told by value; the gradients' addresses, for those with thousands of tensors.
inline int64_t table_size(int64_t n_segments, int64_t n_groups) {
  return n_segments + 1 + (2 * n_groups * kRowColumns + 7) / 8 + (n_segments + 7) / 8;
}

struct Launch {
  Format format;
  int device;
  void* stream;             // cudaStream_t
  const Segment* segments;  // [table_size()] on the device
  const Chunk* chunks;      // [n_chunks] on the device
  const int64_t* grads;     // [n_segments] addresses, 0 = no gradient
  const Row* rows;          // [n_groups]
  int64_t n_segments, n_chunks, n_groups;

  // On the device; see csrc/cpu/launch.h.
  double* partials = nullptr;
  double* sums = nullptr;
  int64_t n_sums = 0, slot = 0;
  double q = 2, max_norm = 0;
  const bool* perturbed = nullptr;  // on the host
  Rule rule = kNoRule;
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
  int64_t* overflows = nullptr;
  int64_t* rounding = nullptr;
  double* clip = nullptr;  // grad_norm writes it, update_ reads it
};

struct Dot {
  int device;
  void* stream;
  const Segment* segments;  // [table_size()] on the device
  const Chunk* chunks;      // [n_chunks] on the device
  int64_t n_segments, n_chunks;
  Operand a, b;
  double* partials;  // [kProducts, n_chunks] on the device
  double* out;       // [kProducts] on the device
};

struct Combination {
  int device;
  void* stream;
  const Chunk* chunks;  // [n_chunks] on the device
  int64_t n_segments, n_chunks;
  Operand out;
  Term terms[kMostTerms];
};

bool has_kernels(const Format&);
// Each returns null, or what went wrong.
const char* grad_norm(const Launch&);
const char* perturb(const Launch&);
const char* update(const Launch&);
const char* dot(const Dot&);
const char* combine(const Combination&);
const char* upload_rows(const Launch&);  // to the device's table, for captured graphs
const char* probe(int device);           // whether its driver takes a kernel of this library

}  // namespace fastsam::gpu
