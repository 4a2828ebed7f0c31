// How csrc/bindings/<op>.cpp describes its params struct and its entries to Python.
//
// Nothing here is pybind11: a description is a table of field names, offsets and kinds, which module.cpp turns into
// Python objects once for all operators. (A pybind11 class for each struct costs ten seconds of compiling per
// operator.)
#pragma once

#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "kimi/common.h"

namespace kimi::bindings {

enum class Kind { kPointer, kInt64, kInt32, kFloat, kBool, kDType };

struct Field {
  std::string name;
  size_t offset;
  Kind kind;
};

struct ParamsType {
  std::string name;
  std::vector<char> defaults;  // the bytes of a default-constructed struct
  std::vector<Field> fields;
};

// A function of one params struct: an operator (validates, then runs) on one device, or the size of its workspace
// there.
struct Function {
  std::string name;
  std::string params;  // name of the ParamsType it takes
  // One of the three is set.
  std::function<void(const void*)> run_cpu;
  std::function<void(const void*, cudaStream_t)> run_cuda;
  std::function<int64_t(const void*)> bytes;
};

struct Module {
  std::deque<ParamsType> types;  // whose elements stay where they are
  std::vector<Function> functions;
};

using Describe = void (*)(Module&);

inline std::vector<Describe>& registered() {
  static std::vector<Describe> all;
  return all;
}

// A static object of this type in bindings/<op>.cpp adds that operator to the module.
struct Register {
  explicit Register(Describe describe) { registered().push_back(describe); }
};

// Params<P>(m, "RmsNormParams").pointer("x", &P::x).value("num_tokens", &P::num_tokens). Pointers are integers
// (addresses) in Python.
template <typename P>
class Params {
  static_assert(std::is_trivially_copyable_v<P>);

 public:
  Params(Module& m, const char* name) : module_(m), type_(m.types.emplace_back()) {
    const P defaults;
    const char* bytes = reinterpret_cast<const char*>(&defaults);
    type_.name = name;
    type_.defaults.assign(bytes, bytes + sizeof(P));
  }

  template <typename T>
  Params& pointer(const char* name, T* P::* field) {
    return add(name, field, Kind::kPointer);
  }

  // The fields of a struct inside this one, which was described just before, under their own names. Comes last: a field
  // of this struct's own hides one of the same name.
  template <typename Inner>
  Params& fields_of(Inner P::* member) {
    const P p;
    const size_t base = reinterpret_cast<const char*>(&(p.*member)) - reinterpret_cast<const char*>(&p);
    const ParamsType& inner = module_.types[module_.types.size() - 2];
    for (const Field& field : inner.fields) type_.fields.push_back({field.name, base + field.offset, field.kind});
    return *this;
  }

  template <typename T>
  Params& value(const char* name, T P::* field) {
    if constexpr (std::is_same_v<T, DType>) {
      return add(name, field, Kind::kDType);
    } else if constexpr (std::is_same_v<T, bool>) {
      return add(name, field, Kind::kBool);
    } else if constexpr (std::is_same_v<T, float>) {
      return add(name, field, Kind::kFloat);
    } else if constexpr (sizeof(T) == 8 && !std::is_floating_point_v<T>) {
      static_assert(std::is_integral_v<T>);
      return add(name, field, Kind::kInt64);
    } else {
      static_assert(sizeof(T) == 4 && (std::is_integral_v<T> || std::is_enum_v<T>));
      return add(name, field, Kind::kInt32);
    }
  }

 private:
  template <typename T>
  Params& add(const char* name, T P::* field, Kind kind) {
    const P p;
    const size_t offset = reinterpret_cast<const char*>(&(p.*field)) - reinterpret_cast<const char*>(&p);
    type_.fields.push_back({name, offset, kind});
    return *this;
  }

  Module& module_;
  ParamsType& type_;
};

// m.<name>(params): validates, then runs the CPU backend. Comes after the Params<P> it takes.
template <typename P>
void cpu_entry(Module& m, const char* name, void (*run)(const P&)) {
  m.functions.push_back({.name = name,
                         .params = m.types.back().name,
                         .run_cpu =
                             [run](const void* p) {
                               validate(*static_cast<const P*>(p));
                               run(*static_cast<const P*>(p));
                             },
                         .run_cuda = nullptr,
                         .bytes = nullptr});
}

// m.<name>(params, stream=0): validates, then runs the CUDA backend on the current device; `stream` is the address of a
// CUDA stream.
template <typename P>
void cuda_entry(Module& m, const char* name, void (*run)(const P&, cudaStream_t)) {
  m.functions.push_back({.name = name,
                         .params = m.types.back().name,
                         .run_cpu = nullptr,
                         .run_cuda =
                             [run](const void* p, cudaStream_t stream) {
                               validate(*static_cast<const P*>(p));
                               run(*static_cast<const P*>(p), stream);
                             },
                         .bytes = nullptr});
}

// m.<name>(params): the bytes of workspace that an entry needs.
template <typename P, typename Bytes>
void workspace_size(Module& m, const char* name, Bytes (*bytes)(const P&)) {
  m.functions.push_back(
      {.name = name,
       .params = m.types.back().name,
       .run_cpu = nullptr,
       .run_cuda = nullptr,
       .bytes = [bytes](const void* p) { return static_cast<int64_t>(bytes(*static_cast<const P*>(p))); }});
}

template <typename P, typename Bytes>
void cpu_size(Module& m, const char* name, Bytes (*bytes)(const P&)) {
  workspace_size(m, name, bytes);
}
template <typename P, typename Bytes>
void cuda_size(Module& m, const char* name, Bytes (*bytes)(const P&)) {
  workspace_size(m, name, bytes);
}

}  // namespace kimi::bindings
