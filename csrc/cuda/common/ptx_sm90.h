// One function per PTX instruction that only Hopper has (target sm_90a), named after it, as in ptx.h. Chapter numbers
// are those of the PTX ISA, "Instruction Set". tests/emulator has a second header of this name.
//
// Code that uses them is compiled for other architectures too; there it must be left out:
//     if constexpr (kHasSm90) { ... } else { __trap(); }
#pragma once

#include "cuda/common/ptx.h"
#include "cuda/common/tensor_map.h"

namespace kimi::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kHasSm90 = true;
#else
inline constexpr bool kHasSm90 = false;
#endif

// ---- Barriers that count arrivals and bytes (mbarrier) -------------------------------------------------------------
// A barrier is in phase 0, 1, 0, 1, ... A phase ends when `arrivals` threads have arrived and the bytes that they said
// to expect have come. Asynchronous copies see a barrier after mbarrier_init_fence() of the thread that made it, other
// threads after that and a barrier among them.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// At the barrier at the same place in block `rank` of the cluster. Orders what this thread has read; for what it wrote
// it would need a wider scope, which costs a wait for all of its stores to global memory.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint64_t* barrier, int rank) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Without an arrival, for bytes that this thread arrives behind.
__device__ __forceinline__ void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase with this parity. Of a new barrier the phase before the first has ended: parity 1.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
      "@!done bra again;}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Arrives when all copies by cp_async_*() that the thread has started are there.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// ---- Bulk copies from global to shared memory (cp.async.bulk) ------------------------------------------------------
// One thread starts a copy of a multiple of 16 bytes, all addresses multiples of 16; `barrier` counts the bytes.

__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// To the L2 cache alone.
__device__ __forceinline__ void bulk_prefetch_l2(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
// A box of a tensor (tensor_map.h), `token` its first one.
__device__ __forceinline__ void tensor_copy(void* shared, const TensorMap& map, int head, int token,
                                            uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %2}], "
      "[%5];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(0), "r"(head), "r"(token), "r"(shared_address(barrier))
      : "memory");
}
// And back, from what fence_proxy_async() has made visible. In groups, as cp_async_commit() makes them.
__device__ __forceinline__ void tensor_store(const void* shared, const TensorMap& map, int head, int token) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %1}], [%4];" ::"l"(&map),
               "r"(0), "r"(head), "r"(token), "r"(shared_address(shared))
               : "memory");
}
__device__ __forceinline__ void tensor_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until all of the thread's stores have read shared memory.
__device__ __forceinline__ void tensor_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// To the same place in every block of the cluster whose bit is set; there the barrier at the same place counts.
__device__ __forceinline__ void bulk_copy_multicast(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                                    uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// ---- Matrices to shared memory (stmatrix) ---------------------------------------------------------------------------
// The reverse of ldmatrix_x4_trans() (ptx.h): four 8 x 8 matrices of 16-bit elements, transposed; lanes 8 i .. + 7 give
// the addresses of matrix i's rows, that is, of the columns that the lanes hold.

__device__ __forceinline__ void stmatrix_x4_trans(void* shared_row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared_row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

__device__ __forceinline__ void stmatrix_x4(void* shared_row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared_row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// What the thread has written to shared memory is there for bulk copies and wgmma.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Clusters of blocks --------------------------------------------------------------------------------------------

// Of the block in its cluster.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// Waits for all threads of the cluster; what they wrote is visible to all then.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- Dependent launches (griddepcontrol) ---------------------------------------------------------------------------

// Waits until the kernel before is complete and what it wrote is visible, if this one was launched before that.
__device__ __forceinline__ void grid_dependency_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// The kernel behind may be launched, as far as this block is concerned.
__device__ __forceinline__ void grid_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- Matrix products of a warpgroup (wgmma) ------------------------------------------------------------------------
// d += a b, or a b unless `accumulate`: d [64, 8 tiles] in fp32, a [64, 16] in fp16 from registers, b [16, 8 tiles] in
// fp16 from shared memory as its descriptor says. All 128 threads of four warps, the first one's number a multiple of
// four. Warp w has rows 16 w .. + 15 of a and d, in the layouts of mma.m16n8k16 (ptx.h), d[i] being columns 8 i .. + 7.
//
// Asynchronous: between wgmma_fence() and the wgmma_wait() for its group, nobody touches d, nor writes what b reads.

// Before the first product after registers of d or a were accessed otherwise.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most the N newest groups are under way. Of the whole warpgroup: not in a branch that only some of its
// warps take.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving the reading of registers up over a wait in front, or their computation down over one
// behind.
__device__ __forceinline__ void register_fence(float (&x)[4]) {
  asm volatile("" : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])::"memory");
}
__device__ __forceinline__ void register_fence(uint32_t (&x)[4]) {
  asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])::"memory");
}

// The descriptor of a matrix in shared memory that consists of 8 x 8 matrices, each 128 bytes in a row: 8 rows of 16
// bytes (no swizzle). The strides, in bytes, go from one of those to the next: along k, and along the columns of b. The
// 16 contiguous bytes are 8 elements along k; if the instruction says kMnMajor, 8 columns.
template <bool kMnMajor>
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* shared, int k_stride, int column_stride) {
  const uint64_t leading = static_cast<uint64_t>(k_stride >> 4), stride = static_cast<uint64_t>(column_stride >> 4);
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffff) >> 4) | leading << 16 | stride << 32;
}

// The same of a matrix in pieces of 8 rows of 64 bytes, 512 bytes in a row and at a multiple of that, with the swizzle
// of 64 bytes: the 16 bytes i of row r are at i ^ r / 2. Rows are columns of b, and 32 elements along k contiguous; if
// the instruction says kMnMajor, the other way around. The strides go from one piece to the next: to the next 32
// elements (only with kMnMajor; along k the start of the descriptor moves instead), and to the next 8 rows.
__device__ __forceinline__ uint64_t wgmma_descriptor_swizzle_64(const void* shared, int across, int down) {
  return wgmma_descriptor<false>(shared, across, down) | uint64_t{2} << 62;
}

template <bool kMnMajor>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %37, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
        "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
        "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),
        "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
        "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kMnMajor ? 1 : 0));
}
template <bool kMnMajor>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b,
                                                 bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %69, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1, %70;}"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
        "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
        "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),
        "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
        "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]),
        "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]), "+f"(d[10][1]),
        "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]), "+f"(d[12][0]),
        "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),
        "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]),
        "+f"(d[15][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kMnMajor ? 1 : 0));
}

// a from shared memory too, its 16 columns contiguous in matrices of 8 x 8 as of wgmma_descriptor<false>.
template <bool kMnMajor>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %34, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, %35;}"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
        "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
        "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),
        "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
        "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kMnMajor ? 1 : 0));
}

// ---- Registers of a warpgroup (setmaxnreg) -------------------------------------------------------------------------
// All four warps; what goes down is free for what goes up, which waits for it.

template <int kCount>
__device__ __forceinline__ void set_max_registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void set_max_registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- Barriers ------------------------------------------------------------------------------------------------------

// barrier_sync, and whether the predicate of any of its threads holds.
__device__ __forceinline__ bool barrier_or(int id, int threads, bool predicate) {
#ifndef KIMI_RACECHECK
  int any;
  asm volatile("{.reg .pred p, q; setp.ne.b32 p, %3, 0; barrier.cta.red.or.pred q, %1, %2, p; selp.b32 %0, 1, 0, q;}"
               : "=r"(any)
               : "r"(id), "r"(threads), "r"(static_cast<int>(predicate))
               : "memory");
  return any != 0;
#else
  __shared__ int any[16];
  atomicExch(&any[id], 0);
  barrier_sync(id, threads);
  if (predicate) atomicExch(&any[id], 1);
  barrier_sync(id, threads);
  const bool result = atomicAdd(&any[id], 0) != 0;
  barrier_sync(id, threads);  // for the next one's zero
  return result;
#endif
}

}  // namespace kimi::cuda
