// mla_decode on the tensor cores of compute capability 8.0 and later (mma.sync), for the released dims 512 + 64 in bf16
// or fp16.
//
// Grid: (as many blocks of 256 threads as multiprocessors) x (head tiles of 32, or of 16). A thread block streams its
// share of all sequences (schedule.cuh) through two buffers of 64 rows; a row is read from memory once for all heads of
// a head tile. Per block of rows:
//   q k^T    warp w adds up columns 16 (w % 4 + 4 i), i < 9, of all heads and keys 32 (w / 4) + [0, 32); the four
//   partial
//            sums go through shared memory, so that q is read there by two warps and the keys by one
//   softmax  8 (or 16) threads a head; p goes to shared memory in the input type
//   p v      warp w owns columns [64 w, 64 w + 64) of o, for all heads, in registers; the values are the keys' rows
// and at the end of a split o is folded into the unit's o, also in registers.
//
// Shared memory, 221 KB: rows 2 x 64 x 576 (144 KB), q 32 x 576 (36 KB), partial s 4 x 32 x 72 fp32 (36 KB), p 32 x 64.
// Rows are multiples of 128 bytes; 16-byte chunk c of row r lies at c ^ (r % 8).
//
// 32 heads: a block of 64 rows is 72 KB from memory, 2.3 us of a 132nd of 4.27 TB/s, and 4.5 Mflop; mma.sync needs 0.9
// us for them, shared memory 385 KB = 1.7 us at 128 bytes a cycle. That would be bound by memory, but the three phases
// follow each other with a barrier in between, and take 3.3 us (docs/mla.md).
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/common/launch.h"
#include "cuda/common/ptx.h"
#include "cuda/common/reduce.h"
#include "cuda/mla_decode/schedule.cuh"

namespace kimi::cuda::mla_decode_detail {

inline constexpr int kDepthGroups = 4, kKeyGroups = kWarps / kDepthGroups;  // of warps in q k^T
inline constexpr int kGroupKeys = kBlockRows / kKeyGroups;
inline constexpr int kDepthSteps = kRowDim / 16 / kDepthGroups;
inline constexpr int kWarpColumns = kLatentDim / kWarps;
inline constexpr int kScorePitch = kBlockRows + 8;  // 8: the two-word accesses of four rows in different banks

template <typename T, int kHeads>
struct alignas(128) DecodeShared {
  T rows[2][kBlockRows * kRowDim];
  T q[kHeads * kRowDim];
  float s[kDepthGroups][kHeads][kScorePitch];
  T p[kHeads * kBlockRows];
  float rescale[kHeads], fold_old[kHeads], fold_added[kHeads], inverse[kHeads];
  float unit_max[kHeads], unit_sum[kHeads], unit_rounded_sum[kHeads];  // of the unit's splits before
  Step steps[4];
  Cursor cursor;
  int warp_blocks[kWarps], warp_splits[kWarps], warp_segments[kWarps];
  bool by_split;
};

// 8 elements from global to shared memory; zeros when not valid. Plain loads where addresses are not multiples of 16.
template <typename T, bool Vector>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, bool valid) {
  if constexpr (Vector) {
    cp_async_16(to, from, valid);
  } else {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) to[i] = valid ? from[i] : from_float<T>(0.0f);
  }
}

// `Vector`: q and the cache may be read by 16 bytes.
template <typename T, int kHeads, bool Vector>
class DecodeBlock {
  static constexpr int kTiles = kHeads / 16;                                                       // m16 tiles of heads
  static constexpr int kHeadThreads = kThreads / kHeads, kThreadKeys = kBlockRows / kHeadThreads;  // in the softmax

 public:
  using Shared = DecodeShared<T, kHeads>;

  __device__ DecodeBlock(const MlaDecodeParams& p, const Workspace& w, const DecodeOptions& options, Shared& shared)
      : p_(p), w_(w), options_(options), shared_(shared), first_head_(blockIdx.y * kHeads) {}

  __device__ void run() {
    plan_work(p_, w_, options_, shared_);
    if (thread_ == 0) {
      for (int i = 0; i < 3; ++i) shared_.steps[i] = next_step(p_, shared_.by_split, shared_.cursor);
    }
    __syncthreads();
    if (shared_.steps[0].rows == 0) return;
    if (thread_ % kHeadThreads == 0) begin_unit(thread_ / kHeadThreads);
    find_pages(shared_.steps[0]);
    load_q(shared_.steps[0]);
    const RowLoader first_rows = row_loader(shared_.steps[0], 0);
#pragma unroll
    for (int i = 0; i < kDepthSteps; ++i) first_rows.piece(i);
    find_pages(shared_.steps[1]);

#pragma unroll 1
    for (int i = 0;; ++i) {
      const Step& step = shared_.steps[i % 4];
      // These rows have come (and q), and nobody reads the other buffer any more: fetch the next ones into it.
      cp_async_commit();
      cp_async_wait<0>();
      if (step.new_sequence && p_.scale < 0) negate_q();
      __syncthreads();
      if (step.rows == 0) break;
      const Step& next = shared_.steps[(i + 1) % 4];
      const RowLoader next_rows = row_loader(next, (i + 1) % 2);
      find_pages(shared_.steps[(i + 2) % 4]);
      if (thread_ == 0) shared_.steps[(i + 3) % 4] = next_step(p_, shared_.by_split, shared_.cursor);

      scores(shared_.rows[i % 2], next_rows);
      __syncthreads();
      if (next.new_sequence) load_q(next);
      softmax(step);
      __syncthreads();
      values(step, shared_.rows[i % 2]);
    }
  }

 private:
  // Where this thread's two rows of a step, thread / 8 and that + 32, lie: read a step before they are fetched.
  __device__ void find_pages(const Step& step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = thread_ / 8 + 32 * half;
      if (row >= step.rows) continue;
      pages_[half] = p_.block_table[step.seq * p_.block_table_stride + options_.page_size(step.first_row + row)];
    }
  }

  // This thread's part of a step's rows, in as many pieces as q k^T has steps: 8 threads a row, so that all chunks of a
  // thread have the same swizzle.
  struct RowLoader {
    T* to;
    const T* from[2];
    bool valid[2];
    __device__ void piece(int i) const {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        copy_chunk<T, Vector>(to + half * (32 * kRowDim) + 64 * i, from[half] + 64 * i, valid[half]);
    }
  };
  __device__ RowLoader row_loader(const Step& step, int buffer) const {
    const int row = thread_ / 8, chunk = thread_ % 8;
    RowLoader loader;
    loader.to = &shared_.rows[buffer][row * kRowDim + (chunk ^ row % 8) * 8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = step.first_row + row + 32 * half;
      const int in_page = at - options_.page_size(at) * static_cast<int>(options_.page_size.divisor);
      loader.valid[half] = row + 32 * half < step.rows;
      loader.from[half] = static_cast<const T*>(p_.cache) + chunk * 8;
      if (loader.valid[half]) loader.from[half] += pages_[half] * p_.page_stride + in_page * kRowDim;
    }
    return loader;
  }

  // q of a sequence; zeros for heads past the last one.
  __device__ void load_q(const Step& step) {
    if (step.rows == 0) return;
    const T* const q = static_cast<const T*>(p_.q) + step.seq * p_.q_seq_stride + first_head_ * p_.q_head_stride;
#pragma unroll 3
    for (int i = thread_; i < kHeads * (kRowDim / 8); i += kThreads) {
      const int head = i / (kRowDim / 8), chunk = i % (kRowDim / 8);
      copy_chunk<T, Vector>(&shared_.q[head * kRowDim + (chunk ^ head % 8) * 8],
                            q + head * p_.q_head_stride + chunk * 8, first_head_ + head < p_.num_heads);
    }
  }
  // Each thread what it has loaded.
  __device__ void negate_q() {
    for (int i = thread_; i < kHeads * (kRowDim / 8); i += kThreads) {
      const int head = i / (kRowDim / 8), chunk = i % (kRowDim / 8);
      uint32_t* const words = reinterpret_cast<uint32_t*>(&shared_.q[head * kRowDim + (chunk ^ head % 8) * 8]);
#pragma unroll
      for (int word = 0; word < 4; ++word) words[word] ^= 0x80008000u;
    }
  }

  // This warp's part of q k^T, to shared memory. In between, the next rows are fetched.
  __device__ void scores(const T* rows, const RowLoader& next_rows) {
    const int depth_group = warp_ % kDepthGroups, first_key = warp_ / kDepthGroups * kGroupKeys;
    // Columns 16 depth_group + 64 i: chunks 8 apart have the same swizzle.
    const T* const q = &shared_.q[lane_ % 16 * kRowDim + ((2 * depth_group + lane_ / 16) ^ lane_ % 8) * 8];
    const T* const k =
        &rows[(first_key + lane_ % 8 + lane_ / 16 * 8) * kRowDim + ((2 * depth_group + lane_ / 8 % 2) ^ lane_ % 8) * 8];
    float s[kTiles][kGroupKeys / 8][4] = {};
#pragma unroll
    for (int i = 0; i < kDepthSteps; ++i) {
      next_rows.piece(i);
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) ldmatrix_x4(a[m], q + 16 * m * kRowDim + 64 * i);
#pragma unroll
      for (int n = 0; n < kGroupKeys / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, k + 8 * n * kRowDim + 64 * i);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma_m16n8k16<T>(s[m][n], a[m], {b[0], b[1]});
          mma_m16n8k16<T>(s[m][n + 1], a[m], {b[2], b[3]});
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kGroupKeys / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const to = &shared_.s[depth_group][16 * m + lane_ / 4 + 8 * half][first_key + 8 * n + lane_ % 4 * 2];
          store_vec(to, Vec<float, 2>{s[m][n][2 * half], s[m][n][2 * half + 1]});
        }
      }
    }
  }

  // p, and the state of this thread's head: max_, and its own keys' part of sum_ and rounded_sum_.
  __device__ void softmax(const Step& step) {
    const int head = thread_ / kHeadThreads, first = thread_ % kHeadThreads * 4;
    if (step.split_begin) {
      max_ = -INFINITY;
      sum_ = rounded_sum_ = 0.0f;
    }
    float s[kThreadKeys];  // keys first + 4 kHeadThreads j + e
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kThreadKeys; i += 4) {
      const int key = first + kHeadThreads * i;
      Vec<float, 4> part[kDepthGroups];
#pragma unroll
      for (int group = 0; group < kDepthGroups; ++group) part[group] = load_vec<float, 4>(&shared_.s[group][head][key]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float sum = (part[0].x[e] + part[1].x[e]) + (part[2].x[e] + part[3].x[e]);
        s[i + e] = key + e < step.rows ? sum : -INFINITY;
        largest = fmaxf(largest, s[i + e]);
      }
    }
    largest = fmaxf(max_, ceilf(warp_max<kHeadThreads>(largest) * options_.scale));
    const float rescale = power_of_two(max_, largest), shift = largest == -INFINITY ? 0.0f : largest;
    max_ = largest;
    sum_ *= rescale;
    rounded_sum_ *= rescale;
#pragma unroll
    for (int i = 0; i < kThreadKeys; i += 4) {
      const int key = first + kHeadThreads * i;
      Vec<uint32_t, 2> packed;
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float lo = exp2_approx(fmaf(s[i + e], options_.scale, -shift));
        const float hi = exp2_approx(fmaf(s[i + e + 1], options_.scale, -shift));
        packed.x[e / 2] = pack2<T>(lo, hi);
        const float2 rounded = unpack2<T>(packed.x[e / 2]);
        sum_ += lo + hi;
        rounded_sum_ += rounded.x + rounded.y;
      }
      store_vec(reinterpret_cast<uint32_t*>(&shared_.p[head * kBlockRows + (key / 8 ^ head % 8) * 8 + key % 8]),
                packed);
    }
    if (thread_ % kHeadThreads == 0) shared_.rescale[head] = rescale;
    if (step.split_end) finish_split(step, head);
  }

  // Folds the split's sums into the unit's; at the end of the unit they go to the workspace, or decide the output.
  __device__ void finish_split(const Step& step, int head) {
    const float sum = warp_sum<kHeadThreads>(sum_), rounded_sum = warp_sum<kHeadThreads>(rounded_sum_);
    if (thread_ % kHeadThreads != 0) return;
    const FoldFactors factors(shared_.unit_max[head], max_);
    const float unit_sum = fold(shared_.unit_sum[head], factors.old, sum, factors.added);
    const float unit_rounded_sum = fold(shared_.unit_rounded_sum[head], factors.old, rounded_sum, factors.added);
    shared_.fold_old[head] = factors.old;
    shared_.fold_added[head] = factors.added;
    if (!step.unit_end) {
      shared_.unit_max[head] = factors.max;
      shared_.unit_sum[head] = unit_sum;
      shared_.unit_rounded_sum[head] = unit_rounded_sum;
      return;
    }
    begin_unit(head);
    shared_.inverse[head] = 1.0f / unit_rounded_sum;
    if (first_head_ + head >= p_.num_heads) return;
    const int64_t at = (step.whole ? step.seq : step.slot) * p_.num_heads + first_head_ + head;
    if (!step.whole) {
      w_.sums[at] = {factors.max, unit_sum, unit_rounded_sum, 0.0f};
    } else if (p_.lse) {
      p_.lse[at] = natural_lse(factors.max, unit_sum);
    }
  }
  __device__ void begin_unit(int head) {
    shared_.unit_max[head] = -INFINITY;
    shared_.unit_sum[head] = shared_.unit_rounded_sum[head] = 0.0f;
  }

  // o += p v for this warp's columns.
  __device__ void values(const Step& step, const T* rows) {
    if (step.split_begin) {
      for_each_o([&](int m, int n, int i) { o_[m][n][i] = 0.0f; });
    } else {
      float rescale[kTiles][2];
      bool any = false;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          rescale[m][half] = shared_.rescale[16 * m + lane_ / 4 + 8 * half];
          any |= rescale[m][half] != 1.0f;
        }
      }
      if (__any_sync(0xffffffffu, any)) for_each_o([&](int m, int n, int i) { o_[m][n][i] *= rescale[m][i / 2]; });
    }
    const T* const p = &shared_.p[lane_ % 16 * kBlockRows];
    const T* const v = &rows[lane_ % 16 * kRowDim + warp_ * kWarpColumns];
    const int swizzle = (lane_ / 16 ^ lane_ % 8) * 8;
#pragma unroll
    for (int k = 0; k < kBlockRows / 16; ++k) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) ldmatrix_x4(a[m], p + 16 * m * kBlockRows + (swizzle ^ 16 * k));
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
    if (!step.split_end) return;
    float old[kTiles][2], added[kTiles][2];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        old[m][half] = shared_.fold_old[16 * m + lane_ / 4 + 8 * half];
        added[m][half] = shared_.fold_added[16 * m + lane_ / 4 + 8 * half];
      }
    }
    for_each_o([&](int m, int n, int i) {
      unit_o_[m][n][i] = fold(unit_o_[m][n][i], old[m][i / 2], o_[m][n][i], added[m][i / 2]);
    });
    if (!step.unit_end) return;
    store(step);
    for_each_o([&](int m, int n, int i) { unit_o_[m][n][i] = 0.0f; });
  }

  // The unit's o: to the workspace, or scaled to the output.
  __device__ void store(const Step& step) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int head = 16 * m + lane_ / 4 + 8 * half, column = warp_ * kWarpColumns + lane_ % 4 * 2;
        if (first_head_ + head >= p_.num_heads) continue;
        if (step.whole) {
          T* const out = static_cast<T*>(p_.out) + step.seq * p_.out_seq_stride +
                         (first_head_ + head) * p_.out_head_stride + column;
          const float inverse = shared_.inverse[head];
#pragma unroll
          for (int n = 0; n < kWarpColumns / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) out[8 * n + i] = from_float<T>(unit_o_[m][n][2 * half + i] * inverse);
          }
        } else {
          float* const o =
              w_.o + (static_cast<int64_t>(step.slot) * p_.num_heads + first_head_ + head) * kLatentDim + column;
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
  Shared& shared_;
  const int first_head_;
  const int thread_ = threadIdx.x, lane_ = threadIdx.x % kWarp, warp_ = threadIdx.x / kWarp;  // divided while unsigned
  int pages_[2] = {};
  float max_ = -INFINITY, sum_ = 0.0f, rounded_sum_ = 0.0f;  // of the split
  float o_[kTiles][kWarpColumns / 8][4] = {}, unit_o_[kTiles][kWarpColumns / 8][4] = {};
};

// SASS: tensor cores, 16-byte loads
template <typename T, int kHeads, bool Vector>
__global__ void __launch_bounds__(kThreads, 1)
    mla_decode_kernel(MlaDecodeParams p, Workspace workspace, DecodeOptions options) {
  DecodeBlock<T, kHeads, Vector>(p, workspace, options, shared_memory<DecodeShared<T, kHeads>>()).run();
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
  static_assert(sizeof(DecodeShared<T, 32>) <= kSharedBytes);
  const auto run = [&]<int kHeads, bool Vector>() {
    launch(mla_decode_kernel<T, kHeads, Vector>, grid, dim3(kThreads), sizeof(DecodeShared<T, kHeads>), stream, p,
           workspace, options);
  };
  const bool vector = aligned_to(16, p.cache, p.q) && multiples_of(8, p.page_stride, p.q_seq_stride, p.q_head_stride);
  if (tile_heads == 16) {
    vector ? run.template operator()<16, true>() : run.template operator()<16, false>();
  } else {
    vector ? run.template operator()<32, true>() : run.template operator()<32, false>();
  }
}

}  // namespace kimi::cuda::mla_decode_detail
