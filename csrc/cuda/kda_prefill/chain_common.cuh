// What the two forms of the second kernel (chain.cuh, chain_sm90.cuh) share: units of a warp's 16 rows of the state,
// and writing the output.
#pragma once

#include "cuda/kda_prefill/tokens.cuh"

namespace kimi::cuda {

// Units in which the largest |S| is 2^10 to 2^11: a product with w (of norm 1, in exceptional data 2) then fits.
inline constexpr int kStateExponent = 10;

// By how many powers of two the units may exceed those of u: its largest value (2^4 and more, or 2^-8 and more in units
// of 1) must not become a subnormal of fp16.
__device__ __forceinline__ int max_unit_gap(int exponent) {
  return exponent == 0 ? 6 : 18;
}

template <int K>
__device__ __forceinline__ void scale_state(float (&s)[K / 8][4], float factor) {
#pragma unroll
  for (int x = 0; x < K / 8; ++x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[x][i] *= factor;
  }
}

// Units for a chunk whose u has units of 2^exponent: no smaller than those, and S must fit.
template <int K>
__device__ __forceinline__ int choose_unit(const float (&s)[K / 8][4], int exponent) {
  float largest = 0.0f;
#pragma unroll
  for (int x = 0; x < K / 8; ++x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(s[x][i]));
  }
  const int of_state = exponent_of(warp_max(largest)) - kStateExponent;
  // A state of ordinary size next to very small values stays in ordinary units.
  return max(exponent, exponent < 0 ? min(of_state, 0) : of_state);
}

// True if no half of the words is infinite or NaN.
template <int N>
__device__ __forceinline__ bool all_finite(const uint32_t (&words)[N][4]) {
  __half2 largest = bits_as<__half2>(words[0][0] & 0x7fff7fffu);
#pragma unroll
  for (int i = 1; i < 4 * N; ++i) largest = __hmax2_nan(largest, __habs2(bits_as<__half2>(words[i / 4][i % 4])));
  // Adding one to an exponent of 31 carries into the place of the sign.
  return ((bits_as<uint32_t>(largest) & 0x7fff7fffu) + 0x04000400u & 0x80008000u) == 0;
}

// Writes the rows of the chunk's first `count` tokens; `to` is the first one, at the warp's first value.
template <typename T>
__device__ __forceinline__ void write_rows(const uint32_t (&rows)[kGroups][2], T* to, int64_t token_stride, int count,
                                           bool wide) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  T* row = to + g * token_stride + 4 * t;
  const int64_t step = kGroup * token_stride;
  if (wide) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group, row += step) {
      if (kGroup * group + g < count) *reinterpret_cast<uint2*>(row) = make_uint2(rows[group][0], rows[group][1]);
    }
  } else {
#pragma unroll
    for (int group = 0; group < kGroups; ++group, row += step) {
      const auto values = bits_as<Vec<T, 4>>(rows[group]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kGroup * group + g < count) row[i] = values.x[i];
      }
    }
  }
}

}  // namespace kimi::cuda
