// The work of a thread block of mla_decode, planned on the device from the lengths: a contiguous, equally long share of
// all sequences' blocks of 64 rows, in whole units (plan.cuh), as a stream of steps of one block each.
#pragma once

#include "cuda/mla_decode/plan.cuh"

namespace kimi::cuda::mla_decode_detail {

inline constexpr int kWarps = 8, kThreads = kWarps * kWarp;  // of the thread block

// One block of rows, as thread 0 plans it three ahead.
struct Step {
  int seq, first_row, rows;  // rows: 0 after the last step
  int slot;                  // of the unit's partial result
  bool new_sequence, split_begin, split_end, unit_end;
  bool whole;  // the unit is the whole sequence: its result is the output
};

// Where the next step is: block `block` of sequence `seq`, whose first one is number `seq_start` of all sequences'
// blocks, one sequence after the other. Units that begin at number `stop` or later are for other thread blocks.
struct Cursor {
  int seq_start, stop;
  int seq, length, blocks, split_blocks, unit_blocks;
  int block, split_end, unit_end, slot;
  bool new_sequence;

  __device__ void begin_sequence(const MlaDecodeParams& p, bool by_split) {
    length = length_of(p, seq);
    const Pieces pieces(length);
    blocks = pieces.blocks;
    split_blocks = pieces.split_blocks;
    unit_blocks = pieces.unit_blocks(by_split);
    block = split_end = unit_end = 0;
    new_sequence = true;
  }
};

// Inclusive sum over the warp.
__device__ __forceinline__ int warp_scan(int x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, x, offset);
    if (lane >= offset) x += other;
  }
  return x;
}

// n / divisor for 0 <= n < 2^31 by a multiplication: magic = ceil(2^(31 + k) / divisor) with 2^k >= divisor.
struct Divider {
  uint32_t divisor, magic;
  int shift;
  explicit Divider(uint32_t divisor) : divisor(divisor), shift(31) {
    while (uint64_t{1} << (shift - 31) < divisor) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  __device__ int operator()(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * magic >> shift);
  }
};

struct DecodeOptions {
  Divider page_size, grid_blocks;
  int full;     // segments that fill the device
  float scale;  // log2 units per unit of q k, positive; the sign of p.scale goes to q
};

// Leaves this thread block's share of the work in shared.cursor. The first thread block writes the plan to the
// workspace.
template <typename Shared>
__device__ __forceinline__ void plan_work(const MlaDecodeParams& p, const Workspace& w, const DecodeOptions& options,
                                          Shared& shared) {
  // Each thread counts some sequences.
  const int thread = threadIdx.x, warp = thread / kWarp, num_seqs = static_cast<int>(p.num_seqs);
  const int per_thread = ceil_div(num_seqs, kThreads);
  const int first = min(thread * per_thread, num_seqs), last = min(first + per_thread, num_seqs);
  int blocks = 0, splits = 0, segments = 0;
  for (int n = first; n < last; ++n) {
    const Pieces pieces(length_of(p, n));
    blocks += pieces.blocks;
    splits += pieces.splits;
    segments += pieces.segments;
  }
  int blocks_before = warp_scan(blocks), splits_before = warp_scan(splits), segments_before = warp_scan(segments);
  if (thread % kWarp == kWarp - 1) {
    shared.warp_blocks[warp] = blocks_before;
    shared.warp_splits[warp] = splits_before;
    shared.warp_segments[warp] = segments_before;
  }
  if (thread == 0) shared.cursor.seq = num_seqs;
  __syncthreads();
  blocks_before -= blocks;
  splits_before -= splits;
  segments_before -= segments;
  int all_blocks = 0, all_splits = 0, all_segments = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) {
      blocks_before += shared.warp_blocks[i];
      splits_before += shared.warp_splits[i];
      segments_before += shared.warp_segments[i];
    }
    all_blocks += shared.warp_blocks[i];
    all_splits += shared.warp_splits[i];
    all_segments += shared.warp_segments[i];
  }
  const bool by_split = all_splits <= kMaxSplitUnits && all_segments < options.full;
  int slot = by_split ? splits_before : segments_before;

  const bool writes_plan = blockIdx.x == 0 && blockIdx.y == 0;
  if (thread == 0) shared.by_split = by_split;
  if (writes_plan && thread == 0) {
    *w.by_split = by_split;
    w.first_unit[num_seqs] = by_split ? all_splits : all_segments;
  }
  // Equal shares of the blocks, of which the first ones get what is left over. The first unit at or after position
  // `begin`: the one thread whose sequences hold that position looks for it.
  const int share = options.grid_blocks(all_blocks), left_over = all_blocks - share * static_cast<int>(gridDim.x);
  const int index = static_cast<int>(blockIdx.x);
  const int begin = share * index + min(index, left_over), end = begin + share + (index < left_over);
  for (int n = first; n < last; ++n) {
    if (writes_plan) w.first_unit[n] = slot;
    const Pieces pieces(length_of(p, n));
    if (begin < end && blocks_before <= begin && begin < blocks_before + pieces.blocks) {
      Cursor& c = shared.cursor;
      c.seq = n;
      c.begin_sequence(p, by_split);
      const int unit = quick_ceil_div(begin - blocks_before, c.unit_blocks);
      c.block = c.split_end = c.unit_end = min(unit * c.unit_blocks, pieces.blocks);  // or the end: the next sequence
      c.slot = slot + unit;
      c.seq_start = blocks_before;
      c.stop = end;
    }
    blocks_before += pieces.blocks;
    slot += pieces.units(by_split);
  }
  __syncthreads();
}

// The step at the cursor, which moves on. For one thread.
__device__ __forceinline__ Step next_step(const MlaDecodeParams& p, bool by_split, Cursor& cursor) {
  Step step = {};
  Cursor c = cursor;
  const int num_seqs = static_cast<int>(p.num_seqs);
  while (c.seq < num_seqs && c.block == c.blocks) {
    c.seq_start += c.blocks;
    if (++c.seq < num_seqs) c.begin_sequence(p, by_split);
  }
  if (c.seq < num_seqs && c.block == c.unit_end) {
    if (c.seq_start + c.block >= c.stop) c.seq = num_seqs;
    c.unit_end = min(c.block + c.unit_blocks, c.blocks);
  }
  if (c.seq < num_seqs) {
    step.split_begin = c.block == c.split_end;
    if (step.split_begin) c.split_end = min(c.block + c.split_blocks, c.blocks);
    step.seq = c.seq;
    step.first_row = c.block * kBlockRows;
    step.rows = min(c.length - step.first_row, kBlockRows);
    step.slot = c.slot;
    step.new_sequence = c.new_sequence;
    c.new_sequence = false;
    ++c.block;
    step.split_end = c.block == c.split_end;
    step.unit_end = c.block == c.unit_end;
    step.whole = c.unit_blocks >= c.blocks;
    c.slot += step.unit_end;
  }
  cursor = c;
  return step;
}

}  // namespace kimi::cuda::mla_decode_detail
