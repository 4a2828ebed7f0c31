// Sums and maxima over a warp or a block, in an order that depends on nothing but the number of lanes.
#pragma once

#include "cuda/common/types.h"

namespace kimi::cuda {

// Over aligned groups of `Width` lanes (a power of two); every lane gets the result. All 32 lanes take part.
template <int Width = kWarp>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = Width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <int Width = kWarp>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = Width / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Over the whole warp; one instruction.
__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
  return __reduce_max_sync(0xffffffffu, x);
}

// Over a one-dimensional block of whole warps; every thread gets the result. `scratch` holds 32 floats and is free
// again after the next barrier.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

}  // namespace kimi::cuda
