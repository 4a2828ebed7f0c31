// The image of a chunk (image.cuh) for the Hopper form of the second kernel: the same matrices, every one as wgmma
// reads it from shared memory. -k, q and kg are in pieces of 8 tokens x 32 channels, 64 bytes a token, with the swizzle
// of 64 bytes. Lane 4 g + t of the first kernel has 8 neighbouring channels of token g: a warp's store of 16 bytes a
// lane is one piece, and each eight of its lanes write 128 bytes in a row. (In matrices of 8 x 8, without a swizzle,
// they would write to four lines, and each takes the data path of the L1 cache for a cycle.) T and A_qk come two
// elements a lane, and are in matrices of 8 x 8, 128 bytes in a row.
//
// Order of channels. Lane t of four has columns 8 i + 2 t, + 1 of the state's accumulators. If those are the channels
// of the same numbers, it has two in a row: 8 bytes of a state in memory. With kFours they are channels 16 (i / 2) + 4
// t + 2 (i % 2), + 1, so that of two neighbouring i a lane has four in a row. What a lane of the first kernel has is
// then one half of two octets of columns, and a warp stores twice 8 bytes a lane: that costs nothing in shared memory,
// but more in memory.
#pragma once

#include "cuda/kda_prefill/image.cuh"

namespace kimi::cuda {

// Where the 16 bytes lie in a piece that would be the `octet`-th without the swizzle: of token octet / 4.
__device__ __forceinline__ int swizzled(int octet) {
  return octet ^ octet / 8;
}

// Of all lanes 4 g + t of a warp: channels 8 t .. 8 t + 7 of token g to a piece.
template <bool kFours>
__device__ __forceinline__ void store_piece(uint4 (&piece)[kWarp], int lane, uint4 row) {
  if constexpr (kFours) {
    uint2* const halves = reinterpret_cast<uint2*>(piece);
    const int first = lane / 2 * 2, half = lane % 2;  // octets of columns: first, first + 1
    halves[2 * swizzled(first) + half] = make_uint2(row.x, row.z);
    halves[2 * swizzled(first + 1) + half] = make_uint2(row.y, row.w);
  } else {
    piece[swizzled(lane)] = row;
  }
}

// What is multiplied with S, and with x and v'.
template <int K>
struct alignas(32) StateFactorsSm90 {
  uint4 k[kGroups][K / 32][kWarp];  // [group][channels 32 j .. + 31][swizzled] -k e^G
  uint4 q[kGroups][K / 32][kWarp];  // q e^G, the same
};
template <int K>
struct alignas(32) ValueFactorsSm90 {
  uint4 kg[kGroups][K / 32][kWarp];  // k e^(G_end - G), as k
  // [column group][row group], zeros above the diagonal.
  uint32_t t[kGroups][kGroups][kWarp];     // T beta: [column, pair of rows]
  uint32_t a_qk[kGroups][kGroups][kWarp];  // A_qk: [row, pair of columns]
};
template <int K>
struct ChunkFactorsSm90 : StateFactorsSm90<K>, ValueFactorsSm90<K> {};

// What threads read themselves.
template <int K>
struct alignas(16) ChunkHeaderSm90 {
  float decay[K];  // e^G_end; of columns 16 i + 8 j + 2 t + b at 16 i + 4 t + 2 j + b: a thread's four lie together
  int exact;       // not 0: nothing else of the image is valid; kg is finite still, T is NaN
  int unused[3];
};

template <int K, bool kFours = false>
struct alignas(128) ChunkImageSm90 {
  static constexpr bool kTransposedKg = false;  // store_kg takes tokens as they come

  ChunkFactorsSm90<K> factors;
  ChunkHeaderSm90<K> header;

  // Of all lanes of a warp: `row` is channels 32 j + 8 (lane % 4) .. + 7 of token lane / 4 of the group.
  __device__ __forceinline__ void store_k(int group, int j, int lane, uint4 row) {
    store_piece<kFours>(factors.k[group][j], lane, row);
  }
  __device__ __forceinline__ void store_q(int group, int j, int lane, uint4 row) {
    store_piece<kFours>(factors.q[group][j], lane, row);
  }
  __device__ __forceinline__ void store_kg(int group, int j, int lane, uint4 row) {
    store_piece<kFours>(factors.kg[group][j], lane, row);
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
    header.decay[kFours ? channel : channel / 16 * 16 + channel / 2 % 4 * 4 + channel / 8 % 2 * 2 + channel % 2] =
        decay;
  }
  __device__ __forceinline__ void store_header(bool exact) {
    header.exact = exact;
    header.unused[0] = header.unused[1] = header.unused[2] = 0;
  }
};

}  // namespace kimi::cuda
