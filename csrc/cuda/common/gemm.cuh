// The matrix products of every operator with weights: out[i, j] = sum over k of x[i, k] * w[j, k]. Rows of x are
// tokens, rows of w are outputs, both contiguous in k.
//
// The order of operations is one for all kernels here, so that a token's bits do not depend on which of them ran, nor
// on the number of tokens. Of 16-bit types: one m16n8k16 instruction after the other into one fp32 accumulator, x as a,
// w as b, k = 0 ... 15 first, the end of the last 64 columns filled with zeros. Of fp32: fused multiply-adds over
// blocks of 32, in order from zero, and the blocks' sums added in order.
//
// Two kernels for 16-bit types: `Stream` (a warp on its own, up to 16 tokens, bound by reading w) and `tile_gemm` (a
// block on a tile of the output, bound by the tensor cores); `ffma_gemm` for fp32. Each works on a Problem of the
// operator, which says where the rows are and what happens to the results.
#pragma once

#include "cuda/common/activations.h"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.h"

namespace kimi::cuda {

// 16 bytes: 8 elements of a row.
using Chunk = Vec<uint32_t, 4>;
inline constexpr int kChunk = 8;

// Rows in shared memory are permuted so that the eight rows of a matrix that ldmatrix reads lie on different banks:
// chunk c of a row is at c ^ key (of c the last three bits), and these rows have different keys, 0 ... 7. The rows of
// an 8 x 8 matrix of weights are not neighbours: column c of tile j in a group of `kGroup` tiles is weight row (c / 2)
// * 2 kGroup + 2 j + c % 2, so that a lane's results (columns 2t and 2t + 1 of every tile) are 2 kGroup neighbours.
// Their key is c.
template <int kGroup>
__device__ __forceinline__ int bank_key(int row) {
  return row / (2 * kGroup) % 4 * 2 + row % 2;
}
template <int kGroup>
__device__ __forceinline__ int row_of_column(int tile, int column) {
  return column / 2 * 2 * kGroup + 2 * tile + column % 2;
}

// The first `count` (at most all) of the elements at `from`, zeros for the others.
template <typename T>
__device__ __forceinline__ Chunk load_chunk(const T* from, int64_t count) {
  Vec<T, kChunk> v;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v.x[i] = i < count ? from[i] : from_float<T>(0.0f);
  return bits_as<Chunk>(v);
}

// Elements k ... k + 7 of a row of `size` elements into shared memory, zeros from its end on and if not `valid`; with
// kAligned asynchronously (cp_async_commit): then rows start on 16 bytes and `size` is a multiple of 8.
template <typename T, bool kAligned>
__device__ __forceinline__ void copy_chunk(Chunk* to, const T* row, int64_t k, int64_t size, bool valid) {
  if constexpr (kAligned) {
    cp_async_16(to, row + k, valid && k < size);
  } else {
    *to = load_chunk(row + k, valid ? size - k : 0);
  }
}

// silu(gate) * up
template <typename T>
__device__ __forceinline__ float swiglu(float gate, float up) {
  if constexpr (std::is_same_v<T, float>) return gate / (1.0f + expf(-gate)) * up;
  return silu(gate) * up;
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
// A warp works on one item after the other: up to 16 tokens times kTiles x 8 weight rows. The weights go through a ring
// of the warp's own in shared memory, kStages x 128 columns deep, which runs on from one item into the next, so that
// memory is waited for once. The tokens' rows are in shared memory from the start (stream_copy_row). There is no
// barrier but the warp's.
//
// Problem:  struct Item { const T* w[2]; int rows[2]; int64_t w_stride, k; int x_row; ... };
//             w, rows: the two (or one) times 8 weight rows and how many of them exist; x_row: of the rows in shared
//             memory the one that is token lane % 16 of the item
//           int64_t num_items();   bool open(int64_t index, Item&): false if there is nothing to do
//           void store(const Item&, const float (&acc)[kTiles][4])
// A lane's results are 2 kTiles neighbouring rows of the weights (row_of_column<kTiles>) for tokens g and g + 8. With
// Problem::kGated the tiles are gate and up, and column c of tile j is row c of w[j].
//
// An accumulator takes a product every 33 cycles (the latency of the instruction), 264 a stage: a warp that is alone on
// its scheduler, as with few rows, is bound by that, if everything else fits in between. Hence the care with addresses.

inline constexpr int kStreamK = 128;  // columns of a stage: 256 bytes of a weight row at a time
inline constexpr int kStreamRowBytes = kStreamK * 2;
inline constexpr int kStreamTokens = 16;

template <int kTiles, int kStages>
struct WarpRing {
  static constexpr int kStageBytes = kTiles * 8 * kStreamRowBytes;
  unsigned char bytes[kStages * kStageBytes];
};

// Rows of `columns` elements in shared memory take this many bytes each, the end filled with zeros.
__host__ __device__ constexpr int64_t stream_row_bytes(int64_t columns) {
  return round_up<int64_t>(columns, kStreamK) * 2;
}

// Starts copying a row of `columns` elements (null: zeros) to row `index` at `rows`: thread `thread` of `threads`.
template <typename T, bool kAligned>
__device__ __forceinline__ void stream_copy_row(unsigned char* rows, int64_t row_bytes, int index, const T* from,
                                                int64_t columns, int thread, int threads) {
  for (int64_t c = thread; c < row_bytes / 16; c += threads) {
    copy_chunk<T, kAligned>(reinterpret_cast<Chunk*>(rows + index * row_bytes + (c ^ (index & 7)) * 16), from,
                            c * kChunk, columns, from != nullptr);
  }
}

template <typename T, int kTiles, int kStages, bool kAligned, typename Problem>
class Stream {
 public:
  using Item = typename Problem::Item;
  using Ring = WarpRing<kTiles, kStages>;

  // Items first, first + stride, ... of the problem. `rows`: the tokens' rows. All shared memory is aligned to 256
  // bytes.
  __device__ Stream(const Problem& problem, Ring& ring, const unsigned char* rows, int64_t row_bytes, int64_t first,
                    int64_t stride)
      : problem_(problem),
        ring_(ring.bytes),
        rows_(rows),
        row_bytes_(static_cast<int>(row_bytes)),
        items_(problem.num_items()),
        first_(first),
        stride_(stride),
        next_(first),
        lane_(threadIdx.x % kWarp) {
    copy_to_ = lane_ / 16 * kStreamRowBytes + (lane_ % 16 ^ lane_ / 16) * 16;
    open_next();
  }

  // Fills the ring.
  __device__ void start() {
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) fill(s * Ring::kStageBytes);
  }
  // Until this thread's copies from before `start` have come.
  __device__ void wait_for_rows() const { cp_async_wait<kStages>(); }

  // After `start`, and when the tokens' rows are there for all lanes.
  __device__ void run() {
    // Matrices of a: rows 0-7, rows 8-15, then both again 8 columns on. Of b: 8 columns and the next 8, of both tiles;
    // of one tile 32 columns.
    const int column = lane_ % 8, tile = kTiles == 2 ? lane_ / 16 : 0;
    const int row = Problem::kGated ? 8 * tile + column : row_of_column<kTiles>(tile, column);
    const int w_lane = row * kStreamRowBytes + ((kTiles == 2 ? lane_ / 8 % 2 : lane_ / 8) ^ column) * 16;
    int slot = 0;
#pragma unroll 1
    for (int64_t index = first_; index < items_; index += stride_) {
      Item item;
      if (!problem_.open(index, item)) continue;
      const int num_stages = static_cast<int>(ceil_div<int64_t>(item.k, kStreamK));
      int x_lane = item.x_row * row_bytes_ + (lane_ / 16 ^ (item.x_row & 7)) * 16;
      float acc[kTiles][4] = {};
      Fragments even, odd;
      wait();
      even.load(rows_, x_lane, ring_, slot + w_lane, 0);
#pragma unroll 1
      for (int s = 1; s < num_stages; ++s) {
        odd.load(rows_, x_lane, ring_, slot + w_lane, 1);
        even.multiply(acc);
        next(slot);
        wait();
        x_lane += kStreamRowBytes;
        even.load(rows_, x_lane, ring_, slot + w_lane, 0);
        odd.multiply(acc);
      }
      odd.load(rows_, x_lane, ring_, slot + w_lane, 1);
      even.multiply(acc);
      next(slot);
      odd.multiply(acc);
      problem_.store(item, acc);
    }
  }

 private:
  static constexpr int kGroup = Problem::kGated ? 1 : kTiles;
  static constexpr int kSteps = kStreamK / 16 / 2;  // of half a stage
  // Offsets in units of 16 bytes, so that 32 bits hold them.
  using Offset = std::conditional_t<kAligned, uint32_t, int64_t>;
  static constexpr int64_t kUnit = kAligned ? kChunk : 1;

  // What half a stage needs.
  struct Fragments {
    uint32_t x[kSteps][4], w[kSteps][kTiles][2];

    __device__ __forceinline__ void load(const unsigned char* rows, int x_at, const unsigned char* ring, int w_at,
                                         int half) {
      x_at += half * kStreamRowBytes / 2;
      w_at += half * kStreamRowBytes / 2;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        ldmatrix_x4(x[i], rows + (x_at ^ 32 * i));
        if (kTiles == 1 && i % 2 == 1) continue;
        uint32_t r[4];
        ldmatrix_x4(r, ring + (w_at ^ 32 * i));
        w[i][0][0] = r[0], w[i][0][1] = r[1];
        auto& second = kTiles == 2 ? w[i][kTiles - 1] : w[i + 1][0];
        second[0] = r[2], second[1] = r[3];
      }
    }

    __device__ __forceinline__ void multiply(float (&acc)[kTiles][4]) const {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) mma_m16n8k16<T>(acc[j], x[i], w[i][j]);
      }
    }
  };

  // The item whose stages are sent for next; none when no item is left.
  __device__ void open_next() {
    Item item;
    bool found = false;
    while (!found && (next_) < items_) {
      found = problem_.open(next_, item);
      next_ += stride_;
    }
    if (!found) {
      copy_rows_[0] = copy_rows_[1] = 0;
      copy_left_ = INT64_MAX;
      return;
    }
    const int r = lane_ / 16, c = lane_ % 16;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      copy_from_[j] = item.w[j] + r * item.w_stride + c * kChunk;
      copy_rows_[j] = (item.rows[j] - r + 1) / 2;  // of the rows r, r + 2, r + 4, r + 6
    }
    copy_step_ = static_cast<Offset>(2 * item.w_stride / kUnit);
    copy_left_ = item.k;
  }

  // Starts reading the next stage into the slot at `slot`. Sixteen lanes read a row.
  __device__ __forceinline__ void fill(int slot) {
    const bool inside = lane_ % 16 * kChunk < copy_left_;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const Offset offset = i % 4 * copy_step_;
      const T* from = copy_from_[i / 4] + offset * kUnit;
      const bool valid = i % 4 < (inside ? copy_rows_[i / 4] : 0);
      unsigned char* to = ring_ + slot + (copy_to_ ^ bank_key<kGroup>(2 * i) * 16) + 2 * i * kStreamRowBytes;
      if constexpr (kAligned) {
        cp_async_16(to, from, valid);
      } else {
        *reinterpret_cast<Chunk*>(to) = load_chunk(from, valid ? copy_left_ - lane_ % 16 * kChunk : 0);
      }
    }
    cp_async_commit();
#pragma unroll
    for (int j = 0; j < kTiles; ++j) copy_from_[j] += kStreamK;
    copy_left_ -= kStreamK;
    if (copy_left_ <= 0) open_next();
  }

  // The slot was read: it is filled again, and the next one's turn.
  __device__ __forceinline__ void next(int& slot) {
    __syncwarp();
    fill(slot);
    slot = slot == (kStages - 1) * Ring::kStageBytes ? 0 : slot + Ring::kStageBytes;
  }

  // Until the oldest stage has come, for all lanes.
  __device__ __forceinline__ void wait() const {
    cp_async_wait<kStages - 1>();
    __syncwarp();
  }

  const Problem& problem_;
  unsigned char* const ring_;
  const unsigned char* const rows_;
  const int row_bytes_;
  const int64_t items_, first_, stride_;
  int64_t next_;
  const int lane_;
  const T* copy_from_[kTiles] = {};
  int copy_to_, copy_rows_[2];
  Offset copy_step_ = 0;
  int64_t copy_left_;  // columns of the item from the next stage on
};

inline constexpr int kStreamWarps = 12;              // of a block, at most
inline constexpr int64_t kSharedBytes = 227 * 1024;  // of a block, on compute capability 9.0

struct StreamGrid {
  int64_t blocks, warps;  // blocks of each group, warps of a block; no blocks if shared memory is too small
};

// Items of `groups` groups spread evenly over as many warps as fit, and these over the multiprocessors; a block's items
// are of one group. `shared_bytes`: what a block needs besides the rings.
inline StreamGrid stream_grid(int64_t groups, int64_t items, size_t ring_bytes, size_t shared_bytes) {
  const int64_t sms = multiprocessors();
  const int64_t fit = (kSharedBytes - static_cast<int64_t>(shared_bytes)) / static_cast<int64_t>(ring_bytes);
  const int64_t most = fit < kStreamWarps ? fit : kStreamWarps;
  if (most < 1) return {0, 0};
  const int64_t share = sms * most / groups;  // warps for a group
  const int64_t rounds = ceil_div<int64_t>(items, share < 1 ? 1 : share);
  const int64_t warps = ceil_div(items, rounds);
  const int64_t wanted = ceil_div(warps * groups, sms);
  const int64_t per_block = wanted < most ? wanted : most;
  const int64_t used = per_block < warps ? per_block : warps;
  return {ceil_div(warps, used), used};
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
