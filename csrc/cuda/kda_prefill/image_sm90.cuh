// The image of a chunk (image.cuh) for the Hopper form of the second kernel: the same matrices, every one as wgmma
// reads it from shared memory without a swizzle, that is in matrices of 8 x 8 elements, 128 bytes in a row. Lane 4 g +
// t of the first kernel has 8 neighbouring channels of token g: one row of such a matrix, and a warp's store of 16
// bytes a lane covers four of them, 512 bytes.
#pragma once

#include "cuda/kda_prefill/image.cuh"

namespace kimi::cuda {

// `octet` is one of 8 channels.
template <int K>
struct alignas(32) ChunkFactorsSm90 {
  uint4 k[kGroups][K / 8][kGroup];   // [group][octet][token] -k e^G
  uint4 q[kGroups][K / 8][kGroup];   // q e^G, the same
  uint4 kg[kGroups][K / 8][kGroup];  // k e^(G_end - G), the same
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
    factors.k[group][4 * j + lane % 4][lane / 4] = row;
  }
  __device__ __forceinline__ void store_q(int group, int j, int lane, uint4 row) {
    factors.q[group][4 * j + lane % 4][lane / 4] = row;
  }
  __device__ __forceinline__ void store_kg(int group, int j, int lane, uint4 row) {
    factors.kg[group][4 * j + lane % 4][lane / 4] = row;
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
