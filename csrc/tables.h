// What the tables that Python fills hold, and what all backends agree on. Plain data, no functions: included
// everywhere.
#pragma once

#include <cstdint>

namespace fastsam {

constexpr int kChunk = 8192;  // elements of one segment that make one partial sum
constexpr int kLanes = 2048;  // a chunk is 4 rows of 2048 lanes
constexpr int kSlots = 1024;  // lanes over which the partial sums of chunks are added
constexpr int kUnit = 64;     // chunk starts and positions are counted in units of 64 elements
constexpr int kMaxStates = 3;
constexpr int kProducts = 3;        // <a,a>, <a,b>, <b,b>
constexpr int kMostTerms = 3;       // of a linear combination
constexpr double kNormEps = 1e-12;  // added to the norm; the paper's code divides by the bare norm

constexpr double kClipEps = 1e-6;  // added to the norm that gradients are clipped by, as torch does

enum Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kDtypes };
constexpr int kSizes[kDtypes] = {4, 8, 2, 2};  // in bytes
enum Rule { kNoRule = -1, kSgd, kAdam, kRmsprop, kAdagrad, kNadam, kRadam, kLion, kRules };
enum Flag {
  kAdaptive = 1,
  kNesterov = 2,
  kMaximize = 4,
  kDecoupled = 8,
  kAmsgrad = 16,
  kLrFloat64 = 32,
  kCentered = 64,
  kDecays = 128
};

// What a bucket's tensors are stored as; fastsam/ops/formats.py. Python hands it over as one number.
struct Format {
  Dtype weight, grad;
  Dtype source;     // what the formulas take the weights from: the masters' dtype, or the weights' own
  Dtype state;      // of the base optimizer's states
  bool stochastic;  // what is narrower than the arithmetic is rounded stochastically: states, weights without masters
  constexpr bool masters() const { return source != weight; }
};

// Streams of random numbers: of the weights in perturb_, of the weights and the states in update_.
enum Stream { kClimbStream, kStepStream, kStateStream };

struct Row {  // one parameter group, 11 float64
  double lr, weight_decay;
  double beta1, beta2;  // SGD: momentum, dampening; RMSprop: momentum, alpha
  double eps, rho, eta;
  double flags;       // bits of Flag, as an exact float
  double extra;       // Adagrad: lr_decay; NAdam: 0.96^momentum_decay
  double lr_address;  // not 0: lr is read from the device, float32 or with kLrFloat64 float64; exact, as addresses are
                      // below 2^53
  double seed;        // of stochastic rounding, exact
};

struct Segment {  // one parameter, 8 int64; the addresses are absolute, 0 where absent
  int64_t weight, backup;
  int64_t state[kMaxStates];
  int64_t master;
  int64_t progress;
  int32_t group;
  int32_t index;  // among all parameters of the optimizer
};

struct Progress {    // of one segment, 2 float32
  float step;        // how many updates so far
  float mu_product;  // NAdam: the product of all momenta so far
};

struct alignas(16) Chunk {  // up to kChunk elements of one segment, 4 int32; read by one load
  int32_t segment;
  int32_t start;     // in units, within the segment
  int32_t length;    // in elements
  int32_t position;  // in units, within the bucket
};

// Gradients or a direction: a tensor of one dtype for each segment, or none.
struct Operand {
  const int64_t* addresses;  // [n_segments] on the host, 0 = none; null: there is no such operand
  Dtype dtype;
};

struct Term {  // of a linear combination
  Operand operand;
  double coefficient;
  const double* address;  // of the coefficient, where it is read on the bucket's device; or null
};

constexpr int kRowColumns = sizeof(Row) / 8;

static_assert(sizeof(Row) == 88 && sizeof(Segment) == 64 && sizeof(Chunk) == 16 && sizeof(Progress) == 8,
              "the tables' row sizes");

}  // namespace fastsam
