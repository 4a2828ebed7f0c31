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

// log(1 + exp(x)), without overflow and without losing small values: max(x, 0) + log(1 + e), e = exp(-|x|), and that is
// 2 atanh(z), z = e / (2 + e) <= 1/3, a series. There are no branches, so that several go through the pipes at once.
__device__ __forceinline__ float softplus(float x) {
  const float e = expf(-fabsf(x)), z = e * rcp_approx(2.0f + e), z2 = z * z;
  float series = 1.0f / 15.0f;
#pragma unroll
  for (int odd = 13; odd >= 3; odd -= 2) series = fmaf(series, z2, 1.0f / static_cast<float>(odd));
  return fmaxf(x, 0.0f) + 2.0f * fmaf(series * z2, z, z);
}

}  // namespace kimi::cuda
