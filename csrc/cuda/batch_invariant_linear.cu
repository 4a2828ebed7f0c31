// CUDA backend of batch_invariant_linear (kimi/batch_invariant_linear.h). Portable; the kernels are those of
// cuda/common/gemm.cuh, which also fixes the order of operations.
//
// Up to 16 tokens: `stream`. Bytes num_groups * out_features * in_features * size_of(dtype), read once; two operations
// a byte and token, so bound by memory. A warp takes 16 weight rows at a time (8 where there are few), and as many
// warps run as multiprocessors hold, each with 16 to 24 KB under way: four times what 4.3 TB/s times 0.8 us of latency
// asks for. More tokens: `tile_gemm` on tiles of 128 x 128, or 64 x 64 where these are too few for the multiprocessors;
// bound by the tensor cores. fp32: `ffma_gemm`.
#include "kimi/batch_invariant_linear.h"

#include <algorithm>

#include "cuda/common/gemm.cuh"

namespace kimi::cuda {
namespace {

constexpr int kStreamWarps = 4;          // warps of a block, at most
constexpr int kWarpsPerSm = 12;          // of `stream`: 16 KB of ring each in 227 KB of shared memory
constexpr int kManyStages = 4;           // stages of a ring of 16 rows: 16 KB
constexpr int kFewStages = 12;           // of 8 rows: 24 KB, as then only one or two warps share a multiprocessor
constexpr int kTokenTilesTogether = 16;  // neighbouring blocks: 16 token tiles by 16 row tiles, which L2 holds

using LargeTile = TileShape<128, 128, 64, 64, 3, 2>;  // 96 KB: two blocks
using SmallTile = TileShape<64, 64, 32, 32, 4, 3>;    // 64 KB: three blocks

// Where one output tile lies.
struct Place {
  int64_t group, token, row;  // first token and weight row
};

template <typename T>
struct LinearTiles {
  static constexpr bool kGated = false;
  using Out = T;

  struct Tile {
    int64_t k;
    int tokens;
    const T* w[2];
    int rows[2];
    int64_t w_stride;
    Place at;
  };

  BatchInvariantLinearParams p;
  const T* x;
  bool wide;  // out may be written 16 bytes at a time

  explicit LinearTiles(const BatchInvariantLinearParams& params) : p(params), x(static_cast<const T*>(params.x)) {
    const int64_t width = 16 / static_cast<int64_t>(size_of(p.out_dtype));
    wide = aligned_to(16, p.out) && multiples_of(width, p.out_token_stride, p.out_group_stride);
  }

  template <int kTokens, int kRows>
  int64_t num_tiles() const {
    return p.num_groups * ceil_div<int64_t>(p.num_tokens, kTokens) * ceil_div<int64_t>(p.out_features, kRows);
  }

  template <int kTokens, int kRows>
  __device__ bool open(int64_t index, Tile& tile) const {
    const int64_t token_tiles = ceil_div<int64_t>(p.num_tokens, kTokens),
                  row_tiles = ceil_div<int64_t>(p.out_features, kRows);
    tile.at.group = index / (token_tiles * row_tiles);
    index -= tile.at.group * token_tiles * row_tiles;
    // Bands of kTokenTilesTogether token tiles; in a band the token tile runs fastest.
    const int64_t band = index / (kTokenTilesTogether * row_tiles);
    const int64_t in_band = index - band * kTokenTilesTogether * row_tiles;
    const int64_t left = token_tiles - band * kTokenTilesTogether,
                  height = left < kTokenTilesTogether ? left : kTokenTilesTogether;
    tile.at.token = (band * kTokenTilesTogether + in_band % height) * kTokens;
    tile.at.row = in_band / height * kRows;
    tile.k = p.in_features;
    tile.tokens = static_cast<int>(min(p.num_tokens - tile.at.token, int64_t{kTokens}));
    tile.w_stride = p.weight_row_stride;
    tile.w[0] =
        static_cast<const T*>(p.weight) + tile.at.group * p.weight_group_stride + tile.at.row * p.weight_row_stride;
    tile.w[1] = tile.w[0] + kRows / 2 * p.weight_row_stride;
    const int64_t rows = p.out_features - tile.at.row;
    tile.rows[0] = static_cast<int>(min(rows, int64_t{kRows / 2}));
    tile.rows[1] = static_cast<int>(min(rows, int64_t{kRows})) - tile.rows[0];
    return true;
  }

  __device__ int64_t x_offset(const Tile& tile, int i) const {
    return (tile.at.token + i) * p.x_token_stride + tile.at.group * p.x_group_stride;
  }

  template <int N>
  __device__ void store(const Tile& tile, int token, int column, const float (&v)[N]) const {
    store_at({tile.at.group, tile.at.token + token, tile.at.row + column}, v);
  }

  template <int N>
  __device__ void store_at(const Place& at, const float (&v)[N]) const {
    const int64_t to = at.token * p.out_token_stride + at.group * p.out_group_stride + at.row;
    const int count = static_cast<int>(min(p.out_features - at.row, int64_t{N}));
    if (p.out_dtype == DType::kF32) {
      store_results(static_cast<float*>(p.out) + to, v, count, wide);
    } else {
      store_results(static_cast<T*>(p.out) + to, v, count, wide);
    }
  }
};

// The same for `stream`, with up to 16 tokens: an item is kTiles x 8 weight rows.
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

  LinearTiles<T> linear;

  __host__ __device__ int64_t items_of_group() const { return ceil_div<int64_t>(linear.p.out_features, 8 * kTiles); }
  __host__ __device__ int64_t num_items() const { return linear.p.num_groups * items_of_group(); }

  __device__ bool open(int64_t index, Item& item) const {
    const BatchInvariantLinearParams& p = linear.p;
    item.group = index / items_of_group();
    item.row = (index - item.group * items_of_group()) * 8 * kTiles;
    item.w_stride = p.weight_row_stride;
    item.k = p.in_features;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int64_t row = item.row + 8 * j;
      item.w[j] = static_cast<const T*>(p.weight) + item.group * p.weight_group_stride + row * p.weight_row_stride;
      item.rows[j] = static_cast<int>(min(p.out_features - row, int64_t{8}));
    }
    const int64_t g = threadIdx.x % kWarp / 4;
    const T* x = linear.x + item.group * p.x_group_stride;
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
      if (g + 8 * h < linear.p.num_tokens && row < linear.p.out_features)
        linear.store_at({item.group, g + 8 * h, row}, v);
    }
  }
};

template <typename T, int kTiles, int kStages, bool kAligned>
__global__ void __launch_bounds__(kStreamWarps* kWarp)
    linear_stream(const __grid_constant__ LinearStream<T, kTiles> problem) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  auto* rings = &shared_memory<WarpRing<kTiles, kStages>>();
  Stream<T, kTiles, kStages, kAligned, LinearStream<T, kTiles>>(
      problem, rings[warp], blockIdx.x * static_cast<int64_t>(warps) + warp, gridDim.x * static_cast<int64_t>(warps))
      .run();
}

// Items spread evenly over the warps that fit.
template <typename T, int kTiles, int kStages, bool kAligned>
void launch_stream(const LinearTiles<T>& linear, cudaStream_t stream) {
  const LinearStream<T, kTiles> problem{linear};
  const int64_t items = problem.num_items(), sms = multiprocessors();
  const int64_t rounds = ceil_div(items, sms * kWarpsPerSm);
  const int64_t warps = ceil_div(items, rounds);
  const int64_t per_block = std::clamp<int64_t>(warps / sms, 1, kStreamWarps);
  launch(linear_stream<T, kTiles, kStages, kAligned>, dim3(static_cast<unsigned>(ceil_div(warps, per_block))),
         dim3(static_cast<unsigned>(per_block * kWarp)), per_block * sizeof(WarpRing<kTiles, kStages>), stream,
         problem);
}

template <typename T>
void linear_half(const BatchInvariantLinearParams& p, cudaStream_t stream) {
  const LinearTiles<T> linear(p);
  const bool aligned =
      aligned_to(16, p.x, p.weight) && multiples_of(kChunk, p.in_features, p.x_token_stride, p.x_group_stride,
                                                    p.weight_row_stride, p.weight_group_stride);
  // Offsets of x are 32 bits of 16 bytes in tile_gemm.
  const int64_t x_extent = (p.num_tokens - 1) * p.x_token_stride + (p.num_groups - 1) * p.x_group_stride;
  const bool small_offsets = x_extent / kChunk < UINT32_MAX;
  if (p.num_tokens <= kStreamTokens) {
    const int64_t items = p.num_groups * ceil_div<int64_t>(p.out_features, 16);
    if (!aligned) {
      launch_stream<T, 2, kManyStages, false>(linear, stream);
    } else if (items < 2 * multiprocessors()) {
      launch_stream<T, 1, kFewStages, true>(linear, stream);
    } else {
      launch_stream<T, 2, kManyStages, true>(linear, stream);
    }
  } else if (!aligned || !small_offsets) {
    launch_tile_gemm<T, SmallTile, false>(linear, stream);
  } else if (linear.template num_tiles<LargeTile::kTokens, LargeTile::kRows>() < multiprocessors()) {
    launch_tile_gemm<T, SmallTile, true>(linear, stream);
  } else {
    launch_tile_gemm<T, LargeTile, true>(linear, stream);
  }
}

}  // namespace

void batch_invariant_linear(const BatchInvariantLinearParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_groups == 0 || p.out_features == 0) return;
  if (p.dtype == DType::kF32) return launch_ffma_gemm(LinearTiles<float>(p), stream);
  dispatch_half(p.dtype, [&]<typename T>() { linear_half<T>(p, stream); });
}

}  // namespace kimi::cuda
