// Tiles: a block on a tile of the output, bound by the tensor cores.
//
// Problem:  struct Tile { int64_t k; int tokens; const T* w[2]; int rows[2]; int64_t w_stride; ... };
//             tokens: how many of the kTokens rows of x exist; w, rows: the two halves of the kRows weight rows
//           bool open<kTokens, kRows>(int64_t index, Tile&);   int64_t num_tiles<kTokens, kRows>() (on the host)
//           const T* x;   int64_t x_offset(const Tile&, int i): of token row i, in elements
//           void store(const Tile&, int token, int column, const float (&v)[N]): N consecutive columns
// With Problem::kGated the halves of the weight rows are gate and up, and the results kRows / 2 columns of SwiGLU. With
// Problem::kSegmented the accumulators start from zero every segment() columns (a multiple of 64) and their sums are
// added in order: instructions round towards zero, so this is about as much more accurate as there are segments.
#pragma once

#include "cuda/common/gemm/operands.cuh"
#include "cuda/common/launch.h"

namespace kimi::cuda {

inline constexpr int kTileK = 64;  // columns of a stage: 128 bytes of a row
inline constexpr int kTileChunks = kTileK / kChunk;
inline constexpr int kTileSteps = kTileK / 16;

template <int kTokens_, int kRows_, int kWarpTokens_, int kWarpRows_, int kStages_, int kBlocks_>
struct TileShape {
  static constexpr int kTokens = kTokens_, kRows = kRows_;                  // of a block
  static constexpr int kWarpTokens = kWarpTokens_, kWarpRows = kWarpRows_;  // of a warp
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // blocks to a multiprocessor that registers must allow
  static constexpr int kTokenWarps = kTokens / kWarpTokens, kRowWarps = kRows / kWarpRows;
  static constexpr int kThreads = kTokenWarps * kRowWarps * kWarp;
};

// Offsets into shared memory are in bytes here: what depends on the thread is computed once, what depends on the step
// is one exclusive or.
inline constexpr int kTileRowBytes = kTileK * 2;

template <typename Shape>
struct TileShared {
  static constexpr int kXStage = Shape::kTokens * kTileRowBytes, kWStage = Shape::kRows * kTileRowBytes;
  static constexpr int kXBegin = 0, kWBegin = Shape::kStages * kXStage;
  unsigned char bytes[Shape::kStages * (kXStage + kWStage)];
};

// Column tiles whose results lie side by side in a lane: 16 bytes of them where the warp is wide enough.
template <typename Shape, typename Problem>
inline constexpr int kTileGroup = [] {
  constexpr int tiles = Shape::kWarpRows / 8 / (Problem::kGated ? 2 : 1);
  constexpr int full = 8 / static_cast<int>(sizeof(typename Problem::Out));
  return tiles < full ? tiles : full;
}();

// What this thread copies to shared memory: one chunk of every kPass-th row of x and w.
template <typename T, typename Shape, bool kAligned, typename Problem>
class TileCopy {
 public:
  static constexpr int kPieces = kTileSteps - 1;  // a stage is copied in this many parts

  __device__ TileCopy(const Problem& problem, const typename Problem::Tile& tile, TileShared<Shape>& shared)
      : shared_(shared) {
    const int row = threadIdx.x / kTileChunks, chunk = threadIdx.x % kTileChunks;
    left_ = tile.k - chunk * kChunk;
    x_to_ = Shared::kXBegin + row * kTileRowBytes + (chunk ^ bank_key<1>(row)) * 16;
    w_to_ = Shared::kWBegin + row * kTileRowBytes + (chunk ^ bank_key<kGroup>(row)) * 16;
    x_ = problem.x + chunk * kChunk;
    x_rows_ = rows_of_thread(tile.tokens - row);
#pragma unroll
    for (int i = 0; i < kXRows; ++i) {
      x_offset_[i] = i < x_rows_ ? static_cast<Offset>(problem.x_offset(tile, row + i * kPass) / kUnit) : Offset{0};
    }
    w_step_ = static_cast<Offset>(kPass * tile.w_stride / kUnit);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      w_[half] = tile.w[half] + row * tile.w_stride + chunk * kChunk;
      w_rows_[half] = rows_of_thread(tile.rows[half] - row);
    }
  }

  // Part `piece` of the next stage, into `slot`; the parts in order.
  __device__ __forceinline__ void copy(int piece, int slot) {
    const bool inside = left_ > 0;
    const int x_rows = inside ? x_rows_ : 0;
#pragma unroll
    for (int i = 0; i < kXRows; ++i) {
      if (i % kPieces != piece) continue;
      const int to = x_to_ + slot * Shared::kXStage + i * kPass * kTileRowBytes;
      copy_chunk(shared_.bytes + to, x_ + x_offset_[i] * kUnit, i < x_rows);
    }
#pragma unroll
    for (int i = 0; i < kWRows; ++i) {
      if ((i + kXRows) % kPieces != piece) continue;
      constexpr int kHalfRows = kWRows / 2;
      const int half = i / kHalfRows, in_half = i % kHalfRows;
      const Offset offset = in_half * w_step_;
      const int to = (w_to_ ^ bank_key<kGroup>(i * kPass) * 16) + slot * Shared::kWStage + i * kPass * kTileRowBytes;
      copy_chunk(shared_.bytes + to, w_[half] + offset * kUnit, in_half < (inside ? w_rows_[half] : 0));
    }
    if (piece == kPieces - 1) {
      left_ -= kTileK;
      x_ += kTileK, w_[0] += kTileK, w_[1] += kTileK;
    }
  }

 private:
  using Shared = TileShared<Shape>;
  static constexpr int kPass = Shape::kThreads / kTileChunks;  // rows that the block copies at a time
  static constexpr int kXRows = Shape::kTokens / kPass, kWRows = Shape::kRows / kPass;
  static constexpr int kGroup = kTileGroup<Shape, Problem>;
  static_assert(Shape::kTokens % kPass == 0 && (Shape::kRows / 2) % kPass == 0 && kPass % 8 == 0);
  // Offsets in units of 16 bytes, so that 32 bits hold them.
  using Offset = std::conditional_t<kAligned, uint32_t, int64_t>;
  static constexpr int64_t kUnit = kAligned ? kChunk : 1;

  // How many of the rows 0, kPass, 2 kPass, ... are among the first `count`.
  static __device__ int rows_of_thread(int count) { return count > 0 ? (count + kPass - 1) / kPass : 0; }

  __device__ __forceinline__ void copy_chunk(unsigned char* to, const T* from, bool valid) const {
    if constexpr (kAligned) {
      cp_async_16(to, from, valid);
    } else {
      *reinterpret_cast<Chunk*>(to) = load_chunk(from, valid ? left_ : 0);
    }
  }

  Shared& shared_;
  int64_t left_;  // elements from this thread's chunk of the next stage to the end of the rows
  const T *x_, *w_[2];
  int x_to_, w_to_, x_rows_, w_rows_[2];
  Offset x_offset_[kXRows], w_step_;
};

// SASS: tensor cores, 16-byte loads
template <typename T, typename Shape, bool kAligned, typename Problem>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) tile_gemm(const __grid_constant__ Problem problem) {
  constexpr int kStages = Shape::kStages;
  constexpr int kM = Shape::kWarpTokens / 16, kN = Shape::kWarpRows / 8;
  constexpr bool kGated = Problem::kGated;
  constexpr int kGroup = kTileGroup<Shape, Problem>;
  static_assert(kN % 2 == 0 && (kGroup % 2 == 0 || !kGated));
  using Shared = TileShared<Shape>;
  auto& shared = shared_memory<Shared>();

  // Phase 1: the block's tile, and the first stages on their way.
  typename Problem::Tile tile;
  if (!problem.template open<Shape::kTokens, Shape::kRows>(blockIdx.x, tile)) return;
  TileCopy<T, Shape, kAligned, Problem> copies(problem, tile, shared);
  const int num_stages = static_cast<int>(ceil_div<int64_t>(tile.k, kTileK));
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < num_stages) {
#pragma unroll
      for (int piece = 0; piece < copies.kPieces; ++piece) copies.copy(piece, s);
    }
    cp_async_commit();
  }

  // Phase 2: the products. While the fragments of one step (16 columns) are multiplied, those of the next are read, and
  // a third of the stage that is kStages - 1 ahead is sent for.
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int warp_token = warp % Shape::kTokenWarps * Shape::kWarpTokens;
  const int warp_column = warp / Shape::kTokenWarps * (Shape::kWarpRows / (kGated ? 2 : 1));
  // The block's weight row of column 0 of tile j; up comes kRows / 2 after gate.
  const auto tile_row = [&](int j) {
    const int in_half = kGated ? j % (kN / 2) : j;
    return (kGated ? j / (kN / 2) * (Shape::kRows / 2) : 0) + warp_column + in_half / kGroup * 8 * kGroup +
           in_half % kGroup * 2;
  };
  constexpr int kNextTile = kGroup == 1 ? 8 : 2;  // from tile j to tile j + 1, of even j
  // Lane l gives the row of matrix l / 8. Of a: rows 0-7, rows 8-15, both again 8 columns on. Of b: tile j, the same 8
  // columns on, tile j + 1, the same 8 columns on.
  const int x_row = warp_token + lane % 16;
  const int x_lane = Shared::kXBegin + x_row * kTileRowBytes + (lane / 16 ^ bank_key<1>(x_row)) * 16;
  const int w_row = warp_column + row_of_column<kGroup>(0, lane % 8) + lane / 16 * kNextTile;
  const int w_lane = Shared::kWBegin + w_row * kTileRowBytes + (lane / 8 % 2 ^ lane % 8) * 16;
  float acc[kM][kN][4] = {};
  float total[Problem::kSegmented ? kM : 1][kN][4] = {};
  uint32_t x[2][kM][4], w[2][kN][2];
  const auto read = [&](int buffer, int stage, int step) {
    const unsigned char* x_at = shared.bytes + ((x_lane + stage * Shared::kXStage) ^ 32 * step);
#pragma unroll
    for (int i = 0; i < kM; ++i) ldmatrix_x4(x[buffer][i], x_at + 16 * i * kTileRowBytes);
    const unsigned char* w_at = shared.bytes + ((w_lane + stage * Shared::kWStage) ^ 32 * step);
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      uint32_t r[4];
      ldmatrix_x4(r, w_at + (tile_row(j) - warp_column) * kTileRowBytes);
      w[buffer][j][0] = r[0], w[buffer][j][1] = r[1], w[buffer][j + 1][0] = r[2], w[buffer][j + 1][1] = r[3];
    }
  };

  cp_async_wait<kStages - 2>();
  __syncthreads();
  read(0, 0, 0);
  int slot = 0, free_slot = kStages - 1;  // free: the one before `slot`
#pragma unroll 1
  for (int s = 0; s < num_stages; ++s) {
    const int next_slot = slot + 1 == kStages ? 0 : slot + 1;
    const bool more = s + kStages - 1 < num_stages;
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) {
      const int now = step % 2, next = 1 - now, next_step = (step + 1) % kTileSteps;
      if (step == kTileSteps - 1) {
        cp_async_commit();
        cp_async_wait<kStages - 2>();
        __syncthreads();  // stage s + 1 has come, and all have read stage s
      }
      const int from = step == kTileSteps - 1 ? next_slot : slot;
      read(next, from, next_step);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) mma_m16n8k16<T>(acc[i][j], x[now][i], w[now][j]);
        if (i == 0 && more && step < copies.kPieces) copies.copy(step, free_slot);
      }
    }
    if constexpr (Problem::kSegmented) {
      if ((s + 1) * kTileK % problem.segment() == 0 || s + 1 == num_stages) {
#pragma unroll
        for (int i = 0; i < kM; ++i) {
#pragma unroll
          for (int j = 0; j < kN; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) total[i][j][c] += acc[i][j][c], acc[i][j][c] = 0.0f;
          }
        }
      }
    }
    free_slot = slot;
    slot = next_slot;
  }

  // Phase 3: results, 2 kGroup consecutive columns of a token at a time.
  constexpr int kOutTiles = kGated ? kN / 2 : kN;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = warp_token + 16 * i + 8 * h + g;
      if (token >= tile.tokens) continue;
#pragma unroll
      for (int group = 0; group < kOutTiles / kGroup; ++group) {
        float v[2 * kGroup];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const int n = group * kGroup + j;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if constexpr (kGated) {
              v[2 * j + c] = swiglu<T>(acc[i][n][2 * h + c], acc[i][kN / 2 + n][2 * h + c]);
            } else if constexpr (Problem::kSegmented) {
              v[2 * j + c] = total[i][n][2 * h + c];
            } else {
              v[2 * j + c] = acc[i][n][2 * h + c];
            }
          }
        }
        problem.store(tile, token, tile_row(group * kGroup) + t * 2 * kGroup, v);
      }
    }
  }
}

template <typename T, typename Shape, bool kAligned, typename Problem>
void launch_tile_gemm(const Problem& problem, cudaStream_t stream) {
  launch(tile_gemm<T, Shape, kAligned, Problem>,
         dim3(static_cast<unsigned>(problem.template num_tiles<Shape::kTokens, Shape::kRows>())), dim3(Shape::kThreads),
         sizeof(TileShared<Shape>), stream, problem);
}

}  // namespace kimi::cuda
