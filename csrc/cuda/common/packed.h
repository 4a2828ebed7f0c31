// Elements on their way between memory and arithmetic, in as few registers as they have bytes.
#pragma once

#include <type_traits>

#include "cuda/common/types.h"

namespace kimi::cuda {

// N elements of one access (4, 8 or 16 bytes; any size for N = 1). Two 16-bit elements share a register; in an array of
// them (Vec) each would take one.
template <typename T, int N>
struct alignas(sizeof(T) * N) Packed {
  static constexpr bool kPairs = sizeof(T) == 2 && N % 2 == 0;
  std::conditional_t<kPairs, uint32_t, T> word[kPairs ? N / 2 : N];

  __device__ __forceinline__ void unpack(float (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (kPairs) {
        const float2 pair = unpack2<T>(word[i / 2]);
        x[i] = i % 2 == 0 ? pair.x : pair.y;
      } else {
        x[i] = to_float(word[i]);
      }
    }
  }

  // Rounds to nearest, ties to even.
  static __device__ __forceinline__ Packed pack(const float (&x)[N]) {
    Packed p;
    if constexpr (kPairs) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) p.word[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) p.word[i] = from_float<T>(x[i]);
    }
    return p;
  }
};

template <typename T, int N>
__device__ __forceinline__ Packed<T, N> load_packed(const T* from) {
  return *reinterpret_cast<const Packed<T, N>*>(from);
}
template <typename T, int N>
__device__ __forceinline__ void store_packed(T* to, const Packed<T, N>& p) {
  *reinterpret_cast<Packed<T, N>*>(to) = p;
}

}  // namespace kimi::cuda
