// K1 of the chunked path: from q, k, v, gate and beta of one chunk and value head to its image (image.cuh).
//
// Block = (chunk, value head), 8 warps, two blocks a multiprocessor. Warp w has the tokens of group w (8 tokens), and
// lane 4 g + t of it token g and, of every 32 channels, eight. With G_i the sum of the log2 gates of the chunk up to
// token i, everything in the image needs 2^(G_i - G_j) for i >= j only, and nothing here ever forms a larger one:
//
//   within a group    2^(G_i - mid) and 2^(mid - G_j) as tf32, mid = the sum over the first half of the group; each
//                     token's gate is floored at -30 in these, so they stay within 2^+-120
//   group to group    2^(G_i - start of i's group) * [product of the whole groups between] * 2^(end of j's group - G_j)
//   with the state    2^(G_i - start of the chunk), 2^(end of the chunk - G_j)
//
// The first two powers are all the exponentials there are (two an element); the others follow by multiplication with
// factors of a group and channel. Operands are fp16: by then all are at most 1 in magnitude but for v, which is scaled
// by a power of two when the chunk needs it. A_kk is kept as the sum of two fp16 (its error would dominate otherwise).
//
// Phases, a block barrier after each: 1 inputs, gates, norms; 2 factors of the groups; 3 operands; 4 A_kk, A_qk and the
// inverses of the diagonal blocks of I + A_kk; 5 w and u by forward substitution over the groups.
//
// Bytes: 64 KB read and 70 KB written a block at K = V = 128: 31 ns at 4.27 TB/s. The products are 1.4 M multiply-adds,
// 1,100 cycles at the rate of mma.sync; the instructions, about 3,500 a warp, 7,000 cycles: they bound it, and waiting
// between them, which the second block on the multiprocessor is for.
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
  ChunkImage<K, V>* image;
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

// Rounds to tf32, whose lower 13 bits an mma ignores; for finite x (to_tf32 spends four instructions on the others).
__device__ __forceinline__ uint32_t finite_to_tf32(float x) {
  return __float_as_uint(x) + 0x1000u;
}

__device__ __forceinline__ uint4 movmatrix_trans(uint4 x) {
  return make_uint4(movmatrix_trans(x.x), movmatrix_trans(x.y), movmatrix_trans(x.z), movmatrix_trans(x.w));
}

// Eight fp32 values times a factor each, as fp16.
__device__ __forceinline__ uint4 pack_scaled(const float (&x)[8], const float (&factor)[8]) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = pack2<Fp16>(x[2 * i] * factor[2 * i], x[2 * i + 1] * factor[2 * i + 1]);
  return make_uint4(w[0], w[1], w[2], w[3]);
}

__device__ __forceinline__ void load_eight(float (&x)[8], const float* from) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto piece = load_vec<float, 4>(from + 4 * half);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[4 * half + i] = piece.x[i];
  }
}

// Phase 2. From the groups' factors to those of the chunk: one channel a thread.
template <int K, int V>
__device__ __forceinline__ void chunk_factors(PrepShared<K, V>& shared, ChunkFactors<K>& image) {
  const int c = threadIdx.x % K, part = threadIdx.x / K;
  if (part >= 2) return;
  auto& factors = shared.factors;
  float decay[kGroups];
#pragma unroll
  for (int m = 0; m < kGroups; ++m) decay[m] = factors.decay[m][c];
  if (part == 0) {
    float before = 1.0f, after = 1.0f;
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
      factors.chunk_start_to_mid[m][c] = factors.start_to_mid[m][c] * before;
      before *= decay[m];
    }
    image.decay[c] = before;
#pragma unroll
    for (int m = kGroups - 1; m >= 0; --m) {
      factors.mid_to_chunk_end[m][c] = factors.mid_to_end[m][c] * after;
      after *= decay[m];
    }
  } else {
#pragma unroll
    for (int row = 2; row < kGroups; ++row) {
      float product = 1.0f;
#pragma unroll
      for (int column = row - 2; column >= 0; --column) {
        product *= decay[column + 1];
        shared.between[between_entry(row, column)][c] = from_float<Fp16>(product);
      }
    }
  }
}

// Operands of the products of a row group with earlier ones, as an mma wants them: rows 0..7 are k, 8..15 are q.
template <int K>
struct RowOperands {
  uint32_t a[K / 16][4];
};

// Phase 3. All operands of the group's tokens; the product of the group with itself into `diagonal` (k rows, q rows).
template <typename T, int K, int V>
__device__ __forceinline__ void make_operands(PrepShared<K, V>& shared, ChunkFactors<K>& image, RowOperands<K>& rows,
                                              float (&diagonal)[4]) {
  const PrepLane at;
  const float q_scale = shared.scales[kGroup * at.group + at.g].x, k_scale = shared.scales[kGroup * at.group + at.g].y;
#pragma unroll
  for (int j = 0; j < K / 32; ++j) {
    const int channel = 32 * j + 8 * at.t;
    auto& group = shared.groups[at.group][j];
    float q[8], k[8], k_column[8], factor[8];
    unpack_eight<T>(shared.q_then_k_start[at.group][j][at.lane], q);
    unpack_eight<T>(shared.k[at.group][j][at.lane], k);
    load_eight(factor, &group.from_mid[at.g][8 * at.t]);
    __syncwarp();  // operands take its place
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float up = exp2_approx(factor[i]), down = exp2_approx(-factor[i]);
      k_column[i] = k[i] * k_scale * down;
      k[i] = k[i] * k_scale * up;
      q[i] = q[i] * q_scale * up;
    }
    // Within the group.
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const uint32_t a[4] = {finite_to_tf32(k[i]), finite_to_tf32(q[i]), finite_to_tf32(k[i + 1]),
                             finite_to_tf32(q[i + 1])};
      const uint32_t b[2] = {finite_to_tf32(k_column[i]), finite_to_tf32(k_column[i + 1])};
      mma_m16n8k8_tf32(diagonal, a, b);
    }
    // Rows and columns of the products between groups.
    load_eight(factor, &shared.factors.start_to_mid[at.group][channel]);
    const uint4 k_rows = pack_scaled(k, factor), q_rows = pack_scaled(q, factor);
    rows.a[2 * j][0] = k_rows.x;
    rows.a[2 * j][1] = q_rows.x;
    rows.a[2 * j][2] = k_rows.y;
    rows.a[2 * j][3] = q_rows.y;
    rows.a[2 * j + 1][0] = k_rows.z;
    rows.a[2 * j + 1][1] = q_rows.z;
    rows.a[2 * j + 1][2] = k_rows.w;
    rows.a[2 * j + 1][3] = q_rows.w;
    load_eight(factor, &shared.factors.mid_to_end[at.group][channel]);
    group.operands.k_end[at.lane] = pack_scaled(k_column, factor);
    // With the state.
    load_eight(factor, &shared.factors.chunk_start_to_mid[at.group][channel]);
    image.q[at.group][j][at.lane] = pack_scaled(q, factor);
    shared.q_then_k_start[at.group][j][at.lane] = movmatrix_trans(pack_scaled(k, factor));
    load_eight(factor, &shared.factors.mid_to_chunk_end[at.group][channel]);
    group.operands.kg[at.lane] = movmatrix_trans(pack_scaled(k_column, factor));
  }
}

// Values 16 m + 4 t .. + 3 of the lane's token, as they are in memory.
template <int K, int V>
__device__ __forceinline__ uint2 value_words(const PrepShared<K, V>& shared, int m) {
  const PrepLane at;
  return reinterpret_cast<const uint2*>(shared.v[at.group].rows[at.g])[4 * m + at.t];
}

// Phase 3b. The group's values times `unit`, in fp16 and transposed, in their place.
template <typename T, int K, int V>
__device__ __forceinline__ void convert_values(PrepShared<K, V>& shared, float unit) {
  const PrepLane at;
  uint2 row[V / 16];
#pragma unroll
  for (int m = 0; m < V / 16; ++m) row[m] = value_words(shared, m);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < V / 32; ++i) {
    uint32_t w[4];
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const float2 pair = unpack2<T>(h % 2 == 0 ? row[2 * i + h / 2].x : row[2 * i + h / 2].y);
      w[h] = pack2<Fp16>(pair.x * unit, pair.y * unit);
    }
    shared.v[at.group].operands[i][at.lane] = movmatrix_trans(make_uint4(w[0], w[1], w[2], w[3]));
  }
}

// Phase 4a. product = rows of this warp's group times k of an earlier group.
template <int K, int V>
__device__ __forceinline__ void group_product(const RowOperands<K>& rows, int row_group, int column_group,
                                              const PrepShared<K, V>& shared, float (&product)[4]) {
  const PrepLane at;
  float part[2][4] = {};  // two chains: an mma takes several times longer to finish than to start
#pragma unroll
  for (int j = 0; j < K / 32; ++j) {
    const uint4 column = shared.groups[column_group][j].operands.k_end[at.lane];
    uint32_t b[4] = {column.x, column.y, column.z, column.w};
    if (column_group < row_group - 1) {
      const auto between = load_vec<uint32_t, 4>(reinterpret_cast<const uint32_t*>(
          &shared.between[between_entry(row_group, column_group)][32 * j + 8 * at.t]));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        b[i] = bits_as<uint32_t>(__hmul2(bits_as<__half2>(b[i]), bits_as<__half2>(between.x[i])));
    }
    mma_m16n8k16<Fp16>(part[0], rows.a[2 * j], {b[0], b[1]});
    mma_m16n8k16<Fp16>(part[1], rows.a[2 * j + 1], {b[2], b[3]});
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) product[i] = part[0][i] + part[1][i];
}

// Phase 4b. The inverse of the unit lower triangular block I + N of 8 tokens; n, and the result, are row g, columns
// 2t and 2t + 1.
__device__ __forceinline__ float2 invert_diagonal_block(float2 n) {
  const PrepLane at;
  float2 inverse = make_float2(at.g == 2 * at.t ? 1.0f : 0.0f, at.g == 2 * at.t + 1 ? 1.0f : 0.0f);
#pragma unroll
  for (int row = 0; row < kGroup - 1; ++row) {  // row is final: subtract its multiple from those below
    const float x = __shfl_sync(kFullWarp, inverse.x, 4 * row + at.t);
    const float y = __shfl_sync(kFullWarp, inverse.y, 4 * row + at.t);
    const float factor = __shfl_sync(kFullWarp, row % 2 == 0 ? n.x : n.y, 4 * at.g + row / 2);
    if (at.g > row) {
      inverse.x = fmaf(-factor, x, inverse.x);
      inverse.y = fmaf(-factor, y, inverse.y);
    }
  }
  return inverse;
}

// Phase 4. This group's rows of A_kk and A_qk.
template <int K, int V>
__device__ __forceinline__ void make_systems(const RowOperands<K>& rows, const float (&diagonal)[4],
                                             PrepShared<K, V>& shared, ChunkFactors<K>& image) {
  const PrepLane at;
  const float beta = shared.beta[kGroup * at.group + at.g];
  uint32_t upper[kGroups] = {}, lower[kGroups] = {}, a_qk[kGroups] = {};  // of column groups
#pragma unroll
  for (int column_group = 0; column_group < kGroups - 1; ++column_group) {
    if (column_group >= at.group) continue;
    float product[4];
    group_product(rows, at.group, column_group, shared, product);
    product[0] *= -beta;
    product[1] *= -beta;
    upper[column_group] = pack2<Fp16>(product[0], product[1]);
    const float2 rounded = unpack2<Fp16>(upper[column_group]);
    lower[column_group] = pack2<Fp16>(product[0] - rounded.x, product[1] - rounded.y);
    a_qk[column_group] = pack2<Fp16>(product[2], product[3]);
  }
  const int column = 2 * at.t;
  const uint32_t a_qk_diagonal =
      pack2<Fp16>(column <= at.g ? diagonal[2] : 0.0f, column + 1 <= at.g ? diagonal[3] : 0.0f);
  const float2 inverse = invert_diagonal_block(
      make_float2(column < at.g ? beta * diagonal[0] : 0.0f, column + 1 < at.g ? beta * diagonal[1] : 0.0f));
  shared.system.inverse[at.group][at.lane] = pack2<Fp16>(inverse.x, inverse.y);
#pragma unroll
  for (int s = 0; s < kGroups / 2; ++s) {
    if (2 * s < at.group) {
      shared.system.a_kk[at.group * at.group / 4 + s][at.lane] =
          make_uint4(upper[2 * s], upper[2 * s + 1], lower[2 * s], lower[2 * s + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (i == at.group) a_qk[i] = a_qk_diagonal;
  }
  image.a_qk[a_qk_entry(at.group, 0)][at.lane] = make_uint4(a_qk[0], a_qk[1], a_qk[2], a_qk[3]);
  if (at.group >= 4) image.a_qk[a_qk_entry(at.group, 1)][at.lane] = make_uint4(a_qk[4], a_qk[5], a_qk[6], a_qk[7]);
}

// Phase 5. 32 rows (the warp's: channels of w, then values of u) of X = R T^T with R = rows x tokens, by forward
// substitution over the groups: X_i = (R_i - sum over j < i of X_j A_ij^T) T_ii^T. x[group][half] are fp16 pairs of
// tokens 2t, 2t + 1: rows g and g + 8 of the half.
template <int K, int V>
__device__ __forceinline__ void substitute(const PrepShared<K, V>& shared, uint32_t (&x)[kGroups][2][2]) {
  const PrepLane at;
  const uint4* right_side = at.group < K / 32 ? &shared.q_then_k_start[0][at.group][at.lane]
                                              : &shared.v[0].operands[at.group - K / 32][at.lane];
  const int step = at.group < K / 32 ? sizeof(shared.q_then_k_start[0]) / 16 : sizeof(shared.v[0]) / 16;
  float sum[kGroups][2][4];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const uint4 words = right_side[i * step];
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
    const auto beta = load_vec<float, 2>(&shared.beta[kGroup * i + 2 * at.t]);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float2 pair = unpack2<Fp16>(w[r]);
      sum[i][r / 2][2 * (r % 2)] = pair.x * beta.x[0];
      sum[i][r / 2][2 * (r % 2) + 1] = pair.y * beta.x[1];
    }
  }
  // sum[row_group] -= X A^T for the column groups of the a operands.
  const auto eliminate = [&](int row_group, int s, const uint32_t (&a)[2][4]) {
    const uint4 b = shared.system.a_kk[row_group * row_group / 4 + s][at.lane];
#pragma unroll
    for (int half = 0; half < 2; ++half) mma_m16n8k16<Fp16>(sum[row_group][half], a[half], {b.x, b.y});
#pragma unroll
    for (int half = 0; half < 2; ++half) mma_m16n8k16<Fp16>(sum[row_group][half], a[half], {b.z, b.w});
  };
  const auto solve = [&](int i) {
    const uint32_t b[2] = {shared.system.inverse[i][at.lane], 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float (&r)[4] = sum[i][half];
      const uint32_t a[4] = {pack2<Fp16>(r[0], r[1]), pack2<Fp16>(r[2], r[3]), 0, 0};
      float solution[4] = {};
      mma_m16n8k16<Fp16>(solution, a, b);
      x[i][half][0] = pack2<Fp16>(solution[0], solution[1]);
      x[i][half][1] = pack2<Fp16>(solution[2], solution[3]);
    }
  };
#pragma unroll
  for (int s = 0; s < kGroups / 2; ++s) {
    const int i = 2 * s;
    solve(i);
    uint32_t a[2][4] = {{x[i][0][0], x[i][0][1], 0, 0}, {x[i][1][0], x[i][1][1], 0, 0}};
    eliminate(i + 1, s, a);
    solve(i + 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[half][2] = x[i + 1][half][0];
      a[half][3] = x[i + 1][half][1];
    }
#pragma unroll
    for (int row_group = i + 2; row_group < kGroups; ++row_group) eliminate(row_group, s, a);
  }
}

// SASS: tensor cores, 16-byte loads
template <typename T, int K, int V>
__global__ void __launch_bounds__(kPrepThreads, 2)
    kda_prep_kernel(const __grid_constant__ KdaPrefillParams p, const __grid_constant__ Segment segment) {
  auto& shared = shared_memory<PrepShared<K, V>>();
  const PrepLane at;
  const int num_heads = static_cast<int>(p.num_value_heads);
  // From the last chunk to the first: the second kernel finds the images it begins with in the L2 cache.
  const int chunk = segment.first + segment.count - 1 - static_cast<int>(blockIdx.y);
  const int sequence = sequence_of_chunk(p.cu_seqlens, static_cast<int>(p.num_sequences), chunk);
  if (sequence < 0 || p.slots[sequence] < 0) return;
  PrepTask task;
  const int offset = (chunk - first_chunk(p.cu_seqlens, sequence)) * kChunk;
  task.first_token = p.cu_seqlens[sequence] + offset;
  const int left = p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence] - offset;
  if (left <= 0) return;
  task.count = left < kChunk ? left : kChunk;
  task.head = static_cast<int>(blockIdx.x);
  task.qk_head =
      p.num_value_heads == p.num_heads ? task.head : task.head / static_cast<int>(p.num_value_heads / p.num_heads);

  // Phase 1: inputs, gates, norms.
  PrepInputs<T, K, V> inputs;
  inputs.load(p, task, segment.wide_inputs, shared);
  group_gates(p, task, inputs.gates, shared);
  const int token_in_chunk = kGroup * at.group + at.g;
  float beta = p.use_beta_sigmoid ? sigmoid(inputs.beta) : inputs.beta, q_scale = 1.0f, k_scale = 1.0f;
  bool exact = false;  // numbers that fp16 operands may not hold, or a recurrence that grows
  cp_async_wait<0>();
  __syncwarp();
  uint4 q_row[K / 32], k_row[K / 32];
#pragma unroll
  for (int j = 0; j < K / 32; ++j) {
    q_row[j] = shared.q_then_k_start[at.group][j][at.lane];
    k_row[j] = shared.k[at.group][j][at.lane];
  }
  if (p.use_qk_l2norm) {
    q_scale = inverse_norm<T>(q_row);
    k_scale = inverse_norm<T>(k_row);
    if (!p.use_beta_sigmoid) exact = beta < 0.0f || beta > 2.2f;
  } else {
    const float q2 = row_squares<T>(q_row, 1.0f), k2 = row_squares<T>(k_row, 1.0f);
    exact = beta < 0.0f || beta * k2 > 2.2f || k2 > 0x1p12f || q2 > 0x1p16f || (k2 > 0.0f && k2 < 0x1p-12f) ||
            (q2 > 0.0f && q2 < 0x1p-16f);
  }
  if (token_in_chunk >= task.count) beta = q_scale = k_scale = 0.0f;  // nothing of such a token is left
  float largest = 0.0f;
#pragma unroll
  for (int m = 0; m < V / 16; ++m) {
    const uint2 words = value_words(shared, m);
    const float2 a = unpack2<T>(words.x), b = unpack2<T>(words.y);
    largest = fmaxf(fmaxf(fmaxf(largest, fabsf(a.x)), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y)));
  }
  largest = warp_max<4>(largest);
  float smallest = largest > 0.0f ? -largest : -INFINITY;
  largest = warp_max(largest);
  smallest = -warp_max(smallest);
  if (at.lane == 0) {
    shared.largest_value[at.group] = largest;
    shared.smallest_value[at.group] = smallest;
  }
  if (at.t == 0) {
    shared.beta[token_in_chunk] = beta;
    shared.scales[token_in_chunk] = make_float2(q_scale, k_scale);
  }
  exact = __syncthreads_or(exact);

  // Phase 2: factors of the groups within the chunk; the unit of the values.
  auto& image = image_of<ChunkImage<K, V>>(segment, chunk, task.head, num_heads);
  chunk_factors(shared, image.factors);
#pragma unroll
  for (int m = 0; m < kGroups; ++m) {
    largest = fmaxf(largest, shared.largest_value[m]);
    smallest = fminf(smallest, shared.smallest_value[m]);
  }
  int exponent = exponent_of(largest);
  exponent = largest == 0.0f || (exponent >= -8 && exponent < 9) || exponent > 127 ? 0 : max(exponent - 4, -100);
  if (threadIdx.x == 0) {
    shared.exponent = exponent;
    shared.image = &image;
    image.factors.exponent = exponent;
    // In units for very large values, a token of ordinary ones would drown, and the large ones may soon be forgotten.
    image.factors.exact = exact || (exponent > 0 && exponent_of(smallest) < exponent - 12);
    image.factors.unused[0] = image.factors.unused[1] = 0;
  }
  __syncthreads();

  // Phase 3: operands.
  RowOperands<K> rows;
  float diagonal[4] = {};
  make_operands<T>(shared, image.factors, rows, diagonal);
  convert_values<T>(shared, power_of_two(-shared.exponent));
  __syncthreads();

  // Phase 4: A_kk, A_qk and the diagonal inverses.
  make_systems(rows, diagonal, shared, shared.image->factors);
  __syncthreads();

  // Phase 5: kg in pairs of groups; w and u, 32 rows a warp.
#pragma unroll
  for (int i = 0; i < K / 64; ++i) {
    const int s = at.group / 2, j = at.group % 2 * (K / 64) + i;
    const uint4 even = shared.groups[2 * s][j].operands.kg[at.lane],
                odd = shared.groups[2 * s + 1][j].operands.kg[at.lane];
    shared.image->factors.kg[s][2 * j][at.lane] = make_uint4(even.x, odd.x, even.y, odd.y);
    shared.image->factors.kg[s][2 * j + 1][at.lane] = make_uint4(even.z, odd.z, even.w, odd.w);
  }
  if (at.group >= K / 32 + V / 32) return;
  uint32_t x[kGroups][2][2];
  substitute(shared, x);
  if (at.group < K / 32) {
    const int j = at.group;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      uint4 w = movmatrix_trans(make_uint4(x[i][0][0], x[i][0][1], x[i][1][0], x[i][1][1]));
      constexpr uint32_t kSigns = 0x80008000u;
      shared.image->factors.w[i][j][at.lane] = make_uint4(w.x ^ kSigns, w.y ^ kSigns, w.z ^ kSigns, w.w ^ kSigns);
    }
  } else {
    const int m = 2 * (at.group - K / 32);
#pragma unroll
    for (int s = 0; s < kGroups / 2; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        shared.image->u[m + half][s][at.lane] =
            make_uint4(x[2 * s][half][0], x[2 * s][half][1], x[2 * s + 1][half][0], x[2 * s + 1][half][1]);
      }
    }
  }
}

}  // namespace kimi::cuda
