// From the DType of a tensor to the type of its elements.
#pragma once

#include "cuda/common/types.h"
#include "kimi/common.h"

namespace kimi::cuda {

// run.template operator()<T>() for the element type T of `dtype`: float, Bf16 or Fp16.
template <typename Run>
decltype(auto) dispatch_dtype(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kF32:
      return run.template operator()<float>();
    case DType::kBF16:
      return run.template operator()<Bf16>();
    default:
      return run.template operator()<Fp16>();
  }
}

// The same for the 16-bit types; `dtype` is one of them.
template <typename Run>
decltype(auto) dispatch_half(DType dtype, Run&& run) {
  return dtype == DType::kBF16 ? run.template operator()<Bf16>() : run.template operator()<Fp16>();
}

}  // namespace kimi::cuda
