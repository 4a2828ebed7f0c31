// K1 of the chunked path, phases 4 and 5: A_kk and A_qk, and T by forward substitution.
#pragma once

#include "cuda/kda_prefill/prep_operands.cuh"

namespace kimi::cuda {

// Multiplies the rows, in place, by a power of two of each channel.
template <int K>
__device__ __forceinline__ void scale_rows(const PrepLane& at, RowOperands<K>& rows, const Fp16* power) {
#pragma unroll
  for (int j = 0; j < K / 32; ++j) {
    const auto factor = load_vec<uint32_t, 4>(reinterpret_cast<const uint32_t*>(power + 32 * j + 8 * at.t));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t& x = rows.a[2 * j + i / 4][i % 4];
      x = bits_as<uint32_t>(__hmul2(bits_as<__half2>(x), bits_as<__half2>(factor.x[i / 2])));
    }
  }
}

// Phase 4a. Tiles of 8 x 8 of both matrices, of the rows of this warp's group and the columns of one or two earlier
// ones: columns[i] are words of the lane, one every step[i]. Leaves 2^e times -L where substitute() reads it, in fp16
// pairs of row g, columns 2t and 2t + 1; and gives those of A_qk.
template <int K, int kTiles>
__device__ __forceinline__ void group_products(const RowOperands<K>& rows, const uint4* const (&columns)[kTiles],
                                               const int (&step)[kTiles], float row_factor, uint4& a_kk,
                                               uint32_t (&a_qk)[kTiles]) {
  float part[kTiles][2][4] = {};  // several chains: an mma takes several times longer to finish than to start
#pragma unroll
  for (int j = 0; j < K / 32; ++j) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4 b = columns[i][j * step[i]];
      mma_m16n8k16<Fp16>(part[i][0], rows.a[2 * j], {b.x, b.y});
      mma_m16n8k16<Fp16>(part[i][1], rows.a[2 * j + 1], {b.z, b.w});
    }
  }
  uint32_t upper[2] = {}, lower[2] = {};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const float x = (part[i][0][0] + part[i][1][0]) * row_factor, y = (part[i][0][1] + part[i][1][1]) * row_factor;
    upper[i] = pack2<Fp16>(x, y);
    const float2 rounded = unpack2<Fp16>(upper[i]);
    lower[i] = pack2<Fp16>(x - rounded.x, y - rounded.y);
    a_qk[i] = pack2<Fp16>(part[i][0][2] + part[i][1][2], part[i][0][3] + part[i][1][3]);
  }
  a_kk = make_uint4(upper[0], upper[1], lower[0], lower[1]);
}

// Phase 4. This group's rows of A_kk and A_qk, level by level, so that hardly a product needs factors between groups.
template <int K, typename Image>
__device__ __forceinline__ void make_systems(const PrepLane& at, RowOperands<K>& rows, uint32_t a_qk_diagonal,
                                             float step, PrepShared<K>& shared, Image& image) {
  constexpr int kStep = sizeof(shared.groups[0][0]) / 16;
  const int m = at.group, first = m / 4 * 4, in_half = m % 4;
  const auto k_end = [&](int group) { return &shared.groups[group][0].operands.k_end[at.lane]; };
  uint4* const a_kk = &shared.a_kk[m * m / 4][at.lane];  // of column groups 0 and 1
  uint32_t near[4] = {}, far[4] = {};                    // A_qk: column groups of this half of the chunk, of the first
  if (m % 2 == 1) {                                      // with the other one of the pair
    uint32_t tile[1];
    group_products<K, 1>(rows, {k_end(m - 1)}, {kStep}, step, a_kk[m / 2 * kWarp], tile);
    near[0] = near[2] = tile[0];
  }
  if (in_half >= 2) {  // with the pair before, in the same half
    if (in_half == 3) scale_rows<K>(at, rows, shared.powers[m][kWithinHalf]);
    uint32_t tiles[2];
    group_products<K, 2>(rows, {&shared.k_quarter[m / 4][0][at.lane], k_end(first + 1)}, {kWarp, kStep}, step,
                         a_kk[first / 2 * kWarp], tiles);
    near[0] = tiles[0];
    near[1] = tiles[1];
  }
  near[0] = in_half == 0 ? a_qk_diagonal : near[0];
  near[1] = in_half == 1 ? a_qk_diagonal : near[1];
  near[2] = in_half == 2 ? a_qk_diagonal : in_half == 3 ? near[2] : 0;
  near[3] = in_half == 3 ? a_qk_diagonal : 0;
  if (m < 4) return image.store_a_qk(m, at.lane, {near[0], near[1], near[2], near[3], 0, 0, 0, 0});
  // With the first half.
  if (m > 4) scale_rows<K>(at, rows, shared.powers[m][kBetweenHalves]);
  const auto k_half = [&](int group) { return &shared.k_then_k_half[0][group][at.lane]; };
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t tiles[2];
    group_products<K, 2>(rows, {k_half(i), i == 0 ? k_half(1) : k_end(3)},
                         {kGroups * kWarp, i == 0 ? kGroups * kWarp : kStep}, step, a_kk[i / 2 * kWarp], tiles);
    far[i] = tiles[0];
    far[i + 1] = tiles[1];
  }
  image.store_a_qk(m, at.lane, {far[0], far[1], far[2], far[3], near[0], near[1], near[2], near[3]});
}

// Phase 4b. Inverses T of the diagonal blocks of I + A_kk, four a warp, a column a lane; times beta 2^-e.
template <int K>
__device__ __forceinline__ void invert_diagonal_blocks(const PrepLane& at, PrepShared<K>& shared) {
  const int block = at.thread / kGroup, column = at.thread % kGroup;
  float x[kGroup];
#pragma unroll
  for (int row = 0; row < kGroup; ++row) {
    float n[kGroup];
    load_eight(n, shared.system[block][row]);
    x[row] = row == column ? 1.0f : 0.0f;
#pragma unroll
    for (int i = 0; i < row; ++i) x[row] = fmaf(-n[i], x[i], x[row]);
  }
  const float beta = shared.beta[kGroup * block + column];
#pragma unroll
  for (int row = 0; row < kGroup; ++row) shared.inverse[block][row][column] = from_float<Fp16>(x[row] * beta);
}

// Phase 5. T beta, with T = (I + A_kk)^-1, transposed: 16 of its rows (the columns of T of tokens 16 pair .. + 15, a
// warp each), by forward substitution over the groups from `pair` on:
//   X_i = (R_i 2^e - sum over j < i of X_j (2^e L_ij)^T) (T_ii beta 2^-e)^T, R the identity.
// The powers of two of beta go with the rows, so that fp16 holds all of it. x[group] are fp16 pairs of row tokens 2t,
// 2t
// + 1: rows g and g + 8.
template <int K>
__device__ __forceinline__ void substitute(const PrepLane& at, const PrepShared<K>& shared, int pair,
                                           uint32_t (&x)[kGroups][2]) {
  float sum[kGroups][4];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const float step = shared.step[kGroup * i + at.g];
    const float low = at.g == 2 * at.t ? step : 0.0f, high = at.g == 2 * at.t + 1 ? step : 0.0f;
    sum[i][0] = i == 2 * pair ? low : 0.0f;
    sum[i][1] = i == 2 * pair ? high : 0.0f;
    sum[i][2] = i == 2 * pair + 1 ? low : 0.0f;
    sum[i][3] = i == 2 * pair + 1 ? high : 0.0f;
    x[i][0] = x[i][1] = 0;
  }
  // The words of row group i and column groups 2 s and 2 s + 1: upper and lower parts.
  const auto system = [&](int i, int s) { return shared.a_kk[i * i / 4 + s][at.lane]; };
  const auto solve = [&](int i) {
    const uint32_t b = *reinterpret_cast<const uint32_t*>(&shared.inverse[i][at.g][2 * at.t]);
    float solution[4] = {};
    mma_m16n8k8<Fp16>(solution, {pack2<Fp16>(sum[i][0], sum[i][1]), pack2<Fp16>(sum[i][2], sum[i][3])}, b);
    x[i][0] = pack2<Fp16>(solution[0], solution[1]);
    x[i][1] = pack2<Fp16>(solution[2], solution[3]);
  };
#pragma unroll
  for (int s = 0; s < kGroups / 2; ++s) {
    if (s < pair) continue;  // above the diagonal
    const int i = 2 * s;
    solve(i);
    const uint4 within = system(i + 1, s);  // of the two column groups: the other is the row group's
    mma_m16n8k8<Fp16>(sum[i + 1], x[i], within.x);
    mma_m16n8k8<Fp16>(sum[i + 1], x[i], within.z);
    solve(i + 1);
    const uint32_t a[4] = {x[i][0], x[i][1], x[i + 1][0], x[i + 1][1]};
#pragma unroll
    for (int row_group = i + 2; row_group < kGroups; ++row_group) {
      const uint4 b = system(row_group, s);
      mma_m16n8k16<Fp16>(sum[row_group], a, {b.x, b.y});
      mma_m16n8k16<Fp16>(sum[row_group], a, {b.z, b.w});
    }
  }
}

// Phase 5, of four warps: T, 16 columns a warp.
template <int K, typename Image>
__device__ __forceinline__ void make_t(const PrepLane& at, const PrepShared<K>& shared, bool exact, Image& image) {
  const int pair = at.group;
  uint32_t x[kGroups][2];
  substitute(at, shared, pair, x);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) image.store_t(pair, i, at.lane, x[i][0], x[i][1]);
  if (exact) [[unlikely]] {  // NaN: every v' will be, and who multiplies with it looks for that
#pragma unroll 1
    for (int i = 0; i < kGroups; ++i) image.store_t(pair, i, at.lane, 0x7fff7fffu, 0x7fff7fffu);
  }
}

}  // namespace kimi::cuda
