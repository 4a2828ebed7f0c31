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

constexpr int kManyStages = 4;  // stages of a ring of 16 rows: 16 KB
constexpr int kFewStages = 12;  // of 8 rows: 24 KB, as then only one or two warps share a multiprocessor

using LargeTile = TileShape<128, 128, 64, 64, 3, 2>;  // 96 KB: two blocks
using SmallTile = TileShape<64, 64, 32, 32, 4, 3>;    // 64 KB: three blocks

// For `stream`, with up to 16 tokens: an item is kTiles x 8 weight rows.
template <typename T, int kTiles>
struct LinearStream {
  static constexpr bool kGated = false;

  struct Item {
    const T* w[2];
    int rows[2];
    int64_t w_stride, k;
    const T *x_lo, *x_hi;
    int64_t group, row;
  };

  Dense<T> dense;

  __host__ __device__ int64_t items_of_group() const { return ceil_div<int64_t>(dense.shape.num_rows, 8 * kTiles); }
  __host__ __device__ int64_t num_items() const { return dense.shape.num_groups * items_of_group(); }

  __device__ bool open(int64_t index, Item& item) const {
    const DenseShape& p = dense.shape;
    item.group = index / items_of_group();
    item.row = (index - item.group * items_of_group()) * 8 * kTiles;
    item.w_stride = p.w_row_stride;
    item.k = p.k;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      item.w[j] = dense.weights(item.group, item.row + 8 * j);
      item.rows[j] = static_cast<int>(min(p.num_rows - item.row - 8 * j, int64_t{8}));
    }
    const int64_t g = threadIdx.x % kWarp / 4;
    const T* x = dense.x + item.group * p.x_group_stride;
    item.x_lo = g < p.num_tokens ? x + g * p.x_token_stride : nullptr;
    item.x_hi = g + 8 < p.num_tokens ? x + (g + 8) * p.x_token_stride : nullptr;
    return true;
  }

  __device__ void store(const Item& item, const float (&acc)[kTiles][4]) const {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float v[2 * kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) v[2 * j] = acc[j][2 * h], v[2 * j + 1] = acc[j][2 * h + 1];
      const int64_t row = item.row + t * 2 * kTiles;
      if (g + 8 * h < dense.shape.num_tokens && row < dense.shape.num_rows) {
        dense.store_at(item.group, g + 8 * h, row, v);
      }
    }
  }
};

// SASS: tensor cores, 16-byte loads
template <typename T, int kTiles, int kStages, bool kAligned>
__global__ void __launch_bounds__(kStreamWarps* kWarp, kStreamWarpsPerSm / kStreamWarps)
    linear_stream(const __grid_constant__ LinearStream<T, kTiles> problem) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  auto* rings = &shared_memory<WarpRing<kTiles, kStages>>();
  Stream<T, kTiles, kStages, kAligned, LinearStream<T, kTiles>>(
      problem, rings[warp], blockIdx.x * static_cast<int64_t>(warps) + warp, gridDim.x * static_cast<int64_t>(warps))
      .run();
}

template <typename T, int kTiles, int kStages, bool kAligned>
void launch_stream(const Dense<T>& dense, cudaStream_t stream) {
  const LinearStream<T, kTiles> problem{dense};
  const StreamGrid grid = stream_grid(problem.num_items());
  launch(linear_stream<T, kTiles, kStages, kAligned>, dim3(grid.blocks), dim3(grid.warps * kWarp),
         grid.warps * sizeof(WarpRing<kTiles, kStages>), stream, problem);
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
  const bool aligned = shape.aligned();
  if (shape.num_tokens <= kStreamTokens) {
    const int64_t items = shape.num_groups * ceil_div<int64_t>(shape.num_rows, 16);
    if (!aligned) {
      launch_stream<T, 2, kManyStages, false>(dense, stream);
    } else if (items < 2 * multiprocessors()) {
      launch_stream<T, 1, kFewStages, true>(dense, stream);
    } else {
      launch_stream<T, 2, kManyStages, true>(dense, stream);
    }
  } else if (!aligned || !shape.small_offsets()) {
    launch_tile_gemm<T, SmallTile, false>(dense, stream);
  } else if (dense.template num_tiles<LargeTile::kTokens, LargeTile::kRows>() < multiprocessors()) {
    launch_tile_gemm<T, SmallTile, true>(dense, stream);
  } else {
    launch_tile_gemm<T, LargeTile, true>(dense, stream);
  }
}

}  // namespace

void batch_invariant_linear(const BatchInvariantLinearParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_groups == 0 || p.out_features == 0) return;
  const DenseShape shape = shape_of(p);
  if (p.dtype == DType::kF32) return launch_ffma_gemm(Dense<float>(shape), stream);
  dispatch_half(p.dtype, [&]<typename T>() { linear_half<T>(shape, stream); });
}

}  // namespace kimi::cuda
