// K2 of the chunked path on Hopper: chain.cuh with matrix products of whole warpgroups (wgmma).
//
// A warpgroup has 64 rows of the state (values) x all key channels as fp32 accumulators, a warp 16 of them, as in
// chain.cuh. Per chunk, transposed, w, q, kg and A_qk being right operands in shared memory as image_sm90.cuh has them:
//
//   (1) v'^T = u^T - S w^T   (2) o^T = S q^T   (3) S = S D + v'^T kg   (4) o^T += v'^T A_qk^T
//
// Block = (sequence, value head, 64 values), a warpgroup and one more warp, which copies. The blocks of a head are a
// cluster: each copies its share of the factors to all of them, so that an image leaves the L2 cache once.
//
// Time. (1) and (3) depend on each other from chunk to chunk, the others fill the time between: while (1) runs, the
// output of the chunk before is rounded; while (2) runs, it is written, v' is rounded and checked and the state
// decayed; while (4) runs, the state is rounded. u^T comes into the accumulators of the next (1) by a product with 1.
// K = V = 128: 256 + 256 + 256 + 128 + 128 cycles of tensor cores a chunk; but each of the four warps has a scheduler
// to itself, and its 510 instructions, most of which wait for the one before, take 2,150 cycles: they bound it.
//
// Copies. A ring of kChainStages images. Barriers of a stage: full, its bytes have come; empty, the block's warps have
// read it, and those of the rest of the cluster.
//
// Range: as in chain.cuh. A warp whose v' is not finite takes part in (3) and (4) with v' = 0 and a state that is not
// decayed, so nothing changes for it; at the end of the chunk the warpgroup learns of it, and careful_chunk() does the
// chunk again for such warps. The products there are the same, in the same order. (0 times kg must be 0 for that: kg is
// finite also where nothing else of an image is valid.)
//
// Shared memory: kChainStages * 66 KB (K = 128), 33 KB (K = 64) and the barriers.
#pragma once

#include "cuda/common/ptx_sm90.h"
#include "cuda/common/shared_memory.h"
#include "cuda/kda_prefill/chain_common.cuh"
#include "cuda/kda_prefill/image_sm90.cuh"

namespace kimi::cuda {

inline constexpr int kChainStages = 3;  // one in use, two on their way: 66 KB each leave no room for a fourth
inline constexpr int kWarpgroup = 4 * kWarp;
inline constexpr int kWarpgroupBarrier = 1;

inline constexpr int kChainThreadsSm90 = kWarpgroup + kWarp;  // the last warp copies

template <int K>
struct alignas(128) ChainStageSm90 {
  ChunkFactorsSm90<K> factors;
  ChunkHeaderSm90<K> header;
  uint4 u[4][kGroups / 2][kWarp];  // of the block's values
};

template <int K>
struct ChainSharedSm90 {
  ChainStageSm90<K> stages[kChainStages];
  uint4 identity[kGroups][kGroups][kGroup];  // of 64 tokens, as a right operand: [row group][column group][row]
  uint64_t full[kChainStages], empty[kChainStages];
};

// Between the order of channels in load_state() (lane t of a quad has channels 8 t + 2 x, + 1 of a block of 32 in s[x])
// and that of the accumulators here (channels 8 x + 2 t, + 1): the transposition of 4 x 4 pairs, its own inverse.
template <int K>
__device__ __forceinline__ void transpose_quads(float (&s)[K / 8][4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < K / 32; ++j) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
      const bool upper = t & bit;
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        if (x & bit) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float &low = s[4 * j + x][i], &high = s[4 * j + (x | bit)][i];
          const float other = __shfl_xor_sync(kFullWarp, upper ? low : high, bit);
          (upper ? low : high) = other;
        }
      }
    }
  }
}

// Accumulators are read only after the wait for them, and what is computed between two waits is not put off: the
// compiler would move either.
template <typename Word, int N>
__device__ __forceinline__ void wgmma_results(Word (&d)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) register_fence(d[i]);
}

// What a warp of the chain holds and does, chunk by chunk.
template <typename T, int K>
struct ChainWarp {
  using Stage = ChainStageSm90<K>;

  float s[K / 8][4];                    // the state: rows g, g + 8 of the warp's 16, channels 8 i + 2 t, + 1
  uint32_t state[K / 16][4];            // in fp16, as left operand
  float values[kGroups][4];             // v'^T
  uint32_t new_values[kGroups / 2][4];  // in fp16, as left operand
  float out[kGroups][4];                // o^T
  uint32_t rows[kGroups][2];            // the same in 16 bits

  __device__ __forceinline__ static int warp() { return threadIdx.x / kWarp; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarp; }

  // state <- S * factor.
  __device__ __forceinline__ void round_state(float factor) {
#pragma unroll
    for (int x = 0; x < K / 16; ++x) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = s[2 * x + i / 2];
        state[x][i] = pack2<Fp16>(from[2 * (i % 2)] * factor, from[2 * (i % 2) + 1] * factor);
      }
    }
  }

  // values <- u^T * factor.
  __device__ __forceinline__ void start_values(const Stage& stage, float factor) {
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) {
      const uint4 words = stage.u[warp()][x][lane()];
      const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack2<Fp16>(w[i]);
        values[2 * x + i / 2][2 * (i % 2)] = pair.x * factor;
        values[2 * x + i / 2][2 * (i % 2) + 1] = pair.y * factor;
      }
    }
  }

  // values <- u^T, by a product with 1: the tensor cores have time, the warps do not.
  __device__ __forceinline__ void multiply_one(const Stage& stage, const uint4* identity) {
    const uint64_t one = wgmma_descriptor<false>(identity, 128, 128 * kGroups);
    uint32_t u[kGroups / 2][4];
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) {
      const uint4 words = stage.u[warp()][x][lane()];
      u[x][0] = words.x;
      u[x][1] = words.y;
      u[x][2] = words.z;
      u[x][3] = words.w;
    }
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) wgmma_m64n64k16<false>(values, u[x], one + 16 * x, x > 0);
    wgmma_commit();
  }

  // (1): values -= S w^T
  __device__ __forceinline__ void multiply_w(const Stage& stage) {
    const uint64_t w = wgmma_descriptor<false>(stage.factors.w, 128, 16 * K);
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < K / 16; ++x) wgmma_m64n64k16<false>(values, state[x], w + 16 * x, true);
    wgmma_commit();
  }

  // (2): out <- S q^T
  __device__ __forceinline__ void multiply_q(const Stage& stage) {
    const uint64_t q = wgmma_descriptor<false>(stage.factors.q, 128, 16 * K);
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < K / 16; ++x) wgmma_m64n64k16<false>(out, state[x], q + 16 * x, x > 0);
    wgmma_commit();
  }

  // (3): S += v'^T kg
  __device__ __forceinline__ void multiply_kg(const Stage& stage) {
    const uint64_t kg = wgmma_descriptor<true>(stage.factors.kg, 16 * K, 128);
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) {
      if constexpr (K == 128)
        wgmma_m64n128k16<true>(s, new_values[x], kg + 2 * K * x, true);
      else
        wgmma_m64n64k16<true>(s, new_values[x], kg + 2 * K * x, true);
    }
    wgmma_commit();
  }

  // (4): out += v'^T A_qk^T
  __device__ __forceinline__ void multiply_a_qk(const Stage& stage) {
    const uint64_t a_qk = wgmma_descriptor<false>(stage.factors.a_qk, 128, 128 * kGroups);
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) wgmma_m64n64k16<false>(out, new_values[x], a_qk + 16 * x, true);
    wgmma_commit();
  }

  // new_values <- v'; true if all of the warp's are finite.
  __device__ __forceinline__ bool round_values() {
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = values[2 * x + i / 2];
        new_values[x][i] = pack2<Fp16>(from[2 * (i % 2)], from[2 * (i % 2) + 1]);
      }
    }
    return __all_sync(kFullWarp, all_finite(new_values));
  }

  // S *= D
  __device__ __forceinline__ void decay_state(const Stage& stage) {
    const float* decay = &stage.header.decay[2 * (threadIdx.x % 4)];
#pragma unroll
    for (int i = 0; i < K / 8; ++i) {
      const auto pair = load_vec<float, 2>(decay + 8 * i);
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][e] *= pair.x[e % 2];
    }
  }

  // rows <- the output times `factor`, in the dtype of memory.
  __device__ __forceinline__ void round_out(float factor) {
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i)
      rows[i / 2][i % 2] = pack2<T>(out[i / 2][2 * (i % 2)] * factor, out[i / 2][2 * (i % 2) + 1] * factor);
  }
  // The rows to memory: the chunk's first `count` tokens, `to` being the first, at the warp's values.
  __device__ __forceinline__ void write_out(T* to, int64_t token_stride, int count, bool wide) {
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) rows[i / 2][i % 2] = movmatrix_trans(rows[i / 2][i % 2]);
    write_rows(rows, to, token_stride, count, wide);
  }

  __device__ __forceinline__ void load(const StateRows& rows, bool zeros) {
    load_state<K / 32>(s, rows, K, zeros);
    transpose_quads<K>(s);
  }
  __device__ __forceinline__ void store(const StateRows& rows) {
    transpose_quads<K>(s);
    store_state<K / 32>(s, rows, K);
    transpose_quads<K>(s);
  }
};

// A block's place in the work.
struct ChainTask {
  int sequence, head, first_value;  // of the warp
  int64_t begin;                    // the sequence's first token
  int length, first_of_sequence;    // tokens, and its first chunk's number
  int first, last;                  // chunks of the sequence that are in the segment: [first, last)
};

// A chunk with units, or whose v' some warp of the warpgroup found not finite (chain.cuh, "Range"), for the warps that
// have not done it yet; out is written.
template <typename T, int K>
__device__ __forceinline__ void careful_chunk(ChainWarp<T, K>& x, const KdaPrefillParams& p, const Segment& segment,
                                              const ChainTask& task, const ChainStageSm90<K>& stage, int chunk,
                                              T* out_of_chunk, bool done) {
  const int exponent = stage.header.exponent;
  const int count = min(task.length - chunk * kChunk, kChunk);
  bool exact = stage.header.exact != 0;
  if (!exact) {  // the same for the whole block
    int unit = exponent == 0 ? 0 : choose_unit<K>(x.s, exponent);
    bool again;
    do {
      exact = exact || (unit > 0 && unit - exponent > max_unit_gap(exponent));
      const bool idle = exact || done;
      x.round_state(idle ? 0.0f : power_of_two(-unit));
      x.start_values(stage, idle ? 0.0f : power_of_two(exponent - unit));
      x.multiply_w(stage);
      wgmma_wait<0>();
      wgmma_results(x.values);
      again = false;
      if (!x.round_values() && !idle) {
        const int larger = choose_unit<K>(x.s, exponent);
        exact = larger <= unit;
        unit = larger;
        again = true;
      }
    } while (barrier_or(kWarpgroupBarrier, kWarpgroup, again));

    // The products are the warpgroup's. To a warp that does not want them v' is 0, and its state stays as it is.
    if (exact || done) {
#pragma unroll
      for (int i = 0; i < 4 * (kGroups / 2); ++i) x.new_values[i / 4][i % 4] = 0;
    } else {
      scale_state<K>(x.s, power_of_two(-unit));
      x.decay_state(stage);
    }
    x.multiply_q(stage);
    x.multiply_kg(stage);
    x.multiply_a_qk(stage);
    wgmma_wait<0>();
    wgmma_results(x.s);
    wgmma_results(x.out);
    if (!exact && !done) {
      scale_state<K>(x.s, power_of_two(unit));
      x.round_out(p.scale * power_of_two(unit));
      x.write_out(out_of_chunk, p.out_token_stride, count, segment.wide_out);
    }
  }
  if (exact && !done) {
    const int64_t token = task.begin + static_cast<int64_t>(chunk) * kChunk;
    transpose_quads<K>(x.s);
    run_tokens<T, K / 32>(TokenReader<T, K / 32>(p, task.head, task.first_value), token, token + count, x.s);
    transpose_quads<K>(x.s);
  }
}

// The ring of images, as one of the warps sees it that read it, or the one that copies: it is at stage `index`, which
// is used for the even or odd time (`parity`).
template <int K, int V>
struct ChainRing {
  using Shared = ChainSharedSm90<K>;
  using Image = ChunkImageSm90<K, V>;
  static constexpr int kCluster = V / 64;
  static constexpr uint32_t kShare = sizeof(ChunkFactorsSm90<K>) / kCluster;
  static constexpr uint32_t kHeader = sizeof(ChunkHeaderSm90<K>), kValues = sizeof(Shared::stages[0].u);
  static_assert(kShare % 16 == 0 && kShare * kCluster == sizeof(ChunkFactorsSm90<K>) && kHeader % 16 == 0);

  Shared& shared;
  int index = 0, parity = 0;

  __device__ __forceinline__ explicit ChainRing(Shared& shared) : shared(shared) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kChainStages; ++i) {
        mbarrier_init(&shared.full[i], 1);
        mbarrier_init(&shared.empty[i], kWarpgroup / kWarp * kCluster);
      }
      mbarrier_init_fence();
    }
    for (int i = threadIdx.x; i < kChunk * kGroups; i += kChainThreadsSm90) {
      const int row = i / kGroups, group = i % kGroups;
      uint32_t words[4];
      for (int w = 0; w < 4; ++w)
        words[w] = row / kGroup == group && row % kGroup / 2 == w ? (row % 2 == 0 ? 0x3c00u : 0x3c000000u) : 0u;
      shared.identity[row / kGroup][group][row % kGroup] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    async_proxy_fence();
    if constexpr (kCluster > 1)
      cluster_sync();
    else
      __syncthreads();
  }

  // One thread of the block copies all images, image_of_chunk(i) being the i-th: its share of the factors to all blocks
  // of the cluster.
  template <typename ImageOfChunk>
  __device__ __forceinline__ void copy_all(int count, ImageOfChunk&& image_of_chunk) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const Image& image = image_of_chunk(i);
      auto& stage = shared.stages[index];
      uint64_t* const full = &shared.full[index];
      if (i >= kChainStages) mbarrier_wait(&shared.empty[index], parity ^ 1);
      mbarrier_arrive_expect_tx(full, kShare * kCluster + kHeader + kValues);
      if constexpr (kCluster > 1) {
        const int rank = cluster_rank();
        bulk_copy_multicast(reinterpret_cast<char*>(&stage.factors) + kShare * rank,
                            reinterpret_cast<const char*>(&image.factors) + kShare * rank, kShare, full,
                            (1 << kCluster) - 1);
        bulk_copy(&stage.header, &image.header, kHeader, full);
        bulk_copy(stage.u, image.u[4 * rank], kValues, full);
      } else {
        bulk_copy(&stage.factors, &image.factors, kShare, full);
        bulk_copy(&stage.header, &image.header, kHeader, full);
        bulk_copy(stage.u, image.u, kValues, full);
      }
      advance();
    }
  }

  __device__ __forceinline__ const auto& stage() const { return shared.stages[index]; }
  __device__ __forceinline__ void wait() { mbarrier_wait(&shared.full[index], parity); }
  // The warp is done with the stage before the present one.
  __device__ __forceinline__ void release_behind() {
    __syncwarp();  // one lane arrives for what all have read
    uint64_t* const empty = &shared.empty[index == 0 ? kChainStages - 1 : index - 1];
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) mbarrier_arrive(empty);
    if (lane > 0 && lane < kCluster) mbarrier_arrive_cluster(empty, (static_cast<int>(blockIdx.x) + lane) % kCluster);
  }
  __device__ __forceinline__ void advance() {
    if (++index == kChainStages) index = 0, parity ^= 1;
  }
};

// Phase 3 of a warp of the warpgroup: the state, through the chunks.
template <typename T, int K, int V>
__device__ __forceinline__ void run_chunks(const KdaPrefillParams& p, const Segment& segment, const ChainTask& task,
                                           ChainRing<K, V>& ring, int slot) {
  const auto rows_of = [&](int of_slot) {
    return state_rows(p, segment.wide_state, of_slot, task.head, task.first_value);
  };
  T* out = static_cast<T*>(p.out) + (task.begin + static_cast<int64_t>(task.first) * kChunk) * p.out_token_stride +
           task.head * p.out_head_stride + task.first_value;  // of the chunk
  ChainWarp<T, K> x;
  x.load(rows_of(slot), task.first == 0 && p.has_initial_state && !p.has_initial_state[task.sequence]);
  x.round_state(1.0f);
  ring.wait();
  x.multiply_one(ring.stage(), &ring.shared.identity[0][0][0]);

  bool behind = false;  // the output of the chunk before is in x.out, not yet written
#pragma unroll 1
  for (int chunk = task.first; chunk < task.last; ++chunk, out += kChunk * p.out_token_stride) {
    const auto& stage = ring.stage();
    x.multiply_w(stage);
    wgmma_wait<1>();  // waits for nothing: tells the compiler that only the products above are under way
    if (behind) x.round_out(p.scale);
    x.multiply_q(stage);
    const bool special = stage.header.exponent != 0 || stage.header.exact != 0;
    if (behind) x.write_out(out - kChunk * p.out_token_stride, p.out_token_stride, kChunk, segment.wide_out);
    wgmma_wait<1>();
    wgmma_results(x.values);
    const bool plain = x.round_values() && !special;
    if (plain) {
      x.decay_state(stage);
    } else {
#pragma unroll
      for (int i = 0; i < 4 * (kGroups / 2); ++i) x.new_values[i / 4][i % 4] = 0;
    }
    x.multiply_kg(stage);
    x.multiply_a_qk(stage);
    behind = !barrier_or(kWarpgroupBarrier, kWarpgroup, !plain);
    ring.advance();
    if (chunk + 1 < task.last) ring.wait();
    x.multiply_one(ring.stage(), &ring.shared.identity[0][0][0]);
    wgmma_wait<2>();
    wgmma_results(x.s);
    x.round_state(1.0f);
    wgmma_results(x.state);
    wgmma_wait<0>();
    wgmma_results(x.out);
    wgmma_results(x.values);
    if (!behind) {
      if (plain) {
        x.round_out(p.scale);
        x.write_out(out, p.out_token_stride, min(task.length - chunk * kChunk, kChunk), segment.wide_out);
      }
      careful_chunk(x, p, segment, task, stage, chunk, out, plain);
      x.round_state(1.0f);
      x.multiply_one(ring.stage(), &ring.shared.identity[0][0][0]);
      wgmma_wait<0>();
      wgmma_results(x.values);
    }
    ring.release_behind();
    if (chunk < p.num_snapshots && task.length - chunk * kChunk >= kChunk) {
      const int to = p.snapshot_slots[task.sequence * p.num_snapshots + chunk];
      if (to >= 0) x.store(rows_of(to));
    }
  }

  // Phase 4: the last output; the state, for the next segment or the caller.
  if (behind) {
    x.round_out(p.scale);
    x.write_out(out - kChunk * p.out_token_stride, p.out_token_stride,
                min(task.length - (task.last - 1) * kChunk, kChunk), segment.wide_out);
  }
  x.store(rows_of(slot));
}

template <typename T, int K, int V>
__device__ __forceinline__ void run_chain(const KdaPrefillParams& p, const Segment& segment) {
  using Ring = ChainRing<K, V>;
  auto& shared = shared_memory<ChainSharedSm90<K>>();
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int slice = static_cast<int>(blockIdx.x) % Ring::kCluster;

  // Phase 1: which of the sequence's chunks are in this segment.
  grid_dependency_wait();
  grid_launch_dependents();
  ChainTask task;
  task.sequence = static_cast<int>(blockIdx.x) / Ring::kCluster;
  task.head = static_cast<int>(blockIdx.y);
  task.first_value = (4 * slice + warp) * 16;
  task.begin = p.cu_seqlens[task.sequence];
  task.length = static_cast<int>(p.cu_seqlens[task.sequence + 1] - task.begin);
  task.first_of_sequence = first_chunk(p.cu_seqlens, task.sequence);
  task.first = max(segment.first - task.first_of_sequence, 0);
  task.last = min(segment.first + segment.count - task.first_of_sequence, ceil_div(task.length, kChunk));
  if (task.length <= 0 || task.first >= task.last) return;
  const bool copies = warp == kWarpgroup / kWarp;
  const int slot = p.slots[task.sequence];
  if (slot < 0) {
    if (copies) return;
    T* const out =
        static_cast<T*>(p.out) + task.begin * p.out_token_stride + task.head * p.out_head_stride + task.first_value;
    const uint32_t zeros[kGroups][2] = {};
    for (int chunk = task.first; chunk < task.last; ++chunk) {
      write_rows(zeros, out + static_cast<int64_t>(chunk) * kChunk * p.out_token_stride, p.out_token_stride,
                 min(task.length - chunk * kChunk, kChunk), segment.wide_out);
    }
    return;
  }

  // Phase 2: the ring.
  Ring ring(shared);
  if (copies) {
    if (threadIdx.x % kWarp == 0) {
      ring.copy_all(task.last - task.first, [&](int i) -> const auto& {
        return image_of<typename Ring::Image>(segment, task.first_of_sequence + task.first + i, task.head,
                                              p.num_value_heads);
      });
    }
    __syncwarp();
  } else {
    run_chunks<T, K, V>(p, segment, task, ring, slot);
  }
  if constexpr (Ring::kCluster > 1) cluster_sync();  // nobody leaves while others copy to it, or arrive at its barriers
}

// SASS: tensor cores, 16-byte loads, stack 16 (what is read once a chunk; registers are full)
template <typename T, int K, int V>
__global__ void __launch_bounds__(kChainThreadsSm90, 1)
    kda_chain_sm90_kernel(const __grid_constant__ KdaPrefillParams p, const __grid_constant__ Segment segment) {
  if constexpr (kHasSm90)
    run_chain<T, K, V>(p, segment);
  else
    __trap();
}

}  // namespace kimi::cuda
