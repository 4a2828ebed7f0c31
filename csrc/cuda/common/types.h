// Element types, their conversions and packed accesses, for host and device code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace kimi::cuda {

using Bf16 = __nv_bfloat16;
using Fp16 = __half;

inline constexpr int kWarp = 32;

template <typename Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

template <typename Int>
__host__ __device__ constexpr Int round_up(Int a, Int b) {
  return ceil_div(a, b) * b;
}

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(Bf16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(Fp16 x) {
  return __half2float(x);
}

// Rounds to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ Fp16 from_float<Fp16>(float x) {
  return __float2half_rn(x);
}

// The bits of `x` as another type of the same size.
template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

// Two 16-bit elements in one register, `lo` at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack2<Bf16>(float lo, float hi) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(lo, hi));
}
template <>
__device__ __forceinline__ uint32_t pack2<Fp16>(float lo, float hi) {
  return bits_as<uint32_t>(__floats2half2_rn(lo, hi));
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t packed);
template <>
__device__ __forceinline__ float2 unpack2<Bf16>(uint32_t packed) {
  return __bfloat1622float2(bits_as<__nv_bfloat162>(packed));
}
template <>
__device__ __forceinline__ float2 unpack2<Fp16>(uint32_t packed) {
  return __half22float2(bits_as<__half2>(packed));
}

// N elements that are loaded and stored in one access of sizeof(T) * N = 4, 8 or 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T x[N];
};

// Accesses of 16 bytes: as many elements as fit.
template <typename T>
inline constexpr int kVec = 16 / sizeof(T);

template <typename T, int N>
__device__ __forceinline__ Vec<T, N> load_vec(const T* from) {
  return *reinterpret_cast<const Vec<T, N>*>(from);
}
template <typename T, int N>
__device__ __forceinline__ void store_vec(T* to, const Vec<T, N>& v) {
  *reinterpret_cast<Vec<T, N>*>(to) = v;
}

// Whether accesses of `bytes` bytes may be used: every pointer and every stride (in bytes) is a multiple of it.
template <typename... Address>
bool aligned_to(uintptr_t bytes, Address... address) {
  return ((reinterpret_cast<uintptr_t>(address) % bytes == 0) && ...);
}
template <typename... Stride>
bool multiples_of(int64_t elements, Stride... stride) {
  return ((stride % elements == 0) && ...);
}

}  // namespace kimi::cuda
