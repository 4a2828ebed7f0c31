// Folds the partial results of mla_decode (plan.cuh) and writes the outputs that no single unit could write.
//
// Grid: sequence x as many blocks as fill the device; an item is (head, 128 columns) of a sequence. Sequences of few
// units: a warp takes an item. Else a block does: each warp folds whole segments, then one thread a column folds these.
// The order is that of plan.cuh either way. Reads the partial results once, mostly from L2: 64 KB a unit at 32 heads.
#pragma once

#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/mla_decode/plan.cuh"

namespace kimi::cuda::mla_decode_detail {

inline constexpr int kMergeColumns = 128, kMergeWarps = 8;
inline constexpr int kMergeBatch = 8;   // partial results whose loads are under way at once
inline constexpr int kWarpUnits = 16;   // up to so many units a warp merges alone
inline constexpr int kMergeBlocks = 2;  // on a multiprocessor

struct MergeShared {
  float o[kMaxSegments][kMergeColumns];
  PartialSums sums[kMaxSegments];
};

// A running fold of `Columns` columns.
template <int Columns>
struct Folded {
  PartialSums sums = {-INFINITY, 0.0f, 0.0f, 0.0f};
  float o[Columns] = {};
  __device__ void add(const PartialSums& x_sums, const float (&x)[Columns]) {
    const FoldFactors factors(sums.max, x_sums.max);
    sums.max = factors.max;
    sums.sum = fold(sums.sum, factors.old, x_sums.sum, factors.added);
    sums.rounded_sum = fold(sums.rounded_sum, factors.old, x_sums.rounded_sum, factors.added);
#pragma unroll
    for (int i = 0; i < Columns; ++i) o[i] = fold(o[i], factors.old, x[i], factors.added);
  }
};

// One head and the lane's four columns of a sequence.
template <typename T, bool Released>
struct MergeItem {
  const MlaDecodeParams& p;
  const Workspace& w;
  int64_t seq, first_slot, head, column;

  // add(u, sums, x) for the units u of [begin, end) in order.
  template <typename Add>
  __device__ void for_units(int begin, int end, const Add& add) const {
    for (int unit = begin; unit < end; unit += kMergeBatch) {
      Vec<float, 4> x[kMergeBatch];
      PartialSums sums[kMergeBatch];
#pragma unroll
      for (int i = 0; i < kMergeBatch; ++i) {
        if (unit + i >= end) break;
        const int64_t at = (first_slot + unit + i) * p.num_heads + head;
        const float* const from = w.o + at * p.latent_dim + column;
        if constexpr (Released) {
          x[i] = load_vec<float, 4>(from);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) x[i].x[e] = column + e < p.latent_dim ? from[e] : 0.0f;
        }
        sums[i] = w.sums[at];
      }
#pragma unroll
      for (int i = 0; i < kMergeBatch; ++i) {
        if (unit + i < end) add(unit + i, sums[i], x[i].x);
      }
    }
  }

  template <int Columns>
  __device__ void write(const Folded<Columns>& folded, int64_t at_column, bool empty) const {
    T* const out = static_cast<T*>(p.out) + seq * p.out_seq_stride + head * p.out_head_stride + at_column;
    const float inverse = empty ? 0.0f : 1.0f / folded.sums.rounded_sum;
#pragma unroll
    for (int i = 0; i < Columns; ++i) {
      if (at_column + i < p.latent_dim) out[i] = from_float<T>(folded.o[i] * inverse);
    }
    if (p.lse && at_column == 0)
      p.lse[seq * p.num_heads + head] = empty ? -INFINITY : natural_lse(folded.sums.max, folded.sums.sum);
  }
};

// `Released`: the partial results are those of the tensor-core kernel, which has written the outputs of sequences that
// are one unit. Else those of the generic kernel, `generic_units` slots a sequence.
// SASS: 16-byte loads
template <typename T, bool Released>
__global__ void __launch_bounds__(kMergeWarps* kWarp, kMergeBlocks)
    mla_decode_merge_kernel(MlaDecodeParams p, Workspace w, int generic_units) {
  MergeShared& shared = shared_memory<MergeShared>();
  const int64_t seq = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t first_slot;
  int units, segment_units = 1;
  if constexpr (Released) {
    first_slot = w.first_unit[seq];
    units = w.first_unit[seq + 1] - static_cast<int>(first_slot);
    if (units == 1) return;
    if (*w.by_split) segment_units = Pieces(length_of(p, seq)).segment_splits;
  } else {
    first_slot = seq * generic_units;
    units = GenericPieces(length_of(p, seq)).units;
  }
  const int64_t slices = ceil_div<int64_t>(p.latent_dim, kMergeColumns), items = p.num_heads * slices;
  const auto item_of = [&](int64_t index) {
    return MergeItem<T, Released>{p, w, seq, first_slot, index / slices, index % slices * kMergeColumns + lane * 4};
  };

  if (units <= kWarpUnits) {
    for (int64_t index = blockIdx.y * kMergeWarps + warp; index < items; index += gridDim.y * kMergeWarps) {
      const auto item = item_of(index);
      Folded<4> total, segment;
      item.for_units(0, units, [&](int unit, const PartialSums& sums, const float (&x)[4]) {
        segment.add(sums, x);
        if ((unit + 1) % segment_units != 0 && unit + 1 != units) return;
        total.add(segment.sums, segment.o);
        segment = {};
      });
      item.write(total, item.column, units == 0);
    }
    return;
  }
  const int segments = ceil_div(units, segment_units);
  for (int64_t index = blockIdx.y; index < items; index += gridDim.y) {
    const auto item = item_of(index);
    // Phase 1: each segment's splits.
    for (int i = warp; i < segments; i += kMergeWarps) {
      Folded<4> segment;
      item.for_units(i * segment_units, min((i + 1) * segment_units, units),
                     [&](int, const PartialSums& sums, const float (&x)[4]) { segment.add(sums, x); });
      store_vec(&shared.o[i][lane * 4], bits_as<Vec<float, 4>>(segment.o));
      if (lane == 0) shared.sums[i] = segment.sums;
    }
    __syncthreads();
    // Phase 2: the segments.
    if (threadIdx.x < kMergeColumns) {
      Folded<1> total;
      for (int i = 0; i < segments; ++i) total.add(shared.sums[i], {shared.o[i][threadIdx.x]});
      item.write(total, index % slices * kMergeColumns + threadIdx.x, false);
    }
    __syncthreads();
  }
}

template <typename T, bool Released>
void launch_merge(const MlaDecodeParams& p, const Workspace& workspace, cudaStream_t stream) {
  const int64_t items = p.num_heads * ceil_div<int64_t>(p.latent_dim, kMergeColumns);
  const int64_t blocks = std::min(items, ceil_div<int64_t>(2 * kMergeBlocks * multiprocessors(), p.num_seqs));
  launch(mla_decode_merge_kernel<T, Released>, dim3(static_cast<unsigned>(p.num_seqs), static_cast<unsigned>(blocks)),
         dim3(kMergeWarps * kWarp), sizeof(MergeShared), stream, p, workspace, generic_units(p));
}

}  // namespace kimi::cuda::mla_decode_detail
