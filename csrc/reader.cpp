// fastsam._C: addresses and layouts of Python tensors, read through torch's DLPack exchange table without its symbols
// or an allocation: one file for every Python (limited API) and every torch that has the table.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <initializer_list>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <ATen/dlpack.h>

#include "bound.h"
#include "cpu/launch.h"
#include "reader.h"
#include "tables.h"

#define FASTSAM_QUOTE_(text) #text
#define FASTSAM_QUOTE(text) FASTSAM_QUOTE_(text)

namespace fastsam {

namespace {

constexpr int64_t kNoMemory = 64;  // stands for the address of an empty gradient, so that it differs from no gradient

const DLPackExchangeAPI* table = nullptr;
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
PyTypeObject* distributed_type = nullptr;  // DTensor, from when there is one
PyObject* grad_property = nullptr;  // torch.Tensor.grad, and how its value is taken
descrgetfunc get_property = nullptr;
PyObject* grad_name = nullptr;
PyObject* params_name = nullptr;
PyObject* is_conj_name = nullptr;
PyObject* is_neg_name = nullptr;
PyObject* local_name = nullptr;
PyObject* spec_name = nullptr;
PyObject* placements_name = nullptr;

// Owns one reference.
class Ref {
 public:
  explicit Ref(PyObject* object) : object_(object) {}
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  void reset(PyObject* object) { Py_XDECREF(std::exchange(object_, object)); }

 private:
  PyObject* object_;
};

template <class T>
T* at(unsigned long long address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

bool is_list(PyObject* object, const char* who, const char* what) {
  if (PyList_Check(object)) return true;
  PyErr_Format(PyExc_TypeError, "%s: %s must be a list, got %R", who, what,
               reinterpret_cast<PyObject*>(Py_TYPE(object)));
  return false;
}

// Whether no element lies in memory.
bool is_empty(const DLTensor& tensor) {
  for (int32_t i = 0; i < tensor.ndim; i++) {
    if (tensor.shape[i] == 0) return true;
  }
  return false;
}

int64_t address_of(const DLTensor& tensor) {
  return tensor.data ? reinterpret_cast<int64_t>(tensor.data) + static_cast<int64_t>(tensor.byte_offset) : 0;
}

int64_t address_of_grad(const DLTensor& grad) { return is_empty(grad) ? kNoMemory : address_of(grad); }

// The stride of a dimension, 0 where it reaches no second element and may be anything.
int64_t stride_of(const DLTensor& tensor, int32_t dim, bool empty) {
  return empty || tensor.shape[dim] == 1 ? 0 : tensor.strides[dim];
}

void mix(uint64_t& hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
  hash ^= hash >> 29;
}

// A hash of dtype, device, shape and strides.
int64_t signature_of(const DLTensor& tensor) {
  const bool empty = is_empty(tensor);
  uint64_t hash = static_cast<uint64_t>(tensor.ndim);
  mix(hash, static_cast<uint64_t>(tensor.dtype.code) << 32 | static_cast<uint64_t>(tensor.dtype.bits) << 16 |
                tensor.dtype.lanes);
  mix(hash, static_cast<uint64_t>(tensor.device.device_type) << 32 | static_cast<uint32_t>(tensor.device.device_id));
  for (int32_t i = 0; i < tensor.ndim; i++) {
    const uint64_t stride = static_cast<uint64_t>(stride_of(tensor, i, empty));
    mix(hash, static_cast<uint64_t>(tensor.shape[i]) ^ (stride << 32 | stride >> 32));
  }
  return static_cast<int64_t>(hash);
}

// Whether a gradient lies like its parameter; `dtype` is what it must hold, type code and bits, 0 for what the
// parameter does.
bool same_layout(const DLTensor& a, const DLTensor& b, unsigned dtype) {
  const DLDataType own{static_cast<uint8_t>(dtype >> 8), static_cast<uint8_t>(dtype), 1},
      &expected = dtype ? own : b.dtype;
  if (a.ndim != b.ndim || a.dtype.code != expected.code || a.dtype.bits != expected.bits ||
      a.device.device_type != b.device.device_type || a.device.device_id != b.device.device_id) {
    return false;
  }
  const bool empty = is_empty(a);
  for (int32_t i = 0; i < a.ndim; i++) {
    if (a.shape[i] != b.shape[i] || stride_of(a, i, empty) != stride_of(b, i, empty)) return false;
  }
  return true;
}

bool is_distributed(PyObject* tensor) {
  PyTypeObject* const type = Py_TYPE(tensor);
  return distributed_type && type != parameter_type && type != tensor_type &&
         (type == distributed_type || PyType_IsSubtype(type, distributed_type));
}

// A distributed tensor's part that lies here, any other tensor itself; a new reference, null with a Python error.
PyObject* local_of(PyObject* tensor) {
  return is_distributed(tensor) ? PyObject_GetAttr(tensor, local_name) : Py_NewRef(tensor);
}

// Whether a gradient lies on the ranks as its parameter does.
bool same_placements(PyObject* param, PyObject* grad, bool& error) {
  if (is_distributed(param) != is_distributed(grad)) return false;
  if (!is_distributed(param)) return true;
  const Ref own(PyObject_GetAttr(param, spec_name)), other(PyObject_GetAttr(grad, spec_name));
  if (own.get() && own.get() == other.get()) return true;
  const Ref a(own.get() ? PyObject_GetAttr(own.get(), placements_name) : nullptr);
  const Ref b(other.get() ? PyObject_GetAttr(other.get(), placements_name) : nullptr);
  const int same = a.get() && b.get() ? PyObject_RichCompareBool(a.get(), b.get(), Py_EQ) : -1;
  error = same < 0;
  return same == 1;
}

// False with a Python error set where `object` is no tensor, or one without strided memory. What `out` points to lives
// as long as the tensor, or as the part of it that lies here.
bool read(PyObject* object, DLTensor& out, const char* who) {
  if (!table) {
    PyErr_Format(PyExc_RuntimeError, "%s: call init() with torch.Tensor's exchange table first", who);
    return false;
  }
  if (!PyType_IsSubtype(Py_TYPE(object), tensor_type)) {
    PyErr_Format(PyExc_TypeError, "%s: expected a torch.Tensor, got %R", who,
                 reinterpret_cast<PyObject*>(Py_TYPE(object)));
    return false;
  }
  const Ref local(local_of(object));
  if (!local.get()) return false;
  if (table->dltensor_from_py_object_no_sync(local.get(), &out) == 0) return true;
  if (!PyErr_Occurred()) PyErr_Format(PyExc_BufferError, "%s: the tensor cannot be read", who);
  return false;
}

PyObject* init(PyObject*, PyObject* capsule) {
  auto* const found = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!found) return nullptr;
  const DLPackVersion version = found->header.version;
  if (version.major != DLPACK_MAJOR_VERSION || !found->dltensor_from_py_object_no_sync || !found->current_work_stream) {
    return PyErr_Format(PyExc_RuntimeError, "init: DLPack %u.%u is not the version %d this library was built for",
                        version.major, version.minor, DLPACK_MAJOR_VERSION);
  }
  const Ref torch(PyImport_ImportModule("torch"));
  if (!torch.get()) return nullptr;
  const Ref nn(PyImport_ImportModule("torch.nn"));
  if (!nn.get()) return nullptr;
  PyObject* const type = PyObject_GetAttrString(torch.get(), "Tensor");  // these are kept for good
  PyObject* const parameter = type ? PyObject_GetAttrString(nn.get(), "Parameter") : nullptr;
  grad_property = parameter ? PyObject_GetAttr(type, grad_name) : nullptr;
  if (!grad_property) return nullptr;
  get_property = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(grad_property), Py_tp_descr_get));
  tensor_type = reinterpret_cast<PyTypeObject*>(type);
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter);
  table = found;
  return Py_BuildValue("(II)", version.major, version.minor);
}

PyObject* set_distributed_type(PyObject*, PyObject* type) {
  if (!PyType_Check(type)) return PyErr_Format(PyExc_TypeError, "set_distributed_type: expected a class, got %R", type);
  distributed_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(type));  // kept for good
  Py_RETURN_NONE;
}

PyObject* same_params(PyObject*, PyObject* args) {
  PyObject *groups, *params;
  if (!PyArg_ParseTuple(args, "OO", &groups, &params)) return nullptr;
  if (!is_list(groups, "same_params", "param_groups") || !is_list(params, "same_params", "params")) return nullptr;
  const Py_ssize_t expected = PyList_Size(params);
  Py_ssize_t seen = 0;
  for (Py_ssize_t i = 0; i < PyList_Size(groups); i++) {
    PyObject* const group = PyList_GetItem(groups, i);
    if (!PyDict_Check(group)) return PyErr_Format(PyExc_TypeError, "same_params: param_groups[%zd] must be a dict", i);
    PyObject* const own = PyDict_GetItemWithError(group, params_name);
    if (!own && !PyErr_Occurred()) PyErr_Format(PyExc_KeyError, "same_params: param_groups[%zd] has no 'params'", i);
    if (!own || !is_list(own, "same_params", "a group's 'params'")) return nullptr;
    for (Py_ssize_t j = 0; j < PyList_Size(own); j++, seen++) {
      if (seen >= expected || PyList_GetItem(own, j) != PyList_GetItem(params, seen)) Py_RETURN_FALSE;
    }
  }
  return PyBool_FromLong(seen == expected);
}

PyObject* same_groups(PyObject*, PyObject* args) {
  PyObject *groups, *params, *entries;
  if (!PyArg_ParseTuple(args, "OOO", &groups, &params, &entries)) return nullptr;
  for (PyObject* const list : {groups, params, entries}) {
    if (!is_list(list, "same_groups", "each argument")) return nullptr;
  }
  const Py_ssize_t n_params = PyList_Size(params), n_entries = PyList_Size(entries) / 2;
  Py_ssize_t seen = 0, entry = 0;
  for (Py_ssize_t i = 0; i < PyList_Size(groups); i++) {
    PyObject* const group = PyList_GetItem(groups, i);
    if (!PyDict_Check(group)) Py_RETURN_FALSE;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (; PyDict_Next(group, &position, &key, &value); entry++) {
      if (entry == n_entries || key != PyList_GetItem(entries, 2 * entry) ||
          value != PyList_GetItem(entries, 2 * entry + 1)) {
        Py_RETURN_FALSE;
      }
      if (key != params_name) continue;
      if (!PyList_Check(value)) Py_RETURN_FALSE;
      for (Py_ssize_t j = 0; j < PyList_Size(value); j++, seen++) {
        if (seen == n_params || PyList_GetItem(value, j) != PyList_GetItem(params, seen)) Py_RETURN_FALSE;
      }
    }
  }
  return PyBool_FromLong(seen == n_params && entry == n_entries);
}

PyObject* describe(PyObject*, PyObject* object) {
  DLTensor tensor{};
  if (!read(object, tensor, "describe")) return nullptr;
  return Py_BuildValue("(LL)", static_cast<long long>(address_of(tensor)),
                       static_cast<long long>(signature_of(tensor)));
}

// A list of indices, None as long as there are none.
class Indices {
 public:
  bool append(Py_ssize_t index) {
    if (!list_.get()) list_.reset(PyList_New(0));
    const Ref number(PyLong_FromSsize_t(index));
    return list_.get() && number.get() && PyList_Append(list_.get(), number.get()) == 0;
  }
  bool empty() const { return !list_.get(); }
  PyObject* release() { return list_.get() ? list_.release() : Py_NewRef(Py_None); }

 private:
  Ref list_{nullptr};
};

// param.grad; without the search for the attribute where the class is torch's own.
PyObject* grad_of(PyObject* param) {
  PyTypeObject* const type = Py_TYPE(param);
  if (get_property && (type == parameter_type || type == tensor_type || type == distributed_type)) {
    return get_property(grad_property, param, reinterpret_cast<PyObject*>(type));
  }
  return PyObject_GetAttr(param, grad_name);
}

// Whether a gradient of a layout that kernels take is lazily conjugated or negated, so that its memory holds other
// values. A real one is negated only as the imaginary part of a conjugate, whose strides betray it but for one element.
bool is_lazy(PyObject* grad, const DLTensor& tensor, bool& error) {
  int64_t elements = 1;
  for (int32_t i = 0; i < tensor.ndim; i++) elements *= tensor.shape[i];
  if (tensor.dtype.code != kDLComplex && elements != 1) return false;
  for (PyObject* const name : {is_conj_name, is_neg_name}) {
    const Ref answer(PyObject_CallMethodObjArgs(grad, name, nullptr));
    const int yes = answer.get() ? PyObject_IsTrue(answer.get()) : -1;
    if (yes != 0) {
      error = yes < 0;
      return true;
    }
  }
  return false;
}

// A bucket, as Python tells of it: see fastsam/memory/gradients.py.
struct Reading {
  PyObject* params;  // borrowed
  const Segment* segments;
  const int64_t* signatures;
  const uint8_t* skip;
  int64_t* addresses;
  unsigned dtype;
  const uint8_t* perturbed;  // this and the next two for whole passes only
  const uint8_t* ready;      // whether a segment has the memory that the pass needs
  Bound* bound;

  bool parse(PyObject* args) {
    unsigned long long segment_address, signature_address, skip_address, grad_address;
    unsigned long long perturbed_address = 0, ready_address = 0, bound_address = 0;
    if (!PyArg_ParseTuple(args, "OKKKKI|KKK", &params, &segment_address, &signature_address, &skip_address,
                          &grad_address, &dtype, &perturbed_address, &ready_address, &bound_address)) {
      return false;
    }
    perturbed = at<const uint8_t>(perturbed_address);
    ready = at<const uint8_t>(ready_address);
    segments = at<const Segment>(segment_address);
    signatures = at<const int64_t>(signature_address);
    skip = at<const uint8_t>(skip_address);
    addresses = at<int64_t>(grad_address);
    bound = at<Bound>(bound_address);
    return is_list(params, "gather", "params");
  }

  // (gradients, moved, foreign); null with a Python error. `in_place`: whether there are none of the latter two.
  PyObject* gather(bool& in_place) const {
    const Py_ssize_t n = PyList_Size(params);
    Ref grads(PyList_New(n));
    if (!grads.get()) return nullptr;
    Indices moved, foreign;
    for (Py_ssize_t i = 0; i < n; i++) {
      const Ref param(Py_XNewRef(PyList_GetItem(params, i)));  // .grad of a subclass may run code that changes the list
      if (!param.get()) return nullptr;
      DLTensor own{};
      bool there = read(param.get(), own, "gather");
      if (!there) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) return nullptr;
        PyErr_Clear();  // describe() will say what is wrong with it
      }
      there = there && signature_of(own) == signatures[i] && (is_empty(own) || address_of(own) == segments[i].weight);
      if (!there && !moved.append(i)) return nullptr;

      const Ref whole(skip && skip[i] ? Py_NewRef(Py_None) : grad_of(param.get()));
      if (!whole.get()) return nullptr;
      const bool present = whole.get() != Py_None;
      PyObject* const grad = local_of(whole.get());
      if (!grad || PyList_SetItem(grads.get(), i, grad) != 0) return nullptr;  // the list owns it now
      addresses[i] = 0;
      if (!present) continue;
      DLTensor tensor{};
      if (read(grad, tensor, "gather")) {
        addresses[i] = address_of_grad(tensor);
      } else {
        PyErr_Clear();
      }
      bool error = false;
      const bool taken = addresses[i] && same_layout(tensor, own, dtype) && !is_lazy(grad, tensor, error) &&
                         same_placements(param.get(), whole.get(), error);
      if (error || (!taken && !foreign.append(i))) return nullptr;
    }
    in_place = moved.empty() && foreign.empty();
    return Py_BuildValue("(NNN)", grads.release(), moved.release(), foreign.release());
  }
};

// The parameters that an operation writes to; new reference, null with a Python error.
PyObject* written_by(const Reading& reading, bool ascent) {
  const Py_ssize_t n = PyList_Size(reading.params);
  const auto is_written = [&](Py_ssize_t i) { return reading.addresses[i] || (!ascent && reading.perturbed[i]); };
  Py_ssize_t count = 0;
  for (Py_ssize_t i = 0; i < n; i++) count += is_written(i);
  if (count == n) return Py_NewRef(reading.params);
  Ref written(PyList_New(0));
  for (Py_ssize_t i = 0; written.get() && i < n; i++) {
    if (is_written(i) && PyList_Append(written.get(), PyList_GetItem(reading.params, i)) != 0) return nullptr;
  }
  return written.release();
}

// Whether a parameter has a gradient, but no backup or states yet.
bool lacks_memory(const Reading& reading) {
  for (Py_ssize_t i = 0; i < PyList_Size(reading.params); i++) {
    if (reading.addresses[i] && !reading.ready[i]) return true;
  }
  return false;
}

PyObject* gather(PyObject*, PyObject* args) {
  Reading reading{};
  bool in_place;
  return reading.parse(args) ? reading.gather(in_place) : nullptr;
}

constexpr Py_ssize_t kMostBuckets = 32;
enum Operation { kNorm = 1, kPerturb = 2, kUpdate = 4 };

// Runs the operations of all buckets, without Python's lock.
const char* run_operations(const Reading* readings, Py_ssize_t n, int operations) {
  const char* error = nullptr;
  Py_BEGIN_ALLOW_THREADS;
  try {
    for (const Operation operation : {kNorm, kPerturb, kUpdate}) {
      for (Py_ssize_t i = 0; (operations & operation) && !error && i < n; i++) {
        Bound& bound = *readings[i].bound;
        error = (operation == kNorm ? bound.grad_norm : operation == kPerturb ? bound.perturb : bound.update)(bound);
      }
    }
  } catch (const std::exception& thrown) {
    static thread_local char text[512];
    std::snprintf(text, sizeof text, "%s", thrown.what());
    error = text;
  }
  Py_END_ALLOW_THREADS;
  return error;
}

// The buckets that Python tells of; -1 with a Python error.
Py_ssize_t parse_buckets(PyObject* buckets, Reading* readings) {
  if (!is_list(buckets, "run_pass", "buckets")) return -1;
  const Py_ssize_t n = PyList_Size(buckets);
  if (n > kMostBuckets) {
    PyErr_Format(PyExc_ValueError, "run_pass: at most %zd buckets, got %zd", kMostBuckets, n);
    return -1;
  }
  for (Py_ssize_t i = 0; i < n; i++) {
    if (!readings[i].parse(PyList_GetItem(buckets, i))) return -1;
  }
  return n;
}

PyObject* failed(const char* error) { return PyErr_Format(PyExc_RuntimeError, "%s", error); }

PyObject* run_pass(PyObject*, PyObject* args) {
  PyObject* buckets;
  int operations;
  if (!PyArg_ParseTuple(args, "Oi", &buckets, &operations)) return nullptr;
  Reading readings[kMostBuckets];
  const Py_ssize_t n = parse_buckets(buckets, readings);
  Ref found(n < 0 ? nullptr : PyList_New(n));
  if (!found.get()) return nullptr;
  for (Py_ssize_t i = 0; i < n; i++) {
    bool in_place = false;
    const Ref result(readings[i].gather(in_place));
    if (!result.get()) return nullptr;
    if (!in_place || lacks_memory(readings[i])) Py_RETURN_NONE;
    PyObject* const written = written_by(readings[i], !(operations & kUpdate));
    PyObject* const pair = written ? Py_BuildValue("(ON)", PyTuple_GetItem(result.get(), 0), written) : nullptr;
    if (!pair || PyList_SetItem(found.get(), i, pair) != 0) return nullptr;
  }
  const char* const error = run_operations(readings, n, operations);
  return error ? failed(error) : found.release();
}

PyObject* run_on(PyObject*, PyObject* args) {
  PyObject* buckets;
  int operations;
  if (!PyArg_ParseTuple(args, "Oi", &buckets, &operations)) return nullptr;
  Reading readings[kMostBuckets];
  const Py_ssize_t n = parse_buckets(buckets, readings);
  if (n < 0) return nullptr;
  const char* const error = run_operations(readings, n, operations);
  return error ? failed(error) : Py_NewRef(Py_None);
}

PyObject* fill(PyObject*, PyObject* args) {
  PyObject* grads;
  unsigned long long address;
  if (!PyArg_ParseTuple(args, "OK", &grads, &address)) return nullptr;
  if (!is_list(grads, "fill", "grads")) return nullptr;
  auto* const addresses = at<int64_t>(address);
  for (Py_ssize_t i = 0; i < PyList_Size(grads); i++) {
    PyObject* const grad = PyList_GetItem(grads, i);
    addresses[i] = 0;
    if (grad == Py_None) continue;
    DLTensor tensor{};
    if (!read(grad, tensor, "fill")) return nullptr;
    addresses[i] = address_of_grad(tensor);
    if (!addresses[i]) return PyErr_Format(PyExc_ValueError, "fill: grads[%zd] has no memory of its own", i);
  }
  Py_RETURN_NONE;
}

PyObject* same_state(PyObject*, PyObject* args) {
  PyObject* state;
  unsigned long long table_address;
  long long n, n_entries;
  if (!PyArg_ParseTuple(args, "OKLL", &state, &table_address, &n, &n_entries)) return nullptr;
  if (!PyDict_Check(state)) return PyErr_Format(PyExc_TypeError, "same_state: state must be a dict");
  if (!table) return PyErr_Format(PyExc_RuntimeError, "same_state: call init() first");
  const auto* known = at<const int64_t>(table_address);
  const auto* const known_entries = known + 2 * n;
  const auto same = [](PyObject* object, int64_t id) { return reinterpret_cast<int64_t>(object) == id; };
  Py_ssize_t outer = 0, seen = 0, entry = 0;
  PyObject *param, *inner, *name, *value;
  for (; PyDict_Next(state, &outer, &param, &inner); seen++) {
    if (seen == n || !same(inner, known[2 * seen]) || PyDict_Size(inner) != known[2 * seen + 1]) Py_RETURN_FALSE;
    Py_ssize_t position = 0;
    for (int64_t left = known[2 * seen + 1]; left > 0; left--, entry++) {
      if (entry == n_entries || !PyDict_Next(inner, &position, &name, &value)) Py_RETURN_FALSE;
      const int64_t* const expected = known_entries + 3 * entry;
      if (!same(name, expected[0]) || !same(value, expected[1])) Py_RETURN_FALSE;
      if (!expected[2]) continue;  // else it is a tensor, as it was one
      DLTensor tensor{};
      if (!read(value, tensor, "same_state")) return nullptr;
      if (address_of(tensor) != expected[2]) Py_RETURN_FALSE;
    }
  }
  return PyBool_FromLong(seen == n && entry == n_entries);
}

PyObject* current_work_stream(PyObject*, PyObject* args) {
  int device_type, device_index;
  if (!PyArg_ParseTuple(args, "ii", &device_type, &device_index)) return nullptr;
  if (!table) return PyErr_Format(PyExc_RuntimeError, "current_work_stream: call init() first");
  void* stream = nullptr;
  if (table->current_work_stream(static_cast<DLDeviceType>(device_type), device_index, &stream) != 0) {
    if (PyErr_Occurred()) return nullptr;
    return PyErr_Format(PyExc_RuntimeError, "current_work_stream: torch has none for device type %d", device_type);
  }
  return PyLong_FromVoidPtr(stream);
}

// Ask for huge pages, before the memory is first written: streams through many flat tensors otherwise wait for address
// translation. A wish only, so nothing is reported.
PyObject* use_huge_pages(PyObject*, PyObject* args) {
  unsigned long long address, bytes;
  if (!PyArg_ParseTuple(args, "KK", &address, &bytes)) return nullptr;
#if defined(MADV_HUGEPAGE)
  constexpr unsigned long long kPage = 4096, kWorthIt = 4 << 20;
  const unsigned long long begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (bytes >= kWorthIt) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#endif
  Py_RETURN_NONE;
}

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(cpu::kernels().isa); }

PyObject* cpu_isas(PyObject*, PyObject*) {
  Ref names(PyList_New(0));
  if (!names.get()) return nullptr;
  for (const char* const* name = cpu::isas(); *name; name++) {
    const Ref text(PyUnicode_FromString(*name));
    if (!text.get() || PyList_Append(names.get(), text.get()) != 0) return nullptr;
  }
  return names.release();
}

PyObject* use_cpu_isa(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  const char* const previous = cpu::kernels().isa;
  if (!cpu::use_isa(name)) {
    const Ref names(cpu_isas(nullptr, nullptr));
    return names.get()
               ? PyErr_Format(PyExc_ValueError, "use_cpu_isa: this processor has %R, not '%s'", names.get(), name)
               : nullptr;
  }
  return PyUnicode_FromString(previous);
}

PyMethodDef methods[] = {
    {"init", init, METH_O, "init(capsule) -> (major, minor): take torch.Tensor.__dlpack_c_exchange_api__."},
    {"same_params", same_params, METH_VARARGS,
     "same_params(param_groups, params) -> bool: the same objects in the same order."},
    {"describe", describe, METH_O, "describe(tensor) -> (address, signature of dtype, device, shape and strides)."},
    {"gather", gather, METH_VARARGS,
     "gather(params, segments, signatures, skip, grads, dtype) -> (gradients, moved, foreign)."},
    {"set_distributed_type", set_distributed_type, METH_O,
     "set_distributed_type(DTensor): of such tensors the part that lies here is read."},
    {"run_pass", run_pass, METH_VARARGS,
     "run_pass(buckets, operations) -> [(gradients, written)], each bucket what gather takes, then perturbed, ready, bound; "
     "operations is a sum of 1 grad_norm, 2 perturb_, 4 update_. "
     "None, and nothing was run, where a parameter or gradient is not what the tables say."},
    {"run_on", run_on, METH_VARARGS, "run_on(buckets, operations): more of them, with what run_pass has read."},
    {"same_groups", same_groups, METH_VARARGS,
     "same_groups(param_groups, params, entries) -> bool: the same parameters, keys and values."},
    {"fill", fill, METH_VARARGS, "fill(grads, table): write the gradients' addresses."},
    {"same_state", same_state, METH_VARARGS,
     "same_state(state, table, dicts, entries) -> bool: whether the inner dicts, their keys and values, and the values' "
     "addresses are those of the table: the id and size of each dict, then the ids of key and value and an address or 0."},
    {"current_work_stream", current_work_stream, METH_VARARGS,
     "current_work_stream(device_type, device_index) -> int."},
    {"use_huge_pages", use_huge_pages, METH_VARARGS,
     "use_huge_pages(address, bytes): ask for them, before the first write."},
    {"cpu_isa", cpu_isa, METH_NOARGS, "cpu_isa() -> the instruction set in use."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "cpu_isas() -> those that this processor has, slowest first."},
    {"use_cpu_isa", use_cpu_isa, METH_VARARGS, "use_cpu_isa(name) -> the previous one."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "fastsam._C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

bool work_stream(int device, void** stream) {
  if (!table) return false;
  const PyGILState_STATE state = PyGILState_Ensure();  // operations run without it, but a failure sets a Python error
  const bool found = table->current_work_stream(kDLCUDA, device, stream) == 0;
  if (!found) PyErr_Clear();
  PyGILState_Release(state);
  return found;
}

}  // namespace fastsam

PyMODINIT_FUNC PyInit__C() {
  using namespace fastsam;
  if (!(grad_name = PyUnicode_InternFromString("grad")) || !(params_name = PyUnicode_InternFromString("params")) ||
      !(is_conj_name = PyUnicode_InternFromString("is_conj")) || !(is_neg_name = PyUnicode_InternFromString("is_neg")) ||
      !(local_name = PyUnicode_InternFromString("_local_tensor")) || !(spec_name = PyUnicode_InternFromString("_spec")) ||
      !(placements_name = PyUnicode_InternFromString("placements"))) {
    return nullptr;
  }
  PyObject* const module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "source_hash", FASTSAM_QUOTE(FASTSAM_SOURCE_HASH)) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
