// K2 of the chunked path on Hopper: chain.cuh with the products (1) to (5) of chain_warp_sm90.cuh.
//
// Block = (sequence, value head, 64 values), a warpgroup and two more warps: one copies images and values to shared
// memory, one the output from there. The blocks of a head are a cluster: each copies its share of the factors to all of
// them, so that an image leaves the L2 cache once.
//
// Time. (1), (2) and (4) depend on each other from chunk to chunk, the rest fills the time between: while (1) runs, the
// output of the chunk before is rounded; while (3) runs, v' is rounded and checked and the state decayed; while (4)
// runs, the next v^T comes into the accumulators of (1); while (5) runs, the state is rounded. K = V = 128: 256 + 128 +
// 256 + 256 + 128 cycles of tensor cores a chunk; each of the four warps has a scheduler to itself, and most of its
// instructions wait for the one before.
//
// Copies. A ring of kChainStages images and values. Barriers of a stage: full, its bytes have come; empty, the block's
// warpgroup has read it, and left the output in the place of the values; free, all blocks of the cluster say so;
// written, the output is in memory. Every thread arrives for what it has itself read or written.
//
// Shared memory: kChainStages * 74 KB (K = 128), 49 KB (K = 64), and the barriers.
#pragma once

#include "cuda/common/shared_memory.h"
#include "cuda/kda_prefill/careful_sm90.cuh"

namespace kimi::cuda {

inline constexpr int kChainStages = 3;  // one in use, two on their way: 74 KB each leave no room for a fourth

// The last two warps copy.
inline constexpr int kChainThreadsSm90 = kWarpgroup + 2 * kWarp;

template <int K>
struct alignas(512) ChainStageSm90 {  // as the swizzle of the factors wants it
  ChunkFactorsSm90<K> factors;
  ChunkHeaderSm90<K> header;
  ValueRows v;  // of the block's values, zeros past the last token; then the output
};

template <int K>
struct ChainSharedSm90 {
  ChainStageSm90<K> stages[kChainStages];
  uint64_t full[kChainStages], empty[kChainStages], written[kChainStages], free[kChainStages];
};

// The ring, as one of the warps sees it that read it, or copy to it and from it: it is at stage `index`, which is used
// for the even or odd time (`parity`).
template <typename T, int K, int V>
struct ChainRing {
  using Shared = ChainSharedSm90<K>;
  using Image = ChunkImageSm90<K>;
  static constexpr int kCluster = V / 64;
  static constexpr uint32_t kShare = sizeof(ChunkFactorsSm90<K>) / kCluster, kHeader = sizeof(ChunkHeaderSm90<K>);
  static_assert(kShare % 16 == 0 && kShare * kCluster == sizeof(ChunkFactorsSm90<K>) && kHeader % 16 == 0);

  Shared& shared;
  int index = 0, parity = 0;

  __device__ __forceinline__ explicit ChainRing(Shared& shared) : shared(shared) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kChainStages; ++i) {
        mbarrier_init(&shared.full[i], 1 + kWarp);
        mbarrier_init(&shared.empty[i], kWarpgroup);
        mbarrier_init(&shared.written[i], kWarp);
        mbarrier_init(&shared.free[i], kCluster);
      }
      mbarrier_init_fence();
    }
    if constexpr (kCluster > 1)
      cluster_sync();
    else
      __syncthreads();
  }

  // A warp of the block brings all images, image_of_chunk(i) being the i-th, its share of the factors to all blocks of
  // the cluster; and the values: of `length` tokens, the first at `values`, at the block's.
  template <typename ImageOfChunk>
  __device__ __forceinline__ void copy_all(int count, ImageOfChunk&& image_of_chunk, const T* values,
                                           int64_t token_stride, int length, bool wide) {
    // A lane has octet lane % 8 of tokens 4 n + lane / 8.
    const int lane = threadIdx.x % kWarp, token = lane / 8, octet = lane % 8;
    const T* from = values + token * token_stride + 8 * octet;
    const int64_t step = 4 * token_stride;
#pragma unroll 1
    for (int i = 0; i < count; ++i, length -= kChunk) {
      auto& stage = shared.stages[index];
      uint64_t* const full = &shared.full[index];
      if (i >= kChainStages) {
        mbarrier_wait(&shared.empty[index], parity ^ 1);
        if constexpr (kCluster > 1) {
          if (lane < kCluster) mbarrier_arrive_cluster(&shared.free[index], lane);
          mbarrier_wait(&shared.free[index], parity ^ 1);
        }
      }
      if (lane == 0) {
        const Image& image = image_of_chunk(i);
        mbarrier_arrive_expect_tx(full, kShare * kCluster + kHeader);
        if constexpr (kCluster > 1) {
          const int rank = cluster_rank();
          bulk_copy_multicast(reinterpret_cast<char*>(&stage.factors) + kShare * rank,
                              reinterpret_cast<const char*>(&image.factors) + kShare * rank, kShare, full,
                              (1 << kCluster) - 1);
        } else {
          bulk_copy(&stage.factors, &image.factors, kShare, full);
        }
        bulk_copy(&stage.header, &image.header, kHeader, full);
      }
      __syncwarp();
      if (i >= kChainStages) mbarrier_wait(&shared.written[index], parity ^ 1);
      if (wide && length >= kChunk) {
        // Several addresses, for a copy reads its own late.
        const T* rows[4] = {from, from + step, from + 2 * step, from + 3 * step};
        uint4* const to = &stage.v.octets[token][octet];
#pragma unroll
        for (int n = 0; n < kChunk / 4; n += 4) {
#pragma unroll
          for (int r = 0; r < 4; ++r) cp_async_16(to + 4 * (n + r) * ValueRows::kOctets, rows[r]);
#pragma unroll
          for (int r = 0; r < 4; ++r) rows[r] += 4 * step;
        }
        cp_async_mbarrier_arrive(full);
      } else {
#pragma unroll 1
        for (int n = 0; n < kChunk / 4; ++n)
          stage.v.octets[4 * n + token][octet] = load_octet(from + n * step, wide, 4 * n + token < length);
        mbarrier_arrive(full);
      }
      from += kChunk / 4 * step;
      advance();
    }
  }

  // Another warp writes the output: of `length` tokens, the first at `out`, at the block's values.
  __device__ __forceinline__ void write_all(int count, T* out, int64_t token_stride, int length, bool wide) {
    const int lane = threadIdx.x % kWarp, token = lane / 8, octet = lane % 8;
    T* to = out + token * token_stride + 8 * octet;
    const int64_t step = 4 * token_stride;
#pragma unroll 1
    for (int i = 0; i < count; ++i, length -= kChunk) {
      mbarrier_wait(&shared.empty[index], parity);
      const auto& rows = shared.stages[index].v;
      if (wide && length >= kChunk) {
        uint4 words[kChunk / 4];
#pragma unroll
        for (int n = 0; n < kChunk / 4; ++n) words[n] = rows.octets[4 * n + token][octet];
#pragma unroll
        for (int n = 0; n < kChunk / 4; ++n, to += step) *reinterpret_cast<uint4*>(to) = words[n];
      } else {
#pragma unroll 1
        for (int n = 0; n < kChunk / 4; ++n, to += step) {
          if (4 * n + token < length) store_octet(to, rows.octets[4 * n + token][octet], wide);
        }
      }
      mbarrier_arrive(&shared.written[index]);
      advance();
    }
  }

  __device__ __forceinline__ auto& stage() const { return shared.stages[index]; }
  // The one before, for rare work: the compiler would keep addresses of the usual work in registers for it.
  __device__ __forceinline__ auto& stage_behind_anew() const { return shared.stages[keep_in_register(behind())]; }
  __device__ __forceinline__ void wait() { mbarrier_wait(&shared.full[index], parity); }
  // The warp is done with the stage before the present one, and its output is there.
  __device__ __forceinline__ void release_behind() { mbarrier_arrive(&shared.empty[behind()]); }
  __device__ __forceinline__ int behind() const { return index == 0 ? kChainStages - 1 : index - 1; }
  __device__ __forceinline__ void advance() {
    if (++index == kChainStages) index = 0, parity ^= 1;
  }
};

// The task of the block, and of this warp of it.
template <int V>
__device__ __forceinline__ ChainTask find_chain_task(const KdaPrefillParams& p, const Segment& segment) {
  return find_task<V / 64, 4>(p, segment, static_cast<int>(threadIdx.x) / kWarp);
}

// Phase 3 of a warp of the warpgroup: the state, through the chunks.
template <typename T, int K, int V>
__device__ __forceinline__ void run_chunks(const KdaPrefillParams& p, const Segment& segment, const ChainTask& task,
                                           ChainRing<T, K, V>& ring) {
  constexpr int kEarlyDecays = K / 64;  // groups of them that come before v' is there: no more registers are free
  const auto rows_of = [&](int slot) {
    const ChainTask anew = find_chain_task<V>(p, segment);
    return state_rows(p, segment.wide_state, slot, anew.head, anew.first_value);
  };
  ChainWarp<T, K> x;
  x.load(rows_of(task.slot), task.first == 0 && p.has_initial_state && !p.has_initial_state[task.sequence]);
  x.round_state();
  ring.wait();
  x.start_values(ring.stage());
  x.multiply_k(ring.stage());
  wgmma_wait<0>();
  wgmma_results(x.values);

  const int last = task.last, num_snapshots = min(static_cast<int>(p.num_snapshots), task.length / kChunk);
#pragma unroll 1
  for (int chunk = task.first; chunk < last; ++chunk) {
    auto& stage = ring.stage();
    x.round_values();
    x.multiply_t(stage);
    x.multiply_q(stage);
    float decay[K / 16][4];
    x.template load_decay<0, kEarlyDecays>(stage.header.decay, decay);
    wgmma_wait<1>();
    wgmma_results(x.values);
    x.round_values();
    x.template load_decay<kEarlyDecays, K / 16>(stage.header.decay, decay);
    const bool plain = is_fit(x.operand);
    if (!plain) x.stay(decay);
    x.decay_state(decay);
    wgmma_results(x.operand);
    x.multiply_kg(stage);
    x.multiply_a_qk(stage);
    ring.advance();
    if (chunk + 1 < last) ring.wait();
    x.start_values(ring.stage());  // behind the last chunk nobody wants them, nor the product below
    wgmma_wait<1>();
    wgmma_results(x.s);
    if (!plain) [[unlikely]] {  // (5) stays under way: waits for wgmma are the warpgroup's
      careful_chunk(p, segment, find_chain_task<V>(p, segment), ring.stage_behind_anew(), chunk, threadIdx.x, x);
      x.start_values(ring.stage());
    }
    x.round_state();
    x.multiply_k(ring.stage());
    wgmma_wait<1>();
    wgmma_results(x.out());
    if (plain) x.round_out(p.scale, stage.v);
    ring.release_behind();
    if (chunk < num_snapshots) [[unlikely]] {
      const int to = p.snapshot_slots[find_chain_task<V>(p, segment).sequence * p.num_snapshots + chunk];
      if (to >= 0) x.store(rows_of(to));
    }
    wgmma_wait<0>();
    wgmma_results(x.values);
  }

  // Phase 4: the state, for the next segment or the caller.
  x.store(rows_of(find_chain_task<V>(p, segment).slot));
}

template <typename T, int K, int V>
__device__ __forceinline__ void run_chain(const KdaPrefillParams& p, const Segment& segment) {
  using Ring = ChainRing<T, K, V>;
  auto& shared = shared_memory<ChainSharedSm90<K>>();
  barrier_begin(kWarpgroupBarrier, kWarpgroup);
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int slice = static_cast<int>(blockIdx.x) % Ring::kCluster;

  // Phase 1: which of the sequence's chunks are in this segment. What the kernels in front write is not read yet.
  Ring ring(shared);
  const ChainTask task = find_chain_task<V>(p, segment);
  grid_dependency_wait();
  grid_launch_dependents();
  if (task.length <= 0 || task.first >= task.last) return;
  constexpr int kCopies = kWarpgroup / kWarp;  // the warp that copies in; the next one copies out
  if (task.slot < 0) {
    if (warp >= kCopies) return;
    write_zeros<T>(p, segment, task, 0, 1);
    return;
  }

  // Phase 2: everybody to his place.
  const int count = task.last - task.first, length = task.length - task.first * kChunk;
  const int64_t first_token = task.begin + static_cast<int64_t>(task.first) * kChunk;
  if (warp == kCopies) {
    const T* const values =
        static_cast<const T*>(p.v) + first_token * p.v_token_stride + task.head * p.v_head_stride + 64 * slice;
    ring.copy_all(
        count,
        [&](int i) -> const auto& {
          return image_of<typename Ring::Image>(segment, task.first_of_sequence + task.first + i, task.head,
                                                p.num_value_heads);
        },
        values, p.v_token_stride, length, segment.wide_inputs);
  } else if (warp > kCopies) {
    T* const out =
        static_cast<T*>(p.out) + first_token * p.out_token_stride + task.head * p.out_head_stride + 64 * slice;
    ring.write_all(count, out, p.out_token_stride, length, segment.wide_out);
  } else {
    run_chunks<T, K, V>(p, segment, task, ring);
  }
  if constexpr (Ring::kCluster > 1) cluster_sync();  // nobody leaves while others copy to it, or arrive at its barriers
}

// SASS: tensor cores, 16-byte loads, stack 256 (the state in careful_chunk(), which is rare)
template <typename T, int K, int V>
__global__ void __launch_bounds__(kChainThreadsSm90, 1)
    kda_chain_sm90_kernel(const __grid_constant__ KdaPrefillParams p, const __grid_constant__ Segment segment) {
  if constexpr (kHasSm90)
    run_chain<T, K, V>(p, segment);
  else
    __trap();
}

}  // namespace kimi::cuda
