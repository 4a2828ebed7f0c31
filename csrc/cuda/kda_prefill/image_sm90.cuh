// The image of a chunk (image.cuh) for the Hopper form of the second kernel: the same matrices, every one as wgmma
// reads it from shared memory without a swizzle, that is in matrices of 8 x 8 elements, 128 bytes in a row. Lane 4 g +
// t of the first kernel has 8 neighbouring channels of token g: one row of such a matrix, and a warp's store of 16
// bytes a lane covers four of them, 512 bytes. One bulk copy brings all but u.
#pragma once

#include "cuda/kda_prefill/image.cuh"

namespace kimi::cuda {

// What wgmma reads, for all value channels; `octet` is one of 8 channels.
template <int K>
struct alignas(32) ChunkFactorsSm90 {
  uint4 w[kGroups][K / 8][kGroup];         // [group][octet][token] -T (beta k e^G)
  uint4 q[kGroups][K / 8][kGroup];         // q e^G, the same
  uint4 kg[kGroups][K / 8][kGroup];        // k e^(G_end - G), the same
  uint32_t a_qk[kGroups][kGroups][kWarp];  // [row group][column group][row, pair of columns] A_qk
};

// What threads read themselves.
template <int K>
struct alignas(16) ChunkHeaderSm90 {
  float decay[K];  // e^G_end
  int exponent;    // u is in units of 2^exponent
  int exact;       // not 0: nothing else of the image is valid; kg is finite still
  int unused[2];
};

template <int K, int V>
struct alignas(128) ChunkImageSm90 {
  static constexpr bool kTransposedKg = false;  // store_kg takes tokens as they come

  ChunkFactorsSm90<K> factors;
  ChunkHeaderSm90<K> header;
  uint4 u[V / 16][kGroups / 2][kWarp];  // as in ChunkImage: accumulators of the second kernel

  // Of all lanes of a warp: `row` is channels 32 j + 8 (lane % 4) .. + 7 of token lane / 4 of the group.
  __device__ __forceinline__ void store_w(int group, int j, int lane, uint4 row) {
    factors.w[group][4 * j + lane % 4][lane / 4] = row;
  }
  __device__ __forceinline__ void store_q(int group, int j, int lane, uint4 row) {
    factors.q[group][4 * j + lane % 4][lane / 4] = row;
  }
  __device__ __forceinline__ void store_kg(int group, int j, int lane, uint4 row) {
    factors.kg[group][4 * j + lane % 4][lane / 4] = row;
  }
  // tiles[c]: row lane / 4 of the group, columns 2 (lane % 4), + 1 of column group c.
  __device__ __forceinline__ void store_a_qk(int group, int lane, const uint32_t (&tiles)[kGroups]) {
#pragma unroll
    for (int c = 0; c < kGroups; ++c) factors.a_qk[group][c][lane] = tiles[c];
  }
  __device__ __forceinline__ void store_u(int block, int half, int lane, uint4 words) { u[block][half][lane] = words; }
  __device__ __forceinline__ void store_decay(int channel, float decay) { header.decay[channel] = decay; }
  __device__ __forceinline__ void store_header(int exponent, bool exact) {
    header.exponent = exponent;
    header.exact = exact;
    header.unused[0] = header.unused[1] = 0;
  }
};

}  // namespace kimi::cuda
