// The matrix products of every operator with weights: out[i, j] = sum over k of x[i, k] * w[j, k]. Rows of x are
// tokens, rows of w are outputs, both contiguous in k.
//
// The order of operations is one for all kernels here, so that a token's bits do not depend on which of them ran, nor
// on the number of tokens. Of 16-bit types: k goes in blocks of 32, from first to last, the end of the last 64 filled
// with zeros; a block is two m16n8k16 instructions into one fp32 accumulator, x as a, w as b. Lane t of a quad holds
// the 16 bytes k = 8 t ... 8 t + 7 of its rows: columns 2t, 2t + 1, 2t + 8, 2t + 9 of the first instruction are
// elements 0 ... 3 of these, those of the second are elements 4 ... 7. A fragment is thus one 16-byte load of a lane,
// from shared memory or straight from global memory, without ldmatrix. Of fp32: fused multiply-adds over blocks of 32,
// in order from zero, and the blocks' sums added in order.
//
// Two kernels for 16-bit types: `stream` (a warp on its own, up to 16 tokens, bound by reading w) and `tile_gemm` (a
// block on a tile of the output, bound by the tensor cores); `ffma_gemm` for fp32. Each works on a Problem of the
// operator, which says where the rows are and what happens to the results.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/common/ptx.h"

namespace kimi::cuda {

// 16 bytes: 8 elements of a row.
using Chunk = Vec<uint32_t, 4>;
inline constexpr int kChunk = 8;

// Where chunk `c` of row `r` lies in a stage with `chunks` of them to a row. Eight consecutive lanes read chunks
// 0 ... 3 (or 4 ... 7) of two consecutive rows: exchanging these halves in odd rows keeps them on different banks.
__device__ __forceinline__ int swizzled(int r, int c, int chunks) {
  return r * chunks + (c ^ ((r & 1) << 2));
}

// Elements k ... k + 7 of a row of `size` elements, zeros from its end on. With kAligned rows start on 16 bytes and
// `size` is a multiple of 8.
template <typename T, bool kAligned>
__device__ __forceinline__ Chunk load_chunk(const T* row, int64_t k, int64_t size) {
  if constexpr (kAligned) {
    return row != nullptr && k < size ? *reinterpret_cast<const Chunk*>(row + k) : Chunk{};
  } else {
    Vec<T, kChunk> v;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v.x[i] = row != nullptr && k + i < size ? row[k + i] : from_float<T>(0.0f);
    return bits_as<Chunk>(v);
  }
}

// The same into shared memory, asynchronously (cp_async_commit) if kAligned. `somewhere` is any legal address.
template <typename T, bool kAligned>
__device__ __forceinline__ void copy_chunk(Chunk* to, const T* row, int64_t k, int64_t size, const T* somewhere) {
  if constexpr (kAligned) {
    const bool valid = row != nullptr && k < size;
    cp_async_16(to, valid ? row + k : somewhere, valid);
  } else {
    *to = load_chunk<T, false>(row, k, size);
  }
}

// d += x w^T over half a block of 32 columns, `kHalf` = 0, 1. lo, hi: the lane's chunks of token rows g and g + 8; w:
// of weight row g.
template <typename T, int kHalf>
__device__ __forceinline__ void mma_half(float (&d)[4], const Chunk& lo, const Chunk& hi, const Chunk& w) {
  const uint32_t a[4] = {lo.x[2 * kHalf], hi.x[2 * kHalf], lo.x[2 * kHalf + 1], hi.x[2 * kHalf + 1]};
  const uint32_t b[2] = {w.x[2 * kHalf], w.x[2 * kHalf + 1]};
  mma_m16n8k16<T>(d, a, b);
}

// silu(gate) * up
template <typename T>
__device__ __forceinline__ float swiglu(float gate, float up) {
  if constexpr (std::is_same_v<T, float>) return gate / (1.0f + expf(-gate)) * up;
  return gate * rcp_approx(1.0f + exp2_approx(-1.44269504f * gate)) * up;
}

// N results at consecutive addresses, of which the first `count` exist. `wide`: addresses are multiples of what N
// elements take, up to 16 bytes.
template <typename T, int N>
__device__ __forceinline__ void store_results(T* to, const float (&v)[N], int count, bool wide) {
  constexpr int kWidth = N < kVec<T> ? N : kVec<T>;
  if (wide && count >= N) {
#pragma unroll
    for (int i = 0; i < N; i += kWidth) {
      Vec<T, kWidth> part;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) part.x[j] = from_float<T>(v[i + j]);
      store_vec(to + i, part);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) to[i] = from_float<T>(v[i]);
    }
  }
}

// ---- Streaming: a warp on its own ----------------------------------------------------------------------------------
//
// A warp works on one item after the other: 16 tokens times kTiles x 8 weight rows. The weights go through a ring of
// the warp's own in shared memory, kStages x 128 columns deep, which runs on from one item into the next, so that
// memory is never waited for twice; the tokens come from L1. There is no barrier but the warp's.
//
// Problem:  struct Item { const T* w[2]; int rows[2]; int64_t w_stride, k; const T *x_lo, *x_hi; ... };
//             w, rows: the two (or one) times 8 weight rows and how many of them exist; x_lo, x_hi: token rows g and
//             g + 8 of this lane (g = lane / 4), null where there is none
//           int64_t num_items();   bool open(int64_t index, Item&): false if there is nothing to do
//           void store(const Item&, const float (&acc)[kTiles][4])
// Column c of tile j of the accumulators is weight row (c / 2) * 2 kTiles + 2 j + c % 2 of the item: a lane's results
// are 2 kTiles consecutive ones. With Problem::kGated it is row c of w[j] instead: gate and up of a feature in one
// lane.

inline constexpr int kStreamK = 128;  // columns of a stage: 256 bytes of a weight row at a time
inline constexpr int kStreamTokens = 16;

template <int kTiles, int kStages>
struct WarpRing {
  Chunk w[kStages][kTiles * 8 * kStreamK / kChunk];
};

template <typename T, int kTiles, int kStages, bool kAligned, typename Problem>
class Stream {
 public:
  using Item = typename Problem::Item;
  using Ring = WarpRing<kTiles, kStages>;

  __device__ Stream(const Problem& problem, Ring& ring, int64_t first, int64_t stride)
      : problem_(problem), ring_(ring), items_(problem.num_items()), stride_(stride), lane_(threadIdx.x % kWarp) {
    produce_.index = first;
    seek(produce_);
    consume_ = produce_;
  }

  __device__ void run() {
    float acc[kTiles][4] = {};
    Fragments even, odd;
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) fill(s);
    wait();
    if (consume_.valid) even.load(*this, 0, 0);
    int slot = 0;
    while (consume_.valid) {
      odd.load(*this, slot, 1);
      even.multiply(acc);
      __syncwarp();  // every lane has read this slot
      fill(slot);
      slot = slot + 1 == kStages ? 0 : slot + 1;
      const Item item = consume_.item;
      const bool last = advance(consume_);
      wait();
      if (consume_.valid) even.load(*this, slot, 0);
      odd.multiply(acc);
      if (last) {
        problem_.store(item, acc);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[j][i] = 0.0f;
        }
      }
    }
  }

 private:
  struct Cursor {
    Item item;
    int64_t index, k = 0;
    bool valid;
  };

  // What two blocks of 32 columns need.
  struct Fragments {
    Chunk w[kTiles][2], lo[2], hi[2];

    __device__ __forceinline__ void load(const Stream& s, int slot, int half) {
      const int g = s.lane_ / 4, t = s.lane_ % 4;
      const Cursor& at = s.consume_;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = 8 * half + 4 * i + t;
        lo[i] = load_chunk<T, kAligned>(at.item.x_lo, at.k + c * kChunk, at.item.k);
        hi[i] = load_chunk<T, kAligned>(at.item.x_hi, at.k + c * kChunk, at.item.k);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const int row = Problem::kGated ? 8 * j + g : g / 2 * 2 * kTiles + 2 * j + g % 2;
          w[j][i] = s.ring_.w[slot][swizzled(row, c, kStreamK / kChunk)];
        }
      }
    }

    __device__ __forceinline__ void multiply(float (&acc)[kTiles][4]) const {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) mma_half<T, 0>(acc[j], lo[i], hi[i], w[j][i]);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) mma_half<T, 1>(acc[j], lo[i], hi[i], w[j][i]);
      }
    }
  };

  // To the first item at or after `c.index` in which there is something to do.
  __device__ void seek(Cursor& c) const {
    while (!(c.valid = (c.index) < items_ && problem_.open(c.index, c.item)) && (c.index) < items_) c.index += stride_;
  }

  // To the next stage; returns whether the item ended.
  __device__ bool advance(Cursor& c) const {
    c.k += kStreamK;
    if (c.k < c.item.k) return false;
    c.k = 0;
    c.index += stride_;
    seek(c);
    return true;
  }

  // Starts reading the next stage. Sixteen lanes read a row.
  __device__ void fill(int slot) {
    if (produce_.valid) {
      const Item& item = produce_.item;
      const int c = lane_ % 16;
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        const int r = lane_ / 16 + 2 * i, r8 = r % 8;
        const T* base = item.w[i / 4];
        copy_chunk<T, kAligned>(&ring_.w[slot][swizzled(r, c, kStreamK / kChunk)],
                                r8 < item.rows[i / 4] ? base + r8 * item.w_stride : nullptr, produce_.k + c * kChunk,
                                item.k, item.w[0]);
      }
      advance(produce_);
    }
    cp_async_commit();
  }

  // Until the oldest stage has come, for all lanes.
  __device__ void wait() const {
    cp_async_wait<kStages - 1>();
    __syncwarp();
  }

  const Problem& problem_;
  Ring& ring_;
  const int64_t items_, stride_;
  const int lane_;
  Cursor produce_, consume_;
};

inline constexpr int kStreamWarps = 4;        // warps of a block, at most
inline constexpr int kStreamWarpsPerSm = 12;  // with rings of 16 KB in 227 KB of shared memory

struct StreamGrid {
  unsigned blocks, warps;  // warps of a block
};

// Items spread evenly over the warps that fit, and these over the multiprocessors.
inline StreamGrid stream_grid(int64_t items) {
  const int64_t sms = multiprocessors();
  const int64_t rounds = ceil_div(items, sms * kStreamWarpsPerSm);
  const int64_t warps = ceil_div(items, rounds);
  const int64_t per_sm = warps / sms;
  const int64_t per_block = per_sm < 1 ? 1 : per_sm < kStreamWarps ? per_sm : kStreamWarps;
  return {static_cast<unsigned>(ceil_div(warps, per_block)), static_cast<unsigned>(per_block)};
}

// ---- Tiles: a block on a tile of the output ------------------------------------------------------------------------
//
// Problem:  struct Tile { int64_t k; int tokens; const T* w[2]; int rows[2]; int64_t w_stride; ... };
//             tokens: how many of the kTokens rows of x exist; w, rows: the two halves of the kRows weight rows
//           bool open<kTokens, kRows>(int64_t index, Tile&);   int64_t num_tiles<kTokens, kRows>() (on the host)
//           const T* x;   int64_t x_offset(const Tile&, int i): of token row i, in elements
//           void store(const Tile&, int token, int column, const float (&v)[N]): N consecutive columns
// With Problem::kGated the halves of the weight rows are gate and up, and the results kRows / 2 columns of SwiGLU. With
// Problem::kSegmented the accumulators start from zero every segment() columns (a multiple of 64) and their sums are
// added in order: instructions round towards zero, so this is about as much more accurate as there are segments.

inline constexpr int kTileK = 64;  // columns of a stage: 128 bytes of a row
inline constexpr int kTileChunks = kTileK / kChunk;

template <int kTokens_, int kRows_, int kWarpTokens_, int kWarpRows_, int kStages_, int kBlocks_>
struct TileShape {
  static constexpr int kTokens = kTokens_, kRows = kRows_;                  // of a block
  static constexpr int kWarpTokens = kWarpTokens_, kWarpRows = kWarpRows_;  // of a warp
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // blocks to a multiprocessor that registers must allow
  static constexpr int kThreads = kTokens / kWarpTokens * (kRows / kWarpRows) * kWarp;
};

template <typename Shape>
struct TileShared {
  Chunk x[Shape::kStages][Shape::kTokens * kTileChunks];
  Chunk w[Shape::kStages][Shape::kRows * kTileChunks];
};

template <typename T, typename Shape, bool kAligned, typename Problem>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) tile_gemm(const __grid_constant__ Problem problem) {
  constexpr int kStages = Shape::kStages;
  constexpr int kPass = Shape::kThreads / kTileChunks;  // rows that the block copies at a time
  constexpr int kXRows = Shape::kTokens / kPass, kWRows = Shape::kRows / kPass;
  constexpr int kM = Shape::kWarpTokens / 16, kN = Shape::kWarpRows / 8;
  constexpr bool kGated = Problem::kGated;
  // Column tiles whose results lie side by side in a lane: 16 bytes of them where the warp is wide enough.
  constexpr int kOutTiles = kGated ? kN / 2 : kN;
  constexpr int kFull = 8 / static_cast<int>(sizeof(typename Problem::Out));
  constexpr int kGroup = kOutTiles < kFull ? kOutTiles : kFull;
  static_assert(Shape::kTokens % kPass == 0 && (Shape::kRows / 2) % kPass == 0);
  auto& shared = shared_memory<TileShared<Shape>>();

  typename Problem::Tile tile;
  if (!problem.template open<Shape::kTokens, Shape::kRows>(blockIdx.x, tile)) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  // Phase 1: which rows this thread copies. Offsets of x in units of 16 bytes, so that 32 bits hold them.
  const int copy_row = threadIdx.x / kTileChunks, copy_chunk_index = threadIdx.x % kTileChunks;
  using Offset = std::conditional_t<kAligned, uint32_t, int64_t>;
  constexpr int64_t kUnit = kAligned ? kChunk : 1;
  Offset x_offset[kXRows];
#pragma unroll
  for (int i = 0; i < kXRows; ++i) {
    const int row = copy_row + i * kPass;
    x_offset[i] = row < tile.tokens ? static_cast<Offset>(problem.x_offset(tile, row) / kUnit) : ~Offset{0};
  }
  const int copy_to = swizzled(copy_row, copy_chunk_index, kTileChunks);
  const auto copy_stage = [&](int stage, int64_t k) {
    const int64_t at = k + copy_chunk_index * kChunk;
#pragma unroll
    for (int i = 0; i < kXRows; ++i) {
      const T* row = x_offset[i] != ~Offset{0} ? problem.x + static_cast<int64_t>(x_offset[i]) * kUnit : nullptr;
      copy_chunk<T, kAligned>(&shared.x[stage][copy_to + i * kPass * kTileChunks], row, at, tile.k, problem.x);
    }
#pragma unroll
    for (int i = 0; i < kWRows; ++i) {
      const int half = i / (kWRows / 2), row_in_half = copy_row + i % (kWRows / 2) * kPass;
      const T* row = row_in_half < tile.rows[half] ? tile.w[half] + row_in_half * tile.w_stride : nullptr;
      copy_chunk<T, kAligned>(&shared.w[stage][copy_to + i * kPass * kTileChunks], row, at, tile.k, tile.w[0]);
    }
  };

  // Phase 2: the products, kStages - 1 stages behind the copies.
  const int g = lane / 4, t = lane % 4;
  const int warp_token = warp % (Shape::kTokens / Shape::kWarpTokens) * Shape::kWarpTokens;
  const int warp_column = warp / (Shape::kTokens / Shape::kWarpTokens) * (Shape::kWarpRows / (kGated ? 2 : 1));
  // First of the group's columns within the block's: column c of tile j of a group is (c / 2) * 2 kGroup + 2 j + c % 2.
  const auto first_of_group = [&](int j) { return warp_column + j / kGroup * 8 * kGroup; };
  float acc[kM][kN][4] = {};
  float total[Problem::kSegmented ? kM : 1][kN][4] = {};
  const auto multiply_stage = [&](int stage) {
#pragma unroll
    for (int block = 0; block < kTileK / 32; ++block) {
      const int lane_chunk = (4 * block + t) ^ ((g & 1) << 2);  // as in `swizzled`: the rows below are odd where g is
      Chunk x[kM][2], w[kN];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          x[i][h] = shared.x[stage][(warp_token + 16 * i + 8 * h + g) * kTileChunks + lane_chunk];
        }
      }
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int half = kGated ? j / (kN / 2) : 0, j_in_half = kGated ? j % (kN / 2) : j;
        const int row =
            half * (Shape::kRows / 2) + first_of_group(j_in_half) + g / 2 * 2 * kGroup + j_in_half % kGroup * 2 + g % 2;
        w[j] = shared.w[stage][row * kTileChunks + lane_chunk];
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) mma_half<T, 0>(acc[i][j], x[i][0], x[i][1], w[j]);
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) mma_half<T, 1>(acc[i][j], x[i][0], x[i][1], w[j]);
      }
    }
  };
  const int64_t num_stages = ceil_div<int64_t>(tile.k, kTileK);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < num_stages) copy_stage(s, s * kTileK);
    cp_async_commit();
  }
  int slot = 0, copy_slot = kStages - 1;
  for (int64_t s = 0; s < num_stages; ++s) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // stage s has come, and all have read the one before it, whose slot is filled next
    if (s + kStages - 1 < num_stages) copy_stage(copy_slot, (s + kStages - 1) * kTileK);
    cp_async_commit();
    multiply_stage(slot);
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
    slot = slot + 1 == kStages ? 0 : slot + 1;
    copy_slot = copy_slot + 1 == kStages ? 0 : copy_slot + 1;
  }

  // Phase 3: results, 2 kGroup consecutive columns of a token at a time.
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
        problem.store(tile, token, first_of_group(group * kGroup) + t * 2 * kGroup, v);
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

// ---- fp32: fused multiply-adds -------------------------------------------------------------------------------------

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
