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
// rounded to fp16 in registers. The images come through a ring of two or three buffers by cp.async.
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

#include "cuda/kda_prefill/chain_common.cuh"

namespace kimi::cuda {

template <int K, int kWarps>
struct alignas(128) ChainStage {
  uint4 u[kWarps][kGroups / 2][kWarp];
  ChunkFactors<K> factors;
};

template <int K, int kWarps>
struct ChainShared {
  ChainStage<K, kWarps> stages[1];  // segment.stages of them
};

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
      values[2 * x + i / 2][2 * (i % 2)] = pair.x;
      values[2 * x + i / 2][2 * (i % 2) + 1] = pair.y;
    }
  }
  if (u_factor != 1.0f) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[group][i] *= u_factor;
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

// Products with the new values: out += v'^T A_qk^T, s <- s D + v'^T kg. `rows` gets the output times `factor` in the
// dtype of memory: of group i, lane 4 g + t the values 4 t .. 4 t + 3 of token g.
template <typename T, int K, int kWarps>
__device__ __forceinline__ void multiply_values(const ChainStage<K, kWarps>& stage, int lane, float factor,
                                                const uint32_t (&new_values)[kGroups / 2][4], float (&s)[K / 8][4],
                                                float (&out)[kGroups][4], uint32_t (&rows)[kGroups][2]) {
#pragma unroll
  for (int x = 0; x < kGroups / 2; ++x) {
#pragma unroll
    for (int group = 2 * x; group < kGroups; ++group) {
      const uint4 b = stage.factors.a_qk[a_qk_entry(group, x / 2)][lane];
      if (x % 2 == 0)
        mma_m16n8k16<Fp16>(out[group], new_values[x], {b.x, b.y});
      else
        mma_m16n8k16<Fp16>(out[group], new_values[x], {b.z, b.w});
    }
  }
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
  constexpr int kSteps = kGroups / 2 * (K / 32);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int x = step / (K / 32), j = step % (K / 32);
    const uint4 low = stage.factors.kg[x][2 * j][lane], high = stage.factors.kg[x][2 * j + 1][lane];
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

// SASS: tensor cores, 16-byte loads
template <typename T, int K, int V, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    kda_chain_kernel(const __grid_constant__ KdaPrefillParams p, const __grid_constant__ Segment segment) {
  using Image = ChunkImage<K, V>;
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

  // Phase 2: the first images, and the state.
  const char* next_image =
      reinterpret_cast<const char*>(&image_of<Image>(segment, first_of_sequence + first, head, p.num_value_heads));
  const int64_t image_step = static_cast<int64_t>(sizeof(Image)) * p.num_value_heads;
  int next_chunk = first, next_stage = 0;
  const auto copy_image = [&] {
    if (next_chunk < last) {
      const auto copy = [&]<int kWords>(uint4* to, const uint4* from) {
#pragma unroll
        for (int i = 0; i < kWords / kThreads; ++i)
          cp_async_16(to + threadIdx.x + i * kThreads, from + threadIdx.x + i * kThreads);
        constexpr int kLeft = kWords % kThreads;
        if (static_cast<int>(threadIdx.x) < kLeft)
          cp_async_16(to + threadIdx.x + kWords - kLeft, from + threadIdx.x + kWords - kLeft);
      };
      const Image& image = *reinterpret_cast<const Image*>(next_image);
      auto& stage = shared.stages[next_stage];
      copy.template operator()<sizeof(stage.u) / 16>(&stage.u[0][0][0], &image.u[slice * kWarps][0][0]);
      copy.template operator()<sizeof(stage.factors) / 16>(reinterpret_cast<uint4*>(&stage.factors),
                                                           reinterpret_cast<const uint4*>(&image.factors));
    }
    cp_async_commit();
    next_image += image_step;
    ++next_chunk;
    next_stage = next_stage + 1 == segment.stages ? 0 : next_stage + 1;
  };
#pragma unroll 1
  for (int i = 1; i < segment.stages; ++i) copy_image();
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
    copy_image();
    const auto& stage = shared.stages[stage_index];
    stage_index = stage_index + 1 == segment.stages ? 0 : stage_index + 1;
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
      uint32_t rows[kGroups][2];
      multiply_values<T>(stage, lane, p.scale * power_of_two(unit), new_values, s, out_values, rows);
      if (unit != 0) scale_state<K>(s, power_of_two(unit));
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
