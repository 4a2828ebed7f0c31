// mla_decode on the tensor cores of compute capability 8.0 and later (mma.sync), for the released dims 512 + 64 in bf16
// or fp16.
//
// Grid: (as many blocks of 12 warps as multiprocessors) x (head tiles of 32, or of 16). Each thread block streams its
// share of all sequences (schedule.cuh) through a ring of five tiles of 32 rows; a row is read from memory once for all
// heads of a head tile. Two kinds of warps work side by side, one tile apart, and meet at one barrier a tile:
//   4 score warps   tile t + 1: s = q k^T. Warp w adds up columns 16 (w + 4 i), i < 9, for which it keeps q in
//   registers;
//                   the four partial sums go through shared memory. Then p, of which each thread has 8 keys of a head.
//   8 value warps   tile t: o += p v. Warp w owns columns [64 w, 64 w + 64) of o for all heads, in registers. At the
//   end of
//                   a split o is folded into the unit's o, also in registers. They also fetch tile t + 4.
//
// Shared memory, 204 KB: rows 5 x 32 x 576 (180 KB), partial s 4 x 32 x 32 fp32 (16 KB), p 2 x 32 x 32. Rows of `rows`
// are multiples of 128 bytes: 16-byte chunk c of row r lies at c ^ (r % 8).
//
// 32 heads: a tile is 36 KB from memory, 1.16 us = 2030 cycles of a 132nd of 4.27 TB/s; 2.2 Mflop, 820 cycles of
// mma.sync; 158 KB through shared memory, 1230 cycles; q k^T and softmax one after the other about 1400. Bound by
// memory where all multiprocessors have work, with up to 108 KB of it under way on each.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/common/launch.h"
#include "cuda/common/ptx.h"
#include "cuda/common/reduce.h"
#include "cuda/mla_decode/schedule.cuh"

namespace kimi::cuda::mla_decode_detail {

inline constexpr int kScoreWarps = 4, kValueWarps = 8, kScoreThreads = kScoreWarps * kWarp;
inline constexpr int kThreads = (kScoreWarps + kValueWarps) * kWarp;
inline constexpr int kDepthSteps = kRowDim / 16 / kScoreWarps;
inline constexpr int kWarpColumns = kLatentDim / kValueWarps;
static_assert(kThreads == kPlanThreads);
// Tiles in the ring: as many as the device has shared memory for, at least one under way while two are worked on.
inline constexpr int kManyStages = 5, kFewStages = 3;

// What the score warps leave for the value warps, besides p: factors of each head's o.
template <int kHeads>
struct Factors {
  float rescale[kHeads];                       // in the middle of a split
  float fold_old[kHeads], fold_added[kHeads];  // at its end: of the unit's o and of the split's
  float inverse[kHeads];                       // at the end of a unit that is a sequence
};

template <typename T, int kHeads, int kStages>
struct alignas(128) DecodeShared {
  T rows[kStages][kTileRows * kRowDim];
  float s[kScoreWarps][kHeads * kTileRows];
  T p[2][kHeads * kTileRows];
  Factors<kHeads> factors[2];
  float unit_max[kHeads], unit_sum[kHeads], unit_rounded_sum[kHeads];  // of the unit's splits before
  PartialSums split[kScoreThreads];                                    // so far, of each score thread's keys
  Schedule schedule;
  uint16_t thread[kThreads];  // of its kind of warps
};

// Where a partial sum of s lies: four keys together, their order in a row of 32 such that eight rows written by pairs
// and two rows read by fours are in different banks.
__device__ __forceinline__ int score_at(int head, int key) {
  return head * kTileRows + (key / 4 ^ (head % 4 * 2 + head / 4 % 2)) * 4 + key % 4;
}
// Where p lies: rows of 64 bytes, 16-byte chunks in an order that puts those of eight rows in different banks.
__device__ __forceinline__ int probability_at(int head, int key) {
  return head * kTileRows + (key / 8 ^ head / 2 % 4) * 8 + key % 8;
}

__device__ __forceinline__ void block_barrier() {
  barrier_sync(1, kThreads);
}
__device__ __forceinline__ void score_barrier() {
  barrier_sync(2, kScoreThreads);
}

// The score warps. `Vector`: q may be read by 4 bytes and the cache by 16.
template <typename T, int kHeads, int kStages, bool Vector>
class ScoreWarps {
  static constexpr int kTiles = kHeads / 16;  // m16 tiles of heads
  static constexpr int kHeadThreads = kScoreThreads / kHeads, kThreadKeys = kTileRows / kHeadThreads;  // in the softmax

 public:
  __device__ ScoreWarps(const MlaDecodeParams& p, const Workspace& w, const DecodeOptions& options,
                        DecodeShared<T, kHeads, kStages>& shared)
      : p_(p), w_(w), options_(options), shared_(shared), steps_(shared.schedule.steps) {}

  __device__ void run() {
    if (thread() % kHeadThreads == 0) begin_unit(thread() / kHeadThreads);
    load_q(steps_[0]);
    block_barrier();
    int stage = 0;
#pragma unroll 1
    for (int tile = 0;; ++tile) {
      if (steps_[tile % kSteps].rows != 0) {
        scores(shared_.rows[stage]);
        const Step& next = steps_[(tile + 1) % kSteps];
        if (next.is(Step::kNewSequence)) load_q(next);
        score_barrier();
        softmax(steps_[tile % kSteps], tile % 2);
        if (threadIdx.x == 0) {
          shared_.schedule.steps[(tile + 6) % kSteps] =
              next_step(p_, shared_.schedule.by_split, shared_.schedule.cursor);
        }
      }
      block_barrier();
      if (steps_[tile % kSteps].rows == 0) break;
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
  }

 private:
  // Read again in each phase: addresses that follow from known values the compiler works out once, and spills.
  __device__ int thread() const { return shared_.thread[threadIdx.x]; }
  __device__ static int first_head() { return static_cast<int>(blockIdx.y) * kHeads; }

  // q as operand a: rows g, g + 8 of columns 2 t, 2 t + 1, then both of columns + 8. Zeros for heads past the last one.
  __device__ void load_q(const Step& step) {
    const int lane = thread() % kWarp, warp = thread() / kWarp;
    const T* const q = static_cast<const T*>(p_.q) + step.seq * p_.q_seq_stride + first_head() * p_.q_head_stride;
    const uint32_t sign = p_.scale < 0 ? 0x80008000u : 0u;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int head = 16 * m + lane / 4 + 8 * half;
        const bool valid = first_head() + head < p_.num_heads;
        const T* const row = q + head * p_.q_head_stride + 16 * warp + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kDepthSteps; ++i) {
#pragma unroll
          for (int columns = 0; columns < 2; ++columns) {
            Vec<T, 2> pair = {};
            if (valid) {
              const T* const from = row + 64 * i + 8 * columns;
              if constexpr (Vector) {
                pair = load_vec<T, 2>(from);
              } else {
                pair = {from[0], from[1]};
              }
            }
            q_[i][m][half + 2 * columns] = bits_as<uint32_t>(pair) ^ sign;
          }
          if constexpr (!Vector)
            __syncwarp();  // so that not all single elements are under way, in registers of their own
        }
      }
    }
  }

  // This warp's part of q k^T, to shared memory.
  __device__ void scores(const T* rows) {
    const int lane = thread() % kWarp, warp = thread() / kWarp;
    // Columns 16 w + 64 i: chunks 8 apart have the same swizzle.
    const T* const k = &rows[(lane % 8 + lane / 16 * 8) * kRowDim + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 8];
    float s[kTiles][kTileRows / 8][4] = {};
#pragma unroll
    for (int i = 0; i < kDepthSteps; ++i) {
#pragma unroll
      for (int n = 0; n < kTileRows / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, k + 8 * n * kRowDim + 64 * i);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma_m16n8k16<T>(s[m][n], q_[i][m], {b[0], b[1]});
          mma_m16n8k16<T>(s[m][n + 1], q_[i][m], {b[2], b[3]});
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTileRows / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const to = &shared_.s[warp][score_at(16 * m + lane / 4 + 8 * half, 8 * n + lane % 4 * 2)];
          store_vec(to, Vec<float, 2>{s[m][n][2 * half], s[m][n][2 * half + 1]});
        }
      }
    }
  }

  // p, and the state of the split: the head's maximum, this thread's keys' part of the sums.
  __device__ void softmax(const Step& step, int parity) {
    const int thread = this->thread();
    const int head = thread / kHeadThreads;
    PartialSums split = {-INFINITY, 0.0f, 0.0f, 0.0f};
    if (!step.is(Step::kSplitBegin)) split = shared_.split[thread];
    // Four keys together, 4 kHeadThreads apart. Of two heads one begins with the second four, for the banks' sake.
    const auto first_key = [&](int i) {
      return thread % kHeadThreads * 4 + (kThreadKeys == 4 ? 0 : (i / 4 ^ head % 2) * 4 * kHeadThreads);
    };
    float s[kThreadKeys];
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kThreadKeys; i += 4) {
      Vec<float, 4> part[kScoreWarps];
#pragma unroll
      for (int w = 0; w < kScoreWarps; ++w) part[w] = load_vec<float, 4>(&shared_.s[w][score_at(head, first_key(i))]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float sum = (part[0].x[e] + part[1].x[e]) + (part[2].x[e] + part[3].x[e]);
        s[i + e] = first_key(i) + e < step.rows ? sum : -INFINITY;
        largest = fmaxf(largest, s[i + e]);
      }
    }
    largest = fmaxf(split.max, ceilf(warp_max<kHeadThreads>(largest) * options_.scale));
    const float rescale = power_of_two(split.max, largest), shift = largest == -INFINITY ? 0.0f : largest;
    split.max = largest;
    split.sum *= rescale;
    split.rounded_sum *= rescale;
#pragma unroll
    for (int i = 0; i < kThreadKeys; i += 4) {
      Vec<uint32_t, 2> packed;
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float lo = exp2_approx(fmaf(s[i + e], options_.scale, -shift));
        const float hi = exp2_approx(fmaf(s[i + e + 1], options_.scale, -shift));
        packed.x[e / 2] = pack2<T>(lo, hi);
        const float2 rounded = unpack2<T>(packed.x[e / 2]);
        split.sum += lo + hi;
        split.rounded_sum += rounded.x + rounded.y;
      }
      store_vec(reinterpret_cast<uint32_t*>(&shared_.p[parity][probability_at(head, first_key(i))]), packed);
    }
    if (thread % kHeadThreads == 0) {
      // At the beginning o is zero.
      shared_.factors[parity].rescale[head] = step.is(Step::kSplitBegin) ? 1.0f : rescale;
    }
    shared_.split[thread] = split;
    if (step.is(Step::kSplitEnd)) finish_split(step, head, split, shared_.factors[parity]);
  }

  // Folds the split's sums into the unit's; at the end of the unit they go to the workspace, or decide the output.
  __device__ void finish_split(const Step& step, int head, const PartialSums& split, Factors<kHeads>& factors) {
    const float sum = warp_sum<kHeadThreads>(split.sum), rounded_sum = warp_sum<kHeadThreads>(split.rounded_sum);
    if (thread() % kHeadThreads != 0) return;
    const FoldFactors folding(shared_.unit_max[head], split.max);
    const float unit_sum = fold(shared_.unit_sum[head], folding.old, sum, folding.added);
    const float unit_rounded_sum = fold(shared_.unit_rounded_sum[head], folding.old, rounded_sum, folding.added);
    factors.fold_old[head] = folding.old;
    factors.fold_added[head] = folding.added;
    if (!step.is(Step::kUnitEnd)) {
      shared_.unit_max[head] = folding.max;
      shared_.unit_sum[head] = unit_sum;
      shared_.unit_rounded_sum[head] = unit_rounded_sum;
      return;
    }
    begin_unit(head);
    factors.inverse[head] = 1.0f / unit_rounded_sum;
    if (first_head() + head >= p_.num_heads) return;
    if (!step.is(Step::kWhole)) {
      w_.sums[step.slot * p_.num_heads + first_head() + head] = {folding.max, unit_sum, unit_rounded_sum, 0.0f};
    } else if (p_.lse) {
      p_.lse[step.seq * p_.num_heads + first_head() + head] = natural_lse(folding.max, unit_sum);
    }
  }
  __device__ void begin_unit(int head) {
    shared_.unit_max[head] = -INFINITY;
    shared_.unit_sum[head] = shared_.unit_rounded_sum[head] = 0.0f;
  }

  const MlaDecodeParams& p_;
  const Workspace& w_;
  const DecodeOptions& options_;
  DecodeShared<T, kHeads, kStages>& shared_;
  const Step* const steps_;
  uint32_t q_[kDepthSteps][kTiles][4];
};

// The value warps, which also fetch the rows.
template <typename T, int kHeads, int kStages, bool Vector>
class ValueWarps {
  static constexpr int kTiles = kHeads / 16;
  static constexpr int kCopies = Vector ? kRowDim / 64 : 1;  // of a thread's chunks of a row, unrolled

 public:
  __device__ ValueWarps(const MlaDecodeParams& p, const Workspace& w, const DecodeOptions& options,
                        DecodeShared<T, kHeads, kStages>& shared)
      : p_(p), w_(w), options_(options), shared_(shared), steps_(shared.schedule.steps) {}

  __device__ void run() {
    int pages[kStages];
#pragma unroll
    for (int i = 0; i < kStages; ++i) pages[i] = page_of(steps_[i]);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) load_rows(steps_[i], pages[i], i);
    int page = pages[kStages - 1];
    wait_for_rows<kStages - 2>();
    wait_for_rows<kStages - 3>();  // the score warps take tile 0
    int stage = 0;
#pragma unroll 1
    for (int tile = 0; steps_[tile % kSteps].rows != 0; ++tile) {
      const int free_stage = stage == 0 ? kStages - 1 : stage - 1;
      load_rows(steps_[(tile + kStages - 1) % kSteps], page, free_stage);
      page = page_of(steps_[(tile + kStages) % kSteps]);
      add_values(steps_[tile % kSteps], shared_.rows[stage], tile % 2);
      wait_for_rows<kStages - 3>();
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
  }

 private:
  __device__ static int first_head() { return static_cast<int>(blockIdx.y) * kHeads; }

  __device__ int thread() const { return shared_.thread[threadIdx.x]; }

  // 8 threads a row: all chunks of a thread have the same swizzle. The page of this thread's row is read a tile before.
  __device__ int page_of(const Step& step) const {
    const int row = thread() / 8;
    if (row >= step.rows) return 0;
    return p_.block_table[step.seq * p_.block_table_stride + options_.page_size(step.first_row + row)];
  }
  __device__ void load_rows(const Step& step, int64_t page, int stage) {
    const int thread = this->thread(), row = thread / 8, chunk = thread % 8, at = step.first_row + row;
    const int in_page = at - options_.page_size(at) * static_cast<int>(options_.page_size.divisor);
    const bool valid = row < step.rows;
    const T* from = static_cast<const T*>(p_.cache) + chunk * 8;
    if (valid) from += page * p_.page_stride + in_page * kRowDim;
    T* const to = &shared_.rows[stage][row * kRowDim + (chunk ^ row % 8) * 8];
#pragma unroll(kCopies)
    for (int i = 0; i < kRowDim / 64; ++i) copy_chunk(to + 64 * i, from + 64 * i, valid);
    cp_async_commit();
  }
  // 8 elements; zeros when not valid. Plain loads where addresses are not multiples of 16.
  __device__ static void copy_chunk(T* to, const T* from, bool valid) {
    if constexpr (Vector) {
      cp_async_16(to, from, valid);
    } else {
#pragma unroll 1
      for (int i = 0; i < 8; ++i) to[i] = valid ? from[i] : from_float<T>(0.0f);
    }
  }
  // The end of a tile for everybody: all but the newest `Newest` tiles have come.
  template <int Newest>
  __device__ void wait_for_rows() {
    cp_async_wait<Newest>();
    block_barrier();
  }

  // o += p v for this warp's columns.
  __device__ void add_values(const Step& step, const T* rows, int parity) {
    const int lane = thread() % kWarp, warp = thread() / kWarp;
    const Factors<kHeads>& factors = shared_.factors[parity];
    float rescale[kTiles][2];
    bool any = false;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rescale[m][half] = factors.rescale[16 * m + lane / 4 + 8 * half];
        any |= rescale[m][half] != 1.0f;
      }
    }
    if (__any_sync(0xffffffffu, any)) for_each_o([&](int m, int n, int i) { o_[m][n][i] *= rescale[m][i / 2]; });
    const T* const v = &rows[lane % 16 * kRowDim + warp * kWarpColumns];
    const int swizzle = (lane / 16 ^ lane % 8) * 8;
#pragma unroll 1
    for (int k = 0; k < kTileRows / 16; ++k) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
        ldmatrix_x4(a[m], &shared_.p[parity][probability_at(16 * m + lane % 16, 16 * k + lane / 16 * 8)]);
#pragma unroll
      for (int n = 0; n < kWarpColumns / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v + 16 * k * kRowDim + (swizzle ^ 8 * n));
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma_m16n8k16<T>(o_[m][n], a[m], {b[0], b[1]});
          mma_m16n8k16<T>(o_[m][n + 1], a[m], {b[2], b[3]});
        }
      }
    }
    if (!step.is(Step::kSplitEnd)) return;
    float old[kTiles][2], added[kTiles][2];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        old[m][half] = factors.fold_old[16 * m + lane / 4 + 8 * half];
        added[m][half] = factors.fold_added[16 * m + lane / 4 + 8 * half];
      }
    }
    for_each_o([&](int m, int n, int i) {
      unit_o_[m][n][i] = fold(unit_o_[m][n][i], old[m][i / 2], o_[m][n][i], added[m][i / 2]);
      o_[m][n][i] = 0.0f;
    });
    if (!step.is(Step::kUnitEnd)) return;
    store(step, factors);
    for_each_o([&](int m, int n, int i) { unit_o_[m][n][i] = 0.0f; });
  }

  // The unit's o: to the workspace, or scaled to the output.
  __device__ void store(const Step& step, const Factors<kHeads>& factors) const {
    const int lane = thread() % kWarp, warp = thread() / kWarp;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int head = 16 * m + lane / 4 + 8 * half, column = warp * kWarpColumns + lane % 4 * 2;
        if (first_head() + head >= p_.num_heads) continue;
        if (step.is(Step::kWhole)) {
          T* const out = static_cast<T*>(p_.out) + step.seq * p_.out_seq_stride +
                         (first_head() + head) * p_.out_head_stride + column;
          const float inverse = factors.inverse[head];
#pragma unroll
          for (int n = 0; n < kWarpColumns / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) out[8 * n + i] = from_float<T>(unit_o_[m][n][2 * half + i] * inverse);
          }
        } else {
          float* const o = w_.o + (step.slot * p_.num_heads + first_head() + head) * kLatentDim + column;
#pragma unroll
          for (int n = 0; n < kWarpColumns / 8; ++n)
            store_vec(o + 8 * n, Vec<float, 2>{unit_o_[m][n][2 * half], unit_o_[m][n][2 * half + 1]});
        }
      }
    }
  }

  template <typename Do>
  __device__ static void for_each_o(const Do& run) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kWarpColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) run(m, n, i);
      }
    }
  }

  const MlaDecodeParams& p_;
  const Workspace& w_;
  const DecodeOptions& options_;
  DecodeShared<T, kHeads, kStages>& shared_;
  const Step* const steps_;
  float o_[kTiles][kWarpColumns / 8][4] = {}, unit_o_[kTiles][kWarpColumns / 8][4] = {};
};

// SASS: tensor cores, 16-byte loads
template <typename T, int kHeads, int kStages, bool Vector>
__global__ void __launch_bounds__(kThreads, 1)
    mla_decode_kernel(MlaDecodeParams p, Workspace workspace, DecodeOptions options) {
  DecodeShared<T, kHeads, kStages>& shared = shared_memory<DecodeShared<T, kHeads, kStages>>();
  Schedule& schedule = shared.schedule;
  shared.thread[threadIdx.x] = threadIdx.x < kScoreThreads ? threadIdx.x : threadIdx.x - kScoreThreads;
  plan_work(p, workspace, options, schedule);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 6; ++i) schedule.steps[i] = next_step(p, schedule.by_split, schedule.cursor);
  }
  __syncthreads();
  if (schedule.steps[0].rows == 0) return;
  if (threadIdx.x < kScoreThreads) {
    ScoreWarps<T, kHeads, kStages, Vector>(p, workspace, options, shared).run();
  } else {
    ValueWarps<T, kHeads, kStages, Vector>(p, workspace, options, shared).run();
  }
}

template <typename T>
void launch_portable(const MlaDecodeParams& p, const Workspace& workspace, cudaStream_t stream) {
  KIMI_CHECK(p.num_seqs * ceil_div<int64_t>(capacity(p), kBlockRows) < int64_t{1} << 31,
             "mla_decode: num_seqs * max_pages is too large, got ", p.num_seqs, " * ", p.max_pages);
  const int tile_heads = p.num_heads <= 16 ? 16 : 32;
  const int head_tiles = static_cast<int>(ceil_div<int64_t>(p.num_heads, tile_heads));
  const int blocks = std::max(1, multiprocessors() / head_tiles);
  // Scale: 0 becomes a number that only a masked s = -inf survives.
  const DecodeOptions options = {.page_size = Divider(static_cast<uint32_t>(p.page_size)),
                                 .grid_blocks = Divider(static_cast<uint32_t>(blocks)),
                                 .full = ceil_div(3 * blocks, 5),
                                 .scale = std::max(std::abs(p.scale) * kLog2E, 1e-37f)};
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(head_tiles));
  const auto run = [&]<int kHeads, int kStages>() {
    using Shared = DecodeShared<T, kHeads, kStages>;
    static_assert(kStages > kFewStages || sizeof(Shared) <= kFewStagesBytes);
    const bool vector = aligned_to(16, p.cache, p.q) && multiples_of(8, p.page_stride, p.q_seq_stride, p.q_head_stride);
    launch(vector ? mla_decode_kernel<T, kHeads, kStages, true> : mla_decode_kernel<T, kHeads, kStages, false>, grid,
           dim3(kThreads), sizeof(Shared), stream, p, workspace, options);
  };
  const bool many = max_shared_bytes() >= static_cast<int>(sizeof(DecodeShared<T, 32, kManyStages>));
  if (tile_heads == 16) {
    many ? run.template operator()<16, kManyStages>() : run.template operator()<16, kFewStages>();
  } else {
    many ? run.template operator()<32, kManyStages>() : run.template operator()<32, kFewStages>();
  }
}

}  // namespace kimi::cuda::mla_decode_detail
