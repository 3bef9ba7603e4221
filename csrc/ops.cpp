// torch.ops.fastsam: schemas, argument checks, and the kernels for CPU tables.
//
// The operations write through addresses in tables, which no schema can show: they are private to fastsam.ops.native
// and never traced.
#include "bound.h"
#include "checks.h"
#include "cpu/launch.h"
#include "math/norm.h"

namespace fastsam {

namespace {

cpu::Launch tables(const char* operation, int64_t format, const Tensor& segments, const Tensor& chunks,
                   const Tensor& grads, const Tensor& rows) {
  cpu::Launch launch{};
  launch.format = checked_format(operation, format);
  check_served(operation, launch.format);
  launch.segments =
      static_cast<const Segment*>(checked(operation, "segments", segments, Place::kCpu, ScalarType::Long, -1, 8));
  launch.n_segments = segments.size(0);
  launch.chunks = static_cast<const Chunk*>(checked(operation, "chunks", chunks, Place::kCpu, ScalarType::Int, -1, 4));
  launch.n_chunks = chunks.size(0);
  launch.grads = static_cast<const int64_t*>(
      checked(operation, "grads", grads, Place::kCpu, ScalarType::Long, launch.n_segments, 0));
  launch.rows =
      static_cast<const Row*>(checked(operation, "rows", rows, Place::kCpu, ScalarType::Double, -1, kRowColumns));
  return launch;
}

// Of the random numbers; null without stochastic rounding.
int64_t* step_of(const char* operation, const Format& format, const std::optional<Tensor>& rounding) {
  STD_TORCH_CHECK(rounding || !format.stochastic, operation, ": stochastic rounding needs `rounding`, got None");
  return scalar<int64_t>(operation, "rounding", rounding, Place::kCpu, ScalarType::Long);
}

// Of all buckets: the squared norm, for q != 2 the norm.
double total_of(const double* sums, int64_t n, double q) {
  const auto each_slot = [&](const auto& f) {
    for (int64_t i = 0; i < n; i++) f(sums[i]);
  };
  if (q != 2) return baseline::q_norm(q, each_slot);
  double total = 0;
  each_slot([&](double sum) { total += sum; });
  return total;
}

void grad_norm(int64_t format, Tensor segments, Tensor chunks, Tensor grads, Tensor rows, Tensor partials, Tensor out,
               int64_t slot, double q, double max_norm, std::optional<Tensor> clip, std::optional<Tensor> grad_scale) {
  cpu::Launch launch = tables("grad_norm", format, segments, chunks, grads, rows);
  launch.partials = static_cast<double*>(
      checked("grad_norm", "partials", partials, Place::kCpu, ScalarType::Double, launch.n_chunks, 0));
  double* const sums = static_cast<double*>(checked("grad_norm", "out", out, Place::kCpu, ScalarType::Double, -1, 0));
  STD_TORCH_CHECK(0 <= slot && slot < out.size(0), "grad_norm: slot must be in [0, ", out.size(0), "), got ", slot);
  double* const factor = scalar<double>("grad_norm", "clip", clip, Place::kCpu, ScalarType::Double);
  const float* const scale = scalar<float>("grad_norm", "grad_scale", grad_scale, Place::kCpu, ScalarType::Float);
  launch.plain = factor;
  launch.q = q;
  sums[slot] = cpu::grad_norm(launch);
  if (!factor) return;
  double sum = 0;
  for (int64_t i = 0; i < out.size(0); i++) sum += sums[i];
  *factor = baseline::clip_factor(max_norm, sum, scale);
}

void perturb_(int64_t format, Tensor segments, Tensor chunks, Tensor grads, Tensor rows, Tensor perturbed, Tensor sums,
              double q, std::optional<Tensor> overflows, std::optional<Tensor> rounding) {
  cpu::Launch launch = tables("perturb_", format, segments, chunks, grads, rows);
  launch.perturbed = static_cast<bool*>(
      checked("perturb_", "perturbed", perturbed, Place::kCpu, ScalarType::Bool, launch.n_segments, 0));
  const double* const slots =
      static_cast<const double*>(checked("perturb_", "sums", sums, Place::kCpu, ScalarType::Double, -1, 0));
  launch.total = total_of(slots, sums.size(0), q);
  launch.overflows = counters("perturb_", overflows, Place::kCpu);
  launch.rounding = step_of("perturb_", launch.format, rounding);
  launch.q = q;
  cpu::perturb(launch);
}

void update_(int64_t format, int64_t rule, Tensor segments, Tensor chunks, Tensor grads, Tensor rows, Tensor perturbed,
             std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> clip,
             std::optional<Tensor> overflows, std::optional<Tensor> rounding) {
  cpu::Launch launch = tables("update_", format, segments, chunks, grads, rows);
  launch.rule = checked_rule("update_", rule);
  launch.perturbed = static_cast<bool*>(
      checked("update_", "perturbed", perturbed, Place::kCpu, ScalarType::Bool, launch.n_segments, 0));
  launch.grad_scale = scalar<float>("update_", "grad_scale", grad_scale, Place::kCpu, ScalarType::Float);
  launch.found_inf = scalar<float>("update_", "found_inf", found_inf, Place::kCpu, ScalarType::Float);
  launch.clip = scalar<double>("update_", "clip", clip, Place::kCpu, ScalarType::Double);
  launch.overflows = counters("update_", overflows, Place::kCpu);
  launch.rounding = step_of("update_", launch.format, rounding);
  cpu::update(launch);
}

void dot(Tensor segments, Tensor chunks, Tensor a, int64_t a_dtype, std::optional<Tensor> b, int64_t b_dtype,
         Tensor partials, Tensor out, int64_t slot) {
  cpu::Dot launch{};
  checked("dot", "segments", segments, Place::kCpu, ScalarType::Long, -1, 8);
  launch.chunks = static_cast<const Chunk*>(checked("dot", "chunks", chunks, Place::kCpu, ScalarType::Int, -1, 4));
  launch.n_chunks = chunks.size(0);
  launch.a = checked_operand("dot", "a", a, a_dtype, segments.size(0), a_dtype);
  launch.b = checked_operand("dot", "b", b, b_dtype, segments.size(0), a_dtype);
  launch.partials = checked_product_partials("dot", partials, launch.n_chunks, Place::kCpu);
  cpu::dot(launch, checked_products("dot", out, slot, Place::kCpu));
}

void combine_(Tensor segments, Tensor chunks, Tensor out, int64_t out_dtype, Tensor a, int64_t a_dtype,
              std::optional<Tensor> b, int64_t b_dtype, std::optional<Tensor> c, int64_t c_dtype, double a_value,
              double b_value, double c_value, std::optional<Tensor> a_coefficient, std::optional<Tensor> b_coefficient,
              std::optional<Tensor> c_coefficient) {
  cpu::Combination launch{};
  checked("combine_", "segments", segments, Place::kCpu, ScalarType::Long, -1, 8);
  launch.chunks = static_cast<const Chunk*>(checked("combine_", "chunks", chunks, Place::kCpu, ScalarType::Int, -1, 4));
  launch.n_chunks = chunks.size(0);
  launch.out = checked_operand("combine_", "out", out, out_dtype, segments.size(0), out_dtype);
  const auto term = [&](const char* name, const std::optional<Tensor>& addresses, int64_t dtype, double value,
                        const char* coefficient_name, const std::optional<Tensor>& coefficient) {
    return Term{checked_operand("combine_", name, addresses, dtype, segments.size(0), out_dtype), value,
                scalar<double>("combine_", coefficient_name, coefficient, Place::kCpu, ScalarType::Double)};
  };
  launch.terms[0] = term("a", a, a_dtype, a_value, "a_coefficient", a_coefficient);
  launch.terms[1] = term("b", b, b_dtype, b_value, "b_coefficient", b_coefficient);
  launch.terms[2] = term("c", c, c_dtype, c_value, "c_coefficient", c_coefficient);
  cpu::combine(launch);
}

struct Operands {
  cpu::Launch launch;
  double* sums;
  int64_t n_sums, slot;
};

const char* run_grad_norm(Bound& bound) {
  Operands& own = bound.as<Operands>();
  own.sums[own.slot] = cpu::grad_norm(own.launch);
  return nullptr;
}

const char* run_perturb(Bound& bound) {
  Operands& own = bound.as<Operands>();
  own.launch.total = total_of(own.sums, own.n_sums, own.launch.q);
  cpu::perturb(own.launch);
  return nullptr;
}

const char* run_update(Bound& bound) {
  cpu::update(bound.as<Operands>().launch);
  return nullptr;
}

// What the operations of a step are told, without loss scale, overflow flag and clipping.
void bind_(int64_t format, int64_t rule, Tensor segments, Tensor chunks, Tensor grads, Tensor rows, Tensor partials,
           Tensor perturbed, Tensor sums, int64_t slot, double q, std::optional<Tensor> overflows,
           std::optional<Tensor> rounding, Tensor bound) {
  Operands own{tables("bind_", format, segments, chunks, grads, rows), nullptr, sums.size(0), slot};
  own.launch.rule = checked_rule("bind_", rule);
  own.launch.partials = static_cast<double*>(
      checked("bind_", "partials", partials, Place::kCpu, ScalarType::Double, own.launch.n_chunks, 0));
  own.launch.perturbed = static_cast<bool*>(
      checked("bind_", "perturbed", perturbed, Place::kCpu, ScalarType::Bool, own.launch.n_segments, 0));
  own.sums = checked_slots("bind_", sums, slot, Place::kCpu);
  own.launch.q = q;
  own.launch.overflows = counters("bind_", overflows, Place::kCpu);
  own.launch.rounding = step_of("bind_", own.launch.format, rounding);
  Bound& result = checked_bound("bind_", bound);
  result.grad_norm = run_grad_norm;
  result.perturb = run_perturb;
  result.update = run_update;
  result.as<Operands>() = own;
}

}  // namespace

STABLE_TORCH_LIBRARY(fastsam, m) {
  m.def(
      "grad_norm(int format, Tensor segments, Tensor chunks, Tensor grads, Tensor rows, "
      "Tensor(a!) partials, Tensor(b!) out, int slot, float q, float max_norm, Tensor(c!)? clip, Tensor? grad_scale) "
      "-> ()");
  m.def(
      "perturb_(int format, Tensor segments, Tensor chunks, Tensor grads, Tensor rows, "
      "Tensor(a!) perturbed, Tensor sums, float q, Tensor(b!)? overflows, Tensor? rounding) -> ()");
  m.def(
      "update_(int format, int rule, Tensor segments, Tensor chunks, Tensor grads, Tensor rows, "
      "Tensor(a!) perturbed, Tensor? grad_scale, Tensor? found_inf, Tensor? clip, "
      "Tensor(b!)? overflows, Tensor(c!)? rounding) -> ()");
  m.def(
      "dot(Tensor segments, Tensor chunks, Tensor a, int a_dtype, Tensor? b, int b_dtype, "
      "Tensor(a!) partials, Tensor(b!) out, int slot) -> ()");
  m.def(
      "combine_(Tensor segments, Tensor chunks, Tensor out, int out_dtype, Tensor a, int a_dtype, Tensor? b, int "
      "b_dtype, "
      "Tensor? c, int c_dtype, float a_value, float b_value, float c_value, "
      "Tensor? a_coefficient, Tensor? b_coefficient, Tensor? c_coefficient) -> ()");
  m.def(
      "bind_(int format, int rule, Tensor segments, Tensor chunks, Tensor grads, Tensor rows, Tensor partials, "
      "Tensor perturbed, Tensor sums, int slot, float q, Tensor? overflows, Tensor? rounding, Tensor(a!) bound) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastsam, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("update_", TORCH_BOX(&update_));
  m.impl("dot", TORCH_BOX(&dot));
  m.impl("combine_", TORCH_BOX(&combine_));
  m.impl("bind_", TORCH_BOX(&bind_));
}

}  // namespace fastsam
