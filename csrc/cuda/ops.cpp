// torch.ops.fastsam on CUDA: argument checks, device and stream. The schemas are in ../ops.cpp.
#include "../bound.h"
#include "../checks.h"

#include <algorithm>

#include <torch/csrc/stable/accelerator.h>

#include "../reader.h"
#include "launch.h"

namespace fastsam {

namespace {

using torch::stable::accelerator::DeviceGuard;

Format served_format(const char* operation, int64_t code) {
  const Format format = checked_format(operation, code);
  STD_TORCH_CHECK(gpu::has_kernels(format), operation, ": there is no kernel for weights of dtype ",
                  static_cast<int>(format.weight), " and gradients of dtype ", static_cast<int>(format.grad),
                  " in format ", code);
  return format;
}

gpu::Launch tables(const char* operation, int64_t format, const Tensor& segments, const Tensor& chunks,
                   const Tensor& grads, const Tensor& rows) {
  gpu::Launch launch{};
  launch.format = served_format(operation, format);
  launch.grads = static_cast<const int64_t*>(checked(operation, "grads", grads, Place::kCpu, ScalarType::Long, -1, 0));
  launch.n_segments = grads.size(0);
  launch.rows =
      static_cast<const Row*>(checked(operation, "rows", rows, Place::kCpu, ScalarType::Double, -1, kRowColumns));
  launch.n_groups = rows.size(0);
  const int64_t size = gpu::table_size(launch.n_segments, launch.n_groups);
  launch.segments =
      static_cast<const Segment*>(checked(operation, "segments", segments, Place::kCuda, ScalarType::Long, size, 8));
  launch.chunks = static_cast<const Chunk*>(checked(operation, "chunks", chunks, Place::kCuda, ScalarType::Int, -1, 4));
  launch.n_chunks = chunks.size(0);
  STD_TORCH_CHECK(launch.n_chunks < 1 << 28, operation, ": at most 2^28 chunks, got ", launch.n_chunks);
  launch.device = segments.get_device_index();
  STD_TORCH_CHECK(work_stream(launch.device, &launch.stream), operation,
                  ": torch gives no current stream for cuda:", launch.device);
  return launch;
}

void expect_device(const char* operation, const char* name, const Tensor& tensor, int device) {
  STD_TORCH_CHECK(tensor.get_device_index() == device, operation, ": ", name, " must be on cuda:", device,
                  ", got cuda:", tensor.get_device_index());
}

// The step of the random numbers, or null where no format needs one.
int64_t* random_step(const char* operation, const gpu::Launch& launch, const std::optional<Tensor>& rounding) {
  STD_TORCH_CHECK(rounding || !launch.format.stochastic, operation, ": stochastic rounding needs `rounding`");
  if (rounding) expect_device(operation, "rounding", *rounding, launch.device);
  return scalar<int64_t>(operation, "rounding", rounding, Place::kCuda, ScalarType::Long);
}

void expect_success(const char* operation, const char* error, int device) {
  STD_TORCH_CHECK(!error, operation, " on cuda:", device, ": ", error,
                  " (this library's kernels are for compute capability 7.5 ",
                  "and later; errors of earlier work may show here)");
}

// A backup is valid only where its kernel was launched: one that was refused has written nothing.
const char* perturb_and_mark(const gpu::Launch& launch, bool* marks) {
  const char* const error = gpu::perturb(launch);
  for (int64_t i = 0; !error && i < launch.n_segments; i++) {
    if (launch.grads[i]) marks[i] = true;
  }
  return error;
}

const char* update_and_clear(const gpu::Launch& launch, bool* marks) {
  const char* const error = gpu::update(launch);
  if (!error) std::fill(marks, marks + launch.n_segments, false);
  return error;
}

void grad_norm(int64_t format, Tensor segments, Tensor chunks, Tensor grads, Tensor rows, Tensor partials, Tensor out,
               int64_t slot, double q, double max_norm, std::optional<Tensor> clip, std::optional<Tensor> grad_scale) {
  gpu::Launch launch = tables("grad_norm", format, segments, chunks, grads, rows);
  launch.partials = static_cast<double*>(
      checked("grad_norm", "partials", partials, Place::kCuda, ScalarType::Double, launch.n_chunks, 0));
  double* const sums = static_cast<double*>(checked("grad_norm", "out", out, Place::kCuda, ScalarType::Double, -1, 0));
  STD_TORCH_CHECK(0 <= slot && slot < out.size(0), "grad_norm: slot must be in [0, ", out.size(0), "), got ", slot);
  expect_device("grad_norm", "out", out, launch.device);
  launch.sums = sums;
  launch.n_sums = out.size(0);
  launch.slot = slot;
  launch.max_norm = max_norm;
  launch.q = q;
  launch.clip = scalar<double>("grad_norm", "clip", clip, Place::kCuda, ScalarType::Double);
  launch.grad_scale = scalar<float>("grad_norm", "grad_scale", grad_scale, Place::kCuda, ScalarType::Float);
  if (clip) expect_device("grad_norm", "clip", *clip, launch.device);
  if (grad_scale) expect_device("grad_norm", "grad_scale", *grad_scale, launch.device);
  const DeviceGuard guard(launch.device);
  expect_success("grad_norm", gpu::grad_norm(launch), launch.device);
}

void perturb_(int64_t format, Tensor segments, Tensor chunks, Tensor grads, Tensor rows, Tensor perturbed, Tensor sums,
              double q, std::optional<Tensor> overflows, std::optional<Tensor> rounding) {
  gpu::Launch launch = tables("perturb_", format, segments, chunks, grads, rows);
  bool* const marks = static_cast<bool*>(
      checked("perturb_", "perturbed", perturbed, Place::kCpu, ScalarType::Bool, launch.n_segments, 0));
  launch.sums = static_cast<double*>(checked("perturb_", "sums", sums, Place::kCuda, ScalarType::Double, -1, 0));
  launch.n_sums = sums.size(0);
  launch.overflows = counters("perturb_", overflows, Place::kCuda);
  launch.rounding = random_step("perturb_", launch, rounding);
  launch.q = q;
  if (overflows) expect_device("perturb_", "overflows", *overflows, launch.device);
  expect_device("perturb_", "sums", sums, launch.device);
  const DeviceGuard guard(launch.device);
  expect_success("perturb_", perturb_and_mark(launch, marks), launch.device);
}

void update_(int64_t format, int64_t rule, Tensor segments, Tensor chunks, Tensor grads, Tensor rows, Tensor perturbed,
             std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> clip,
             std::optional<Tensor> overflows, std::optional<Tensor> rounding) {
  gpu::Launch launch = tables("update_", format, segments, chunks, grads, rows);
  launch.rule = checked_rule("update_", rule);
  bool* const marks = static_cast<bool*>(
      checked("update_", "perturbed", perturbed, Place::kCpu, ScalarType::Bool, launch.n_segments, 0));
  launch.perturbed = marks;
  launch.grad_scale = scalar<float>("update_", "grad_scale", grad_scale, Place::kCuda, ScalarType::Float);
  launch.found_inf = scalar<float>("update_", "found_inf", found_inf, Place::kCuda, ScalarType::Float);
  launch.clip = scalar<double>("update_", "clip", clip, Place::kCuda, ScalarType::Double);
  if (grad_scale) expect_device("update_", "grad_scale", *grad_scale, launch.device);
  launch.overflows = counters("update_", overflows, Place::kCuda);
  launch.rounding = random_step("update_", launch, rounding);
  if (overflows) expect_device("update_", "overflows", *overflows, launch.device);
  if (found_inf) expect_device("update_", "found_inf", *found_inf, launch.device);
  if (clip) expect_device("update_", "clip", *clip, launch.device);
  for (int64_t i = 0; rule == kNoRule && i < launch.n_segments; i++) {
    STD_TORCH_CHECK(launch.grads[i] == 0, "update_: without a rule there must be no gradients, got one for segment ",
                    i);
  }
  const DeviceGuard guard(launch.device);
  expect_success("update_", update_and_clear(launch, marks), launch.device);
}

// What both operations over operands have: segments, chunks, and where they lie. There are n segments, and the kernels'
// own rows behind them.
template <class L>
L operands_launch(const char* operation, const Tensor& segments, const Tensor& chunks, int64_t n) {
  L launch{};
  checked(operation, "segments", segments, Place::kCuda, ScalarType::Long, -1, 8);
  STD_TORCH_CHECK(n < segments.size(0), operation, ": there are addresses of ", n, " segments, but of all ",
                  segments.size(0), " rows of segments some are the kernels' own");
  launch.n_segments = n;
  launch.chunks = static_cast<const Chunk*>(checked(operation, "chunks", chunks, Place::kCuda, ScalarType::Int, -1, 4));
  launch.n_chunks = chunks.size(0);
  STD_TORCH_CHECK(launch.n_chunks < 1 << 28, operation, ": at most 2^28 chunks, got ", launch.n_chunks);
  launch.device = segments.get_device_index();
  expect_device(operation, "chunks", chunks, launch.device);
  STD_TORCH_CHECK(work_stream(launch.device, &launch.stream), operation,
                  ": torch gives no current stream for cuda:", launch.device);
  return launch;
}

void dot(Tensor segments, Tensor chunks, Tensor a, int64_t a_dtype, std::optional<Tensor> b, int64_t b_dtype,
         Tensor partials, Tensor out, int64_t slot) {
  gpu::Dot launch = operands_launch<gpu::Dot>("dot", segments, chunks, a.numel());
  launch.segments = static_cast<const Segment*>(segments.data_ptr());
  launch.a = checked_operand("dot", "a", a, a_dtype, launch.n_segments, a_dtype);
  launch.b = checked_operand("dot", "b", b, b_dtype, launch.n_segments, a_dtype);
  launch.partials = checked_product_partials("dot", partials, launch.n_chunks, Place::kCuda);
  launch.out = checked_products("dot", out, slot, Place::kCuda);
  expect_device("dot", "partials", partials, launch.device);
  expect_device("dot", "out", out, launch.device);
  const DeviceGuard guard(launch.device);
  expect_success("dot", gpu::dot(launch), launch.device);
}

void combine_(Tensor segments, Tensor chunks, Tensor out, int64_t out_dtype, Tensor a, int64_t a_dtype,
              std::optional<Tensor> b, int64_t b_dtype, std::optional<Tensor> c, int64_t c_dtype, double a_value,
              double b_value, double c_value, std::optional<Tensor> a_coefficient, std::optional<Tensor> b_coefficient,
              std::optional<Tensor> c_coefficient) {
  gpu::Combination launch = operands_launch<gpu::Combination>("combine_", segments, chunks, out.numel());
  launch.out = checked_operand("combine_", "out", out, out_dtype, launch.n_segments, out_dtype);
  const auto term = [&](const char* name, const std::optional<Tensor>& addresses, int64_t dtype, double value,
                        const char* coefficient_name, const std::optional<Tensor>& coefficient) {
    const double* const address =
        scalar<double>("combine_", coefficient_name, coefficient, Place::kCuda, ScalarType::Double);
    if (coefficient) expect_device("combine_", coefficient_name, *coefficient, launch.device);
    return Term{checked_operand("combine_", name, addresses, dtype, launch.n_segments, out_dtype), value, address};
  };
  launch.terms[0] = term("a", a, a_dtype, a_value, "a_coefficient", a_coefficient);
  launch.terms[1] = term("b", b, b_dtype, b_value, "b_coefficient", b_coefficient);
  launch.terms[2] = term("c", c, c_dtype, c_value, "c_coefficient", c_coefficient);
  const DeviceGuard guard(launch.device);
  expect_success("combine_", gpu::combine(launch), launch.device);
}

struct Operands {
  gpu::Launch launch;
  bool* marks;
};

template <class F>
const char* run_on_stream(Bound& bound, const F& operation) {
  Operands& own = bound.as<Operands>();
  if (!work_stream(own.launch.device, &own.launch.stream)) return "torch gives no current stream";
  const DeviceGuard guard(own.launch.device);
  return operation(own);
}

const char* run_grad_norm(Bound& bound) {
  return run_on_stream(bound, [](Operands& own) { return gpu::grad_norm(own.launch); });
}

const char* run_perturb(Bound& bound) {
  return run_on_stream(bound, [](Operands& own) { return perturb_and_mark(own.launch, own.marks); });
}

const char* run_update(Bound& bound) {
  return run_on_stream(bound, [](Operands& own) { return update_and_clear(own.launch, own.marks); });
}

// What the operations of a step are told, without loss scale, overflow flag and clipping.
void bind_(int64_t format, int64_t rule, Tensor segments, Tensor chunks, Tensor grads, Tensor rows, Tensor partials,
           Tensor perturbed, Tensor sums, int64_t slot, double q, std::optional<Tensor> overflows,
           std::optional<Tensor> rounding, Tensor bound) {
  Operands own{tables("bind_", format, segments, chunks, grads, rows), nullptr};
  gpu::Launch& launch = own.launch;
  launch.rule = checked_rule("bind_", rule);
  launch.partials = static_cast<double*>(
      checked("bind_", "partials", partials, Place::kCuda, ScalarType::Double, launch.n_chunks, 0));
  own.marks = static_cast<bool*>(
      checked("bind_", "perturbed", perturbed, Place::kCpu, ScalarType::Bool, launch.n_segments, 0));
  launch.perturbed = own.marks;
  launch.sums = checked_slots("bind_", sums, slot, Place::kCuda);
  expect_device("bind_", "sums", sums, launch.device);
  launch.n_sums = sums.size(0);
  launch.slot = slot;
  launch.q = q;
  launch.overflows = counters("bind_", overflows, Place::kCuda);
  if (overflows) expect_device("bind_", "overflows", *overflows, launch.device);
  launch.rounding = random_step("bind_", launch, rounding);
  Bound& result = checked_bound("bind_", bound);
  result.grad_norm = run_grad_norm;
  result.perturb = run_perturb;
  result.update = run_update;
  result.as<Operands>() = own;
}

// Captured graphs read the groups' values from the device's table; this writes it, outside the graph, and loads the
// kernels.
void upload_rows(int64_t format, int64_t rule, Tensor segments, Tensor rows, int64_t n_segments, double q) {
  gpu::Launch launch{};
  launch.format = served_format("upload_rows", format);
  launch.rule = checked_rule("upload_rows", rule);
  launch.rows =
      static_cast<const Row*>(checked("upload_rows", "rows", rows, Place::kCpu, ScalarType::Double, -1, kRowColumns));
  launch.n_segments = n_segments;
  launch.n_groups = rows.size(0);
  launch.q = q;
  const int64_t size = gpu::table_size(n_segments, launch.n_groups);
  launch.segments = static_cast<const Segment*>(
      checked("upload_rows", "segments", segments, Place::kCuda, ScalarType::Long, size, 8));
  launch.device = segments.get_device_index();
  STD_TORCH_CHECK(work_stream(launch.device, &launch.stream),
                  "upload_rows: torch gives no current stream for cuda:", launch.device);
  const DeviceGuard guard(launch.device);
  expect_success("upload_rows", gpu::upload_rows(launch), launch.device);
}

// Raises where the driver takes none of this library's kernels: it is older than its CUDA runtime or its PTX, or the
// library was built for other GPUs.
void probe(int64_t device) {
  const DeviceGuard guard(static_cast<int32_t>(device));
  const char* const error = gpu::probe(static_cast<int>(device));
  STD_TORCH_CHECK(!error, error);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastsam, m) {
  m.def("probe(int device) -> ()");
  m.def("upload_rows(int format, int rule, Tensor(a!) segments, Tensor rows, int n_segments, float q) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastsam, CUDA, m) {
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("update_", TORCH_BOX(&update_));
  m.impl("dot", TORCH_BOX(&dot));
  m.impl("combine_", TORCH_BOX(&combine_));
  m.impl("bind_", TORCH_BOX(&bind_));
  m.impl("upload_rows", TORCH_BOX(&upload_rows));
}

STABLE_TORCH_LIBRARY_IMPL(fastsam, CompositeExplicitAutograd, m) { m.impl("probe", TORCH_BOX(&probe)); }

}  // namespace fastsam
