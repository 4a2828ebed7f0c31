// What a block of the second kernel on Hopper has to do (chain_sm90.cuh, strip_sm90.cuh).
#pragma once

#include "cuda/kda_prefill/chain_common.cuh"

namespace kimi::cuda {

// The work of a block, and of a warp of it.
struct ChainTask {
  int sequence, head, first_value;  // of the warp
  int64_t begin;                    // the sequence's first token
  int length, first_of_sequence;    // tokens, and its first chunk's number
  int first, last;                  // chunks of the sequence that are in the segment: [first, last)
  int slot;
};

// Of a block, one of kCluster of a head, and a warp that has the `strip`-th of the block's kStrips of 16 values. Who
// wants to know it once in a while asks again: registers are few.
template <int kCluster, int kStrips>
__device__ __forceinline__ ChainTask find_task(const KdaPrefillParams& p, const Segment& segment, int strip) {
  ChainTask task;
  task.sequence = static_cast<int>(blockIdx.x) / kCluster;
  task.head = static_cast<int>(blockIdx.y);
  task.first_value = (kStrips * (static_cast<int>(blockIdx.x) % kCluster) + strip) * 16;
  task.begin = p.cu_seqlens[task.sequence];
  task.length = static_cast<int>(p.cu_seqlens[task.sequence + 1] - task.begin);
  task.first_of_sequence = first_chunk(p.cu_seqlens, task.sequence);
  task.first = max(segment.first - task.first_of_sequence, 0);
  task.last = min(segment.first + segment.count - task.first_of_sequence, ceil_div(task.length, kChunk));
  task.slot = p.slots[task.sequence];
  return task;
}

// For a sequence without a slot: zeros for the task's 16 values of its tokens, by the `warp`-th of `warps`.
template <typename T>
__device__ __forceinline__ void write_zeros(const KdaPrefillParams& p, const Segment& segment, const ChainTask& task,
                                            int warp, int warps) {
  T* const out =
      static_cast<T*>(p.out) + task.begin * p.out_token_stride + task.head * p.out_head_stride + task.first_value;
  const int lane = threadIdx.x % kWarp, end = min(task.length, task.last * kChunk);
  for (int token = task.first * kChunk + warp * (kWarp / 2) + lane / 2; token < end; token += warps * (kWarp / 2))
    store_octet(out + token * p.out_token_stride + 8 * (lane % 2), make_uint4(0, 0, 0, 0), segment.wide_out);
}

}  // namespace kimi::cuda
