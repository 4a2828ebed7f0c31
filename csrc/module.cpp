// Python module `_C`: every kernel entry on raw pointers (for CuPy, Numba, JAX and ctypes users), build and machine
// facts. Free of torch and of tensors. A params struct of the C++ interface becomes an object with the same field
// names: pointers are integers (addresses), dtypes are `_C.DType`.
//
//     p = _C.RmsNormParams()
//     p.x, p.weight, p.out = x.ctypes.data, ...
//     _C.rms_norm_cpu(p)
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "cpu/common/isa.h"
#include "cpu/common/parallel.h"

namespace py = pybind11;

namespace {

using kimi::bindings::Field;
using kimi::bindings::Function;
using kimi::bindings::Kind;
using kimi::bindings::Module;
using kimi::bindings::ParamsType;

// One params struct: its bytes, and the table that says what lies where.
class ParamsObject {
 public:
  explicit ParamsObject(const ParamsType& type) : type_(type), bytes_(type.defaults.size() / sizeof(int64_t) + 1) {
    std::memcpy(bytes_.data(), type.defaults.data(), type.defaults.size());
  }

  const std::string& type_name() const { return type_.name; }
  const void* data() const { return bytes_.data(); }

  py::object get(const std::string& name) const {
    const Field& field = find(name);
    switch (field.kind) {
      case Kind::kPointer:
        return py::int_(read<uintptr_t>(field));
      case Kind::kInt64:
        return py::int_(read<int64_t>(field));
      case Kind::kInt32:
        return py::int_(read<int32_t>(field));
      case Kind::kFloat:
        return py::float_(read<float>(field));
      case Kind::kBool:
        return py::bool_(read<bool>(field));
      default:
        return py::cast(read<kimi::DType>(field));
    }
  }

  void set(const std::string& name, const py::object& value) {
    const Field& field = find(name);
    switch (field.kind) {
      case Kind::kPointer:
        return write(field, value.cast<uintptr_t>());
      case Kind::kInt64:
        return write(field, value.cast<int64_t>());
      case Kind::kInt32:
        return write(field, value.cast<int32_t>());
      case Kind::kFloat:
        return write(field, value.cast<float>());
      case Kind::kBool:
        return write(field, value.cast<bool>());
      default:
        return write(field, value.cast<kimi::DType>());
    }
  }

  py::list names() const {
    py::list all;
    for (const Field& field : type_.fields) all.append(field.name);
    return all;
  }

 private:
  const Field& find(const std::string& name) const {
    for (const Field& field : type_.fields) {
      if (field.name == name) return field;
    }
    throw py::attribute_error(type_.name + " has no field '" + name + "'");
  }
  char* at(const Field& field) { return reinterpret_cast<char*>(bytes_.data()) + field.offset; }
  template <typename T>
  T read(const Field& field) const {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(bytes_.data()) + field.offset, sizeof(T));
    return value;
  }
  template <typename T>
  void write(const Field& field, T value) {
    std::memcpy(at(field), &value, sizeof(T));
  }

  const ParamsType& type_;
  std::vector<int64_t> bytes_;  // int64 for the alignment of the struct
};

void check_type(const Function& function, const ParamsObject& params) {
  if (params.type_name() != function.params)
    throw py::type_error(function.name + " takes " + function.params + ", got " + params.type_name());
}

void define(py::module_& m, const Function& function) {
  if (function.bytes) {
    m.def(
        function.name.c_str(),
        [&function](const ParamsObject& params) {
          check_type(function, params);
          return function.bytes(params.data());
        },
        py::arg("params"));
  } else if (function.run_cuda) {
    m.def(
        function.name.c_str(),
        [&function](const ParamsObject& params, uintptr_t stream) {
          check_type(function, params);
          py::gil_scoped_release unlocked;
          function.run_cuda(params.data(), reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("params"), py::arg("stream") = 0);
  } else {
    m.def(
        function.name.c_str(),
        [&function](const ParamsObject& params) {
          check_type(function, params);
          py::gil_scoped_release unlocked;
          function.run_cpu(params.data());
        },
        py::arg("params"));
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Tensor-free bindings of the kimi_native kernels.";
  py::register_exception<kimi::Error>(m, "Error", PyExc_RuntimeError);

  py::enum_<kimi::DType>(m, "DType")
      .value("float32", kimi::DType::kF32)
      .value("bfloat16", kimi::DType::kBF16)
      .value("float16", kimi::DType::kF16);

  m.def("cpu_isa", &kimi::cpu::isa_name, "Instruction-set level in use: base, avx2 or avx512.");
  m.def("cpu_threads", &kimi::cpu::max_threads, "Threads that a CPU kernel uses.");
  m.def("build_facts", [] {
    py::dict facts;
    facts["version"] = KIMI_VERSION;
    facts["compiler"] = KIMI_COMPILER;
    facts["build_type"] = KIMI_BUILD_TYPE;
    facts["cuda"] = KIMI_CUDA_VERSION;  // of the compiler; empty without CUDA kernels
    facts["cuda_architectures"] = KIMI_CUDA_ARCHITECTURES;
    return facts;
  });

  static Module all;  // described once; the functions below refer to it
  if (all.types.empty()) {
    for (const auto describe : kimi::bindings::registered()) describe(all);
  }
  py::class_<ParamsObject>(m, "Params", "A params struct of the C++ interface, field by field.")
      .def("__getattr__", &ParamsObject::get)
      .def("__setattr__", &ParamsObject::set)
      .def("__dir__", &ParamsObject::names)
      .def("__repr__", [](const ParamsObject& p) { return "<" + p.type_name() + ">"; });
  for (const ParamsType& type : all.types)
    m.def(type.name.c_str(), [&type] { return ParamsObject(type); }, "A new struct with its default values.");
  for (const Function& function : all.functions) define(m, function);
}
