// From torch tensors to the pointers, sizes and strides of <Op>Params, through torch's stable ABI: one binary loads in
// every torch from 2.11 on. Here it is checked that tensors agree with each other; what an operator supports is checked
// by its `validate`.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>

#include "kimi/common.h"

// In torch's CUDA library only: weak, so that one binary loads in a CPU-only torch too, where nobody calls it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// The two backends of an operator, as arguments of `run` and `workspace_bytes`.
#ifdef KIMI_CUDA
#define KIMI_BACKENDS(name) &::kimi::cpu::name, &::kimi::cuda::name
#else
#define KIMI_BACKENDS(name) &::kimi::cpu::name, nullptr
#endif

namespace kimi::torch_glue {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      raise(__FILE_NAME__, __LINE__, "dtype", name, " must be float32, bfloat16 or float16");
  }
}

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline constexpr int64_t kAny = -1;

// `t` has exactly these sizes; kAny matches everything.
inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  std::string wanted = "[";
  int64_t i = 0;
  for (int64_t size : sizes) {
    wanted += (i ? ", " : "") + (size == kAny ? std::string("*") : std::to_string(size));
    same = same && (size == kAny || t.size(i) == size);
    ++i;
  }
  KIMI_CHECK(same, name, " must have shape ", wanted, "], got ", shape_of(t));
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType wanted, const char* wanted_name) {
  KIMI_CHECK(t.scalar_type() == wanted, name, " must be ", wanted_name);
}
inline void check_f32(const Tensor& t, const char* name) {
  check_dtype(t, name, ScalarType::Float, "float32");
}
inline void check_i32(const Tensor& t, const char* name) {
  check_dtype(t, name, ScalarType::Int, "int32");
}
inline void check_i64(const Tensor& t, const char* name) {
  check_dtype(t, name, ScalarType::Long, "int64");
}
inline void check_bool(const Tensor& t, const char* name) {
  check_dtype(t, name, ScalarType::Bool, "bool");
}

// Same device and dtype as the operator's first tensor.
inline void check_like(const Tensor& t, const char* name, const Tensor& first) {
  KIMI_CHECK(t.scalar_type() == first.scalar_type(), name, " must have the dtype of the first tensor");
  KIMI_CHECK(t.is_cpu() == first.is_cpu() && t.get_device_index() == first.get_device_index(), name,
             " must be on the device of the first tensor");
}
inline void check_device(const Tensor& t, const char* name, const Tensor& first) {
  KIMI_CHECK(t.is_cpu() == first.is_cpu() && t.get_device_index() == first.get_device_index(), name,
             " must be on the device of the first tensor");
}

// The last dimension lies contiguously in memory (sizes 0 and 1 always do).
inline void check_last_contiguous(const Tensor& t, const char* name) {
  KIMI_CHECK(t.dim() >= 1 && (t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1), name,
             " must be contiguous in its last dimension");
}
inline void check_contiguous(const Tensor& t, const char* name) {
  KIMI_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// Trailing dimensions from `dim` on are contiguous as one block: strides are those of a packed tensor.
inline void check_contiguous_from(const Tensor& t, const char* name, int64_t dim) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= dim; --i) {
    KIMI_CHECK(t.size(i) <= 1 || t.stride(i) == expected, name, " must be contiguous from dimension ", dim, " on");
    expected *= t.size(i);
  }
}

template <typename T = void>
const T* pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T = void>
const T* pointer(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}
template <typename T = void>
T* mutable_pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T = void>
T* mutable_pointer(const OptionalTensor& t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

// Whether a tensor's operators run on the CUDA backend. Those of a build for the emulator (tests/emulator) always do.
inline bool on_cuda(const Tensor& t) {
#ifdef KIMI_CUDA_EMULATED
  (void)t;
  return true;
#else
  return !t.is_cpu();
#endif
}

// Runs the backend of the device that `t` is on; on a GPU, on torch's current stream of that device.
template <typename Params>
void run(const Tensor& t, const Params& p, void (*cpu)(const std::type_identity_t<Params>&),
         void (*cuda)(const std::type_identity_t<Params>&, cudaStream_t)) {
  if (!on_cuda(t)) return cpu(p);
  KIMI_CHECK(cuda != nullptr, "this build of kimi_native has no CUDA kernels; build it where nvcc is");
#ifdef KIMI_CUDA_EMULATED
  cuda(p, nullptr);
#else
  KIMI_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  const torch::stable::accelerator::DeviceGuard on_device(t.get_device_index());
  void* stream = nullptr;
  KIMI_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "torch gave no CUDA stream");
  cuda(p, static_cast<cudaStream_t>(stream));
#endif
}

// Bytes of workspace that the backend of `t`'s device needs.
template <typename Params>
size_t workspace_bytes(const Tensor& t, const Params& p, size_t (*cpu)(const std::type_identity_t<Params>&),
                       size_t (*cuda)(const std::type_identity_t<Params>&)) {
  if (!on_cuda(t) || cuda == nullptr) return cpu(p);
#ifdef KIMI_CUDA_EMULATED
  return cuda(p);
#else
  const torch::stable::accelerator::DeviceGuard on_device(t.get_device_index());
  return cuda(p);
#endif
}

}  // namespace kimi::torch_glue
