// K1 of the chunked path, phases 2 and 3: the decays of the chunk, and all operands of its products.
#pragma once

#include "cuda/kda_prefill/prep_inputs.cuh"

namespace kimi::cuda {

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
template <int K, int V, typename Image>
__device__ __forceinline__ void chunk_factors(PrepShared<K, V>& shared, Image& image) {
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
    image.store_decay(c, before);
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
template <typename T, int K, int V, typename Image>
__device__ __forceinline__ void make_operands(PrepShared<K, V>& shared, Image& image, RowOperands<K>& rows,
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
    image.store_q(at.group, j, at.lane, pack_scaled(q, factor));
    shared.q_then_k_start[at.group][j][at.lane] = movmatrix_trans(pack_scaled(k, factor));
    load_eight(factor, &shared.factors.mid_to_chunk_end[at.group][channel]);
    if constexpr (Image::kTransposedKg)
      group.operands.kg[at.lane] = movmatrix_trans(pack_scaled(k_column, factor));
    else
      image.store_kg(at.group, j, at.lane, pack_scaled(k_column, factor));
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

}  // namespace kimi::cuda
