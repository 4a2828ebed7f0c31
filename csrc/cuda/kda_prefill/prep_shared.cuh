// K1 of the chunked path: what a block works on, and its shared memory.
#pragma once

#include "cuda/common/activations.h"
#include "cuda/common/reduce.h"
#include "cuda/kda_prefill/image.cuh"

namespace kimi::cuda {

inline constexpr int kPrepThreads = kGroups * kWarp;

// What the block works on.
struct PrepTask {
  unsigned head, qk_head, first_token;
  int count;  // tokens; fewer than kChunk at the end of a sequence

  // False if there is nothing to do. Every load waits for the one before, so there are few.
  __device__ __forceinline__ bool find(const KdaPrefillParams& p, int chunk) {
    const int num_sequences = static_cast<int>(p.num_sequences);
    const int sequence = num_sequences == 1 ? 0 : sequence_of_chunk(p.cu_seqlens, num_sequences, chunk);
    if (sequence < 0) return false;
    const int begin = p.cu_seqlens[sequence], end = p.cu_seqlens[sequence + 1], slot = p.slots[sequence];
    const int offset = (chunk - first_chunk(p.cu_seqlens, sequence)) * kChunk;
    if (slot < 0 || offset < 0 || offset >= end - begin) return false;
    first_token = static_cast<unsigned>(begin + offset);
    count = min(end - begin - offset, kChunk);
    head = qk_head = blockIdx.x;
    if (p.num_value_heads != p.num_heads)
      qk_head /= static_cast<unsigned>(p.num_value_heads) / static_cast<unsigned>(p.num_heads);
    return true;
  }
};

// The place of a thread: warp = group of tokens, lane = 4 g + t. From a number without a sign: of one with a sign that
// the compiler does not know, each division would take several instructions.
struct PrepLane {
  int thread, group, lane, g, t;
  __device__ __forceinline__ explicit PrepLane(unsigned thread)
      : thread(static_cast<int>(thread)),
        group(static_cast<int>(thread / kWarp)),
        lane(static_cast<int>(thread % kWarp)),
        g(static_cast<int>(thread % kWarp / 4)),
        t(static_cast<int>(thread % 4)) {}
};

// Three levels of products between groups: within pairs, within each half of the chunk, between the halves.
template <int K>
struct PrepShared {
  // Of each group and 32 channels.
  union {
    float from_mid[kGroup][32];  // G - mid, where from_mid_place() says; phase 1 to 3, each warp its own
    struct {
      uint4 k_end[kWarp];  // k 2^(end of the group - G), as b operands; phase 3 to 4
      uint4 kg[kWarp];     // k 2^(end of the chunk - G), transposed; phase 3 to 4
    } operands;
  } groups[kGroups][K / 32];
  // Of 32 channels and each group, each lane its own 16 bytes: q and k as they are in memory in phases 1 to 3; in the
  // place of k of groups 0 to 2 then k_end for the products between the halves, in phase 4.
  alignas(128) uint4 q[K / 32][kGroups][kWarp];
  uint4 k_then_k_half[K / 32][kGroups][kWarp];
  uint4 k_quarter[2][K / 32][kWarp];  // k_end of groups 0 and 4 for the products within a half; phase 3 to 4
  float sums[kGroups][K];  // log2 decay over the group in phase 1, from the chunk's start to the group's end in 2 to 3
  union {
    // Of the group, each warp its own, phase 3: 2^(mid - start), 2^(end - mid), both with the fractional part of the
    // sums at the group's ends, and 2^(end of the chunk - mid).
    float factors[kGroups][3][K];
    // 2^e times -L as b operands (A_kk = beta L): row tokens as columns n, tokens of column groups 2 s, 2 s + 1 as k.
    // Words: two of the upper and two of the lower fp16 of the split. Entry group^2 / 4 + s; phase 4 to 5.
    uint4 a_kk[16][kWarp];
  };
  // Powers of two, of the group: start of the chunk to its start; between its end and that of the quarter; of the half.
  Fp16 powers[kGroups][3][K];             // phase 3 to 4, each warp its own
  float system[kGroups][kGroup][kGroup];  // beta L within the group, strictly lower; phase 3 to 4
  Fp16 inverse[kGroups][kGroup][kGroup];  // of the diagonal block of I + A_kk, times beta 2^-e; phase 4 to 5
  float step[kChunk], beta[kChunk];       // beta as 2^e and a number in [1, 2); phase 2 to 5
};

// Rows of two tokens would lie in the same banks: the odd ones are turned by 16 bytes.
__device__ __forceinline__ int from_mid_place(int token, int channel) {
  return channel % 32 ^ token % 2 * 4;
}
}  // namespace kimi::cuda
