// How mla_decode cuts sequences into pieces, and the workspace that holds the pieces' partial results.
//
// A block is 64 rows, a split some blocks, a segment some splits; their sizes depend on the sequence's length alone.
// The result is defined as
//   split      one chain of online softmax over its blocks, started from nothing
//   segment    its splits folded from left to right (Fold below), from nothing
//   sequence   its segments folded from left to right, from nothing
// and maxima are rounded up to integers of log2 units, so that all rescaling is by powers of two and exact.
//
// What one thread block works on at a time, a unit, is either a split or a segment. That choice may look at the whole
// call, because it does not change a bit of the result: few sequences are cut into splits, so that all multiprocessors
// have work; many sequences into segments, which leave fewer partial results (a split of 64 rows reads 72 KB of cache
// and leaves 64 KB).
#pragma once

#include "cuda/common/attention.h"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.h"
#include "kimi/mla_decode.h"

namespace kimi::cuda::mla_decode_detail {

inline constexpr int kLatentDim = 512, kRopeDim = 64, kRowDim = kLatentDim + kRopeDim;  // the released dims
inline constexpr int kBlockRows = 64;

// At most 128 splits, which is about one for each multiprocessor: 8192 rows each at a million rows, 64 each below 8192.
// A segment has at least 2048 rows, against which its partial result is 6 % more traffic; at most 32 are merged.
inline constexpr int kMaxSplits = 128, kMaxSegments = 32, kSegmentBlocks = 32;
// Splits are the units of a call while these are at most so many (64 KB each at 32 heads), and segments too few to fill
// the device.
inline constexpr int kMaxSplitUnits = 1024;

// ceil(n / divisor) where that is less than 2^16: a few instructions, where an integer division takes a hundred cycles
// and the plan needs several, one after the other.
__device__ __forceinline__ int quick_ceil_div(int n, int divisor) {
  int quotient = static_cast<int>(static_cast<float>(n) * rcp_approx(static_cast<float>(divisor)));  // to one
  quotient += (quotient + 1) * divisor <= n;
  quotient -= quotient * divisor > n;
  return quotient + (quotient * divisor < n);
}

struct Pieces {
  int blocks, splits, segments;
  int split_blocks, segment_splits;

  __device__ explicit Pieces(int length) {
    blocks = ceil_div(length, kBlockRows);
    split_blocks = max(ceil_div(blocks, kMaxSplits), 1);
    splits = quick_ceil_div(blocks, split_blocks);
    segment_splits = max(quick_ceil_div(kSegmentBlocks, split_blocks), ceil_div(splits, kMaxSegments));
    segments = quick_ceil_div(splits, segment_splits);
  }
  __device__ int units(bool by_split) const { return by_split ? splits : segments; }
  __device__ int unit_blocks(bool by_split) const { return by_split ? split_blocks : split_blocks * segment_splits; }
};

// The units of the generic kernel: one chain each, all segments of their own.
struct GenericPieces {
  int units, unit_blocks;
  __device__ explicit GenericPieces(int length) {
    const int blocks = ceil_div(length, kBlockRows);
    unit_blocks = max(ceil_div(blocks, kMaxSegments), 1);
    units = ceil_div(blocks, unit_blocks);
  }
};

__host__ __device__ inline int64_t capacity(const MlaDecodeParams& p) {
  return p.max_pages * p.page_size;
}
__device__ __forceinline__ int length_of(const MlaDecodeParams& p, int64_t seq) {
  const int64_t length = p.lengths[seq], most = capacity(p);
  return static_cast<int>(length < 0 ? 0 : length < most ? length : most);
}

// Of a partial result: the maximum in log2 units, the sum of p and that of p as it was multiplied with the values.
struct alignas(16) PartialSums {
  float max, sum, rounded_sum, zero;
};

// The partial result of unit u is slot first_unit[n] + u, for the released dims; n * generic_units() + u in the generic
// kernel.
struct Workspace {
  int32_t* by_split;    // [1]  whether units are splits
  int32_t* first_unit;  // [num_seqs + 1]
  PartialSums* sums;    // [slots, num_heads]
  float* o;             // [slots, num_heads, latent_dim]
  int64_t bytes;
};

// Whether the tensor-core kernel runs: released dims, a 16-bit type, and the shared memory that it needs.
inline constexpr int kSharedBytes = 222 << 10;
inline bool on_tensor_cores(const MlaDecodeParams& p) {
  return p.dtype != DType::kF32 && p.latent_dim == kLatentDim && p.rope_dim == kRopeDim &&
         max_shared_bytes() >= kSharedBytes;
}

inline int generic_units(const MlaDecodeParams& p) {
  const int64_t blocks = ceil_div<int64_t>(capacity(p), kBlockRows);
  return static_cast<int>(blocks < kMaxSegments ? blocks : kMaxSegments);
}

inline Workspace workspace_of(const MlaDecodeParams& p) {
  const int64_t blocks = ceil_div<int64_t>(capacity(p), kBlockRows);
  const int64_t most = on_tensor_cores(p) ? ceil_div<int64_t>(blocks, kSegmentBlocks) : blocks;
  const int64_t segments = most < kMaxSegments ? most : kMaxSegments;  // of any length up to the capacity
  const int64_t splits = on_tensor_cores(p) ? p.num_seqs * (blocks < kMaxSplits ? blocks : kMaxSplits) : 0;
  const int64_t split_units = splits < kMaxSplitUnits ? splits : kMaxSplitUnits;
  const int64_t slots = p.num_seqs * segments > split_units ? p.num_seqs * segments : split_units;
  Workspace w;
  w.bytes = 0;
  const auto take = [&]<typename Element>(Element*& to, int64_t count) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p.workspace) + w.bytes;  // null when only the size is asked for
    to = reinterpret_cast<Element*>(at);
    w.bytes += round_up<int64_t>(count * static_cast<int64_t>(sizeof(Element)), 64);
  };
  take(w.by_split, 1);
  take(w.first_unit, p.num_seqs + 1);
  take(w.sums, slots * p.num_heads);
  take(w.o, slots * p.num_heads * p.latent_dim);
  return w;
}

// Adding the partial result x (sum, or an element of o) of maximum x_max to one of maximum max: fold(acc, old, x,
// added) with the two factors. Spelled out so that all kernels round alike; x + 0 turns -0 into 0, which a first fold
// does too.
struct FoldFactors {
  float max, old, added;
  __device__ FoldFactors(float acc_max, float x_max)
      : max(fmaxf(acc_max, x_max)), old(power_of_two(acc_max, max)), added(power_of_two(x_max, max)) {}
};
__device__ __forceinline__ float fold(float acc, float old, float x, float added) {
  return __fmaf_rn(__fadd_rn(x, 0.0f), added, __fmul_rn(acc, old));
}

}  // namespace kimi::cuda::mla_decode_detail
