// mla_decode in fp32 arithmetic, for fp32 tensors and for dims that are not the released ones
// (cuda/common/attention.h).
//
// Grid: (unit of a sequence, at most 32) x (16 heads) x (512 columns of the latents, each with its own q k^T). Shared
// memory 58 KB. Bound by FFMA and the loads from shared memory that feed it; for tests and small models.
#pragma once

#include "cuda/common/attention.h"
#include "cuda/common/launch.h"
#include "cuda/mla_decode/plan.cuh"

namespace kimi::cuda::mla_decode_detail {

inline constexpr int kGenericChunks = 4, kGenericColumns = kGenericChunks * kAttentionColumns;

template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    mla_decode_generic_kernel(MlaDecodeParams p, Workspace w, int generic_units) {
  AttentionShared& shared = shared_memory<AttentionShared>();
  const int64_t seq = blockIdx.x / generic_units;
  const int unit = static_cast<int>(blockIdx.x % generic_units), length = length_of(p, seq);
  const GenericPieces pieces(length);
  if (unit >= pieces.units) return;
  const int64_t first_head = static_cast<int64_t>(blockIdx.y) * kAttentionRows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.z) * kGenericColumns;
  const int64_t columns = min(p.latent_dim - first_column, static_cast<int64_t>(kGenericColumns));
  const int64_t row_dim = p.latent_dim + p.rope_dim;
  const T* const q = static_cast<const T*>(p.q) + seq * p.q_seq_stride + first_head * p.q_head_stride;
  const int32_t* const pages = p.block_table + seq * p.block_table_stride;

  AttentionState<kGenericChunks> state;
  const int end = min((unit + 1) * pieces.unit_blocks * kBlockRows, length);
  for (int first = unit * pieces.unit_blocks * kBlockRows; first < end; first += kBlockRows) {
    const int count = min(end - first, kBlockRows);
    const auto row = [&](int j) {
      const int at = first + j, size = static_cast<int>(p.page_size);
      return static_cast<const T*>(p.cache) + pages[at / size] * p.page_stride + at % size * row_dim;
    };
    state.attend(
        shared, count, count, row_dim, columns, p.scale * kLog2E,
        [&](int h, int64_t c) { return first_head + h < p.num_heads ? to_float(q[h * p.q_head_stride + c]) : 0.0f; },
        [&](int j, int64_t c) { return to_float(row(j)[c]); },
        [&](int j, int64_t c) { return to_float(row(j)[first_column + c]); });
  }

  const float sum = state.total_sum();
  const int64_t head = first_head + threadIdx.x / 8;
  if (head >= p.num_heads) return;
  const int64_t at = (seq * generic_units + unit) * p.num_heads + head;
  if (blockIdx.z == 0 && threadIdx.x % 8 == 0) w.sums[at] = {state.max, sum, sum, 0.0f};
#pragma unroll
  for (int chunk = 0; chunk < kGenericChunks; ++chunk) {
#pragma unroll
    for (int i = 0; i < state.kThreadColumns; ++i) {
      const int column = state.column(chunk, i);
      if (column < columns) w.o[at * p.latent_dim + first_column + column] = state.o[chunk][i];
    }
  }
}

template <typename T>
void launch_generic(const MlaDecodeParams& p, const Workspace& workspace, cudaStream_t stream) {
  const int units = generic_units(p);
  const dim3 grid(static_cast<unsigned>(p.num_seqs * units),
                  static_cast<unsigned>(ceil_div<int64_t>(p.num_heads, kAttentionRows)),
                  static_cast<unsigned>(ceil_div<int64_t>(p.latent_dim, kGenericColumns)));
  launch(mla_decode_generic_kernel<T>, grid, dim3(kAttentionThreads), sizeof(AttentionShared), stream, p, workspace,
         units);
}

}  // namespace kimi::cuda::mla_decode_detail
