// K2 of the chunked path: the state runs through the images (image.cuh) of a sequence's chunks, one after another.
//
// Block = (sequence, value head, slice of 16 kWarps value channels). A warp has 16 rows of the state (values) x all key
// channels as fp32 accumulators, and needs nothing from the other warps but their share of the copying: rows of the
// state do not interact. Per chunk, transposed so that every result is the left operand of the next product as it lies:
//
//   v'^T = u^T - S w^T       [16 x 64]
//   o^T  = S q^T + v'^T A_qk^T
//   S    = S D + v'^T kg     [16 x K]
//
// w, q, kg and A_qk are right operands, read from shared memory in fragment order, 16 bytes a lane; S and v' are
// rounded to fp16 in registers. The images come through a ring of kStages buffers by cp.async.
//
// Range. A chunk is worked on in units of 2^unit: those of its u (0 unless the values are very large or small), or of S
// if that is larger. Nothing is checked beforehand: v' is not finite in fp16 when anything overflowed, and then the
// chunk is done again in larger units. If u would drown in those, or the image says so, the chunk's tokens go one after
// another in fp32 instead (tokens.cuh). All of this is decided per warp, from its own rows: no result depends on
// kWarps.
//
// Bytes: 70 KB of images a chunk and head (55 + 15 / slices). One slice of 64 values: 212 mma a warp and chunk, 53 KB
// of shared memory read by each warp; 4 warps: 2,200 cycles a chunk of shared memory, 1,400 of tensor cores.
#pragma once

#include "cuda/kda_prefill/tokens.cuh"

namespace kimi::cuda {

template <int K, int kWarps>
struct alignas(128) ChainStage {
  uint4 u[kWarps][kGroups / 2][kWarp];
  ChunkFactors<K> factors;
};

template <int K, int kWarps, int kStages>
struct ChainShared {
  ChainStage<K, kWarps> stages[kStages];
};

// Units in which the largest |S| is 2^10 to 2^11: a product with w (of norm 1, in exceptional data 2) then fits.
inline constexpr int kStateExponent = 10;

// By how many powers of two the units may exceed those of u: its largest value (2^4 and more, or 2^-8 and more in units
// of 1) must not become a subnormal of fp16.
__device__ __forceinline__ int max_unit_gap(int exponent) {
  return exponent == 0 ? 6 : 18;
}

template <int K>
__device__ __forceinline__ void scale_state(float (&s)[K / 8][4], float factor) {
#pragma unroll
  for (int x = 0; x < K / 8; ++x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[x][i] *= factor;
  }
}

// Units for a chunk whose u has units of 2^exponent: no smaller than those, and S must fit.
template <int K>
__device__ __forceinline__ int choose_unit(const float (&s)[K / 8][4], int exponent) {
  float largest = 0.0f;
#pragma unroll
  for (int x = 0; x < K / 8; ++x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(s[x][i]));
  }
  const int of_state = exponent_of(warp_max(largest)) - kStateExponent;
  // A state of ordinary size next to very small values stays in ordinary units.
  return max(exponent, exponent < 0 ? min(of_state, 0) : of_state);
}

// True if no half of the words is infinite or NaN.
template <int N>
__device__ __forceinline__ bool all_finite(const uint32_t (&words)[N][4]) {
  uint32_t seen = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) seen |= (words[n][i] & 0x7fff7fffu) + 0x04000400u;  // an exponent of 31 carries
  }
  return (seen & 0x80008000u) == 0;
}

// Products with the state: new_values <- u^T - S w^T, out <- S q^T; values are fp16 pairs of tokens (a operands), true
// if all of them are finite.
template <int K, int kWarps>
__device__ __forceinline__ bool multiply_state(const ChainStage<K, kWarps>& stage, const float (&s)[K / 8][4], int warp,
                                               int lane, float u_factor, uint32_t (&new_values)[kGroups / 2][4],
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
#pragma unroll
  for (int x = 0; x < kGroups / 2; ++x) {
    const uint4 words = stage.u[warp][x][lane];
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<Fp16>(w[i]);
      values[2 * x + i / 2][2 * (i % 2)] = pair.x * u_factor;
      values[2 * x + i / 2][2 * (i % 2) + 1] = pair.y * u_factor;
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
      const uint4 w0 = stage.factors.w[group][j][lane], w1 = stage.factors.w[group + 1][j][lane];
      const uint4 q0 = stage.factors.q[group][j][lane], q1 = stage.factors.q[group + 1][j][lane];
      mma_m16n8k16<Fp16>(values[group], state[2 * j], {w0.x, w0.y});
      mma_m16n8k16<Fp16>(values[group + 1], state[2 * j], {w1.x, w1.y});
      mma_m16n8k16<Fp16>(out[group], state[2 * j], {q0.x, q0.y});
      mma_m16n8k16<Fp16>(out[group + 1], state[2 * j], {q1.x, q1.y});
      mma_m16n8k16<Fp16>(values[group], state[2 * j + 1], {w0.z, w0.w});
      mma_m16n8k16<Fp16>(values[group + 1], state[2 * j + 1], {w1.z, w1.w});
      mma_m16n8k16<Fp16>(out[group], state[2 * j + 1], {q0.z, q0.w});
      mma_m16n8k16<Fp16>(out[group + 1], state[2 * j + 1], {q1.z, q1.w});
    }
  }
#pragma unroll
  for (int x = 0; x < kGroups / 2; ++x) {
    new_values[x][0] = pack2<Fp16>(values[2 * x][0], values[2 * x][1]);
    new_values[x][1] = pack2<Fp16>(values[2 * x][2], values[2 * x][3]);
    new_values[x][2] = pack2<Fp16>(values[2 * x + 1][0], values[2 * x + 1][1]);
    new_values[x][3] = pack2<Fp16>(values[2 * x + 1][2], values[2 * x + 1][3]);
  }
  return __all_sync(kFullWarp, all_finite(new_values));
}

// Products with the new values: out += v'^T A_qk^T, s <- s D + v'^T kg.
template <int K, int kWarps>
__device__ __forceinline__ void multiply_values(const ChainStage<K, kWarps>& stage, int lane,
                                                const uint32_t (&new_values)[kGroups / 2][4], float (&s)[K / 8][4],
                                                float (&out)[kGroups][4]) {
#pragma unroll
  for (int j = 0; j < K / 32; ++j) {
    const float* decay = &stage.factors.decay[32 * j + 8 * (lane % 4)];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto piece = load_vec<float, 4>(decay + 4 * half);
#pragma unroll
      for (int i = 0; i < 8; ++i) s[4 * j + 2 * half + i / 4][i % 4] *= piece.x[2 * (i / 4) + i % 2];
    }
  }
#pragma unroll
  for (int x = 0; x < kGroups / 2; ++x) {
#pragma unroll
    for (int j = 0; j < K / 32; ++j) {
      const uint4 even = stage.factors.kg[2 * x][j][lane], odd = stage.factors.kg[2 * x + 1][j][lane];
      mma_m16n8k16<Fp16>(s[4 * j], new_values[x], {even.x, odd.x});
      mma_m16n8k16<Fp16>(s[4 * j + 1], new_values[x], {even.y, odd.y});
      mma_m16n8k16<Fp16>(s[4 * j + 2], new_values[x], {even.z, odd.z});
      mma_m16n8k16<Fp16>(s[4 * j + 3], new_values[x], {even.w, odd.w});
    }
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half <= group / 4; ++half) {
      const uint4 b = stage.factors.a_qk[a_qk_entry(group, half)][lane];
      mma_m16n8k16<Fp16>(out[group], new_values[2 * half], {b.x, b.y});
      if (2 * half + 1 <= group / 2) mma_m16n8k16<Fp16>(out[group], new_values[2 * half + 1], {b.z, b.w});
    }
  }
}

// Rows of the output: the first `count` tokens of the chunk, 16 values each.
template <typename T>
__device__ __forceinline__ void write_out(const float (&out)[kGroups][4], float factor, T* to, int64_t token_stride,
                                          int count, bool wide) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    // Lane 4 g + t gets token g, values 4 t .. 4 t + 3.
    const uint32_t words[2] = {movmatrix_trans(pack2<T>(out[group][0] * factor, out[group][1] * factor)),
                               movmatrix_trans(pack2<T>(out[group][2] * factor, out[group][3] * factor))};
    const int token = kGroup * group + g;
    if (token >= count) continue;
    T* row = to + token * token_stride + 4 * t;
    const auto values = bits_as<Vec<T, 4>>(words);
    if (wide) {
      store_vec(row, values);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) row[i] = values.x[i];
    }
  }
}

template <typename T, int K, int V, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    kda_chain_kernel(const __grid_constant__ KdaPrefillParams p, const __grid_constant__ Segment segment) {
  using Image = ChunkImage<K, V>;
  constexpr int kSlices = V / (16 * kWarps), kThreads = kWarps * kWarp;
  auto& shared = shared_memory<ChainShared<K, kWarps, kStages>>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int slice = static_cast<int>(blockIdx.x) % kSlices;
  const int head = static_cast<int>(blockIdx.x / kSlices % p.num_value_heads);
  const int sequence = static_cast<int>(blockIdx.x / kSlices / p.num_value_heads);
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
    const float zeros[kGroups][4] = {};
    for (int chunk = first; chunk < last; ++chunk) {
      write_out(zeros, 0.0f, out + static_cast<int64_t>(chunk) * kChunk * p.out_token_stride, p.out_token_stride,
                min(length - chunk * kChunk, kChunk), segment.wide_out);
    }
    return;
  }
  const auto rows_of = [&](int of_slot) {
    return p.state + of_slot * p.state_slot_stride + (static_cast<int64_t>(head) * V + first_value) * K;
  };

  // Phase 2: the first images, and the state.
  const auto copy_image = [&](int chunk) {
    if (chunk < last) {
      const Image& image = image_of<Image>(segment, first_of_sequence + chunk, head, p.num_value_heads);
      auto& stage = shared.stages[chunk % kStages];
      const auto copy = [&](void* to, const void* from, int words) {
        for (int i = threadIdx.x; i < words; i += kThreads)
          cp_async_16(static_cast<uint4*>(to) + i, static_cast<const uint4*>(from) + i);
      };
      copy(stage.u, image.u[slice * kWarps], sizeof(stage.u) / 16);
      copy(&stage.factors, &image.factors, sizeof(stage.factors) / 16);
    }
    cp_async_commit();
  };
  constexpr int kAhead = kStages > 1 ? kStages - 1 : 1;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) copy_image(first + i);
  float s[K / 8][4];
  const bool fresh = first == 0 && p.has_initial_state && !p.has_initial_state[sequence];
  load_state<K / 32>(s, rows_of(slot), K, segment.wide_state, fresh);

  // Phase 3: the chunks.
#pragma unroll 1
  for (int chunk = first; chunk < last; ++chunk) {
    cp_async_wait<kAhead - 1>();
    __syncthreads();  // the image is there, and everybody is done with the one before
    if (kStages > 1) copy_image(chunk + kAhead);
    const auto& stage = shared.stages[chunk % kStages];
    const int count = min(length - chunk * kChunk, kChunk);
    T* const out_of_chunk = out + static_cast<int64_t>(chunk) * kChunk * p.out_token_stride;

    const int exponent = stage.factors.exponent;
    int unit = exponent == 0 ? 0 : choose_unit<K>(s, exponent);
    bool exact = stage.factors.exact != 0;
    float out_values[kGroups][4];
    uint32_t new_values[kGroups / 2][4];
    while (!exact) {
      exact = unit > 0 && unit - exponent > max_unit_gap(exponent);
      if (exact) break;
      if (unit != 0) scale_state<K>(s, power_of_two(-unit));
      if (multiply_state(stage, s, warp, lane, power_of_two(exponent - unit), new_values, out_values)) break;
      if (unit != 0) scale_state<K>(s, power_of_two(unit));
      const int larger = choose_unit<K>(s, exponent);
      exact = larger <= unit;
      unit = larger;
    }
    if (!exact) {
      multiply_values(stage, lane, new_values, s, out_values);
      if (unit != 0) scale_state<K>(s, power_of_two(unit));
      write_out(out_values, p.scale * power_of_two(unit), out_of_chunk, p.out_token_stride, count, segment.wide_out);
    } else {
      const int64_t token = begin + static_cast<int64_t>(chunk) * kChunk;
      store_state<K / 32>(s, rows_of(slot), K, segment.wide_state);
      run_tokens_in_pool<T, K / 32>(p, head, first_value, token, token + count, rows_of(slot), segment.wide_state);
      load_state<K / 32>(s, rows_of(slot), K, segment.wide_state, false);
    }
    if (kStages == 1) {
      __syncthreads();
      copy_image(chunk + 1);
    }
    if (count == kChunk && chunk < p.num_snapshots) {
      const int to = p.snapshot_slots[sequence * p.num_snapshots + chunk];
      if (to >= 0) store_state<K / 32>(s, rows_of(to), K, segment.wide_state);
    }
  }

  // Phase 4: the state, for the next segment or the caller.
  store_state<K / 32>(s, rows_of(slot), K, segment.wide_state);
}

}  // namespace kimi::cuda
