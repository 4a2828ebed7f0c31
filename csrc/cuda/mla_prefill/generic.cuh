// mla_prefill in fp32 arithmetic, for fp32 tensors and for dims that are not the released ones
// (cuda/common/attention.h).
//
// Grid: (query tile of 16, head; see tiles.cuh) x (128 columns of the values, each with its own q k^T). Shared memory
// 58 KB. Bound by FFMA and the loads from shared memory that feed it; for tests and small models.
#pragma once

#include "cuda/common/attention.h"
#include "cuda/common/launch.h"
#include "cuda/mla_prefill/tiles.cuh"

namespace kimi::cuda::mla_prefill_detail {

template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    mla_prefill_generic_kernel(MlaPrefillParams p, int64_t num_tiles) {
  AttentionShared& shared = shared_memory<AttentionShared>();
  const QueryTile tile = query_tile(p, kAttentionRows, num_tiles, (p.nope_dim + p.value_dim) * sizeof(T));
  if (tile.rows == 0) return;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kAttentionColumns;
  const int64_t columns = min(p.value_dim - first_column, static_cast<int64_t>(kAttentionColumns));
  const T* const q = static_cast<const T*>(p.q) + tile.q_at * p.q_stride + tile.head * p.q_head_stride;
  const T* const k_nope =
      static_cast<const T*>(p.k_nope) + tile.k_at * p.k_nope_stride + tile.head * p.k_nope_head_stride;
  const T* const k_rope = static_cast<const T*>(p.k_rope) + tile.k_at * p.k_rope_stride - p.nope_dim;
  const T* const v = static_cast<const T*>(p.v) + tile.k_at * p.v_stride + tile.head * p.v_head_stride + first_column;

  const int row = threadIdx.x / 8;
  const int row_end = tile.end_of(row, 1);  // 0 for rows past the last query
  AttentionState<1> state;
  const int end = tile.end_of(0, kAttentionRows);
  for (int first = 0; first < end; first += kAttentionKeys) {
    state.attend(
        shared, row_end - first, min(tile.num_keys - first, kAttentionKeys), p.nope_dim + p.rope_dim, columns,
        p.scale * kLog2E, [&](int r, int64_t c) { return r < tile.rows ? to_float(q[r * p.q_stride + c]) : 0.0f; },
        [&](int j, int64_t c) {
          const int64_t key = first + j;
          return to_float(c < p.nope_dim ? k_nope[key * p.k_nope_stride + c] : k_rope[key * p.k_rope_stride + c]);
        },
        [&](int j, int64_t c) { return to_float(v[(first + j) * p.v_stride + c]); });
  }

  const float sum = state.total_sum();
  if (row >= tile.rows) return;
  const bool blind = row_end == 0;
  const int64_t token = tile.q_at + row;
  if (p.lse && blockIdx.y == 0 && threadIdx.x % 8 == 0)
    p.lse[token * p.num_heads + tile.head] = blind ? -INFINITY : natural_lse(state.max, sum);
  const int64_t out_at = token * p.out_stride + tile.head * p.out_head_stride + first_column;
#pragma unroll
  for (int i = 0; i < state.kThreadColumns; ++i) {
    const int column = state.column(0, i);
    if (column >= columns) continue;
    const float x = blind ? 0.0f : state.o[0][i] / sum;
    if (p.out_dtype == DType::kF32) {
      static_cast<float*>(p.out)[out_at + column] = x;
    } else {
      static_cast<T*>(p.out)[out_at + column] = from_float<T>(x);
    }
  }
}

template <typename T>
void launch_generic(const MlaPrefillParams& p, cudaStream_t stream) {
  const int64_t num_tiles = max_query_tiles(p, kAttentionRows);
  const dim3 grid(static_cast<unsigned>(num_tiles * p.num_heads),
                  static_cast<unsigned>(ceil_div<int64_t>(p.value_dim, kAttentionColumns)));
  launch(mla_prefill_generic_kernel<T>, grid, dim3(kAttentionThreads), sizeof(AttentionShared), stream, p, num_tiles);
}

}  // namespace kimi::cuda::mla_prefill_detail
