// fp32: fused multiply-adds, a block on a tile of the output. The Problem is that of tiles.cuh.
#pragma once

#include "cuda/common/gemm/operands.cuh"
#include "cuda/common/launch.h"

namespace kimi::cuda {

inline constexpr int kFfmaTokens = 32, kFfmaRows = 64, kFfmaK = 32, kFfmaThreads = 128;

struct FfmaShared {
  float x[kFfmaTokens][kFfmaK + 1];  // + 1: consecutive rows on different banks
  float w[kFfmaRows][kFfmaK + 1];
};

// A thread has 4 tokens times 4 weight rows, 8 and 16 apart.
template <typename Problem>
__global__ void __launch_bounds__(kFfmaThreads) ffma_gemm(const __grid_constant__ Problem problem) {
  auto& shared = shared_memory<FfmaShared>();
  typename Problem::Tile tile;
  if (!problem.template open<kFfmaTokens, kFfmaRows>(blockIdx.x, tile)) return;
  const int row = threadIdx.x % 16, token = threadIdx.x / 16;
  float sum[4][4] = {};
  for (int64_t k = 0; k < tile.k; k += kFfmaK) {
    const int c = threadIdx.x % kFfmaK;
    const bool inside = k + c < tile.k;
    for (int i = threadIdx.x / kFfmaK; i < kFfmaTokens; i += kFfmaThreads / kFfmaK) {
      shared.x[i][c] = inside && i < tile.tokens ? problem.x[problem.x_offset(tile, i) + k + c] : 0.0f;
    }
    for (int i = threadIdx.x / kFfmaK; i < kFfmaRows; i += kFfmaThreads / kFfmaK) {
      const bool second = i >= kFfmaRows / 2;
      const int row = i % (kFfmaRows / 2);
      const bool valid = inside && row < (second ? tile.rows[1] : tile.rows[0]);
      shared.w[i][c] = valid ? (second ? tile.w[1] : tile.w[0])[row * tile.w_stride + k + c] : 0.0f;
    }
    __syncthreads();
    float block[4][4] = {};
#pragma unroll 4
    for (int c = 0; c < kFfmaK; ++c) {
      float x[4], w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = shared.x[token + 8 * i][c], w[i] = shared.w[row + 16 * i][c];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) block[i][j] = fmaf(x[i], w[j], block[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += block[i][j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (token + 8 * i >= tile.tokens) continue;
#pragma unroll
    for (int j = 0; j < (Problem::kGated ? 2 : 4); ++j) {
      const float v[1] = {Problem::kGated ? swiglu<float>(sum[i][j], sum[i][(j + 2) % 4]) : sum[i][j]};
      problem.store(tile, token + 8 * i, row + 16 * j, v);
    }
  }
}

template <typename Problem>
void launch_ffma_gemm(const Problem& problem, cudaStream_t stream) {
  launch(ffma_gemm<Problem>, dim3(static_cast<unsigned>(problem.template num_tiles<kFfmaTokens, kFfmaRows>())),
         dim3(kFfmaThreads), sizeof(FfmaShared), stream, problem);
}

}  // namespace kimi::cuda
