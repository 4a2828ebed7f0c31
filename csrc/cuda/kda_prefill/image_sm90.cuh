// The image of a chunk (image.cuh) for the Hopper form of the second kernel: the same matrices, every one as wgmma
// reads it from shared memory. -k, q and kg are in pieces of 8 tokens x 32 channels, 64 bytes a token, with the swizzle
// of 64 bytes. Lane 4 g + t of the first kernel has 8 neighbouring channels of token g: a warp's store of 16 bytes a
// lane is one piece, and each eight of its lanes write 128 bytes in a row. (In matrices of 8 x 8, without a swizzle,
// they would write to four lines, and each takes the data path of the L1 cache for a cycle.) T and A_qk come two
// elements a lane, and are in matrices of 8 x 8, 128 bytes in a row.
#pragma once

#include "cuda/kda_prefill/image.cuh"

namespace kimi::cuda {

// Where the 16 bytes of lane 4 g + t lie in a piece.
__device__ __forceinline__ int swizzled(int lane) {
  return lane ^ lane / 8;
}

template <int K>
struct alignas(32) ChunkFactorsSm90 {
  uint4 k[kGroups][K / 32][kWarp];   // [group][channels 32 j .. + 31][swizzled] -k e^G
  uint4 q[kGroups][K / 32][kWarp];   // q e^G, the same
  uint4 kg[kGroups][K / 32][kWarp];  // k e^(G_end - G), the same
  // [column group][row group], zeros above the diagonal.
  uint32_t t[kGroups][kGroups][kWarp];     // T beta: [column, pair of rows]
  uint32_t a_qk[kGroups][kGroups][kWarp];  // A_qk: [row, pair of columns]
};

// What threads read themselves.
template <int K>
struct alignas(16) ChunkHeaderSm90 {
  float decay[K];  // e^G_end of channel 16 i + 8 j + 2 t + b at 16 i + 4 t + 2 j + b: a thread's four lie together
  int exact;       // not 0: nothing else of the image is valid; kg is finite still, T is NaN
  int unused[3];
};

template <int K>
struct alignas(128) ChunkImageSm90 {
  static constexpr bool kTransposedKg = false;  // store_kg takes tokens as they come

  ChunkFactorsSm90<K> factors;
  ChunkHeaderSm90<K> header;

  // Of all lanes of a warp: `row` is channels 32 j + 8 (lane % 4) .. + 7 of token lane / 4 of the group.
  __device__ __forceinline__ void store_k(int group, int j, int lane, uint4 row) {
    factors.k[group][j][swizzled(lane)] = row;
  }
  __device__ __forceinline__ void store_q(int group, int j, int lane, uint4 row) {
    factors.q[group][j][swizzled(lane)] = row;
  }
  __device__ __forceinline__ void store_kg(int group, int j, int lane, uint4 row) {
    factors.kg[group][j][swizzled(lane)] = row;
  }
  // tiles[c]: row lane / 4 of the group, columns 2 (lane % 4), + 1 of column group c; zeros above the diagonal.
  __device__ __forceinline__ void store_a_qk(int group, int lane, const uint32_t (&tiles)[kGroups]) {
#pragma unroll
    for (int c = 0; c < kGroups; ++c) factors.a_qk[c][group][lane] = tiles[c];
  }
  // Of T, transposed: tokens (columns of T) 16 pair .. + 15 as rows, lane / 4 in `low` and 8 more in `high`; row tokens
  // 2 (lane % 4), + 1 of `group`; zeros above the diagonal.
  __device__ __forceinline__ void store_t(int pair, int group, int lane, uint32_t low, uint32_t high) {
    factors.t[2 * pair][group][lane] = low;
    factors.t[2 * pair + 1][group][lane] = high;
  }
  __device__ __forceinline__ void store_decay(int channel, float decay) {
    header.decay[channel / 16 * 16 + channel / 2 % 4 * 4 + channel / 8 % 2 * 2 + channel % 2] = decay;
  }
  __device__ __forceinline__ void store_header(bool exact) {
    header.exact = exact;
    header.unused[0] = header.unused[1] = header.unused[2] = 0;
  }
};

}  // namespace kimi::cuda
