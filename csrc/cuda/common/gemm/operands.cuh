// What the matrix products of 16-bit types share: rows on their way to shared memory, and how they lie there.
#pragma once

#include "cuda/common/activations.h"
#include "cuda/common/ptx.h"
#include "cuda/common/types.h"

namespace kimi::cuda {

// 16 bytes: 8 elements of a row.
using Chunk = Vec<uint32_t, 4>;
inline constexpr int kChunk = 8;

// Rows in shared memory are permuted so that the eight rows of a matrix that ldmatrix reads lie on different banks:
// chunk c of a row is at c ^ key (of c the last three bits), and these rows have different keys, 0 ... 7. The rows of
// an 8 x 8 matrix of weights are not neighbours: column c of tile j in a group of `kGroup` tiles is weight row (c / 2)
// * 2 kGroup + 2 j + c % 2, so that a lane's results (columns 2t and 2t + 1 of every tile) are 2 kGroup neighbours.
// Their key is c.
template <int kGroup>
__device__ __forceinline__ int bank_key(int row) {
  return row / (2 * kGroup) % 4 * 2 + row % 2;
}
template <int kGroup>
__device__ __forceinline__ int row_of_column(int tile, int column) {
  return column / 2 * 2 * kGroup + 2 * tile + column % 2;
}

// The first `count` (at most all) of the elements at `from`, zeros for the others.
template <typename T>
__device__ __forceinline__ Chunk load_chunk(const T* from, int64_t count) {
  Vec<T, kChunk> v;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v.x[i] = i < count ? from[i] : from_float<T>(0.0f);
  return bits_as<Chunk>(v);
}

// Elements k ... k + 7 of a row of `size` elements into shared memory, zeros from its end on and if not `valid`; with
// kAligned asynchronously (cp_async_commit): then rows start on 16 bytes and `size` is a multiple of 8.
template <typename T, bool kAligned>
__device__ __forceinline__ void copy_chunk(Chunk* to, const T* row, int64_t k, int64_t size, bool valid) {
  if constexpr (kAligned) {
    cp_async_16(to, row + k, valid && k < size);
  } else {
    *to = load_chunk(row + k, valid ? size - k : 0);
  }
}

// silu(gate) * up
template <typename T>
__device__ __forceinline__ float swiglu(float gate, float up) {
  if constexpr (std::is_same_v<T, float>) return gate / (1.0f + expf(-gate)) * up;
  return silu(gate) * up;
}

// N results at consecutive addresses, of which the first `count` exist. `wide`: addresses are multiples of what N
// elements take, up to 16 bytes.
template <typename T, int N>
__device__ __forceinline__ void store_results(T* to, const float (&v)[N], int count, bool wide) {
  constexpr int kWidth = N < kVec<T> ? N : kVec<T>;
  if (wide && count >= N) {
#pragma unroll
    for (int i = 0; i < N; i += kWidth) {
      Vec<T, kWidth> part;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) part.x[j] = from_float<T>(v[i + j]);
      store_vec(to + i, part);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) to[i] = from_float<T>(v[i]);
    }
  }
}

}  // namespace kimi::cuda
