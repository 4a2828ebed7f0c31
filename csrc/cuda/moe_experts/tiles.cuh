// The two products of moe_experts on tiles, for one 16-bit type (tiles_bf16.cu, tiles_fp16.cu).
#pragma once

#include "cuda/moe_experts/moe_experts.cuh"

namespace kimi::cuda::experts {

// 128 weight rows (64 features of gate and up): with few tokens bound by reading them, so that about 160 KB are under
// way in the two blocks of a multiprocessor.
using Tile16 = TileShape<16, 128, 16, 32, 6, 2>;    // 108 KB
using Tile32 = TileShape<32, 128, 32, 32, 5, 2>;    // 100 KB
using Tile64 = TileShape<64, 128, 32, 64, 4, 2>;    // 96 KB
using Tile128 = TileShape<128, 128, 64, 64, 3, 2>;  // 96 KB, bound by the tensor cores
using AnyTile = TileShape<64, 64, 32, 32, 4, 3>;    // for rows that are not aligned

template <typename Shape, bool kAligned, typename T>
void run_shape(const MoeExpertsParams& p, const Workspace& w, cudaStream_t stream) {
  launch_tile_gemm<T, Shape, kAligned>(UpTiles<T>(p, w), stream);
  launch_tile_gemm<T, Shape, kAligned>(DownTiles<T>(p, w), stream);
}

template <typename T>
void run_tiles(const MoeExpertsParams& p, const Workspace& w, bool aligned, int tile_tokens, cudaStream_t stream) {
  if (!aligned) return run_shape<AnyTile, false, T>(p, w, stream);
  switch (tile_tokens) {
    case 16:
      return run_shape<Tile16, true, T>(p, w, stream);
    case 32:
      return run_shape<Tile32, true, T>(p, w, stream);
    case 64:
      return run_shape<Tile64, true, T>(p, w, stream);
    default:
      return run_shape<Tile128, true, T>(p, w, stream);
  }
}

}  // namespace kimi::cuda::experts
