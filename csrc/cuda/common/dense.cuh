// The plain matrix product as a Problem of the kernels in gemm.cuh: out[t, g, n] = sum over k of x[t, g, k] w[g, n, k].
#pragma once

#include "cuda/common/gemm.cuh"

namespace kimi::cuda {

// Sizes and strides in elements; the last dimension is contiguous everywhere.
struct DenseShape {
  const void* x;
  const void* w;
  void* out;
  int64_t num_tokens, num_groups, k, num_rows;
  int64_t x_token_stride, x_group_stride, w_group_stride, w_row_stride, out_token_stride, out_group_stride;
  bool out_f32;   // out is fp32 instead of x's type
  bool out_wide;  // and may be written 16 bytes at a time
  int segment;    // columns to a segment of the sum (kSegmented), a multiple of kTileK

  // Of 16-bit types: rows can be read 16 bytes at a time.
  bool aligned() const {
    return aligned_to(16, x, w) &&
           multiples_of(kChunk, k, x_token_stride, x_group_stride, w_row_stride, w_group_stride);
  }
  // tile_gemm keeps offsets in 32 bits, in units of 16 bytes.
  bool small_offsets() const {
    return ((num_tokens - 1) * x_token_stride + (num_groups - 1) * x_group_stride) / kChunk < UINT32_MAX &&
           128 * w_row_stride / kChunk < UINT32_MAX;
  }
  void set_out_wide() {
    const int64_t width = out_f32 ? 4 : 8;
    out_wide = aligned_to(16, out) && multiples_of(width, out_token_stride, out_group_stride);
  }
};

template <typename T, bool kSegmented_ = false>
struct Dense {
  static constexpr bool kGated = false;
  static constexpr bool kSegmented = kSegmented_;
  static constexpr int64_t kTokenTilesTogether =
      16;  // neighbouring blocks: 16 token tiles by 16 row tiles, which L2 holds
  using Out = T;

  struct Tile {
    int64_t k;
    int tokens;
    const T* w[2];
    int rows[2];
    int64_t w_stride;
    int64_t group, token, row;  // the first ones
  };

  DenseShape shape;
  const T* x;

  explicit Dense(const DenseShape& s) : shape(s), x(static_cast<const T*>(s.x)) {}

  __device__ int segment() const { return shape.segment; }

  template <int kTokens, int kRows>
  int64_t num_tiles() const {
    return shape.num_groups * ceil_div<int64_t>(shape.num_tokens, kTokens) * ceil_div<int64_t>(shape.num_rows, kRows);
  }

  __device__ const T* weights(int64_t group, int64_t row) const {
    return static_cast<const T*>(shape.w) + group * shape.w_group_stride + row * shape.w_row_stride;
  }

  template <int kTokens, int kRows>
  __device__ bool open(int64_t index, Tile& tile) const {
    const int64_t token_tiles = ceil_div<int64_t>(shape.num_tokens, kTokens);
    const int64_t row_tiles = ceil_div<int64_t>(shape.num_rows, kRows);
    tile.group = index / (token_tiles * row_tiles);
    index -= tile.group * token_tiles * row_tiles;
    // Bands of token tiles; in a band the token tile runs fastest.
    const int64_t band = index / (kTokenTilesTogether * row_tiles);
    const int64_t in_band = index - band * kTokenTilesTogether * row_tiles;
    const int64_t height = min(token_tiles - band * kTokenTilesTogether, int64_t{kTokenTilesTogether});
    tile.token = (band * kTokenTilesTogether + in_band % height) * kTokens;
    tile.row = in_band / height * kRows;
    tile.k = shape.k;
    tile.tokens = static_cast<int>(min(shape.num_tokens - tile.token, int64_t{kTokens}));
    tile.w_stride = shape.w_row_stride;
    tile.w[0] = weights(tile.group, tile.row);
    tile.w[1] = tile.w[0] + kRows / 2 * shape.w_row_stride;
    const int64_t rows = shape.num_rows - tile.row;
    tile.rows[0] = static_cast<int>(min(rows, int64_t{kRows / 2}));
    tile.rows[1] = static_cast<int>(min(rows, int64_t{kRows})) - tile.rows[0];
    return true;
  }

  __device__ int64_t x_offset(const Tile& tile, int i) const {
    return (tile.token + i) * shape.x_token_stride + tile.group * shape.x_group_stride;
  }

  template <int N>
  __device__ void store(const Tile& tile, int token, int column, const float (&v)[N]) const {
    store_at(tile.group, tile.token + token, tile.row + column, v, N);
  }

  // Of the values, the first `count`.
  template <int N>
  __device__ void store_at(int64_t group, int64_t token, int64_t row, const float (&v)[N], int count) const {
    const int64_t to = token * shape.out_token_stride + group * shape.out_group_stride + row;
    count = static_cast<int>(min(shape.num_rows - row, int64_t{count}));
    if (shape.out_f32) {
      store_results(static_cast<float*>(shape.out) + to, v, count, shape.out_wide);
    } else {
      store_results(static_cast<T*>(shape.out) + to, v, count, shape.out_wide);
    }
  }
};

using DenseTile128 = TileShape<128, 128, 64, 64, 3, 2>;           // 96 KB: two blocks
using DenseTile128Segmented = TileShape<128, 128, 64, 32, 3, 1>;  // 8 warps, for two sets of accumulators
using DenseTile64x128 = TileShape<64, 128, 32, 64, 4, 2>;         // 96 KB
using DenseTile64 = TileShape<64, 64, 32, 32, 4, 3>;              // 64 KB: three blocks
using DenseTile16 = TileShape<16, 64, 16, 16, 8, 2>;              // 80 KB

// tile_gemm on the tiles that keep the multiprocessors busy for the shortest time. `percent` is what of the large
// tile's rate another one reaches, by and large.
template <typename T, bool kSegmented>
void launch_dense_tiles(const Dense<T, kSegmented>& dense, cudaStream_t stream) {
  if (!dense.shape.aligned() || !dense.shape.small_offsets()) {
    return launch_tile_gemm<T, DenseTile64, false>(dense, stream);
  }
  using Large = std::conditional_t<kSegmented, DenseTile128Segmented, DenseTile128>;
  const auto cost = [&]<typename Shape>(Shape, int64_t percent) {
    const int64_t tiles = dense.template num_tiles<Shape::kTokens, Shape::kRows>();
    return ceil_div<int64_t>(tiles, multiprocessors()) * Shape::kTokens * Shape::kRows * 100 / percent;
  };
  const int64_t large = cost(Large(), 100), medium = cost(DenseTile64x128(), 85), small = cost(DenseTile64(), 65);
  const int64_t tiny = cost(DenseTile16(), 30);
  if (large <= medium && large <= small && large <= tiny) return launch_tile_gemm<T, Large, true>(dense, stream);
  if (medium <= small && medium <= tiny) return launch_tile_gemm<T, DenseTile64x128, true>(dense, stream);
  if (small <= tiny) return launch_tile_gemm<T, DenseTile64, true>(dense, stream);
  launch_tile_gemm<T, DenseTile16, true>(dense, stream);
}

}  // namespace kimi::cuda
