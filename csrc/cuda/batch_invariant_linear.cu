// CUDA backend of batch_invariant_linear (kimi/batch_invariant_linear.h). Portable; the kernels are those of
// cuda/common/gemm.cuh, which also fixes the order of operations.
//
// Up to 16 tokens: `stream`. Bytes num_groups * out_features * in_features * size_of(dtype), read once; two operations
// a byte and token, so bound by memory. A warp takes 16 weight rows at a time (8 where there are few), and as many
// warps run as multiprocessors hold, each with 16 to 24 KB under way: four times what 4.3 TB/s times 0.8 us of latency
// asks for. More tokens: `tile_gemm` on tiles of 128 x 128, or 64 x 64 where these are too few for the multiprocessors;
// bound by the tensor cores. fp32: `ffma_gemm`.
#include "kimi/batch_invariant_linear.h"

#include "cuda/common/dense.cuh"

namespace kimi::cuda {
namespace {

constexpr int kManyStages = 3;  // stages of a ring of 16 rows: 12 KB a warp, 144 KB with all 12 warps
constexpr int kFewStages = 12;  // of 8 rows: 24 KB, for the few warps that share a multiprocessor then

// For `Stream`: up to kTiles x 8 weight rows of one group, and up to 16 tokens.
template <typename T, int kTiles>
struct LinearStream {
  static constexpr bool kGated = false;

  struct Item {
    const T* w[2];
    int rows[2];
    int64_t w_stride, k;
    int x_row;
    int64_t row;
  };

  const Dense<T>& dense;
  int64_t group;
  int rows_of_item;

  __device__ int64_t num_items() const { return ceil_div<int64_t>(dense.shape.num_rows, rows_of_item); }

  __device__ bool open(int64_t index, Item& item) const {
    const DenseShape& p = dense.shape;
    item.row = index * rows_of_item;
    const int rows = static_cast<int>(min(p.num_rows - item.row, int64_t{rows_of_item}));
    item.w_stride = p.w_row_stride;
    item.k = p.k;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      item.w[j] = dense.weights(group, item.row + 8 * j);
      item.rows[j] = rows - 8 * j;
    }
    item.x_row = min(static_cast<int>(threadIdx.x % 16), static_cast<int>(p.num_tokens));
    return true;
  }

  __device__ void store(const Item& item, const float (&acc)[kTiles][4]) const {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float v[2 * kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) v[2 * j] = acc[j][2 * h], v[2 * j + 1] = acc[j][2 * h + 1];
      const int row = t * 2 * kTiles;
      if (g + 8 * h < dense.shape.num_tokens && row < item.rows[0]) {
        dense.store_at(group, g + 8 * h, item.row + row, v, item.rows[0] - row);
      }
    }
  }
};

// Shared memory: the warps' rings, then the tokens' rows and one of zeros.
// SASS: tensor cores, 16-byte loads
template <typename T, int kTiles, int kStages, bool kAligned>
__global__ void __launch_bounds__(kStreamWarps* kWarp, 1)
    linear_stream(const __grid_constant__ Dense<T> dense, int64_t blocks_per_group, int rows_of_item) {
  const DenseShape& p = dense.shape;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  auto* rings = &shared_memory<WarpRing<kTiles, kStages>>();
  auto* rows = reinterpret_cast<unsigned char*>(rings + warps);
  const int64_t row_bytes = stream_row_bytes(p.k), group = blockIdx.x / blocks_per_group;
  for (int i = 0; i <= p.num_tokens; ++i) {
    const T* from = i < p.num_tokens ? dense.x + i * p.x_token_stride + group * p.x_group_stride : nullptr;
    stream_copy_row<T, kAligned>(rows, row_bytes, i, from, p.k, threadIdx.x, blockDim.x);
  }
  cp_async_commit();
  const LinearStream<T, kTiles> problem{dense, group, rows_of_item};
  Stream<T, kTiles, kStages, kAligned, LinearStream<T, kTiles>> stream(
      problem, rings[warp], rows, row_bytes, blockIdx.x % blocks_per_group * warps + warp, blocks_per_group * warps);
  stream.start();
  stream.wait_for_rows();
  __syncthreads();
  stream.run();
}

// False if the tokens' rows are too long for shared memory.
template <typename T, int kTiles, int kStages, bool kAligned>
bool launch_stream(const Dense<T>& dense, cudaStream_t stream) {
  const DenseShape& p = dense.shape;
  int64_t rows_of_item = 8 * kTiles;
  if (p.num_groups == 1) {  // fewer, if that gives every multiprocessor as many
    const int64_t warps = round_up<int64_t>(ceil_div(p.num_rows, rows_of_item), multiprocessors());
    rows_of_item = round_up<int64_t>(ceil_div(p.num_rows, warps), 2 * kTiles);  // a lane's results in one access
  }
  const size_t rows = static_cast<size_t>((p.num_tokens + 1) * stream_row_bytes(p.k));
  const size_t ring = sizeof(WarpRing<kTiles, kStages>);
  const StreamGrid grid = stream_grid(p.num_groups, ceil_div(p.num_rows, rows_of_item), ring, rows);
  if (grid.blocks == 0) return false;
  launch(linear_stream<T, kTiles, kStages, kAligned>, dim3(static_cast<unsigned>(grid.blocks * p.num_groups)),
         dim3(static_cast<unsigned>(grid.warps * kWarp)), grid.warps * ring + rows, stream, dense, grid.blocks,
         static_cast<int>(rows_of_item));
  return true;
}

DenseShape shape_of(const BatchInvariantLinearParams& p) {
  DenseShape s = {};
  s.x = p.x, s.w = p.weight, s.out = p.out;
  s.num_tokens = p.num_tokens, s.num_groups = p.num_groups, s.k = p.in_features, s.num_rows = p.out_features;
  s.x_token_stride = p.x_token_stride, s.x_group_stride = p.x_group_stride;
  s.w_row_stride = p.weight_row_stride, s.w_group_stride = p.weight_group_stride;
  s.out_token_stride = p.out_token_stride, s.out_group_stride = p.out_group_stride;
  s.out_f32 = p.out_dtype == DType::kF32;
  s.set_out_wide();
  return s;
}

template <typename T>
void linear_half(const DenseShape& shape, cudaStream_t stream) {
  const Dense<T> dense(shape);
  if (shape.num_tokens <= kStreamTokens) {
    const bool few = shape.num_groups * ceil_div<int64_t>(shape.num_rows, 16) < 4 * multiprocessors();
    if (!shape.aligned()) {
      if (launch_stream<T, 1, kManyStages, false>(dense, stream)) return;
    } else if (few) {
      if (launch_stream<T, 1, kFewStages, true>(dense, stream)) return;
    } else {
      if (launch_stream<T, 2, kManyStages, true>(dense, stream)) return;
    }
  }
  launch_dense_tiles(dense, stream);
}

}  // namespace

void batch_invariant_linear(const BatchInvariantLinearParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_groups == 0 || p.out_features == 0) return;
  const DenseShape shape = shape_of(p);
  if (p.dtype == DType::kF32) return launch_ffma_gemm(Dense<float>(shape), stream);
  dispatch_half(p.dtype, [&]<typename T>() { linear_half<T>(shape, stream); });
}

}  // namespace kimi::cuda
