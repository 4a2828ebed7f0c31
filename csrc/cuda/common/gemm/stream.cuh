// Streaming: a warp on its own, for few tokens, bound by reading the weights.
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
#pragma once

#include "cuda/common/gemm/operands.cuh"

namespace kimi::cuda {

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

}  // namespace kimi::cuda
