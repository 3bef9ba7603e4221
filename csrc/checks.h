// Checks of an operation's tensors: who, what must hold, what came.
#pragma once

#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "bound.h"
#include "tables.h"

namespace fastsam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Place { kCpu, kCuda };

inline bool is_on(const Tensor& tensor, Place place) {
  return place == Place::kCpu ? tensor.is_cpu() : tensor.is_cuda();
}
inline const char* name_of(Place place) { return place == Place::kCpu ? "on the CPU" : "on a CUDA device"; }

// The data of a tensor that must be contiguous, at `place`, of `dtype`, with `rows` rows (-1: any) of `columns` (-1:
// any, 0: of one dimension).
inline void* checked(const char* operation, const char* name, const Tensor& tensor, Place place, ScalarType dtype,
                     int64_t rows, int64_t columns) {
  using torch::headeronly::toString;
  const int64_t dim = columns != 0 ? 2 : 1;
  STD_TORCH_CHECK(is_on(tensor, place) && tensor.is_contiguous(), operation, ": ", name, " must be contiguous, ",
                  name_of(place));
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, operation, ": ", name, " must have dtype ", toString(dtype), ", got ",
                  toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == dim, operation, ": ", name, " must have ", dim, " dimension(s), got ", tensor.dim());
  STD_TORCH_CHECK(rows < 0 || tensor.size(0) == rows, operation, ": ", name, " must have ", rows, " rows, got ",
                  tensor.size(0));
  STD_TORCH_CHECK(columns <= 0 || tensor.size(1) == columns, operation, ": ", name, " must have ", columns,
                  " columns, got ", tensor.size(1));
  return tensor.data_ptr();
}

constexpr const char* kDtypeNames[kDtypes] = {"float32", "float64", "bfloat16", "float16"};

// From fastsam/ops/native.py: four dtypes of four bits each, and whether rounding is stochastic.
inline Format checked_format(const char* operation, int64_t format) {
  const auto dtype = [&](int place) { return static_cast<Dtype>(format >> 4 * place & 15); };
  const Format result{dtype(0), dtype(1), dtype(2), dtype(3), (format >> 16 & 1) != 0};
  for (const Dtype each : {result.weight, result.grad, result.source, result.state}) {
    STD_TORCH_CHECK(each < kDtypes && format >> 17 == 0, operation, ": there is no format ", format);
  }
  return result;
}

// What the formats that fastsam/ops/formats.py makes have in common: float64 stands alone, masters are float32, and
// states are narrower than what they are computed from only if that is float32.
inline void check_served(const char* operation, const Format& format) {
  bool served = (format.source == format.weight || format.source == kFloat32) &&
                (format.state == format.source || format.source == kFloat32);
  for (const Dtype each : {format.grad, format.source, format.state}) {
    served = served && (each == kFloat64) == (format.weight == kFloat64);
  }
  STD_TORCH_CHECK(served, operation, ": there is no kernel for weights of dtype ", kDtypeNames[format.weight],
                  " computed in ", kDtypeNames[format.source], ", gradients of dtype ", kDtypeNames[format.grad],
                  " and states of dtype ", kDtypeNames[format.state]);
}

// Gradients or a direction: a table of addresses on the host and the dtype of what lies there, as one of the codes
// above. What is not float64 is computed in float32, so that float64 stands beside float64 only: beside `arithmetic`.
inline Operand checked_operand(const char* operation, const char* name, const std::optional<Tensor>& addresses,
                               int64_t dtype, int64_t n_segments, int64_t arithmetic) {
  if (!addresses) return {nullptr, kFloat32};
  STD_TORCH_CHECK(0 <= dtype && dtype < kDtypes, operation, ": ", name, " must have a dtype with a code in [0, ",
                  static_cast<int>(kDtypes), "), got ", dtype);
  STD_TORCH_CHECK((dtype == kFloat64) == (arithmetic == kFloat64), operation,
                  ": float64 stands beside float64 only, got ", name, " of dtype ", kDtypeNames[dtype]);
  const void* const table = checked(operation, name, *addresses, Place::kCpu, ScalarType::Long, n_segments, 0);
  return {static_cast<const int64_t*>(table), static_cast<Dtype>(dtype)};
}

inline Rule checked_rule(const char* operation, int64_t rule) {
  STD_TORCH_CHECK(kNoRule <= rule && rule < kRules, operation, ": rule must be a code in [-1, ",
                  static_cast<int>(kRules), "), got ", rule);
  return static_cast<Rule>(rule);
}

// A number that an operation reads or writes itself, or null.
template <class T>
T* scalar(const char* operation, const char* name, const std::optional<Tensor>& tensor, Place place, ScalarType dtype) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(is_on(*tensor, place) && tensor->scalar_type() == dtype && tensor->numel() == 1, operation, ": ",
                  name, " must be one element of dtype ", torch::headeronly::toString(dtype), " ", name_of(place),
                  ", got ", tensor->numel(), " of ", torch::headeronly::toString(tensor->scalar_type()));
  return static_cast<T*>(tensor->data_ptr());
}

// The two counters of overflows, or null.
inline int64_t* counters(const char* operation, const std::optional<Tensor>& tensor, Place place) {
  return tensor ? static_cast<int64_t*>(checked(operation, "overflows", *tensor, place, ScalarType::Long, 2, 0))
                : nullptr;
}

// The buckets' sums, of which `slot` is this bucket's.
inline double* checked_slots(const char* operation, const Tensor& sums, int64_t slot, Place place) {
  double* const slots = static_cast<double*>(checked(operation, "sums", sums, place, ScalarType::Double, -1, 0));
  STD_TORCH_CHECK(0 <= slot && slot < sums.size(0), operation, ": slot must be in [0, ", sums.size(0), "), got ", slot);
  return slots;
}

// What `dot` writes: the buckets' products, of which row `slot` is this bucket's.
inline double* checked_products(const char* operation, const Tensor& out, int64_t slot, Place place) {
  double* const rows = static_cast<double*>(checked(operation, "out", out, place, ScalarType::Double, -1, kProducts));
  STD_TORCH_CHECK(0 <= slot && slot < out.size(0), operation, ": slot must be in [0, ", out.size(0), "), got ", slot);
  return rows + slot * kProducts;
}

// Its scratch: a row of partial sums for each product.
inline double* checked_product_partials(const char* operation, const Tensor& partials, int64_t n_chunks, Place place) {
  void* const rows = checked(operation, "partials", partials, place, ScalarType::Double, kProducts, -1);
  STD_TORCH_CHECK(partials.size(1) == n_chunks, operation, ": partials must have ", n_chunks, " columns, got ",
                  partials.size(1));
  return static_cast<double*>(rows);
}

// Where bound operands are kept.
inline Bound& checked_bound(const char* operation, const Tensor& bound) {
  return *static_cast<Bound*>(checked(operation, "bound", bound, Place::kCpu, ScalarType::Byte, sizeof(Bound), 0));
}

}  // namespace fastsam
