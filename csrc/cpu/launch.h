// One operation over one bucket on the CPU: what ops.cpp hands over, and the loops that each instruction set provides.
#pragma once

#include "../tables.h"

namespace fastsam::cpu {

struct Launch {
  Format format;
  const Segment* segments;  // [n_segments]
  const Chunk* chunks;      // [n_chunks]
  const int64_t* grads;     // [n_segments] addresses, 0 = no gradient
  const Row* rows;          // [n_groups]
  int64_t n_segments, n_chunks;

  double* partials = nullptr;  // grad_norm: [n_chunks]
  bool plain = false;          // grad_norm: T = 1 in all groups
  double q = 2;                // grad_norm and perturb_: the norm's exponent
  double total = 0;            // perturb_: the squared norm over all buckets, for q != 2 the norm
  bool* perturbed = nullptr;   // [n_segments] whether the backup holds the weights: perturb_ sets it, update_ clears it

  int64_t* overflows = nullptr;  // [2] or null: steps without a perturbation, steps without an update

  int64_t* rounding = nullptr;  // [1] or null: the step of the random numbers, which update_ with a rule advances

  Rule rule = kNoRule;                // update_, as all below
  const float* grad_scale = nullptr;  // [1] or null, as the two below
  const float* found_inf = nullptr;
  const double* clip = nullptr;

  bool stream = false;  // write around the caches
};

struct Dot {
  const Chunk* chunks;  // [n_chunks]
  int64_t n_chunks;
  Operand a, b;
  double* partials;  // [kProducts, n_chunks]
};

struct Combination {
  const Chunk* chunks;  // [n_chunks]
  int64_t n_chunks;
  Operand out;
  Term terms[kMostTerms];
  bool stream;  // write around the caches
};

// Work on the chunks [begin, end).
template <class L>
using LoopOver = void (*)(const L&, int64_t begin, int64_t end);
using Loop = LoopOver<Launch>;

struct Kernels {  // in float32, in float64
  const char* isa;
  Loop grad_norm[2], perturb[2], update[2];
  LoopOver<Dot> dot[2];
  LoopOver<Combination> combine[2];
};

// The loops of the instruction set in use, at first the best this processor has, and the size of its last-level cache
// in bytes.
const Kernels& kernels();
int64_t cache_size();

// The instruction sets that this processor has, slowest first, null at the end; choosing one by name (false: it has it
// not).
const char* const* isas();
bool use_isa(const char* name);

double grad_norm(const Launch&);  // returns the bucket's sum of squares, for q != 2 its norm
void perturb(Launch&);
void update(Launch&);
void dot(const Dot&, double* out);  // [kProducts]
void combine(Combination&);

}  // namespace fastsam::cpu
