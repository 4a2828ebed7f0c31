// Softmax attention of 16 query rows against blocks of 64 keys on FFMA, in fp32 for every element type, any dims and
// any strides: what mla_prefill and mla_decode run where their tensor-core kernels do not apply.
//
//   for each block of keys j:   s = scale * q k^T,  m' = max(m, max_j s),  p = 2^(s - m')
//                               l = l 2^(m - m') + sum_j p,   o = o 2^(m - m') + p v
//
// in log2 units, m rounded up to an integer, so that rescaling is exact.
//
// A block of 128 threads, 8 a row: in s a thread has keys t, t + 8, ..., in o groups of 4 columns 32 apart. An element
// of s is a sum of chains of FMAs over 64 columns each (one chain over 576 has more than twice the error), an element
// of p v one chain over the visible keys of the block. Keys that a row may not see are left out of its chain, not
// multiplied by zero: what lies in them, NaN too, never reaches it, and its bits do not depend on the other rows.
#pragma once

#include "cuda/common/reduce.h"

namespace kimi::cuda {

// 2^(from - to) for integers from <= to, either of which may be infinite; 0 below 2^-126.
__device__ __forceinline__ float power_of_two(float from, float to) {
  if (from == to) return 1.0f;
  const int exponent = static_cast<int>(fmaxf(from - to, -127.0f)) + 127;
  return bits_as<float>(exponent << 23);
}

// log(sum e^s) of a softmax whose maximum is in log2 units.
__device__ __forceinline__ float natural_lse(float max_log2, float sum) {
  return (max_log2 + log2f(sum)) * 0.69314718055994531f;
}

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr int kAttentionRows = 16, kAttentionKeys = 64, kAttentionThreads = 128;
inline constexpr int kAttentionColumns = 128;  // of values at a time
inline constexpr int kAttentionBlocks = 3;     // on a multiprocessor, by their shared memory

struct AttentionShared {
  static constexpr int kDepth = 64, kPitch = kDepth + 4;  // 4: rows of 8 threads in different banks
  float q[kAttentionRows][kPitch];
  float keys[kAttentionKeys][kPitch];
  float values[kAttentionKeys][kAttentionColumns];
  float p[kAttentionRows][kAttentionKeys];
};

// A thread's share of the state of its row, threadIdx.x / 8. `Chunks` * 128 columns of o.
template <int Chunks>
struct AttentionState {
  static constexpr int kThreadColumns = kAttentionColumns / 8;
  float max = -INFINITY, sum = 0.0f;  // sum: of this thread's keys
  float o[Chunks][kThreadColumns] = {};

  // The column of o[chunk][i].
  __device__ static int column(int chunk, int i) {
    return chunk * kAttentionColumns + i / 4 * 32 + threadIdx.x % 8 * 4 + i % 4;
  }
  __device__ float total_sum() const { return warp_sum<8>(sum); }

  // One more block, of which this thread's row sees the first `visible` keys and which has `count`. query(row, column),
  // key(j, column) and value(j, column) give elements; they are called for column < dim and j < count only. `scale`:
  // log2 units per unit of q k.
  template <typename Query, typename Key, typename Value>
  __device__ void attend(AttentionShared& shared, int visible, int count, int64_t key_dim, int64_t value_dim,
                         float scale, const Query& query, const Key& key, const Value& value) {
    constexpr int kDepth = AttentionShared::kDepth, kThreadKeys = kAttentionKeys / 8;
    const int thread = threadIdx.x, row = thread / 8, first = thread % 8;

    // s, 64 columns at a time.
    float s[kThreadKeys] = {};
    for (int64_t at = 0; at < key_dim; at += kDepth) {
      __syncthreads();
      const int64_t column = at + thread % kDepth;
      for (int i = thread / kDepth; i < kAttentionRows + kAttentionKeys; i += kAttentionThreads / kDepth) {
        const int j = i - kAttentionRows;
        if (j < 0) {
          shared.q[i][thread % kDepth] = column < key_dim ? query(i, column) : 0.0f;
        } else {
          shared.keys[j][thread % kDepth] = column < key_dim && j < count ? key(j, column) : 0.0f;
        }
      }
      __syncthreads();
      float chain[kThreadKeys] = {};
      for (int c = 0; c < kDepth; c += 4) {
        const Vec<float, 4> q = load_vec<float, 4>(&shared.q[row][c]);
#pragma unroll
        for (int j = 0; j < kThreadKeys; ++j) {
          const Vec<float, 4> k = load_vec<float, 4>(&shared.keys[first + 8 * j][c]);
#pragma unroll
          for (int i = 0; i < 4; ++i) chain[j] = fmaf(q.x[i], k.x[i], chain[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kThreadKeys; ++j) s[j] += chain[j];
    }

    // Softmax. The row's eight threads are in one warp.
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kThreadKeys; ++j)
      if (first + 8 * j < visible) largest = fmaxf(largest, s[j] * scale);
    largest = fmaxf(max, ceilf(warp_max<8>(largest)));
    const float factor = power_of_two(max, largest), shift = largest == -INFINITY ? 0.0f : largest;
    max = largest;
    sum *= factor;
#pragma unroll
    for (int j = 0; j < kThreadKeys; ++j) {
      const float p = first + 8 * j < visible ? exp2f(fmaf(s[j], scale, -shift)) : 0.0f;
      sum += p;
      shared.p[row][first + 8 * j] = p;
    }
    __syncwarp();

    // o, 128 columns at a time.
#pragma unroll
    for (int chunk = 0; chunk < Chunks; ++chunk) {
      __syncthreads();
      const int64_t from = chunk * kAttentionColumns + thread;
      for (int j = 0; j < kAttentionKeys; ++j)
        shared.values[j][thread] = from < value_dim && j < count ? value(j, from) : 0.0f;
      __syncthreads();
      float chain[kThreadColumns] = {};
      for (int j = 0; j < visible && j < kAttentionKeys; ++j) {
        const float p = shared.p[row][j];
#pragma unroll
        for (int i = 0; i < kThreadColumns; i += 4) {
          const Vec<float, 4> v = load_vec<float, 4>(&shared.values[j][column(0, i)]);
#pragma unroll
          for (int e = 0; e < 4; ++e) chain[i + e] = fmaf(p, v.x[e], chain[i + e]);
        }
      }
#pragma unroll
      for (int i = 0; i < kThreadColumns; ++i) o[chunk][i] = fmaf(o[chunk][i], factor, chain[i]);
    }
  }
};

}  // namespace kimi::cuda
