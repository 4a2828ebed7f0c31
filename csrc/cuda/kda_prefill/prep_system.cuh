// K1 of the chunked path, phases 4 and 5: A_kk and A_qk, and w and u by forward substitution.
#pragma once

#include "cuda/kda_prefill/prep_operands.cuh"

namespace kimi::cuda {

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
template <int K, int V, typename Image>
__device__ __forceinline__ void make_systems(const RowOperands<K>& rows, const float (&diagonal)[4],
                                             PrepShared<K, V>& shared, Image& image) {
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
  image.store_a_qk(at.group, at.lane, a_qk);
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

}  // namespace kimi::cuda
