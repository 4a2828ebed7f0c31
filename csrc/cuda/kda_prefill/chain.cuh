// K2 of the chunked path: the state runs through the images (image.cuh) of a sequence's chunks, one after another.
//
// Block = (sequence, value head, slice of 16 kWarps value channels). A warp has 16 rows of the state (values) x all key
// channels as fp32 accumulators, and needs nothing from the other warps but their share of the copying: rows of the
// state do not interact. Per chunk, transposed so that every result is the left operand of the next product as it lies
// (-k, q, kg, T and A_qk are the image's):
//
//   x^T  = v^T - S k^T          [16 x 64]
//   v'^T = x^T T^T
//   o^T  = S q^T + v'^T A_qk^T
//   S    = S D + v'^T kg        [16 x K]
//
// The right operands are read from shared memory in fragment order, 16 bytes a lane; S, x and v' are rounded to fp16 in
// registers; v comes from the input. Everything comes through a ring of two or three buffers by cp.async.
//
// Range: chain_common.cuh. A chunk is tried in ordinary units first.
//
// Bytes: 59 KB of image and 16 KB of values a chunk and head. One slice of 64 values: 240 mma a warp and chunk, 54 KB
// of shared memory read by each warp; 4 warps: 2,200 cycles a chunk of shared memory, 1,500 of tensor cores.
#pragma once

#include "cuda/kda_prefill/chain_common.cuh"

namespace kimi::cuda {

template <int K, int kWarps>
struct alignas(128) ChainStage {
  ChunkImage<K> image;
  uint4 v[kChunk][2 * kWarps + 1];  // of the block's values, a token a row; padded so that eight rows hit all banks
};

template <int K, int kWarps>
struct ChainShared {
  ChainStage<K, kWarps> stages[1];  // segment.stages of them
};

// Not inlined: who calls it where it is hardly ever needed keeps its registers. `rows` are `stride` apart.
template <typename T>
__device__ __noinline__ ValueUnits value_units_of(const uint4* rows, int stride) {
  return choose_value_units<T>([&](int token, int i) { return rows[token * stride + i]; });
}

// Words of the warp's values as the left operand of a product over tokens: v[x] of tokens 16 x .. + 15.
template <int K, int kWarps>
__device__ __forceinline__ void load_values(const ChainStage<K, kWarps>& stage, int warp, int lane,
                                            uint32_t (&v)[kGroups / 2][4]) {
#pragma unroll
  for (int x = 0; x < kGroups / 2; ++x)
    ldmatrix_x4_trans(v[x], &stage.v[16 * x + lane / 16 * 8 + lane % 8][2 * warp + lane / 8 % 2]);
}

// Accumulators to the left operand of a product over their columns.
__device__ __forceinline__ void round_columns(const float (&from)[kGroups][4], uint32_t (&to)[kGroups / 2][4]) {
#pragma unroll
  for (int x = 0; x < kGroups / 2; ++x) {
    to[x][0] = pack2<Fp16>(from[2 * x][0], from[2 * x][1]);
    to[x][1] = pack2<Fp16>(from[2 * x][2], from[2 * x][3]);
    to[x][2] = pack2<Fp16>(from[2 * x + 1][0], from[2 * x + 1][1]);
    to[x][3] = pack2<Fp16>(from[2 * x + 1][2], from[2 * x + 1][3]);
  }
}

// sum += left triangle^T, for T or A_qk.
__device__ __forceinline__ void multiply_triangle(const uint4 (&triangle)[12][kWarp], int lane,
                                                  const uint32_t (&left)[kGroups / 2][4], float (&sum)[kGroups][4]) {
#pragma unroll
  for (int x = 0; x < kGroups / 2; ++x) {
#pragma unroll
    for (int group = 2 * x; group < kGroups; ++group) {
      const uint4 b = triangle[triangle_entry(group, x / 2)][lane];
      if (x % 2 == 0)
        mma_m16n8k16<Fp16>(sum[group], left[x], {b.x, b.y});
      else
        mma_m16n8k16<Fp16>(sum[group], left[x], {b.z, b.w});
    }
  }
}

// Products with the state: out <- S q^T, and v' as the left operand of the next products. Values are multiplied by
// `factor` first.
template <typename T, int K, int kWarps>
__device__ __forceinline__ void multiply_state(const ChainStage<K, kWarps>& stage, const float (&s)[K / 8][4], int warp,
                                               int lane, float factor, uint32_t (&new_values)[kGroups / 2][4],
                                               float (&out)[kGroups][4]) {
  uint32_t state[K / 16][4];
#pragma unroll
  for (int x = 0; x < K / 16; ++x) {
    state[x][0] = pack2<Fp16>(s[2 * x][0], s[2 * x][1]);
    state[x][1] = pack2<Fp16>(s[2 * x][2], s[2 * x][3]);
    state[x][2] = pack2<Fp16>(s[2 * x + 1][0], s[2 * x + 1][1]);
    state[x][3] = pack2<Fp16>(s[2 * x + 1][2], s[2 * x + 1][3]);
  }
  float values[kGroups][4];
  load_values(stage, warp, lane, new_values);
#pragma unroll
  for (int x = 0; x < kGroups / 2; ++x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(new_values[x][i]);
      values[2 * x + i / 2][2 * (i % 2)] = pair.x;
      values[2 * x + i / 2][2 * (i % 2) + 1] = pair.y;
    }
  }
  if (factor != 1.0f) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[group][i] *= factor;
    }
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[group][i] = 0.0f;
  }
  // Four products side by side, so that none waits for its own last one.
#pragma unroll
  for (int j = 0; j < K / 32; ++j) {
#pragma unroll
    for (int group = 0; group < kGroups; group += 2) {
      const uint4 k0 = stage.image.k[group][j][lane], k1 = stage.image.k[group + 1][j][lane];
      const uint4 q0 = stage.image.q[group][j][lane], q1 = stage.image.q[group + 1][j][lane];
      mma_m16n8k16<Fp16>(values[group], state[2 * j], {k0.x, k0.y});
      mma_m16n8k16<Fp16>(values[group + 1], state[2 * j], {k1.x, k1.y});
      mma_m16n8k16<Fp16>(out[group], state[2 * j], {q0.x, q0.y});
      mma_m16n8k16<Fp16>(out[group + 1], state[2 * j], {q1.x, q1.y});
      mma_m16n8k16<Fp16>(values[group], state[2 * j + 1], {k0.z, k0.w});
      mma_m16n8k16<Fp16>(values[group + 1], state[2 * j + 1], {k1.z, k1.w});
      mma_m16n8k16<Fp16>(out[group], state[2 * j + 1], {q0.z, q0.w});
      mma_m16n8k16<Fp16>(out[group + 1], state[2 * j + 1], {q1.z, q1.w});
    }
  }
  round_columns(values, new_values);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[group][i] = 0.0f;
  }
  multiply_triangle(stage.image.t, lane, new_values, values);
  round_columns(values, new_values);
}

// Products with the new values: out += v'^T A_qk^T, s <- s D + v'^T kg. `rows` gets the output times `factor` in the
// dtype of memory: of group i, lane 4 g + t the values 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of token g.
template <typename T, int K, int kWarps>
__device__ __forceinline__ void multiply_values(const ChainStage<K, kWarps>& stage, int lane, float factor,
                                                const uint32_t (&new_values)[kGroups / 2][4], float (&s)[K / 8][4],
                                                float (&out)[kGroups][4], uint32_t (&rows)[kGroups][2]) {
  multiply_triangle(stage.image.a_qk, lane, new_values, out);
#pragma unroll
  for (int j = 0; j < K / 32; ++j) {
    const float* decay = &stage.image.decay[32 * j + 8 * (lane % 4)];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto piece = load_vec<float, 4>(decay + 4 * half);
#pragma unroll
      for (int i = 0; i < 8; ++i) s[4 * j + 2 * half + i / 4][i % 4] *= piece.x[2 * (i / 4) + i % 2];
    }
  }
  constexpr int kSteps = kGroups / 2 * (K / 32);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int x = step / (K / 32), j = step % (K / 32);
    const uint4 low = stage.image.kg[x][2 * j][lane], high = stage.image.kg[x][2 * j + 1][lane];
    mma_m16n8k16<Fp16>(s[4 * j], new_values[x], {low.x, low.y});
    mma_m16n8k16<Fp16>(s[4 * j + 1], new_values[x], {low.z, low.w});
    mma_m16n8k16<Fp16>(s[4 * j + 2], new_values[x], {high.x, high.y});
    mma_m16n8k16<Fp16>(s[4 * j + 3], new_values[x], {high.z, high.w});
    // In between, 16 / kSteps halves of the output rows.
#pragma unroll
    for (int i = step * 2 * kGroups / kSteps; i < (step + 1) * 2 * kGroups / kSteps; ++i) {
      const float (&o)[4] = out[i / 2];
      rows[i / 2][i % 2] = movmatrix_trans(pack2<T>(o[2 * (i % 2)] * factor, o[2 * (i % 2) + 1] * factor));
    }
  }
}

// Writes the rows of the chunk's first `count` tokens; `to` is the first one, at the warp's first value.
template <typename T>
__device__ __forceinline__ void write_rows(const uint32_t (&rows)[kGroups][2], T* to, int64_t token_stride, int count,
                                           bool wide) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  T* row = to + g * token_stride + 2 * t;
  const int64_t step = kGroup * token_stride;
#pragma unroll
  for (int group = 0; group < kGroups; ++group, row += step) {
    if (kGroup * group + g >= count) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (wide) {
        *reinterpret_cast<uint32_t*>(row + 8 * half) = rows[group][half];
      } else {
        const auto values = bits_as<Vec<T, 2>>(rows[group][half]);
        row[8 * half] = values.x[0];
        row[8 * half + 1] = values.x[1];
      }
    }
  }
}

// SASS: tensor cores, 16-byte loads, stack 24 (addresses of what is done once a chunk; registers are full)
template <typename T, int K, int V, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    kda_chain_kernel(const __grid_constant__ KdaPrefillParams p, const __grid_constant__ Segment segment) {
  using Image = ChunkImage<K>;
  constexpr int kThreads = kWarps * kWarp;
  auto& shared = shared_memory<ChainShared<K, kWarps>>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int sequence = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int slice = static_cast<int>(blockIdx.z);
  const int first_value = (slice * kWarps + warp) * 16;

  // Phase 1: which of the sequence's chunks are in this segment.
  const int64_t begin = p.cu_seqlens[sequence];
  const int length = static_cast<int>(p.cu_seqlens[sequence + 1] - begin);
  const int first_of_sequence = first_chunk(p.cu_seqlens, sequence);
  const int first = max(segment.first - first_of_sequence, 0);
  const int last = min(segment.first + segment.count - first_of_sequence, ceil_div(length, kChunk));  // one past it
  if (length <= 0 || first >= last) return;
  T* const out = static_cast<T*>(p.out) + begin * p.out_token_stride + head * p.out_head_stride + first_value;
  const int slot = p.slots[sequence];
  if (slot < 0) {
    const uint32_t zeros[kGroups][2] = {};
    for (int chunk = first; chunk < last; ++chunk) {
      write_rows(zeros, out + static_cast<int64_t>(chunk) * kChunk * p.out_token_stride, p.out_token_stride,
                 min(length - chunk * kChunk, kChunk), segment.wide_out);
    }
    return;
  }
  const auto rows_of = [&](int of_slot) { return state_rows(p, segment.wide_state, of_slot, head, first_value); };

  // Phase 2: the first images and values, and the state.
  const T* const values =
      static_cast<const T*>(p.v) + begin * p.v_token_stride + head * p.v_head_stride + slice * kWarps * 16;
  int next_chunk = first, next_stage = 0;
  const auto copy_next = [&] {
    if (next_chunk < last) {
      auto& stage = shared.stages[next_stage];
      const auto* from = reinterpret_cast<const uint4*>(
          &image_of<Image>(segment, first_of_sequence + next_chunk, head, p.num_value_heads));
      auto* to = reinterpret_cast<uint4*>(&stage.image);
      constexpr int kWords = (offsetof(Image, exact) + 4 * sizeof(int)) / 16;  // without the padding
#pragma unroll
      for (int i = 0; i < kWords / kThreads; ++i)
        cp_async_16(to + threadIdx.x + i * kThreads, from + threadIdx.x + i * kThreads);
      constexpr int kLeft = kWords % kThreads;
      if (static_cast<int>(threadIdx.x) < kLeft)
        cp_async_16(to + threadIdx.x + kWords - kLeft, from + threadIdx.x + kWords - kLeft);
      // Tokens past the end are zeros.
      const int count = min(length - next_chunk * kChunk, kChunk);
      const T* rows = values + static_cast<int64_t>(next_chunk) * kChunk * p.v_token_stride;
      for (int i = threadIdx.x; i < kChunk * 2 * kWarps; i += kThreads) {
        const int token = i / (2 * kWarps), octet = i % (2 * kWarps);
        const bool valid = token < count;
        const T* row = rows + (valid ? token : 0) * p.v_token_stride + 8 * octet;
        if (segment.wide_inputs)
          cp_async_16(&stage.v[token][octet], row, valid);
        else
          stage.v[token][octet] = load_octet(row, false, valid);
      }
    }
    cp_async_commit();
    ++next_chunk;
    next_stage = next_stage + 1 == segment.stages ? 0 : next_stage + 1;
  };
#pragma unroll 1
  for (int i = 1; i < segment.stages; ++i) copy_next();
  float s[K / 8][4];
  const bool fresh = first == 0 && p.has_initial_state && !p.has_initial_state[sequence];
  load_state<K / 32>(s, rows_of(slot), K, fresh);

  // Phase 3: the chunks.
  int stage_index = 0;
#pragma unroll 1
  for (int chunk = first; chunk < last; ++chunk) {
    if (segment.stages == 3)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    __syncthreads();  // the image is there, and everybody is done with the one before
    copy_next();
    const auto& stage = shared.stages[stage_index];
    stage_index = stage_index + 1 == segment.stages ? 0 : stage_index + 1;
    const int count = min(length - chunk * kChunk, kChunk);
    T* const out_of_chunk = out + static_cast<int64_t>(chunk) * kChunk * p.out_token_stride;

    ChunkUnits units(stage.image.exact != 0);
    float out_values[kGroups][4];
    uint32_t new_values[kGroups / 2][4];
    while (!units.exact) {
      const int unit = units.unit;
      if (unit != 0) scale_state<K>(s, power_of_two(-unit));
      multiply_state<T>(stage, s, warp, lane, power_of_two(-unit), new_values, out_values);
      if (unit != 0) scale_state<K>(s, power_of_two(unit));
      if (units.accept<K>(magnitude_of(new_values), s,
                          [&] { return value_units_of<T>(&stage.v[0][2 * warp], 2 * kWarps + 1); }))
        break;
    }
    if (!units.exact) {
      uint32_t rows[kGroups][2];
      if (units.unit != 0) scale_state<K>(s, power_of_two(-units.unit));
      multiply_values<T>(stage, lane, p.scale * power_of_two(units.unit), new_values, s, out_values, rows);
      if (units.unit != 0) scale_state<K>(s, power_of_two(units.unit));
      write_rows(rows, out_of_chunk, p.out_token_stride, count, segment.wide_out);
    } else {
      const int64_t token = begin + static_cast<int64_t>(chunk) * kChunk;
      store_state<K / 32>(s, rows_of(slot), K);
      run_tokens_in_pool<T, K / 32>(p, head, first_value, token, token + count, rows_of(slot));
      load_state<K / 32>(s, rows_of(slot), K, false);
    }
    if (count == kChunk && chunk < p.num_snapshots) {
      const int to = p.snapshot_slots[sequence * p.num_snapshots + chunk];
      if (to >= 0) store_state<K / 32>(s, rows_of(to), K);
    }
  }

  // Phase 4: the state, for the next segment or the caller.
  store_state<K / 32>(s, rows_of(slot), K);
}

}  // namespace kimi::cuda
