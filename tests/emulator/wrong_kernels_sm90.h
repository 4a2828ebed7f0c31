// Kernels of test_emulator.cpp with mistakes in what Hopper does beside the threads: copies that arrive at barriers,
// boxes of tensors, clusters, products of warpgroups.
#pragma once

#include "cuda/common/ptx_sm90.h"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 128;  // of a block, or of a cluster of two

struct CopyShared {
  int values[2][kThreads];
  uint64_t full[2], empty[2];
};

// Eight copies bring the numbers. Modes: 0 right, 1 nobody waits for them, 2 the barrier expects more, 3 no fence after
// its initialisation, 4 no initialisation, 5 an odd number of bytes, 6 one arrival too many.
__global__ void bulk_copies(const int* in, int* out, int mode) {
  auto& shared = shared_memory<CopyShared>();
  uint64_t* full = &shared.full[0];
  const int i = threadIdx.x;
  if (i == 0) {
    if (mode != 4) mbarrier_init(full, 1);
    if (mode != 3) mbarrier_init_fence();
    mbarrier_arrive_expect_tx(full, mode == 2 ? kThreads * 4 + 16 : kThreads * 4);
    if (mode == 6) mbarrier_arrive(full);
    for (int part = 0; part < 8; ++part) {
      bulk_copy(&shared.values[0][16 * part], in + 16 * part, mode == 5 ? 60 : 64, full);
    }
  }
  __syncthreads();
  if (mode != 1) mbarrier_wait(full, 0);
  out[i] = shared.values[0][i];
  mbarrier_wait(full, 0);
}

// Each thread's copy arrives at the barrier. Modes: 0 right, 1 nobody waits, 2 the threads arrive, not their copies, 3
// they arrive though the barrier only waits for bytes.
__global__ void copies_that_arrive(const int* in, int* out, int mode) {
  auto& shared = shared_memory<CopyShared>();
  uint64_t* full = &shared.full[0];
  const int i = threadIdx.x;
  if (i == 0) {
    mbarrier_init(full, mode == 3 ? 1 : kThreads);
    mbarrier_init_fence();
    if (mode == 3) mbarrier_arrive_expect_tx(full, 16);
  }
  __syncthreads();
  cp_async_4(&shared.values[0][i], in + i);
  mode == 2 ? mbarrier_arrive(full) : cp_async_mbarrier_arrive(full);
  if (mode != 1) mbarrier_wait(full, 0);
  out[i] = shared.values[0][kThreads - 1 - i];
  mbarrier_wait(full, 0);
}

struct BoxShared {
  alignas(1024) int values[2 * kThreads];
  uint64_t full;
};

// Eight boxes of 64 bytes bring the numbers, each to a multiple of 128 bytes. Modes: 0 right, 1 nobody waits for them,
// 2 the barrier expects more, 3 at a multiple of 64 bytes only, 4 of a head that is not there, 5 no fence after the
// initialisation of the barrier.
__global__ void boxes(const TensorMap map, int* out, int mode) {
  auto& shared = shared_memory<BoxShared>();
  const int i = threadIdx.x;
  if (i == 0) {
    mbarrier_init(&shared.full, 1);
    if (mode != 5) mbarrier_init_fence();
    mbarrier_arrive_expect_tx(&shared.full, mode == 2 ? 4 * kThreads + 64 : 4 * kThreads);
    for (int box = 0; box < 8; ++box) {
      tensor_copy(&shared.values[32 * box + (mode == 3 ? 16 : 0)], map, mode == 4 ? 1 : 0, 4 * box, &shared.full);
    }
  }
  __syncthreads();
  if (mode != 1) mbarrier_wait(&shared.full, 0);
  out[i] = shared.values[i / 16 * 32 + i % 16];
  mbarrier_wait(&shared.full, 0);
}

// All the numbers in one box of rows of 128 bytes.
__global__ void one_box(const TensorMap map, int* out, int place, bool swizzled) {
  auto& shared = shared_memory<BoxShared>();
  const int i = threadIdx.x, row = i / 32, sixteen_bytes = i % 32 / 4;
  if (i == 0) {
    mbarrier_init(&shared.full, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect_tx(&shared.full, 4 * kThreads);
    tensor_copy(&shared.values[place], map, 0, 0, &shared.full);
  }
  __syncthreads();
  mbarrier_wait(&shared.full, 0);
  out[i] = shared.values[place + 32 * row + 4 * (swizzled ? sixteen_bytes ^ row : sixteen_bytes) + i % 4];
}

// The numbers go to memory in eight boxes of 64 bytes, all through the same place. Modes: 0 right, 1 overwritten before
// they are read, 2 the thread returns before, 3 in no group, 4 another thread waits, 5 at a multiple of 64 bytes only.
__global__ void stores(const int* in, const TensorMap map, int mode) {
  auto& shared = shared_memory<BoxShared>();
  const int i = threadIdx.x;
  for (int box = 0; box < 8; ++box) {
    if (i < 16) shared.values[(mode == 5 ? 16 : 0) + i] = in[16 * box + i];
    fence_proxy_async();
    __syncthreads();
    if (i == 0) {
      tensor_store(&shared.values[mode == 5 ? 16 : 0], map, 0, 4 * box);
      if (mode != 3) tensor_store_commit();
    }
    if (i == (mode == 4 ? 1 : 0) && mode != 1 && !(mode == 2 && box == 7)) tensor_store_wait_read();
    __syncthreads();
  }
  if (i == 0 && (mode == 1 || mode == 4)) tensor_store_wait_read();
}

// out[i] = sum over eight rounds of (round + 1) in[i], through a ring of two stages. Wrong: without waiting until a
// stage has been read.
__global__ void ring(const int* in, int* out, bool wait) {
  auto& shared = shared_memory<CopyShared>();
  const int i = threadIdx.x;
  if (i == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      mbarrier_init(&shared.full[stage], 1);
      mbarrier_init(&shared.empty[stage], kThreads / 32);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  int sum = 0;
  for (int round = 0; round < 9; ++round) {
    if (i == 0 && round < 8) {
      const int stage = round % 2;
      if (wait) mbarrier_wait(&shared.empty[stage], round / 2 % 2 ^ 1);
      mbarrier_arrive_expect_tx(&shared.full[stage], kThreads * 4);
      bulk_copy(shared.values[stage], in, kThreads * 4, &shared.full[stage]);
    }
    __syncwarp();
    if (round == 0) continue;
    const int stage = (round - 1) % 2;
    mbarrier_wait(&shared.full[stage], (round - 1) / 2 % 2);
    sum += round * shared.values[stage][i];
    __syncwarp();
    if (i % 32 == 0) mbarrier_arrive(&shared.empty[stage]);
  }
  out[i] = sum;
}

// Two blocks of 64 threads: block 0 copies the numbers to both. Modes: 0 right, 1 block 1 does not wait for them, 2 it
// leaves at once, 3 it is not in the cluster, 4 nobody waits until its barrier is there.
__global__ void to_neighbour(const int* in, int* out, int mode) {
  auto& shared = shared_memory<CopyShared>();
  uint64_t* full = &shared.full[0];
  const int i = threadIdx.x, rank = static_cast<int>(blockIdx.x);
  if (i == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect_tx(full, kThreads * 4);
  }
  if (mode != 4) cluster_sync();
  if (mode == 2 && rank == 1) return;
  if (rank == 0 && i == 0) {
    for (int part = 0; part < 8; ++part) {
      bulk_copy_multicast(&shared.values[0][16 * part], in + 16 * part, 64, full, mode == 3 ? 5 : 3);
    }
  }
  if (mode != 1 || rank == 0) mbarrier_wait(full, 0);
  out[64 * rank + i] = shared.values[0][64 * rank + i];
  mbarrier_wait(full, 0);
  if (mode != 2) cluster_sync();
}

// Each block of two counts the other one's arrivals. Wrong: it does not wait, and may leave before.
__global__ void arrive_at_neighbour(int* out, bool wait) {
  auto& shared = shared_memory<CopyShared>();
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.full[0], 64);
    mbarrier_init_fence();
  }
  cluster_sync();
  mbarrier_arrive_cluster(&shared.full[0], rank ^ 1);
  if (wait) mbarrier_wait(&shared.full[0], 0);
  out[64 * rank + threadIdx.x] = 1;
}

// The left operand in shared memory too. Modes: 0 right, 1 it is written before the wait, 2 another one in one thread,
// 3 it is past the shared memory, 4 other strides. out[i]: a sum over the thread's results.
__global__ void products_of_shared(int* out, int mode) {
  auto& shared = shared_memory<CopyShared>();
  auto* a = reinterpret_cast<Fp16*>(shared.values);        // all rows the same, 1 ... 16: two matrices of 8 x 8
  auto* b = reinterpret_cast<Fp16*>(shared.values) + 128;  // ones: one matrix of 8 x 8
  const int i = threadIdx.x;
  const auto fill = [&](int factor) { a[i] = from_float<Fp16>(factor * (1.0f + i / 64 * 8 + i % 8)); };
  if (i < 64) b[i] = from_float<Fp16>(1.0f);
  const uint64_t left =
      wgmma_descriptor<false>(a, mode == 4 ? 0 : 128, 0) + (mode == 3 ? 1 << 13 : 0) + (mode == 2 && i == 40 ? 8 : 0);
  const uint64_t right = wgmma_descriptor<false>(b, 0, 0);
  float d[8][4] = {}, sum = 0.0f;
  for (int round = 0; round < 8; ++round) {
    fill(1);
    fence_proxy_async();
    __syncthreads();
    wgmma_fence();
    wgmma_m64n64k16<false>(d, left, right, true);
    wgmma_commit();
    if (mode == 1) {
      fill(5);
      __syncthreads();
    }
    wgmma_wait<0>();
    __syncthreads();
  }
  for (int e = 0; e < 32; ++e) sum += d[e / 4][e % 4];
  out[i] = static_cast<int>(sum);
}

// Modes: 0 right, 1 other strides, 2 no wait, 3 shared memory is written before the wait, 4 the accumulators are, 5 no
// fence, 6 a different operand in one thread, 7 the threads leave, 8 accumulators in another shape, 9 in a branch of
// one warp, 10 a descriptor past the shared memory. out[i]: a sum over the thread's results, which are integers.
__global__ void products(int* out, int mode) {
  auto& shared = shared_memory<CopyShared>();
  auto* b = reinterpret_cast<Fp16*>(shared.values);  // zeros but for b[k][n] = 1 where k = n % 16; two times 512 bytes
  const int i = threadIdx.x;
  const auto fill = [&](float one) {  // k contiguous, blocks of 8 columns: all eight of them are the same
    for (int k = i; k < 256; k += kThreads) b[k] = from_float<Fp16>(k / 64 % 2 == 0 && k % 64 % 9 == 0 ? one : 0.0f);
  };
  float d[8][4] = {}, sum = 0.0f;
  const uint32_t a[4] = {pack2<Fp16>(1, 2), pack2<Fp16>(3, 4), pack2<Fp16>(5, 6), pack2<Fp16>(7, 8)};
  const int from = mode == 6 && i == 40 ? 128 : 0;
  const uint64_t operand =
      wgmma_descriptor<false>(reinterpret_cast<char*>(b) + from, mode == 1 ? 0 : 128, 0) + (mode == 10 ? 1 << 13 : 0);
  for (int round = 0; round < 8; ++round) {
    fill(1.0f);
    __syncthreads();
    if (mode != 5) wgmma_fence();
    if (mode == 9 && i >= 96) {
      wgmma_m64n64k16<true>(d, a, operand, true);
    } else {
      wgmma_m64n64k16<false>(d, a, operand, true);
    }
    wgmma_commit();
    if (mode == 3) {
      fill(5.0f);
      __syncthreads();
    }
    if (mode == 4) d[7][3] += 1.0f;
    if (mode == 2) sum += d[0][0];
    if (mode == 7) break;
    if (mode == 8) {
      auto& other = *reinterpret_cast<float (*)[16][4]>(&d);
      wgmma_m64n128k16<false>(other, a, operand, true);
    }
    wgmma_wait<0>();
    __syncthreads();
  }
  for (int e = 0; e < 32; ++e) sum += static_cast<float>(1 + e % 4) * d[e / 4][e % 4];
  out[i] = static_cast<int>(sum);
}

}  // namespace
}  // namespace kimi::cuda
