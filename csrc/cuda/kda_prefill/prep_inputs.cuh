// K1 of the chunked path, phase 1: what a block works on, its shared memory, the loads, the gates and the norms.
#pragma once

#include "cuda/common/activations.h"
#include "cuda/common/reduce.h"
#include "cuda/kda_prefill/image.cuh"

namespace kimi::cuda {

inline constexpr int kPrepThreads = kGroups * kWarp;
inline constexpr float kGateFloor = -30.0f;  // log2 of a token's decay within its group: 2^-30 is nothing to the state

template <int K, int V>
struct PrepShared {
  // Of each group and 32 channels. Rows of 36 floats: no bank conflicts, whether a warp has a row or a column of lanes.
  union {
    float from_mid[kGroup][36];  // G - mid; phase 1 to 3, each warp its own
    struct {
      uint4 k_end[kWarp];  // k 2^(end of the group - G), as b operands; phase 3 to 4
      uint4 kg[kWarp];     // k 2^(end of the chunk - G), transposed; phase 3 to 5
    } operands;
  } groups[kGroups][K / 32];
  union {
    struct {
      float decay[kGroups][K];         // 2^(sum over the group); phase 1 to 2
      float start_to_mid[kGroups][K];  // 2^(sum over the first half of the group), floored; phase 1 to 3
      float mid_to_end[kGroups][K];    // the second half
      float chunk_start_to_mid[kGroups][K];
      float mid_to_chunk_end[kGroups][K];
    } factors;
    struct {
      // -A_kk as b operands: row tokens as columns n, tokens of column groups 2 s, 2 s + 1 as k. Words: two of the
      // upper and two of the lower fp16 of the split. Entry group^2 / 4 + s.
      uint4 a_kk[16][kWarp];
      uint32_t inverse[kGroups][kWarp];  // of the diagonal block of I + A_kk
    } system;                            // phase 4 to 5
  };
  Fp16 between[21][K];  // product of the whole groups between two; entry between_entry(); phase 2 to 4
  // Of each group and 32 channels: q as it is in memory, each lane its own 16 bytes, in phases 1 to 3; in its place
  // then k 2^(G - start of the chunk), transposed: rows are channels; phase 3 to 5.
  uint4 q_then_k_start[kGroups][K / 32][kWarp];
  uint4 k[kGroups][K / 32][kWarp];  // as it is in memory, each lane its own 16 bytes; phase 1 to 3
  union {  // of each group: v as it is in memory, in phases 1 to 3, each warp its own; rows apart by 8 banks more than
           // they are long
    uint4 rows[kGroup][V / 8 + 2];
    uint4 operands[V / 32][kWarp];  // then in fp16, transposed: rows are values; phase 3 to 5
  } v[kGroups];
  float beta[kChunk];
  float2 scales[kChunk];  // of q and k
  int exponent;           // units of the values, phase 2 on; here like `image` for want of registers in phase 3
  void* image;
  float largest_value[kGroups], smallest_value[kGroups];  // of the tokens' largest |v|; zeros left out of the smallest
};

__host__ __device__ constexpr int between_entry(int row_group, int column_group) {  // column_group <= row_group - 2
  return (row_group - 1) * (row_group - 2) / 2 + column_group;
}

// log2(1 + y) for y in [0, 1], relative error 4e-7 also where y is small (lg2.approx of 1 + y has an absolute one).
__device__ __forceinline__ float log2_one_plus(float y) {
  constexpr float kCoefficients[] = {1.4426947832107544f,   -0.7213100790977478f, 0.48006370663642883f,
                                     -0.35339483618736267f, 0.2560097575187683f,  -0.1553518921136856f,
                                     0.06360789388418198f,  -0.01231947261840105f};
  float sum = kCoefficients[7];
#pragma unroll
  for (int i = 6; i >= 0; --i) sum = fmaf(sum, y, kCoefficients[i]);
  return sum * y;
}

// From raw gates (g + dt_bias) log2(e), or g log2(e) for ready log-decays, to the log2 of the decays. The form of the
// gate is decided once for all elements: a branch for each would keep them from overlapping.
template <int N, int M>
__device__ __forceinline__ void log2_decays(const KdaPrefillParams& p, int head, float (&x)[N][M]) {
  if (p.gate == KdaGate::kLogDecay) return;
  float rate = p.A_log ? expf(p.A_log[head]) : 1.0f;
  if (rate < 1e-38f) rate = 1e-38f;  // so that the products below are never 0 * infinity
  if (rate > 3e38f) rate = 3e38f;
  if (p.gate == KdaGate::kBounded) {
    const float lower_bound_log2 = p.lower_bound * kLog2e;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int m = 0; m < M; ++m) x[n][m] = lower_bound_log2 * rcp_approx(1.0f + exp2_approx(-rate * x[n][m]));
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int m = 0; m < M; ++m)
        x[n][m] = -rate * (fmaxf(x[n][m], 0.0f) + log2_one_plus(exp2_approx(-fabsf(x[n][m]))));
    }
  }
}

// The place of a thread: warp = group of tokens, lane = 4 g + t.
struct PrepLane {
  int group, lane, g, t;
  __device__ __forceinline__ PrepLane()
      : group(threadIdx.x / kWarp), lane(threadIdx.x % kWarp), g(lane / 4), t(lane % 4) {}
};

// What the block works on.
struct PrepTask {
  int head, qk_head, count;  // tokens; fewer than kChunk at the end of a sequence
  int64_t first_token;
};

// N elements, in one access if they lie for it.
template <bool kWide, typename T, int N>
__device__ __forceinline__ Vec<T, N> load_elements(const T* from) {
  if constexpr (kWide) return load_vec<T, N>(from);
  Vec<T, N> v;
#pragma unroll
  for (int i = 0; i < N; ++i) v.x[i] = from[i];
  return v;
}

// What a thread loads: of all tokens of the group the raw gates of channels K / 32 * lane on, times log2(e); q, k and v
// go to shared memory, of its token 16 bytes here and there.
template <typename T, int K, int V>
struct PrepInputs {
  float gates[kGroup][K / kWarp];
  float beta;

  // Without a branch between the loads, so that all are under way at once: rows past the end are those of the chunk's
  // first token, and made harmless later.
  template <bool kWide, typename G>
  __device__ __forceinline__ void load(const KdaPrefillParams& p, const PrepTask& task, PrepShared<K, V>& shared) {
    constexpr int kChannels = K / kWarp;
    const PrepLane at;
    const int row = kGroup * at.group + at.g;
    const int64_t token = task.first_token + (row < task.count ? row : 0);
    const T* from_q = static_cast<const T*>(p.q) + token * p.q_token_stride + task.qk_head * p.q_head_stride;
    const T* from_k = static_cast<const T*>(p.k) + token * p.k_token_stride + task.qk_head * p.k_head_stride;
    const T* from_v = static_cast<const T*>(p.v) + token * p.v_token_stride + task.head * p.v_head_stride;
    const int left = task.count - kGroup * at.group;
    const G* const first_g = static_cast<const G*>(p.g) + task.head * p.g_head_stride + kChannels * at.lane +
                             (task.first_token + (left > 0 ? kGroup * at.group : 0)) * p.g_token_stride;
    const G* from_g = first_g;
    Vec<G, kChannels> raw[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i, from_g += p.g_token_stride)
      raw[i] = load_elements<kWide, G, kChannels>(i < left ? from_g : first_g);
    const auto copy = [](uint4* to, const T* from) {
      if constexpr (kWide)
        cp_async_16(to, from);
      else
        *to = bits_as<uint4>(load_elements<false, T, 8>(from));
    };
#pragma unroll
    for (int j = 0; j < K / 32; ++j) {
      copy(&shared.k[at.group][j][at.lane], from_k + 32 * j + 8 * at.t);
      copy(&shared.q_then_k_start[at.group][j][at.lane], from_q + 32 * j + 8 * at.t);
    }
#pragma unroll
    for (int i = 0; i < V / 32; ++i) copy(&shared.v[at.group].rows[at.g][4 * i + at.t], from_v + 32 * i + 8 * at.t);
    cp_async_commit();
    const int64_t beta_at = token * p.beta_token_stride + task.head * p.beta_head_stride;
    beta = p.beta_dtype == DType::kF32 ? static_cast<const float*>(p.beta)[beta_at]
                                       : to_float(static_cast<const T*>(p.beta)[beta_at]);
    float bias[kChannels] = {};
    if (p.dt_bias && p.gate != KdaGate::kLogDecay) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) bias[c] = p.dt_bias[task.head * K + kChannels * at.lane + c] * kLog2e;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) gates[i][c] = fmaf(to_float(raw[i].x[c]), kLog2e, bias[c]);
    }
  }

  __device__ __forceinline__ void load(const KdaPrefillParams& p, const PrepTask& task, bool wide,
                                       PrepShared<K, V>& shared) {
    const bool wide_gates = p.g_dtype == DType::kF32;
    if (wide)
      wide_gates ? load<true, float>(p, task, shared) : load<true, T>(p, task, shared);
    else
      wide_gates ? load<false, float>(p, task, shared) : load<false, T>(p, task, shared);
  }
};

// Phase 1b. Sums of the gates over the group: leaves G - mid and the group's factors.
template <int K, int V>
__device__ __forceinline__ void group_gates(const KdaPrefillParams& p, const PrepTask& task,
                                            float (&log2_decay)[kGroup][K / kWarp], PrepShared<K, V>& shared) {
  constexpr int kChannels = K / kWarp;
  const PrepLane at;
  const int channel = kChannels * at.lane, left = task.count - kGroup * at.group;
  log2_decays(p, task.head, log2_decay);
  float from_start[kGroup][kChannels], decay[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    float floored = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float x = i < left ? log2_decay[i][c] : 0.0f;
      sum += x;
      floored += fmaxf(x, kGateFloor);
      from_start[i][c] = floored;
    }
    decay[c] = exp2_approx(sum);
  }
  constexpr int kMid = kGroup / 2 - 1;
  Vec<float, kChannels> group, start, end;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    group.x[c] = decay[c];
    start.x[c] = exp2_approx(from_start[kMid][c]);
    end.x[c] = exp2_approx(from_start[kGroup - 1][c] - from_start[kMid][c]);
  }
  store_vec(&shared.factors.decay[at.group][channel], group);
  store_vec(&shared.factors.start_to_mid[at.group][channel], start);
  store_vec(&shared.factors.mid_to_end[at.group][channel], end);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    Vec<float, kChannels> row;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) row.x[c] = from_start[i][c] - from_start[kMid][c];
    store_vec(&shared.groups[at.group][channel / 32].from_mid[i][channel % 32], row);
  }
}

template <typename T>
__device__ __forceinline__ void unpack_eight(uint4 words, float (&x)[8]) {
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2<T>(w[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// Sum of (scale x)^2 over a token's row of q or k; each of its lanes gets it.
template <typename T, int J>
__device__ __forceinline__ float row_squares(const uint4 (&row)[J], float scale) {
  float sum[2] = {};
#pragma unroll
  for (int j = 0; j < J; ++j) {
    float x[8];
    unpack_eight<T>(row[j], x);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i % 2] = fmaf(scale * x[i], scale * x[i], sum[i % 2]);
  }
  return warp_sum<4>(sum[0] + sum[1]);
}

// 1 / sqrt(sum x^2 + 1e-6) of a token's row, also where the squares overflow.
template <typename T, int J>
__device__ __forceinline__ float inverse_norm(const uint4 (&row)[J]) {
  const float sum = row_squares<T>(row, 1.0f);
  float inverse = rsqrt_approx(sum + 1e-6f);
  if (__any_sync(kFullWarp, !(sum < 1e37f))) {
    const float scaled = rsqrt_approx(row_squares<T>(row, 0x1p-80f)) * 0x1p-80f;
    if (!(sum < 1e37f)) inverse = scaled;
  }
  return inverse;
}

}  // namespace kimi::cuda
