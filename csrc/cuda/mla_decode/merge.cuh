// Folds the partial results of mla_decode (plan.cuh) and writes the outputs that no single unit could write.
//
// Grid: sequence x as many blocks as fill the device; a block takes (head, 128 columns) items of its sequence. The
// splits of a segment are folded by one warp, the segments then by one thread a column: the order is that of plan.cuh
// whatever the grid. Reads the partial results once, mostly from L2: 64 KB a unit at 32 heads.
#pragma once

#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/mla_decode/plan.cuh"

namespace kimi::cuda::mla_decode_detail {

inline constexpr int kMergeColumns = 128, kMergeWarps = 8;
inline constexpr int kMergeBatch = 8;  // partial results whose loads are under way at once

struct MergeShared {
  float o[kMaxSegments][kMergeColumns];
  float max[kMaxSegments], sum[kMaxSegments], rounded_sum[kMaxSegments];
};

// A running fold of `Columns` columns.
template <int Columns>
struct Folded {
  float max = -INFINITY, sum = 0.0f, rounded_sum = 0.0f;
  float o[Columns] = {};
  __device__ void add(float x_max, float x_sum, float x_rounded_sum, const float (&x)[Columns]) {
    const FoldFactors factors(max, x_max);
    max = factors.max;
    sum = fold(sum, factors.old, x_sum, factors.added);
    rounded_sum = fold(rounded_sum, factors.old, x_rounded_sum, factors.added);
#pragma unroll
    for (int i = 0; i < Columns; ++i) o[i] = fold(o[i], factors.old, x[i], factors.added);
  }
};

// `Released`: the partial results are those of the tensor-core kernel, which has written the outputs of sequences that
// are one unit. Else those of the generic kernel, `generic_units` slots a sequence.
template <typename T, bool Released>
__global__ void __launch_bounds__(kMergeWarps* kWarp)
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
  const int segments = ceil_div(units, segment_units);

  const int64_t slices = ceil_div<int64_t>(p.latent_dim, kMergeColumns);
  for (int64_t item = blockIdx.y; item < p.num_heads * slices; item += gridDim.y) {
    const int64_t head = item / slices, first_column = item % slices * kMergeColumns;

    // Phase 1: each segment's splits.
    for (int segment = warp; segment < segments; segment += kMergeWarps) {
      Folded<4> folded;
      const int end = min((segment + 1) * segment_units, units);
      for (int unit = segment * segment_units; unit < end; unit += kMergeBatch) {
        Vec<float, 4> x[kMergeBatch];
        float max[kMergeBatch], sum[kMergeBatch], rounded_sum[kMergeBatch];
#pragma unroll
        for (int i = 0; i < kMergeBatch; ++i) {
          if (unit + i >= end) break;
          const int64_t at = (first_slot + unit + i) * p.num_heads + head, column = first_column + lane * 4;
          const float* const from = w.o + at * p.latent_dim + column;
          if constexpr (Released) {
            x[i] = load_vec<float, 4>(from);
          } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) x[i].x[e] = column + e < p.latent_dim ? from[e] : 0.0f;
          }
          max[i] = w.max[at];
          sum[i] = w.sum[at];
          rounded_sum[i] = w.rounded_sum[at];
        }
#pragma unroll
        for (int i = 0; i < kMergeBatch; ++i) {
          if (unit + i < end) folded.add(max[i], sum[i], rounded_sum[i], x[i].x);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) shared.o[segment][lane * 4 + i] = folded.o[i];
      if (lane == 0) {
        shared.max[segment] = folded.max;
        shared.sum[segment] = folded.sum;
        shared.rounded_sum[segment] = folded.rounded_sum;
      }
    }
    __syncthreads();

    // Phase 2: the segments.
    const int64_t column = first_column + threadIdx.x;
    if (threadIdx.x < kMergeColumns && column < p.latent_dim) {
      Folded<1> folded;
      for (int i = 0; i < segments; ++i)
        folded.add(shared.max[i], shared.sum[i], shared.rounded_sum[i], {shared.o[i][threadIdx.x]});
      const float inverse = 1.0f / folded.rounded_sum;
      static_cast<T*>(p.out)[seq * p.out_seq_stride + head * p.out_head_stride + column] =
          from_float<T>(units == 0 ? 0.0f : folded.o[0] * inverse);
      if (p.lse && column == 0)
        p.lse[seq * p.num_heads + head] = units == 0 ? -INFINITY : natural_lse(folded.max, folded.sum);
    }
    __syncthreads();
  }
}

template <typename T, bool Released>
void launch_merge(const MlaDecodeParams& p, const Workspace& workspace, cudaStream_t stream) {
  const int64_t items = p.num_heads * ceil_div<int64_t>(p.latent_dim, kMergeColumns);
  const int64_t blocks = std::min(items, ceil_div<int64_t>(4 * multiprocessors(), p.num_seqs));
  launch(mla_decode_merge_kernel<T, Released>, dim3(static_cast<unsigned>(p.num_seqs), static_cast<unsigned>(blocks)),
         dim3(kMergeWarps * kWarp), sizeof(MergeShared), stream, p, workspace, generic_units(p));
}

}  // namespace kimi::cuda::mla_decode_detail
