// K1 of the chunked path, phase 3: all operands of the chunk's products.
#pragma once

#include "cuda/kda_prefill/prep_inputs.cuh"

namespace kimi::cuda {

// An mma ignores the lower 13 bits of a tf32 operand. Operands that are 1 + 0.72 / 2^11 times too large are rounded by
// that without an instruction: numbers that tf32 holds stay as they are, others are right on average.
inline constexpr float kTf32Rounding = 1.0f + 0.72f / 2048;
inline constexpr float kTf32RoundingLog2 = 5.0710e-4f;

// Of PrepShared::powers.
enum PowerOfGroup { kFromStart, kWithinHalf, kBetweenHalves };

// Phase 3a. The factors of the group's operands, lanes and channels as for the gates. Sums of the gates at the ends of
// groups are taken apart into a whole number, whose power of two may multiply an fp16 operand without an error, and a
// fraction, which is in the operands from the beginning.
template <int K>
__device__ __forceinline__ void make_factors(const PrepLane& at, const GroupHalves<K / kWarp>& halves,
                                             PrepShared<K>& shared) {
  constexpr int kChannels = K / kWarp;
  using Channels = Vec<float, kChannels>;
  const int m = at.group, channel = kChannels * at.lane;
  const auto sum_before = [&](int group) { return load_vec<float, kChannels>(&shared.sums[group - 1][channel]); };
  const Channels start = m == 0 ? Channels{} : sum_before(m), end = sum_before(m + 1), total = sum_before(kGroups);
  const Channels quarter = sum_before(m / 4 * 4 + 2), half = sum_before(4);
  constexpr float kRounding = 0x1.8p23f;  // x + it has x's whole number in its last bits
  Channels start_to_mid, mid_to_end, mid_to_chunk_end;
  float powers[3][kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const float first = halves.first[c] - kTf32RoundingLog2, second = halves.second[c] - kTf32RoundingLog2;
    const float at_start = start.x[c] + kRounding, at_end = end.x[c] + kRounding;
    const float at_quarter = quarter.x[c] + kRounding, at_half = half.x[c] + kRounding;
    const float whole_start = at_start - kRounding, whole_end = at_end - kRounding;
    start_to_mid.x[c] = exp2_approx(first + (start.x[c] - whole_start));
    mid_to_end.x[c] = exp2_approx(second - (end.x[c] - whole_end));
    mid_to_chunk_end.x[c] = exp2_approx(second + (total.x[c] - end.x[c]));
    powers[kFromStart][c] = exp2_approx(whole_start);
    // Rows of the later part are scaled from their start, columns of the earlier part from their end.
    const float self = m % 4 >= 2 ? at_start : at_end;
    powers[kWithinHalf][c] = exp2_approx(-fabsf(self - at_quarter));
    const float other = m < 4 ? at_end : m % 4 == 3 ? at_quarter : at_start;  // of group 7: what that left
    powers[kBetweenHalves][c] = exp2_approx(-fabsf(other - at_half));
  }
  store_vec(&shared.factors[m][0][channel], start_to_mid);
  store_vec(&shared.factors[m][1][channel], mid_to_end);
  store_vec(&shared.factors[m][2][channel], mid_to_chunk_end);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    Vec<uint32_t, kChannels / 2> packed;
#pragma unroll
    for (int c = 0; c < kChannels; c += 2) packed.x[c / 2] = pack2<Fp16>(powers[i][c], powers[i][c + 1]);
    store_vec(reinterpret_cast<uint32_t*>(&shared.powers[m][i][channel]), packed);
  }
  __syncwarp();
}

__device__ __forceinline__ void load_eight(float (&x)[8], const float* from) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto piece = load_vec<float, 4>(from + 4 * half);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[4 * half + i] = piece.x[i];
  }
}

// Eight fp32 values times a factor each, as fp16.
__device__ __forceinline__ uint4 pack_scaled(const float (&x)[8], const float (&factor)[8]) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = pack2<Fp16>(x[2 * i] * factor[2 * i], x[2 * i + 1] * factor[2 * i + 1]);
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// Products of eight fp16 values, two a word.
__device__ __forceinline__ uint4 multiply(uint4 a, uint4 b) {
  const auto product = [](uint32_t x, uint32_t y) {
    return bits_as<uint32_t>(__hmul2(bits_as<__half2>(x), bits_as<__half2>(y)));
  };
  return make_uint4(product(a.x, b.x), product(a.y, b.y), product(a.z, b.z), product(a.w, b.w));
}

// The b operand 1 of mma.m16n8k8.
template <typename T>
__device__ __forceinline__ uint32_t identity_operand(const PrepLane& at) {
  return pack2<T>(at.g == 2 * at.t ? 1.0f : 0.0f, at.g == 2 * at.t + 1 ? 1.0f : 0.0f);
}

// Eight elements to fp32, times a factor, by products with 1: one instruction for two words of a lane, which are rows g
// and g + 8 of the left operand, instead of eight.
template <typename T>
__device__ __forceinline__ void to_float_by_mma(uint4 words, uint32_t identity, float factor, float (&x)[8]) {
  float first[4] = {}, second[4] = {};
  mma_m16n8k8<T>(first, {words.x, words.y}, identity);
  mma_m16n8k8<T>(second, {words.z, words.w}, identity);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = first[i] * factor;
    x[4 + i] = second[i] * factor;
  }
}

// Operands of the products of a row group with earlier ones, as an mma wants them: rows 0..7 are -k, 8..15 are q.
template <int K>
struct RowOperands {
  uint32_t a[K / 16][4];
};

// Of the group, of the lane's eight of channels 32 j on.
template <int K>
__device__ __forceinline__ uint4 powers_of(const PrepLane& at, const PrepShared<K>& shared, int j, PowerOfGroup which) {
  return *reinterpret_cast<const uint4*>(&shared.powers[at.group][which][32 * j + 8 * at.t]);
}

// Phase 3b. All operands of the group's tokens; the product of the group with itself into `diagonal` (k rows, q rows).
template <typename T, int K, typename Image>
__device__ __forceinline__ void make_operands(const PrepLane& at, const TokenScales& scales, bool exact,
                                              PrepShared<K>& shared, Image& image, RowOperands<K>& rows,
                                              float (&diagonal)[4]) {
  const float q_scale = scales.q * kTf32Rounding, k_scale = scales.k * kTf32Rounding;
  const uint32_t identity = identity_operand<T>(at);
#pragma unroll
  for (int j = 0; j < K / 32; ++j) {
    const int channel = 32 * j + 8 * at.t;
    auto& group = shared.groups[at.group][j];
    float q[8], k[8], k_column[8], factor[8];
    const uint4 raw_q = shared.q[j][at.group][at.lane], raw_k = shared.k_then_k_half[j][at.group][at.lane];
    to_float_by_mma<T>(raw_q, identity, q_scale, q);
    to_float_by_mma<T>(raw_k, identity, k_scale, k);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto piece = load_vec<float, 4>(&group.from_mid[at.g][from_mid_place(at.g, channel + 4 * half)]);
#pragma unroll
      for (int i = 0; i < 4; ++i) factor[4 * half + i] = piece.x[i];
    }
    __syncwarp();  // operands take its place
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float up = exp2_approx(factor[i]), down = exp2_approx(-factor[i]);
      k_column[i] = k[i] * down;
      k[i] *= up;
      q[i] *= up;
    }
    // Within the group.
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      mma_m16n8k8_tf32(
          diagonal,
          {__float_as_uint(k[i]), __float_as_uint(q[i]), __float_as_uint(k[i + 1]), __float_as_uint(q[i + 1])},
          {__float_as_uint(k_column[i]), __float_as_uint(k_column[i + 1])});
    }
    // Rows of the products with earlier groups, and with the state.
    load_eight(factor, &shared.factors[at.group][0][channel]);
    const uint4 q_rows = pack_scaled(q, factor);
#pragma unroll
    for (int i = 0; i < 8; ++i) factor[i] = -factor[i];
    const uint4 k_rows = pack_scaled(k, factor);
    rows.a[2 * j][0] = k_rows.x;
    rows.a[2 * j][1] = q_rows.x;
    rows.a[2 * j][2] = k_rows.y;
    rows.a[2 * j][3] = q_rows.y;
    rows.a[2 * j + 1][0] = k_rows.z;
    rows.a[2 * j + 1][1] = q_rows.z;
    rows.a[2 * j + 1][2] = k_rows.w;
    rows.a[2 * j + 1][3] = q_rows.w;
    const uint4 from_start = powers_of(at, shared, j, kFromStart);
    image.store_q(at.group, j, at.lane, multiply(q_rows, from_start));
    image.store_k(at.group, j, at.lane, multiply(k_rows, from_start));
    // Columns of the products with later groups, and of the state's update.
    load_eight(factor, &shared.factors[at.group][1][channel]);
    group.operands.k_end[at.lane] = pack_scaled(k_column, factor);
    load_eight(factor, &shared.factors[at.group][2][channel]);
    const uint4 kg = pack_scaled(k_column, factor);
    if constexpr (Image::kTransposedKg)
      group.operands.kg[at.lane] = movmatrix_trans(kg);
    else
      image.store_kg(at.group, j, at.lane, kg);
  }
  if constexpr (!Image::kTransposedKg) {
    if (exact) [[unlikely]] {  // it may be infinite
#pragma unroll 1
      for (int j = 0; j < K / 32; ++j) image.store_kg(at.group, j, at.lane, make_uint4(0, 0, 0, 0));
    }
  }
  // Columns for rows beyond a quarter or half of the chunk, of groups that end before it does. (Of all channels here:
  // in the loop each would be a branch.)
  const auto k_end = [&](int j) { return shared.groups[at.group][j].operands.k_end[at.lane]; };
  if (at.group % 4 == 0) {
#pragma unroll
    for (int j = 0; j < K / 32; ++j)
      shared.k_quarter[at.group / 4][j][at.lane] = multiply(k_end(j), powers_of(at, shared, j, kWithinHalf));
  }
  if (at.group < 3) {
#pragma unroll
    for (int j = 0; j < K / 32; ++j)
      shared.k_then_k_half[j][at.group][at.lane] = multiply(k_end(j), powers_of(at, shared, j, kBetweenHalves));
  }
}

// Phase 3c. beta L within the group, for whoever inverts it; the group's own tile of A_qk.
template <int K>
__device__ __forceinline__ uint32_t store_diagonal(const PrepLane& at, const TokenScales& scales,
                                                   const float (&diagonal)[4], PrepShared<K>& shared) {
  const int column = 2 * at.t;
  const float beta = scales.beta;
  const Vec<float, 2> system = {column < at.g ? beta * diagonal[0] : 0.0f,
                                column + 1 < at.g ? beta * diagonal[1] : 0.0f};
  store_vec(&shared.system[at.group][at.g][column], system);
  return pack2<Fp16>(column <= at.g ? diagonal[2] : 0.0f, column + 1 <= at.g ? diagonal[3] : 0.0f);
}

}  // namespace kimi::cuda
