// mla_prefill on the tensor cores of compute capability 8.0 and later (mma.sync), for the released dims 128 + 64 / 128
// in bf16 or fp16.
//
//   s = q k^T,  m' = max(m, max_j s),  p = 2^(s - m'),  l = l 2^(m - m') + sum_j p,  o = o 2^(m - m') + p v
//
// in log2 units; p is rounded to the input type for the second product. out = o / l.
//
// Grid: (query tile of 128, head), see tiles.cuh; two blocks of four warps on a multiprocessor, so that one's softmax
// runs beside the other's matrix products. A warp owns 32 query rows: its o (32 x 128) stays in 128 registers, its s
// (32 x 64) in 64, and p is the A operand of the second product in the registers where s was computed.
//
// Shared memory, 112 KB: q 128 x 192 (its rows become the output tile), keys 2 x 64 x 192, values 64 x 128. A row is a
// multiple of 128 bytes; its 16-byte chunk c lies at c ^ (row % 8), so that the 8 rows of an 8x8 matrix are in 8
// different bank groups. k_rope goes into the same rows as k_nope, read again for each head (from L2).
//
// A block of keys for a tile: 128 x 64 x 320 x 2 = 5.2 Mflop; 40 KB from L2, 208 KB read by ldmatrix and 40 KB
// written, 248 KB = 1984 cycles of shared memory against about 2100 cycles of mma.sync: bound by both.
//
// Bits: blocks of 64 keys are anchored at key 0 and taken in order; whether a row rescales depends on the row alone
// (multiplying by 1 changes nothing); p of a key that the row may not see is exactly 0. That would still let NaN or
// infinities of such a value through (0 * NaN), so in blocks with a mask values that are not finite are replaced by 0
// and added by hand to the rows that do see them.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/common/attention.h"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.h"
#include "cuda/mla_prefill/tiles.cuh"

namespace kimi::cuda::mla_prefill_detail {

inline constexpr int kNopeDim = 128, kRopeDim = 64, kKeyDim = kNopeDim + kRopeDim, kValueDim = 128;
inline constexpr int kKeyBlock = 64;
inline constexpr int kWarps = 4, kThreads = kWarps * kWarp;
inline constexpr int kWarpRows = 32;  // two m16 tiles: every fragment of k and v from shared memory is used twice
inline constexpr int kRows = kWarps * kWarpRows;

// Below every maximum, and finite: 2^(-inf - kNoMaximum) is 0.
inline constexpr float kNoMaximum = -3e38f;

template <typename T>
struct alignas(128) PrefillShared {
  T q[kRows * kKeyDim];
  T keys[2][kKeyBlock * kKeyDim];
  T values[kKeyBlock * kValueDim];
  // What is the same for all threads and needed now and then: here it takes no registers.
  QueryTile tile;
  const T *k_nope, *k_rope, *v;  // of the sequence's first key
  // Each lane's part of a LaneRow. Read again in each phase: from known values the compiler precomputes, and spills,
  // all addresses.
  int a_swizzle[kWarp], b_swizzle[kWarp];
};

// Index of chunk `chunk` (8 elements) of `row` in a swizzled tile of rows of `Dim` elements.
template <int Dim>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * Dim + (chunk ^ row % 8) * 8;
}

// Addresses in a swizzled tile for ldmatrix_x4, which reads 16 x 16 elements as four matrices of 8 rows of a chunk.
// `row` is the lane's row and `swizzle` 8 (chunk ^ row % 8) with the lane's chunk, 0 or 1; from there other rows (in
// steps of 8) and chunks (in steps of 2) are a constant away.
//   operand a, and v: 8 rows of a chunk, the next 8 rows, then both of the next chunk
//   operand b, k:     8 rows of a chunk, of the next chunk, then both of the next 8 rows
template <typename T, int Dim>
struct LaneRow {
  const T* row_start;
  int swizzle;
  __device__ LaneRow(const T* tile, int row, int swizzle) : row_start(tile + row * Dim), swizzle(swizzle) {}
  __device__ const T* at(int rows, int chunks) const {
    return row_start + (swizzle ^ chunks % 8 * 8) + (rows * Dim + chunks / 8 * 64);
  }
};

// 8 elements from global to shared memory; zeros when not valid. Plain loads where addresses are not multiples of 16.
template <typename T, bool kVector>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, bool valid) {
  if constexpr (kVector) {
    cp_async_16(to, from, valid);
  } else {
    Vec<T, 8> chunk;
#pragma unroll
    for (int i = 0; i < 8; ++i) chunk.x[i] = valid ? from[i] : from_float<T>(0.0f);
    store_vec(to, chunk);
  }
}

// Whether one of 8 elements is NaN or infinite: its exponent is all ones, and adding one to it carries into the sign.
template <typename T>
__device__ __forceinline__ bool any_not_finite(const Vec<T, 8>& chunk) {
  constexpr uint32_t kExponent = std::is_same_v<T, Bf16> ? 0x7f807f80u : 0x7c007c00u;
  constexpr uint32_t kOne = std::is_same_v<T, Bf16> ? 0x00800080u : 0x04000400u;
  uint32_t carry = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) carry |= (bits_as<Vec<uint32_t, 4>>(chunk).x[i] & kExponent) + kOne;
  return (carry & 0x80008000u) != 0;
}
__device__ __forceinline__ bool is_finite(float x) {
  return x - x == 0.0f;
}

// `scale`: log2 units per unit of q k, positive.
// SASS: tensor cores, 16-byte loads
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) mla_prefill_kernel(MlaPrefillParams p, int64_t num_tiles, float scale) {
  PrefillShared<T>& shared = shared_memory<PrefillShared<T>>();
  const int thread = threadIdx.x, lane = thread % kWarp;
  const int first_row = thread / kWarp * kWarpRows;  // of the warp

  // Phase 0: which tile. A warp's blocks of keys end where its last row's keys end.
  QueryTile& tile = shared.tile;
  {
    const QueryTile found = query_tile(p, kRows, num_tiles, (kNopeDim + kValueDim) * sizeof(T));
    if (found.rows == 0) return;
    if (thread < kWarp) {
      shared.a_swizzle[lane] = (lane / 16 ^ lane % 8) * 8;
      shared.b_swizzle[lane] = (lane / 8 % 2 ^ lane % 8) * 8;
    }
    if (thread == 0) {
      tile = found;
      shared.k_nope =
          static_cast<const T*>(p.k_nope) + found.k_at * p.k_nope_stride + found.head * p.k_nope_head_stride;
      shared.k_rope = static_cast<const T*>(p.k_rope) + found.k_at * p.k_rope_stride;
      shared.v = static_cast<const T*>(p.v) + found.k_at * p.v_stride + found.head * p.v_head_stride;
    }
    __syncthreads();
  }
  const int num_blocks = ceil_div(tile.end_of(0, kRows), kKeyBlock);

  // Phase 1: loads, 8 threads a row, rows 16 apart: all chunks of a thread have the same swizzle.
  const int load_row = thread / 8, load_chunk = thread % 8;
  const auto load_keys = [&](int block, int stage) {
    const int first = block * kKeyBlock + load_row, left = tile.num_keys - first;
    T* to = &shared.keys[stage][swizzled<kKeyDim>(load_row, load_chunk)];
    const T* nope = shared.k_nope + first * p.k_nope_stride + load_chunk * 8;
    const T* rope = shared.k_rope + first * p.k_rope_stride + load_chunk * 8;
#pragma unroll
    for (int row = 0; row < kKeyBlock; row += kThreads / 8, to += kThreads / 8 * kKeyDim) {
      copy_chunk<T, kVector>(to, nope, row < left);
      copy_chunk<T, kVector>(to + 64, nope + 64, row < left);
      copy_chunk<T, kVector>(to + kNopeDim, rope, row < left);
      nope += kThreads / 8 * p.k_nope_stride;
      rope += kThreads / 8 * p.k_rope_stride;
    }
  };
  const auto load_values = [&](int block) {
    const int first = block * kKeyBlock + load_row, left = tile.num_keys - first;
    T* to = &shared.values[swizzled<kValueDim>(load_row, load_chunk)];
    const T* v = shared.v + first * p.v_stride + load_chunk * 8;
#pragma unroll
    for (int row = 0; row < kKeyBlock; row += kThreads / 8, to += kThreads / 8 * kValueDim) {
      copy_chunk<T, kVector>(to, v, row < left);
      copy_chunk<T, kVector>(to + 64, v + 64, row < left);
      v += kThreads / 8 * p.v_stride;
    }
  };
  // Whether this thread's part of the value tile holds something that is not finite; that becomes 0.
  const auto clean_values = [&] {
    bool found = false;
#pragma unroll 1
    for (int i = 0; i < 2 * kKeyBlock; i += kThreads / 8) {
      T* const at = &shared.values[swizzled<kValueDim>(load_row + i % kKeyBlock, load_chunk + i / kKeyBlock * 8)];
      Vec<T, 8> chunk = load_vec<T, 8>(at);
      if (!any_not_finite(chunk)) continue;
      found = true;
      for (int i = 0; i < 8; ++i)
        if (!is_finite(to_float(chunk.x[i]))) chunk.x[i] = from_float<T>(0.0f);
      store_vec(at, chunk);
    }
    return found;
  };

  if (num_blocks > 0) {
    const T* const q = static_cast<const T*>(p.q) + tile.q_at * p.q_stride + tile.head * p.q_head_stride;
#pragma unroll 4
    for (int i = thread; i < kRows * (kKeyDim / 8); i += kThreads) {
      const int row = i / (kKeyDim / 8), chunk = i % (kKeyDim / 8);
      copy_chunk<T, kVector>(&shared.q[swizzled<kKeyDim>(row, chunk)], q + row * p.q_stride + chunk * 8,
                             row < tile.rows);
    }
    load_keys(0, 0);
    cp_async_commit();
  }
  if (num_blocks > 0 && p.scale < 0) {
    cp_async_wait<0>();
    for (int i = thread; i < kRows * (kKeyDim / 8); i += kThreads) {
      uint32_t* const at =
          reinterpret_cast<uint32_t*>(&shared.q[swizzled<kKeyDim>(i / (kKeyDim / 8), i % (kKeyDim / 8))]);
#pragma unroll
      for (int word = 0; word < 4; ++word) at[word] ^= 0x80008000u;
    }
  }

  // Fragments: o[m][n] as accumulators of rows 16 m + g and + 8; what belongs to a row is indexed 2 m + half.
  float o[2][kValueDim / 8][4] = {};
  float max_log2[4], sum[4] = {};
#pragma unroll
  for (int r = 0; r < 4; ++r) max_log2[r] = kNoMaximum;

#pragma unroll 1
  for (int block = 0; block < num_blocks; ++block) {
    // Phase 2: these keys have come and nobody reads the values or the other keys any more: fetch those of next.
    cp_async_wait<0>();
    __syncthreads();
    load_values(block);
    cp_async_commit();
    if (block + 1 < num_blocks) load_keys(block + 1, (block + 1) % 2);
    cp_async_commit();

    const int first_key = block * kKeyBlock;
    const bool active = first_key < tile.end_of(first_row, kWarpRows);
    float s[2][kKeyBlock / 8][4] = {};
    uint32_t probabilities[2][2][4];  // operand a of the second product for 16 keys, and for the next 16
    // Its register i of rows 16 m + [0, 16): rows g, g + 8, then the same of the next 8 keys.
    const auto exponentiate = [&](int k, int m, int i) {
      const int r = 2 * m + i % 2;
      const float* const pair = &s[m][2 * k + i / 2][i % 2 * 2];
      const float lo = exp2_approx(fmaf(pair[0], scale, -max_log2[r])),
                  hi = exp2_approx(fmaf(pair[1], scale, -max_log2[r]));
      probabilities[k % 2][m][i] = pack2<T>(lo, hi);
      sum[r] += lo + hi;
    };
    if (active) {
      // Phase 3: s = q k^T.
      const LaneRow<T, kKeyDim> q_lane(shared.q, first_row + lane % 16, shared.a_swizzle[lane]);
      const LaneRow<T, kKeyDim> k_lane(shared.keys[block % 2], lane % 8 + lane / 16 * 8, shared.b_swizzle[lane]);
#pragma unroll
      for (int k = 0; k < kKeyDim / 16; ++k) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) ldmatrix_x4(a[m], q_lane.at(16 * m, 2 * k));
#pragma unroll
        for (int n = 0; n < kKeyBlock / 8; n += 2) {
          uint32_t b[4];
          ldmatrix_x4(b, k_lane.at(8 * n, 2 * k));
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma_m16n8k16<T>(s[m][n], a[m], {b[0], b[1]});
            mma_m16n8k16<T>(s[m][n + 1], a[m], {b[2], b[3]});
          }
        }
      }
      // Keys that a row does not see: -inf, whatever came out.
      if (first_key + kKeyBlock > tile.num_keys || first_key + kKeyBlock > tile.first_end + first_row) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int first_visible = tile.first_end + first_row + lane / 4;
            const int end = min(first_visible + 16 * m + i / 2 * 8, tile.num_keys) - first_key - lane % 4 * 2 - i % 2;
#pragma unroll
            for (int n = 0; n < kKeyBlock / 8; ++n) s[m][n][i] = 8 * n < end ? s[m][n][i] : -INFINITY;
          }
        }
      }
      // Phase 4: running maximum, and o, l in its units.
      float factor[4];
      bool rescale = false;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeyBlock / 8; ++n)
          largest = fmaxf(largest, fmaxf(s[r / 2][n][r % 2 * 2], s[r / 2][n][r % 2 * 2 + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2)) * scale;
        const bool raise = largest > max_log2[r];
        factor[r] = raise ? exp2_approx(max_log2[r] - largest) : 1.0f;
        if (raise) max_log2[r] = largest;
        rescale |= raise;
      }
      if (__any_sync(0xffffffffu, rescale)) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int n = 0; n < kValueDim / 8; ++n) o[m][n][i] *= factor[2 * m + i / 2];
          }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[r] *= factor[r];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) exponentiate(0, i / 4, i % 4);
    }

    // Phase 5: the values have come. Where a row of the tile may not see all keys they are cleaned.
    cp_async_wait<1>();
    bool cleaned = false;
    if (first_key + kKeyBlock > tile.first_end) {
      cleaned = __syncthreads_or(clean_values());
    } else {
      __syncthreads();
    }
    if (!active) continue;

    // Phase 6: o += p v, 16 keys at a time, and between the products p of the next 16 keys.
    const LaneRow<T, kValueDim> v_lane(shared.values, lane % 16, shared.a_swizzle[lane]);
#pragma unroll
    for (int k = 0; k < kKeyBlock / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kValueDim / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v_lane.at(16 * k, n));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_m16n8k16<T>(o[m][n], probabilities[k % 2][m], {b[0], b[1]});
          mma_m16n8k16<T>(o[m][n + 1], probabilities[k % 2][m], {b[2], b[3]});
        }
        if (k + 1 < kKeyBlock / 16) exponentiate(k + 1, n / 8, n / 2 % 4);
      }
    }
    if (cleaned) {
#pragma unroll 1
      for (int key = first_key; key < first_key + kKeyBlock && key < tile.num_keys; ++key) {
        const T* const value = shared.v + key * p.v_stride + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kValueDim / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float x = to_float(value[8 * n + i]);
            if (is_finite(x)) continue;
#pragma unroll
            for (int r = 0; r < 4; ++r)
              if (key < tile.first_end + first_row + lane / 4 + 8 * r) o[r / 2][n][r % 2 * 2 + i] += x;
          }
        }
      }
    }
  }
  cp_async_wait<0>();

  // Phase 7: out = o / l, lse = ln(2) (m + log2 l). The warp's rows of q are free: staging for 16-byte
  // stores.
  float inverse[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = first_row + lane / 4 + 8 * r;
    const bool blind = tile.first_end + row <= 0 || tile.num_keys <= 0;
    float total = sum[r] + __shfl_xor_sync(0xffffffffu, sum[r], 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    inverse[r] = blind ? 0.0f : 1.0f / total;
    if (p.lse && lane % 4 == 0 && row < tile.rows) {
      p.lse[(tile.q_at + row) * p.num_heads + tile.head] = blind ? -INFINITY : natural_lse(max_log2[r], total);
    }
  }
  const int64_t out_at = tile.q_at * p.out_stride + tile.head * p.out_head_stride;
  if (kVector && p.out_dtype != DType::kF32) {
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kValueDim / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int at = swizzled<kKeyDim>(first_row + lane / 4 + 8 * r, n) + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(&shared.q[at]) =
            pack2<T>(o[r / 2][n][r % 2 * 2] * inverse[r], o[r / 2][n][r % 2 * 2 + 1] * inverse[r]);
      }
    }
    __syncwarp();
    T* const out = static_cast<T*>(p.out) + out_at;
#pragma unroll
    for (int i = 0; i < kWarpRows; i += kWarp / 16) {
      const int row = first_row + i + lane / 16;
      if (row < tile.rows) {
        store_vec(out + row * p.out_stride + lane % 16 * 8,
                  load_vec<T, 8>(&shared.q[swizzled<kKeyDim>(row, lane % 16)]));
      }
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = first_row + lane / 4 + 8 * r;
    if (row >= tile.rows) continue;
#pragma unroll
    for (int n = 0; n < kValueDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t at = out_at + row * p.out_stride + 8 * n + lane % 4 * 2 + i;
        const float x = o[r / 2][n][r % 2 * 2 + i] * inverse[r];
        if (p.out_dtype == DType::kF32) {
          static_cast<float*>(p.out)[at] = x;
        } else {
          static_cast<T*>(p.out)[at] = from_float<T>(x);
        }
      }
    }
  }
}

template <typename T>
void launch_portable(const MlaPrefillParams& p, cudaStream_t stream) {
  const bool vector = aligned_to(16, p.q, p.k_nope, p.k_rope, p.v, p.out) &&
                      multiples_of(8, p.q_stride, p.q_head_stride, p.k_nope_stride, p.k_nope_head_stride,
                                   p.k_rope_stride, p.v_stride, p.v_head_stride, p.out_stride, p.out_head_stride);
  const int64_t num_tiles = max_query_tiles(p, kRows);
  // The sign goes to q, and 0 becomes a number that only a masked s = -inf survives.
  const float scale = std::max(std::abs(p.scale) * kLog2E, 1e-37f);
  const dim3 grid(static_cast<unsigned>(num_tiles * p.num_heads));
  launch(vector ? mla_prefill_kernel<T, true> : mla_prefill_kernel<T, false>, grid, dim3(kThreads),
         sizeof(PrefillShared<T>), stream, p, num_tiles, scale);
}

}  // namespace kimi::cuda::mla_prefill_detail
