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

// In one access.
template <typename T, int N>
__device__ __forceinline__ Packed<T, N> load_packed(const T* from) {
  using Word = std::remove_all_extents_t<decltype(Packed<T, N>::word)>;
  Packed<T, N> p;
  if constexpr (sizeof(p) == 16) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    p.word[0] = bits_as<Word>(v.x), p.word[1] = bits_as<Word>(v.y);
    p.word[2] = bits_as<Word>(v.z), p.word[3] = bits_as<Word>(v.w);
  } else if constexpr (sizeof(p) == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    p.word[0] = bits_as<Word>(v.x), p.word[1] = bits_as<Word>(v.y);
  } else {
    p = *reinterpret_cast<const Packed<T, N>*>(from);
  }
  return p;
}
// To global memory in one access. (An assignment the compiler cuts up where the words become ready one after the
// other.)
template <typename T, int N>
__device__ __forceinline__ void store_packed(T* to, const Packed<T, N>& p) {
  if constexpr (sizeof(p) == 16) {
    __stcg(reinterpret_cast<uint4*>(to), make_uint4(bits_as<uint32_t>(p.word[0]), bits_as<uint32_t>(p.word[1]),
                                                    bits_as<uint32_t>(p.word[2]), bits_as<uint32_t>(p.word[3])));
  } else if constexpr (sizeof(p) == 8) {
    __stcg(reinterpret_cast<uint2*>(to), make_uint2(bits_as<uint32_t>(p.word[0]), bits_as<uint32_t>(p.word[1])));
  } else {
    *reinterpret_cast<Packed<T, N>*>(to) = p;
  }
}

}  // namespace kimi::cuda
