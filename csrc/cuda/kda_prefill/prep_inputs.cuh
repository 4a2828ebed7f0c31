// K1 of the chunked path, phases 1 and 2: the loads, the gates and the norms.
#pragma once

#include "cuda/kda_prefill/prep_shared.cuh"

namespace kimi::cuda {

inline constexpr float kGateFloor = -30.0f;  // log2 of a token's decay within its group: 2^-30 is nothing to the state
inline constexpr float kSumFloor =
    -256.0f;  // of the decay over a group: 2^-256 is 0, and sums of eight stay exact enough

// e^A_log, such that its products in log2_decays() are never 0 * infinity.
__device__ __forceinline__ float gate_rate(float log_rate) {
  const float rate = expf(log_rate);
  if (rate < 1e-38f) return 1e-38f;
  return rate > 2e38f ? 2e38f : rate;
}

// From raw gates (g + dt_bias) log2(e), or g log2(e) for ready log-decays, to the log2 of the decays. The form of the
// gate is decided once for all elements: a branch for each would keep them from overlapping.
template <int N, int M>
__device__ __forceinline__ void log2_decays(const KdaPrefillParams& p, float rate, float (&x)[N][M]) {
  if (p.gate == KdaGate::kLogDecay) return;
  if (p.gate == KdaGate::kBounded) {
    const float lower_bound_log2 = p.lower_bound * kLog2e;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int m = 0; m < M; ++m) x[n][m] = lower_bound_log2 * rcp_approx(1.0f + exp2_approx(-rate * x[n][m]));
    }
  } else {
    // log2(1 + 2^x) = max(x, 0) + log2(1 + y) with y = 2^-|x|. The polynomial log2(1 + y) / y has a relative error of
    // 6e-5 for all y in [0, 1] (lg2.approx of 1 + y has an absolute one), which moves a decay by 4e-5 of the state at
    // most: a decay that is relevant is no small power of 1/2.
    const float c[5] = {-1.44261324f * rate, 0.71698743f * rate, -0.44189889f * rate, 0.2271195f * rate,
                        -0.05965156f * rate};
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float y = exp2_approx(-fabsf(x[n][m]));
        const float sum = fmaf(fmaf(fmaf(fmaf(c[4], y, c[3]), y, c[2]), y, c[1]), y, c[0]);
        x[n][m] = fmaf(sum, y, -rate * fmaxf(x[n][m], 0.0f));
      }
    }
  }
}

// N elements, in one access if they lie for it.
template <bool kWide, typename T, int N>
__device__ __forceinline__ Vec<T, N> load_elements(const T* from) {
  if constexpr (kWide) {  // as words, which stay together
    constexpr int kWords = N * static_cast<int>(sizeof(T)) / 4;
    return bits_as<Vec<T, N>>(load_vec<uint32_t, kWords>(reinterpret_cast<const uint32_t*>(from)));
  } else {
    Vec<T, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.x[i] = from[i];
    return v;
  }
}

// Eight elements of 16 bits to shared memory; asynchronous if they lie for it.
template <bool kWide, typename T>
__device__ __forceinline__ void copy_octet(uint4* to, const T* from) {
  if constexpr (kWide)
    cp_async_16(to, from);
  else
    *to = bits_as<uint4>(load_elements<false, T, 8>(from));
}

// What a thread loads: of all tokens of the group the raw gates of channels K / 32 * lane on, to registers; of its own
// token q and k to shared memory, from where it takes them itself (registers would be too many: what is kept of them
// keeps the compiler from loading ahead in phase 3).
//
// kOnlyT: the gates are T, else they may be fp32 too; and the head's constants are as they are used.
template <typename T, int K, bool kOnlyT = false>
struct PrepInputs {
  static constexpr int kChannels = K / kWarp;
  // As they are in memory: to convert anything here would be to wait for it.
  uint32_t gates[kGroup][kOnlyT ? kChannels / 2 : kChannels];  // words; half of them for a 16-bit dtype
  Vec<float, kChannels> bias;                                  // dt_bias, or times log2(e)
  float rate;                                                  // A_log, or gate_rate() of it
  uint16_t beta_words[2] = {};                                 // the upper half, and the lower one of an fp32 beta

  __device__ __forceinline__ float beta(DType dtype) const {
    if (std::is_same_v<T, Bf16> || dtype == DType::kF32)  // of a bf16 the lower half is 0
      return __uint_as_float(uint32_t{beta_words[0]} << 16 | beta_words[1]);
    return to_float(bits_as<T>(beta_words[0]));
  }

  template <bool kWide>
  __device__ __forceinline__ void load_constants(int lane, const KdaPrefillParams& p, unsigned head) {
    rate = p.A_log ? p.A_log[head] : 0.0f;
    bias = {};
    if (p.dt_bias && p.gate != KdaGate::kLogDecay)
      bias = load_elements<kWide, float, kChannels>(p.dt_bias + head * K + kChannels * lane);
    if constexpr (kOnlyT) {
      rate = gate_rate(rate);
#pragma unroll
      for (float& x : bias.x) x *= kLog2e;
    }
  }
  // Rows past the end are another token's, and made harmless later.
  template <bool kWide, typename G>
  __device__ __forceinline__ void load_gates(const PrepLane& at, const KdaPrefillParams& p, const PrepTask& task) {
    const int left = task.count - kGroup * at.group;
    const uint64_t first_of_group = task.first_token + static_cast<unsigned>(left > 0 ? kGroup * at.group : 0);
    const G* from_g = static_cast<const G*>(p.g) + task.head * p.g_head_stride + kChannels * at.lane +
                      first_of_group * p.g_token_stride;
    const auto load_row = [&](int i, const G* from) {
      using Words = Vec<uint32_t, kChannels * sizeof(G) / 4>;
      const auto words = bits_as<Words>(load_elements<kWide, G, kChannels>(from));
#pragma unroll
      for (unsigned c = 0; c < sizeof(Words) / 4; ++c) gates[i][c] = words.x[c];
    };
    if (left >= kGroup) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i, from_g += p.g_token_stride) load_row(i, from_g);
    } else {
      const int last = max(left - 1, 0);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) load_row(i, from_g + min(i, last) * p.g_token_stride);
    }
  }
  // q and k of the lane's token, to shared memory.
  template <bool kWide>
  __device__ __forceinline__ static void copy_keys(const PrepLane& at, const KdaPrefillParams& p, const PrepTask& task,
                                                   PrepShared<K>& shared) {
    const uint64_t token = token_of(at, task);
    const T* from_q = static_cast<const T*>(p.q) + token * p.q_token_stride + task.qk_head * p.q_head_stride + 8 * at.t;
    const T* from_k = static_cast<const T*>(p.k) + token * p.k_token_stride + task.qk_head * p.k_head_stride + 8 * at.t;
#pragma unroll
    for (int j = 0; j < K / 32; ++j) {
      copy_octet<kWide>(&shared.k_then_k_half[j][at.group][at.lane], from_k + 32 * j);
      copy_octet<kWide>(&shared.q[j][at.group][at.lane], from_q + 32 * j);
    }
  }
  // From where beta_of() says: the beta of a token, or the upper half of one in fp32.
  __device__ __forceinline__ void load_beta(const KdaPrefillParams& p, const char* at) {
    const auto* const from = reinterpret_cast<const uint16_t*>(at);
    beta_words[0] = __ldcg(from);
    if (p.beta_dtype == DType::kF32) beta_words[1] = __ldcg(from - 1);
  }
  __device__ __forceinline__ static const char* beta_of(const KdaPrefillParams& p, uint64_t token, unsigned head) {
    const int64_t at = token * p.beta_token_stride + head * p.beta_head_stride;
    return static_cast<const char*>(p.beta) + (p.beta_dtype == DType::kF32 ? 4 * at + 2 : 2 * at);
  }
  __device__ __forceinline__ static uint64_t token_of(const PrepLane& at, const PrepTask& task) {
    return task.first_token + static_cast<unsigned>(row_of(at, task.count));
  }
  // Rows past the end are the first one.
  __device__ __forceinline__ static int row_of(const PrepLane& at, int count) {
    const int row = kGroup * at.group + at.g;
    return row < count ? row : 0;
  }

  // Gates of dtype T by way of shared memory, `rows` the chunk's one after the other: those of the warp's group to
  // there, and from there.
  template <bool kWide>
  __device__ __forceinline__ static void copy_gates(const PrepLane& at, const KdaPrefillParams& p, const PrepTask& task,
                                                    uint4* rows) {
    constexpr int kOctets = K / 8;  // of a row
    const int left = task.count - kGroup * at.group, last = min(max(left, 1), kGroup) - 1;
    const T* const from =
        static_cast<const T*>(p.g) + task.head * p.g_head_stride +
        (task.first_token + static_cast<unsigned>(left > 0 ? kGroup * at.group : 0)) * p.g_token_stride;
#pragma unroll 1
    for (int i = at.lane; i < kGroup * kOctets; i += kWarp)
      copy_octet<kWide>(rows + kGroup * kOctets * at.group + i,
                        from + min(i / kOctets, last) * p.g_token_stride + i % kOctets * 8);
  }
  __device__ __forceinline__ void take_gates(const PrepLane& at, const uint4* rows) {
    const auto* const from = reinterpret_cast<const uint32_t*>(rows) + K / 2 * kGroup * at.group;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const auto words = load_vec<uint32_t, kChannels / 2>(from + K / 2 * i + kChannels / 2 * at.lane);
#pragma unroll
      for (int c = 0; c < kChannels / 2; ++c) gates[i][c] = words.x[c];
    }
  }

  // All loads are under way before the first use; the gates, which are needed first, in front.
  template <bool kWide, typename G>
  __device__ __forceinline__ void load(const PrepLane& at, const KdaPrefillParams& p, const PrepTask& task,
                                       PrepShared<K>& shared) {
    load_constants<kWide>(at.lane, p, task.head);
    load_gates<kWide, G>(at, p, task);
    copy_keys<kWide>(at, p, task, shared);
    cp_async_commit();
    load_beta(p, beta_of(p, token_of(at, task), task.head));
  }
  __device__ __forceinline__ void load(const PrepLane& at, const KdaPrefillParams& p, const PrepTask& task, bool wide,
                                       PrepShared<K>& shared) {
    const bool wide_gates = p.g_dtype == DType::kF32;
    if (wide)
      wide_gates ? load<true, float>(at, p, task, shared) : load<true, T>(at, p, task, shared);
    else
      wide_gates ? load<false, float>(at, p, task, shared) : load<false, T>(at, p, task, shared);
  }

  // The gates times log2(e), with their bias.
  template <typename G>
  __device__ __forceinline__ void unpack_gates(float (&to)[kGroup][kChannels]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
#pragma unroll
      for (int c = 0; c < kChannels; c += 2) {
        float2 pair;
        if constexpr (sizeof(G) == 2)
          pair = unpack_pair<G>(gates[i][c / 2]);
        else
          pair = make_float2(__uint_as_float(gates[i][c]), __uint_as_float(gates[i][c + 1]));
        constexpr float kFactor = kOnlyT ? 1.0f : kLog2e;
        to[i][c] = fmaf(pair.x, kLog2e, bias.x[c] * kFactor);
        to[i][c + 1] = fmaf(pair.y, kLog2e, bias.x[c + 1] * kFactor);
      }
    }
  }
};

// Of a lane's channels in the layout of the gates, log2 of the decay over each half of the group, floored.
template <int N>
struct GroupHalves {
  float first[N], second[N];
};

// Phase 1b. Sums of the gates over the group: leaves G - mid, and the sum for the others to add.
template <typename T, int K, bool kOnlyT>
__device__ __forceinline__ GroupHalves<K / kWarp> group_gates(const PrepLane& at, const KdaPrefillParams& p,
                                                              const PrepTask& task,
                                                              const PrepInputs<T, K, kOnlyT>& inputs,
                                                              PrepShared<K>& shared) {
  constexpr int kChannels = K / kWarp, kMid = kGroup / 2 - 1;
  const int channel = kChannels * at.lane, left = task.count - kGroup * at.group;
  float log2_decay[kGroup][kChannels];
  if constexpr (kOnlyT)
    inputs.template unpack_gates<T>(log2_decay);
  else
    p.g_dtype == DType::kF32 ? inputs.template unpack_gates<float>(log2_decay)
                             : inputs.template unpack_gates<T>(log2_decay);
  log2_decays(p, kOnlyT ? inputs.rate : gate_rate(inputs.rate), log2_decay);
  if (left < kGroup) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) log2_decay[i][c] = i < left ? log2_decay[i][c] : 0.0f;
    }
  }
  GroupHalves<kChannels> halves;
  Vec<float, kChannels> sum;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    sum.x[c] = log2_decay[0][c];
#pragma unroll
    for (int i = 1; i < kGroup; ++i) sum.x[c] += log2_decay[i][c];
    if (sum.x[c] < kSumFloor) sum.x[c] = kSumFloor;  // a NaN stays one
    // Outwards from the middle; minus the floored decays towards the start.
    float from_mid = fminf(-log2_decay[kMid][c], -kGateFloor);
    log2_decay[kMid][c] = 0.0f;
#pragma unroll
    for (int i = kMid - 1; i >= 0; --i) {
      const float next = from_mid + fminf(-log2_decay[i][c], -kGateFloor);
      log2_decay[i][c] = from_mid;
      from_mid = next;
    }
    halves.first[c] = -from_mid;
    log2_decay[kMid + 1][c] = from_mid = fmaxf(log2_decay[kMid + 1][c], kGateFloor);
#pragma unroll
    for (int i = kMid + 2; i < kGroup; ++i) log2_decay[i][c] = from_mid += fmaxf(log2_decay[i][c], kGateFloor);
    halves.second[c] = from_mid;
  }
  store_vec(&shared.sums[at.group][channel], sum);
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    store_vec(&shared.groups[at.group][channel / 32].from_mid[i][from_mid_place(i, channel)],
              bits_as<Vec<float, kChannels>>(log2_decay[i]));
  return halves;
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

// Sum of (2^-80 x)^2 over a token's row of q or k; each of its lanes gets it.
template <typename T, int J>
__device__ __forceinline__ float scaled_row_squares(const uint4 (&row)[J]) {
  float sum[2] = {};
#pragma unroll
  for (int j = 0; j < J; ++j) {
    float x[8];
    unpack_eight<T>(row[j], x);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i % 2] = fmaf(0x1p-80f * x[i], 0x1p-80f * x[i], sum[i % 2]);
  }
  return warp_sum<4>(sum[0] + sum[1]);
}

// Sum of the squares of the lane's token's row: the diagonal of x x^T.
template <typename T, int J>
__device__ __forceinline__ float row_squares(const PrepLane& at, const uint4 (&x)[J]) {
  // Two words of a lane are rows g and g + 8, of different channels: the product with either has one half of use. (To
  // take the same words of q and k together would need moves between registers.)
  float first[4] = {}, second[4] = {};
#pragma unroll
  for (int j = 0; j < J; ++j) {
    mma_m16n8k8<T>(first, {x[j].x, x[j].y}, x[j].x);
    mma_m16n8k8<T>(second, {x[j].x, x[j].y}, x[j].y);
    mma_m16n8k8<T>(first, {x[j].z, x[j].w}, x[j].z);
    mma_m16n8k8<T>(second, {x[j].z, x[j].w}, x[j].w);
  }
  const float diagonal = (at.g % 2 == 0 ? first[0] : first[1]) + (at.g % 2 == 0 ? second[2] : second[3]);
  return __shfl_sync(kFullWarp, diagonal, 4 * at.g + at.g / 2);  // from the lane that holds row g, column g
}

// 1 / sqrt(sum x^2 + 1e-6) of a token's row, also where the squares overflow.
template <typename T, int J>
__device__ __forceinline__ float inverse_norm(const uint4 (&row)[J], float squares) {
  float inverse = rsqrt_approx(squares + 1e-6f);
  if (__any_sync(kFullWarp, !(squares < 1e37f))) {
    const float scaled = rsqrt_approx(scaled_row_squares<T>(row)) * 0x1p-80f;
    if (!(squares < 1e37f)) inverse = scaled;
  }
  return inverse;
}

// Factors of the lane's token.
struct TokenScales {
  float q, k;  // to normalize
  float beta;  // as a power of two `step` times a number in [1, 2)
  float step;
  bool exact;  // numbers that fp16 operands may not hold, or a recurrence that grows
};

// Phase 2a.
template <typename T, int K, bool kOnlyT>
__device__ __forceinline__ TokenScales token_scales(const PrepLane& at, const KdaPrefillParams& p, const PrepTask& task,
                                                    const PrepInputs<T, K, kOnlyT>& inputs, PrepShared<K>& shared) {
  const float beta = inputs.beta(p.beta_dtype);
  TokenScales scales{1.0f, 1.0f, p.use_beta_sigmoid ? sigmoid(beta) : beta, 1.0f, false};
  uint4 q[K / 32], k[K / 32];
#pragma unroll
  for (int j = 0; j < K / 32; ++j) {
    q[j] = shared.q[j][at.group][at.lane];
    k[j] = shared.k_then_k_half[j][at.group][at.lane];
  }
  const float q2 = row_squares<T>(at, q), k2 = row_squares<T>(at, k);
  if (p.use_qk_l2norm) {
    scales.q = inverse_norm<T>(q, q2);
    scales.k = inverse_norm<T>(k, k2);
    if (!p.use_beta_sigmoid) scales.exact = scales.beta < 0.0f || scales.beta > 2.2f;
  } else {
    scales.exact = scales.beta < 0.0f || scales.beta * k2 > 2.2f || k2 > 0x1p12f || q2 > 0x1p16f ||
                   (k2 > 0.0f && k2 < 0x1p-12f) || (q2 > 0.0f && q2 < 0x1p-16f);
  }
  const int token = kGroup * at.group + at.g;
  if (token >= task.count) scales.beta = scales.q = scales.k = 0.0f;  // nothing of such a token is left
  // Not below the normal numbers of fp16, which has to hold it.
  const int exponent = min(max(exponent_of(scales.beta), -14), 1);
  scales.step = power_of_two(exponent);
  if (at.t == 0) {
    shared.beta[token] = scales.beta * power_of_two(-exponent);
    shared.step[token] = scales.step;
  }
  return scales;
}

// To the L2 cache: the inputs of the chunk that is `ahead` tokens further, which another block will soon take up.
template <typename T, int K>
__device__ __forceinline__ void prefetch_inputs(const PrepLane& at, const KdaPrefillParams& p, const PrepTask& task,
                                                int ahead) {
  const int row = at.thread % kChunk, part = at.thread / kChunk;
  const int64_t token = static_cast<int64_t>(task.first_token) + ahead + row;
  if (token < 0 || token >= p.num_tokens) return;
  const auto prefetch = [&](const void* base, int64_t token_stride, int64_t head_stride, int head, int bytes) {
    const char* from = static_cast<const char*>(base) + (token * token_stride + head * head_stride) * bytes;
    for (int i = 0; i < K * bytes; i += 128) prefetch_l2(from + i);
  };
  static_assert(kPrepThreads / kChunk == 4);
  if (part == 0)
    prefetch(p.g, p.g_token_stride, p.g_head_stride, task.head, p.g_dtype == DType::kF32 ? 4 : 2);
  else if (part == 1)
    prefetch(p.k, p.k_token_stride, p.k_head_stride, task.qk_head, sizeof(T));
  else if (part == 2)
    prefetch(p.q, p.q_token_stride, p.q_head_stride, task.qk_head, sizeof(T));
}

__device__ __forceinline__ uint4 movmatrix_trans(uint4 x) {
  return make_uint4(movmatrix_trans(x.x), movmatrix_trans(x.y), movmatrix_trans(x.z), movmatrix_trans(x.w));
}

// Phase 2b. One channel a thread: the sums over the groups become sums from the chunk's start to the group's end; and
// the sum over the chunk.
template <int K>
__device__ __forceinline__ float add_groups(const PrepLane& at, PrepShared<K>& shared) {
  const int c = at.thread;
  float sum = 0.0f;
  if (c < K) {
#pragma unroll
    for (int m = 0; m < kGroups; ++m) shared.sums[m][c] = sum += shared.sums[m][c];
  }
  return sum;
}

}  // namespace kimi::cuda
