// What the two kernels of the chunked path share: the grid of chunks, and the image of a chunk that the first one
// leaves for the second.
//
// Fragment order. Both kernels hold matrices as operands of mma.m16n8k16 (cuda/common/ptx.h), where lane = 4 g + t
// knows row g (and g + 8) and columns 2t, 2t + 1. The k index of a product may be numbered in any order that both
// operands share, so key channels are numbered such that a lane's eight channels of a block j of 32 lie together in
// memory:
//   channel 32 j + 8 t + 2 x + b   is column 2 t + b of tile 4 j + x,   x in 0..3
// An image stores fragments as a lane wants them, 16 bytes a lane: every access of a warp is 512 bytes in a row, in
// global and in shared memory, without ldmatrix, padding or bank conflicts.
#pragma once

#include "cuda/common/ptx.h"
#include "cuda/common/types.h"
#include "kimi/kda_prefill.h"

namespace kimi::cuda {

inline constexpr int kChunk = 64;  // tokens; also the grid of the snapshots
inline constexpr int kGroup = 8;   // tokens of a group: rows that a lane quad column of an mma covers
inline constexpr int kGroups = kChunk / kGroup;
inline constexpr unsigned kFullWarp = 0xffffffffu;

// Entry of row group `group`, s-th half of the column groups, in a lower triangle: the first four groups have only one.
__host__ __device__ constexpr int triangle_entry(int group, int s) {
  return group < 4 ? group : 4 + 2 * (group - 4) + s;
}

// The factors of a chunk for all value channels. `group` is the one of the tokens (rows of the matrix).
template <int K>
struct alignas(128) ChunkImage {
  uint4 k[kGroups][K / 32][kWarp];  // -k e^G: tokens as columns n, channels as k; words: tiles 4 j .. 4 j + 3
  uint4 q[kGroups][K / 32][kWarp];  // q e^G, the same
  uint4 kg[kGroups / 2][K / 16]
          [kWarp];        // k e^(G_end - G), transposed: channels as columns n of two tiles, 16 tokens as k
  uint4 t[12][kWarp];     // T beta: row tokens as columns n, tokens as k; words: column groups 4 s .. 4 s + 3
  uint4 a_qk[12][kWarp];  // A_qk, the same
  float decay[K];         // e^G_end
  int exact;              // not 0: nothing else here is valid, the tokens must be done one after another
  int unused[3];

  // What the first kernel stores, each call by a whole warp. A `row` is channels 32 j + 8 t .. + 7 of token g of the
  // group, in fp16, in the order of memory.
  __device__ __forceinline__ void store_q(int group, int j, int lane, uint4 row) { q[group][j][lane] = row; }
  __device__ __forceinline__ void store_k(int group, int j, int lane, uint4 row) { k[group][j][lane] = row; }
  // kg as rows, like q; or (here) transposed, channels 32 j .. + 31 of groups 2 s and 2 s + 1: words are tiles of 8
  // channels x 8 tokens.
  static constexpr bool kTransposedKg = true;
  __device__ __forceinline__ void store_kg(int s, int j, int lane, uint4 even, uint4 odd) {
    kg[s][2 * j][lane] = make_uint4(even.x, odd.x, even.y, odd.y);
    kg[s][2 * j + 1][lane] = make_uint4(even.z, odd.z, even.w, odd.w);
  }
  // tiles[c]: row g, columns 2t and 2t + 1 of column group c; zeros above the diagonal.
  __device__ __forceinline__ void store_a_qk(int group, int lane, const uint32_t (&tiles)[kGroups]) {
    a_qk[triangle_entry(group, 0)][lane] = make_uint4(tiles[0], tiles[1], tiles[2], tiles[3]);
    if (group >= 4) a_qk[triangle_entry(group, 1)][lane] = make_uint4(tiles[4], tiles[5], tiles[6], tiles[7]);
  }
  // Of T, transposed: tokens (columns of T) 16 pair .. + 15 as rows, g in `low` and g + 8 in `high`; row tokens 2t and
  // 2t + 1 of `group`; zeros above the diagonal.
  __device__ __forceinline__ void store_t(int pair, int group, int lane, uint32_t low, uint32_t high) {
    if (group < 4 && pair >= 2) return;
    uint4& words = t[triangle_entry(group, pair / 2)][lane];
    reinterpret_cast<uint2*>(&words)[pair % 2] = make_uint2(movmatrix_trans(low), movmatrix_trans(high));
  }
  __device__ __forceinline__ void store_decay(int channel, float of_channel) { decay[channel] = of_channel; }
  __device__ __forceinline__ void store_header(bool is_exact) {
    exact = is_exact;
    unused[0] = unused[1] = unused[2] = 0;
  }
};

// Chunks are numbered without a list: those of sequence n begin at first_chunk(n) = cu_seqlens[n] / 64 + n, which
// leaves room for ceil(length / 64) of them whatever the lengths. A call has less than num_tokens / 64 + num_sequences
// + 1.
__host__ __device__ constexpr int64_t max_chunks(int64_t num_tokens, int64_t num_sequences) {
  return num_tokens / kChunk + num_sequences;
}
__device__ __forceinline__ int first_chunk(const int32_t* cu_seqlens, int n) {
  return cu_seqlens[n] / kChunk + n;
}

// The sequence whose numbers include `chunk` (which may still be past its end): the last one that begins at or before
// it; -1 if there is none. A search with 32 probes a step; all lanes of the warp take part.
__device__ __forceinline__ int sequence_of_chunk(const int32_t* cu_seqlens, int num_sequences, int chunk) {
  int low = -1, high = num_sequences;  // first_chunk(low) <= chunk < first_chunk(high)
  while (high - low > 1) {
    const int step = ceil_div(high - low, kWarp);
    const int probe = low + (static_cast<int>(threadIdx.x) % kWarp + 1) * step;
    const bool before = probe < high && first_chunk(cu_seqlens, probe) <= chunk;
    const int passed = __popc(__ballot_sync(kFullWarp, before));
    const int above = low + (passed + 1) * step;
    low += passed * step;
    high = above < high ? above : high;
  }
  return low;
}

// The chunks [first, first + count) that one pair of launches covers, and their images [count][num_value_heads].
struct Segment {
  int first = 0, count = 0;
  void* images = nullptr;
  int stages = 2;        // of the ring of images of the second kernel in its portable form: 2 or 3
  int prefetch = 0;      // for the inputs of how many tokens further on the first kernel asks the L2 cache
  bool forward = false;  // the order in which the first kernel goes through the chunks
  // Which tensors lie such that vectors of up to 16 bytes may be used.
  bool wide_inputs = false, wide_out = false, wide_state = false;
  // For whole_sm90.cuh: whether the copy engine brings and takes whole chunks; the first beta, or its upper half if it
  // is fp32, and the way to others.
  bool boxes = false;
  const char* beta = nullptr;
  uint32_t beta_token_bytes = 0;
  int64_t beta_head_bytes = 0;
};

template <typename Image>
__device__ __forceinline__ Image& image_of(const Segment& segment, int chunk, int head, int64_t num_heads) {
  return static_cast<Image*>(segment.images)[(chunk - segment.first) * num_heads + head];
}

// unpack2, which takes three instructions for bf16.
template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t packed) {
  if constexpr (std::is_same_v<T, Bf16>)
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
  else
    return unpack2<T>(packed);
}

// 2^n as a float, n in [-126, 127].
__device__ __forceinline__ float power_of_two(int n) {
  return __int_as_float((n + 127) << 23);
}

// n with 2^n <= |x| < 2^(n + 1), for normal x; -127 for less, 128 for infinity and NaN.
__device__ __forceinline__ int exponent_of(float x) {
  return ((__float_as_int(x) >> 23) & 0xff) - 127;
}

}  // namespace kimi::cuda
