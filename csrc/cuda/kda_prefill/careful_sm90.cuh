// A chunk whose v' is not fit for fp16 (chain_common.cuh), on Hopper: one warp does it again for its 16 values, in
// other units or token by token, while the others of its warpgroup go on to their next product and wait for it there.
//
// The products are those of chain_warp_sm90.cuh, from the same image, by mma: a warp's rows of wgmma's accumulators and
// left operands are laid out as those of mma, and what wgmma reads as right operands are rows of 16 bytes, which
// ldmatrix reads too.
//
// A strip (strip_sm90.cuh) has it done by its first warp, for all of its 16 values, from the image in memory.
//
// This is rare, and must not cost the usual way anything. So S is in local memory, and loops stay loops: registers that
// the compiler would use here it would take from there.
#pragma once

#include "cuda/kda_prefill/chain_warp_sm90.cuh"
#include "cuda/kda_prefill/task_sm90.cuh"

namespace kimi::cuda {

template <int K>
using WarpState = float[K / 8][4];  // as ChainWarp::s

template <int K>
__device__ __forceinline__ void copy_state(const WarpState<K>& from, WarpState<K>& to) {
#pragma unroll
  for (int i = 0; i < K / 8 * 4; ++i) to[i / 4][i % 4] = from[i / 4][i % 4];
}

// Four matrices of an image as fragments, as ldmatrix_x4() and ldmatrix_x4_trans() (cuda/common/ptx.h) have them.
struct SharedMatrices {
  template <bool kTransposed>
  __device__ __forceinline__ static void load(uint32_t (&r)[4], const void* row) {
    if constexpr (kTransposed)
      ldmatrix_x4_trans(r, row);
    else
      ldmatrix_x4(r, row);
  }
};
// Of an image in memory.
struct MemoryMatrices {
  template <bool kTransposed>
  __device__ __forceinline__ static void load(uint32_t (&r)[4], const void* row) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const auto row_of = [&](int of_lane) {
      return reinterpret_cast<const char*>(__shfl_sync(kFullWarp, reinterpret_cast<unsigned long long>(row), of_lane));
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kTransposed) {
        const char *const even = row_of(8 * i + 2 * t), *const odd = row_of(8 * i + 2 * t + 1);
        r[i] = reinterpret_cast<const uint16_t*>(even)[g] |
               static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(odd)[g]) << 16;
      } else {
        r[i] = reinterpret_cast<const uint32_t*>(row_of(8 * i + g))[t];
      }
    }
  }
};

// sum += (S * factor) right^T for k or q of an image.
template <int K, typename Matrices>
__device__ __forceinline__ void multiply_rows_alone(const uint4 (&right)[kGroups][K / 32][kWarp], int lane,
                                                    const WarpState<K>& s, float factor, float (&sum)[kGroups][4]) {
  const int row = swizzled(4 * (lane % 8) + lane / 8);  // a piece is four matrices, of eight channels each
#pragma unroll 1
  for (int j = 0; j < K / 32; ++j) {
    uint32_t left[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float (&from)[4] = s[4 * j + i / 2];
      left[i / 4][i % 4] = pack2<Fp16>(from[2 * (i % 2)] * factor, from[2 * (i % 2) + 1] * factor);
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t piece[4];
      Matrices::template load<false>(piece, &right[group][j][row]);
      mma_m16n8k16<Fp16>(sum[group], left[0], {piece[0], piece[1]});
      mma_m16n8k16<Fp16>(sum[group], left[1], {piece[2], piece[3]});
    }
  }
}

// sum += left right^T for T (kTransposed) or A_qk of an image.
template <bool kTransposed, typename Matrices>
__device__ __forceinline__ void multiply_triangle_alone(const uint32_t (&right)[kGroups][kGroups][kWarp], int lane,
                                                        const uint32_t (&left)[kGroups / 2][4],
                                                        float (&sum)[kGroups][4]) {
#pragma unroll
  for (int x = 0; x < kGroups / 2; ++x) {
#pragma unroll
    for (int group = 2 * x; group < kGroups; group += 2) {  // the others are zeros
      uint32_t tiles[4];                                    // of two groups, columns of two groups
      Matrices::template load<kTransposed>(tiles, &right[2 * x + lane / 8 % 2][group + lane / 16][4 * (lane % 8)]);
      mma_m16n8k16<Fp16>(sum[group], left[x], {tiles[0], tiles[1]});
      mma_m16n8k16<Fp16>(sum[group + 1], left[x], {tiles[2], tiles[3]});
    }
  }
}

// S <- S D + left kg, in units of 2^unit.
template <int K, typename Matrices>
__device__ __forceinline__ void update_state_alone(const ChunkFactorsSm90<K>& factors, const ChunkHeaderSm90<K>& header,
                                                   int lane, int unit, const uint32_t (&left)[kGroups / 2][4],
                                                   WarpState<K>& s) {
#pragma unroll 1
  for (int i = 0; i < K / 8; i += 2) {
    const auto decay = load_vec<float, 4>(&header.decay[8 * i + 4 * (lane % 4)]);
    float sum[2][4];
#pragma unroll
    for (int e = 0; e < 8; ++e)
      sum[e / 4][e % 4] = s[i + e / 4][e % 4] * power_of_two(-unit) * decay.x[e / 4 * 2 + e % 2];
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) {
      uint32_t tiles[4];  // of channels 8 i .. + 7 and the next eight, tokens of two groups
      Matrices::template load<true>(
          tiles, &factors.kg[2 * x + lane / 8 % 2][i / 4][swizzled(4 * (lane % 8) + i % 4 + lane / 16)]);
      mma_m16n8k16<Fp16>(sum[0], left[x], {tiles[0], tiles[1]});
      mma_m16n8k16<Fp16>(sum[1], left[x], {tiles[2], tiles[3]});
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) s[i + e / 4][e % 4] = sum[e / 4][e % 4] * power_of_two(unit);
  }
}

// `chunk` of the task's sequence, from the state before it: in other units, or token by token. The output takes the
// place of the warp's values.
template <typename T, int K, bool kShared, typename Matrices, typename Stage>
__device__ __forceinline__ void careful_chunk(const KdaPrefillParams& p, const Segment& segment, const ChainTask& task,
                                              Stage& stage, int chunk, unsigned thread, WarpState<K>& s) {
  ChainWarp<T, K, kShared> x;
  x.find_place(thread);
  const int lane = x.lane;
  const auto clear = [](float (&sum)[kGroups][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i) sum[i / 4][i % 4] = 0.0f;
  };
  ChunkUnits units(stage.header.exact != 0);
#pragma unroll 1
  while (!units.exact) {
    const float factor = power_of_two(-units.unit);
    x.start_values(stage);
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i) x.values[i / 4][i % 4] *= factor;
    multiply_rows_alone<K, Matrices>(stage.factors.k, lane, s, factor, x.values);
    x.round_values();
    clear(x.values);
    multiply_triangle_alone<true, Matrices>(stage.factors.t, lane, x.operand, x.values);
    x.round_values();
    const auto value_units = [&] {
      return choose_value_units<T>(
          [&](int token, int i) { return (&stage.v.octets[0][0])[x.place(token, 2 * x.warp + i)]; });
    };
    if (units.template accept<K>(magnitude_of(x.operand), s, value_units)) break;
  }
  if (!units.exact) {
    clear(x.out());
    multiply_rows_alone<K, Matrices>(stage.factors.q, lane, s, power_of_two(-units.unit), x.out());
    multiply_triangle_alone<false, Matrices>(stage.factors.a_qk, lane, x.operand, x.out());
    x.round_out(p.scale * power_of_two(units.unit), stage.v);
    update_state_alone<K, Matrices>(stage.factors, stage.header, lane, units.unit, x.operand, s);
    return;
  }
  const int64_t begin = task.begin + static_cast<int64_t>(chunk) * kChunk;
  const int count = min(task.length - chunk * kChunk, kChunk);
  copy_state<K>(s, x.s);
  x.to_token_order();
  run_tokens<T, K / 32>(TokenReader<T, K / 32>(p, task.head, task.first_value), begin, begin + count, x.s);
  x.from_token_order();
  copy_state<K>(x.s, s);
  __syncwarp();  // what a lane has written others read
  const T* const out = static_cast<const T*>(p.out) + begin * p.out_token_stride + task.head * p.out_head_stride +
                       task.first_value + 8 * (lane % 2);
#pragma unroll 1
  for (int token = lane / 2; token < count; token += kWarp / 2)
    (&stage.v.octets[0][0])[x.place(token, 2 * x.warp + lane % 2)] =
        load_octet(out + token * p.out_token_stride, segment.wide_out, true);
  __syncwarp();
}

// The same for a state in registers.
template <typename T, int K, bool kShared, typename Stage>
__device__ __forceinline__ void careful_chunk(const KdaPrefillParams& p, const Segment& segment, const ChainTask& task,
                                              Stage& stage, int chunk, unsigned thread, ChainWarp<T, K, kShared>& x) {
  WarpState<K> memory;
  WarpState<K>& s = *unknown_pointer(&memory);
  copy_state<K>(x.s, s);
  careful_chunk<T, K, kShared, SharedMatrices>(p, segment, task, stage, chunk, thread, s);
  copy_state<K>(s, x.s);
}

}  // namespace kimi::cuda
