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
template <typename T, bool Vector>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, bool valid) {
  if constexpr (Vector) {
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

// One tile.
template <typename T, bool Vector>
class PrefillTile {
 public:
  // `scale`: log2 units per unit of q k, positive; the sign of p.scale goes to q.
  __device__ PrefillTile(const MlaPrefillParams& p, const float& scale, PrefillShared<T>& shared)
      : p_(p), scale_(scale), shared_(shared), tile_(shared.tile) {}

  __device__ void run(int64_t num_tiles) {
    if (!find_tile(num_tiles)) return;
    const int num_blocks = ceil_div(tile_.end_of(0, kRows), kKeyBlock);
    if (num_blocks > 0) {
      load_q();
      load_keys(0, 0);
      cp_async_commit();
      if (p_.scale < 0) {
        cp_async_wait<0>();
        negate_q();
      }
    }
#pragma unroll 1
    for (int block = 0; block < num_blocks; ++block) {
      const int first_key = block * kKeyBlock;
      // These keys have come and nobody reads the values or the other keys any more: fetch those of next.
      cp_async_wait<0>();
      __syncthreads();
      load_values(block);
      cp_async_commit();
      if (block + 1 < num_blocks) load_keys(block + 1, (block + 1) % 2);
      cp_async_commit();

      const bool active = first_key < tile_.end_of(first_row_, kWarpRows);
      float s[2][kKeyBlock / 8][4];
      uint32_t probabilities[2][2][4];
      if (active) {
        scores(s, shared_.keys[block % 2]);
        mask(s, first_key);
        raise_maximum(s);
#pragma unroll
        for (int i = 0; i < 8; ++i) exponentiate(s, probabilities[0], 0, i / 4, i % 4);
      }
      // The values have come. Where a row of the tile may not see all keys they are cleaned.
      cp_async_wait<1>();
      bool cleaned = false;
      if (first_key + kKeyBlock > tile_.first_end) {
        cleaned = __syncthreads_or(clean_values());
      } else {
        __syncthreads();
      }
      if (!active) continue;
      add_values(s, probabilities);
      if (cleaned) add_not_finite(first_key);
    }
    cp_async_wait<0>();
    finish();
  }

 private:
  // Which tile this is; false if none.
  __device__ bool find_tile(int64_t num_tiles) {
    const QueryTile found = query_tile(p_, kRows, num_tiles, (kNopeDim + kValueDim) * sizeof(T));
    if (found.rows == 0) return false;
    if (thread_ < kWarp) {
      shared_.a_swizzle[lane_] = (lane_ / 16 ^ lane_ % 8) * 8;
      shared_.b_swizzle[lane_] = (lane_ / 8 % 2 ^ lane_ % 8) * 8;
    }
    if (thread_ == 0) {
      shared_.tile = found;
      shared_.k_nope =
          static_cast<const T*>(p_.k_nope) + found.k_at * p_.k_nope_stride + found.head * p_.k_nope_head_stride;
      shared_.k_rope = static_cast<const T*>(p_.k_rope) + found.k_at * p_.k_rope_stride;
      shared_.v = static_cast<const T*>(p_.v) + found.k_at * p_.v_stride + found.head * p_.v_head_stride;
    }
    __syncthreads();
    return true;
  }

  // ---- Loads. Keys and values: 8 threads a row, so that all chunks of a thread have the same swizzle ----------------

  __device__ void load_q() {
    const T* const q = static_cast<const T*>(p_.q) + tile_.q_at * p_.q_stride + tile_.head * p_.q_head_stride;
#pragma unroll 4
    for (int i = thread_; i < kRows * (kKeyDim / 8); i += kThreads) {
      const int row = i / (kKeyDim / 8), chunk = i % (kKeyDim / 8);
      copy_chunk<T, Vector>(&shared_.q[swizzled<kKeyDim>(row, chunk)], q + row * p_.q_stride + chunk * 8,
                            row < tile_.rows);
    }
  }
  // Each thread what it has loaded.
  __device__ void negate_q() {
    for (int i = thread_; i < kRows * (kKeyDim / 8); i += kThreads) {
      uint32_t* const at =
          reinterpret_cast<uint32_t*>(&shared_.q[swizzled<kKeyDim>(i / (kKeyDim / 8), i % (kKeyDim / 8))]);
#pragma unroll
      for (int word = 0; word < 4; ++word) at[word] ^= 0x80008000u;
    }
  }
  __device__ void load_keys(int block, int stage) {
    const int first = block * kKeyBlock + load_row_, left = tile_.num_keys - first;
    T* to = &shared_.keys[stage][swizzled<kKeyDim>(load_row_, load_chunk_)];
    const T* nope = shared_.k_nope + first * p_.k_nope_stride + load_chunk_ * 8;
    const T* rope = shared_.k_rope + first * p_.k_rope_stride + load_chunk_ * 8;
#pragma unroll
    for (int row = 0; row < kKeyBlock; row += kThreads / 8, to += kThreads / 8 * kKeyDim) {
      copy_chunk<T, Vector>(to, nope, row < left);
      copy_chunk<T, Vector>(to + 64, nope + 64, row < left);
      copy_chunk<T, Vector>(to + kNopeDim, rope, row < left);
      nope += kThreads / 8 * p_.k_nope_stride;
      rope += kThreads / 8 * p_.k_rope_stride;
    }
  }
  __device__ void load_values(int block) {
    const int first = block * kKeyBlock + load_row_, left = tile_.num_keys - first;
    T* to = &shared_.values[swizzled<kValueDim>(load_row_, load_chunk_)];
    const T* v = shared_.v + first * p_.v_stride + load_chunk_ * 8;
#pragma unroll
    for (int row = 0; row < kKeyBlock; row += kThreads / 8, to += kThreads / 8 * kValueDim) {
      copy_chunk<T, Vector>(to, v, row < left);
      copy_chunk<T, Vector>(to + 64, v + 64, row < left);
      v += kThreads / 8 * p_.v_stride;
    }
  }
  // Whether this thread's part of the values holds something that is not finite; that becomes 0.
  __device__ bool clean_values() {
    bool found = false;
#pragma unroll 1
    for (int i = 0; i < 2 * kKeyBlock; i += kThreads / 8) {
      T* const at = &shared_.values[swizzled<kValueDim>(load_row_ + i % kKeyBlock, load_chunk_ + i / kKeyBlock * 8)];
      Vec<T, 8> chunk = load_vec<T, 8>(at);
      if (!any_not_finite(chunk)) continue;
      found = true;
      for (int e = 0; e < 8; ++e)
        if (!is_finite(to_float(chunk.x[e]))) chunk.x[e] = from_float<T>(0.0f);
      store_vec(at, chunk);
    }
    return found;
  }

  // ---- A warp's 32 rows against a block of keys. s[m][n] is the accumulator of rows 16 m and keys 8 n
  // ----------------

  using Scores = float[2][kKeyBlock / 8][4];

  __device__ void scores(Scores& s, const T* keys) {
    const LaneRow<T, kKeyDim> q_lane(shared_.q, first_row_ + lane_ % 16, shared_.a_swizzle[lane_]);
    const LaneRow<T, kKeyDim> k_lane(keys, lane_ % 8 + lane_ / 16 * 8, shared_.b_swizzle[lane_]);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyBlock / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
      }
    }
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
  }

  // Keys that a row does not see: -inf, whatever came out.
  __device__ void mask(Scores& s, int first_key) {
    if (first_key + kKeyBlock <= tile_.num_keys && first_key + kKeyBlock <= tile_.first_end + first_row_) return;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row_end = tile_.first_end + first_row_ + lane_ / 4 + 16 * m + i / 2 * 8;
        const int end = min(row_end, tile_.num_keys) - first_key - lane_ % 4 * 2 - i % 2;
#pragma unroll
        for (int n = 0; n < kKeyBlock / 8; ++n) s[m][n][i] = 8 * n < end ? s[m][n][i] : -INFINITY;
      }
    }
  }

  // The running maximum, and o and l in its units.
  __device__ void raise_maximum(const Scores& s) {
    float factor[4];
    bool rescale = false;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeyBlock / 8; ++n)
        largest = fmaxf(largest, fmaxf(s[r / 2][n][r % 2 * 2], s[r / 2][n][r % 2 * 2 + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2)) * scale_;
      const bool raise = largest > max_log2_[r];
      factor[r] = raise ? exp2_approx(max_log2_[r] - largest) : 1.0f;
      if (raise) max_log2_[r] = largest;
      rescale |= raise;
    }
    if (!__any_sync(0xffffffffu, rescale)) return;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int n = 0; n < kValueDim / 8; ++n) o_[m][n][i] *= factor[2 * m + i / 2];
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) sum_[r] *= factor[r];
  }

  // p as operand a of rows 16 m and keys 16 k: its register i is that of rows g or g + 8, then the same of keys + 8.
  __device__ void exponentiate(const Scores& s, uint32_t (&a)[2][4], int k, int m, int i) {
    const int r = 2 * m + i % 2;
    const float* const pair = &s[m][2 * k + i / 2][i % 2 * 2];
    const float lo = exp2_approx(fmaf(pair[0], scale_, -max_log2_[r]));
    const float hi = exp2_approx(fmaf(pair[1], scale_, -max_log2_[r]));
    a[m][i] = pack2<T>(lo, hi);
    sum_[r] += lo + hi;
  }

  // o += p v, 16 keys at a time, and between the products p of the next 16 keys; that of the first ones is there.
  __device__ void add_values(const Scores& s, uint32_t (&probabilities)[2][2][4]) {
    const LaneRow<T, kValueDim> v_lane(shared_.values, lane_ % 16, shared_.a_swizzle[lane_]);
#pragma unroll
    for (int k = 0; k < kKeyBlock / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kValueDim / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v_lane.at(16 * k, n));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_m16n8k16<T>(o_[m][n], probabilities[k % 2][m], {b[0], b[1]});
          mma_m16n8k16<T>(o_[m][n + 1], probabilities[k % 2][m], {b[2], b[3]});
        }
        if (k + 1 < kKeyBlock / 16) exponentiate(s, probabilities[(k + 1) % 2], k + 1, n / 8, n / 2 % 4);
      }
    }
  }

  // What clean_values took out, for the rows that see it.
  __device__ void add_not_finite(int first_key) {
#pragma unroll 1
    for (int key = first_key; key < first_key + kKeyBlock && key < tile_.num_keys; ++key) {
      const T* const value = shared_.v + key * p_.v_stride + lane_ % 4 * 2;
#pragma unroll
      for (int n = 0; n < kValueDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float x = to_float(value[8 * n + i]);
          if (is_finite(x)) continue;
#pragma unroll
          for (int r = 0; r < 4; ++r)
            if (key < tile_.first_end + first_row_ + lane_ / 4 + 8 * r) o_[r / 2][n][r % 2 * 2 + i] += x;
        }
      }
    }
  }

  // ---- out = o / l, lse = ln(2) (m + log2 l)
  // -------------------------------------------------------------------------

  __device__ void finish() {
    float inverse[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = first_row_ + lane_ / 4 + 8 * r;
      const bool blind = tile_.first_end + row <= 0 || tile_.num_keys <= 0;
      float total = sum_[r] + __shfl_xor_sync(0xffffffffu, sum_[r], 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      inverse[r] = blind ? 0.0f : 1.0f / total;
      if (p_.lse && lane_ % 4 == 0 && row < tile_.rows)
        p_.lse[(tile_.q_at + row) * p_.num_heads + tile_.head] = blind ? -INFINITY : natural_lse(max_log2_[r], total);
    }
    const int64_t out_at = tile_.q_at * p_.out_stride + tile_.head * p_.out_head_stride;
    if (Vector && p_.out_dtype != DType::kF32) {
      write_vectors(inverse, static_cast<T*>(p_.out) + out_at);
    } else if (p_.out_dtype == DType::kF32) {
      write_elements(inverse, static_cast<float*>(p_.out) + out_at);
    } else {
      write_elements(inverse, static_cast<T*>(p_.out) + out_at);
    }
  }
  // Through the warp's own rows of q, to stores of 16 bytes.
  __device__ void write_vectors(const float (&inverse)[4], T* out) {
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kValueDim / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int at = swizzled<kKeyDim>(first_row_ + lane_ / 4 + 8 * r, n) + lane_ % 4 * 2;
        *reinterpret_cast<uint32_t*>(&shared_.q[at]) =
            pack2<T>(o_[r / 2][n][r % 2 * 2] * inverse[r], o_[r / 2][n][r % 2 * 2 + 1] * inverse[r]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kWarpRows; i += kWarp / 16) {
      const int row = first_row_ + i + lane_ / 16;
      if (row >= tile_.rows) continue;
      store_vec(out + row * p_.out_stride + lane_ % 16 * 8,
                load_vec<T, 8>(&shared_.q[swizzled<kKeyDim>(row, lane_ % 16)]));
    }
  }
  template <typename Out>
  __device__ void write_elements(const float (&inverse)[4], Out* out) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = first_row_ + lane_ / 4 + 8 * r;
      if (row >= tile_.rows) continue;
      Out* const to = out + row * p_.out_stride + lane_ % 4 * 2;
#pragma unroll
      for (int n = 0; n < kValueDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) to[8 * n + i] = from_float<Out>(o_[r / 2][n][r % 2 * 2 + i] * inverse[r]);
      }
    }
  }

  const MlaPrefillParams& p_;
  const float& scale_;
  PrefillShared<T>& shared_;
  const QueryTile& tile_;
  // Divided while unsigned: a shift.
  const int thread_ = threadIdx.x, lane_ = threadIdx.x % kWarp, first_row_ = threadIdx.x / kWarp * kWarpRows;
  const int load_row_ = threadIdx.x / 8, load_chunk_ = threadIdx.x % 8;
  // o_[m][n] is the accumulator of rows 16 m and columns 8 n; what belongs to row 16 m + 8 half + g is indexed 2 m +
  // half.
  float o_[2][kValueDim / 8][4] = {};
  float max_log2_[4] = {kNoMaximum, kNoMaximum, kNoMaximum, kNoMaximum}, sum_[4] = {};
};

// SASS: tensor cores, 16-byte loads
template <typename T, bool Vector>
__global__ void __launch_bounds__(kThreads, 2) mla_prefill_kernel(MlaPrefillParams p, int64_t num_tiles, float scale) {
  PrefillTile<T, Vector>(p, scale, shared_memory<PrefillShared<T>>()).run(num_tiles);
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
