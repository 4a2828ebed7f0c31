// One function per PTX instruction, named after it. Chapter numbers are those of the PTX ISA, "Instruction Set".
// Everything here runs on compute capability 8.0. No other file of the portable kernels holds inline assembly, which
// is also what lets tests/emulator run them on a CPU: it has a second header of this name.
#pragma once

#include <type_traits>

#include "cuda/common/types.h"

namespace kimi::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- Matrix products (warp-level matrix instructions: mma.sync) ----------------------------------------------------
// Fragment layouts, with g = lane / 4 and t = lane % 4:
//   d (16x8, fp32)   d[0], d[1] = (g, 2t), (g, 2t + 1);   d[2], d[3] = the same of row g + 8
//   a (16x16)        a[0], a[1] = rows g, g + 8 of columns 2t, 2t + 1;   a[2], a[3] = the same of columns + 8
//   b (16x8)         b[0] = rows 2t, 2t + 1 of column g;   b[1] = rows + 8

// d += a * b for a [16, 16] row-major, b [16, 8] column-major.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>);
  if constexpr (std::is_same_v<T, Bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The same with half the depth: a [16, 8], b [8, 8]; a[0], a[1] and b[0] of the fragments above.
template <typename T>
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>);
  if constexpr (std::is_same_v<T, Bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
  }
}

// d += a * b for a [16, 8] and b [8, 8] in tf32 (to_tf32): a[0..3] = (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);
// b[0], b[1] = rows t, t + 4 of column g.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to tf32 (10 mantissa bits), to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// ---- Fragments from shared memory (ldmatrix, movmatrix) ------------------------------------------------------------
// Matrices of 8x8 16-bit elements. Lane 8 i + j gives the address of row j of matrix i (16 bytes, aligned); r[i] gets
// row g, columns 2t and 2t + 1 of matrix i. With _trans, of the transposed matrix.

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}

// Transposes the 8x8 matrix of 16-bit elements that the warp holds (row g, columns 2t and 2t + 1 per lane).
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// ---- Asynchronous copies from global to shared memory (cp.async) ---------------------------------------------------
// When not `valid` nothing is read and the target gets zeros.

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 8 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}
// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most the N newest groups of this thread are under way. Other threads see the data after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- Hints to the L2 cache: which lines to evict first (createpolicy, cache_hint) ----------------------------------

__device__ __forceinline__ uint64_t l2_evict_last() {
  uint64_t hint;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(hint));
  return hint;
}
__device__ __forceinline__ uint64_t l2_evict_normal() {
  uint64_t hint;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(hint));
  return hint;
}
__device__ __forceinline__ uint4 load_16_hint(const void* global, uint64_t hint) {
  uint4 v;
  asm volatile("ld.global.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global), "l"(hint)
               : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_8_hint(const void* global, uint64_t hint) {
  uint2 v;
  asm volatile("ld.global.L2::cache_hint.v2.b32 {%0, %1}, [%2], %3;"
               : "=r"(v.x), "=r"(v.y)
               : "l"(global), "l"(hint)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_16_hint(void* global, uint4 v, uint64_t hint) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(global), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w), "l"(hint)
               : "memory");
}
__device__ __forceinline__ void store_8_hint(void* global, uint2 v, uint64_t hint) {
  asm volatile("st.global.L2::cache_hint.v2.b32 [%0], {%1, %2}, %3;" ::"l"(global), "r"(v.x), "r"(v.y), "l"(hint)
               : "memory");
}

// Begins to bring the line of 128 bytes to the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// What the L2 cache has, whatever this multiprocessor has read before; another kernel may be writing it.
__device__ __forceinline__ int32_t load_relaxed(const int32_t* global) {
  int32_t v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(global) : "memory");
  return v;
}

// ---- Special functions (ex2, lg2, rcp, rsqrt, tanh; relative error about 2^-22, tanh 2^-11) ------------------------

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, which the compiler keeps in a register from here on: it would compute it again at each use, from special registers
// that take long to read.
__device__ __forceinline__ int keep_in_register(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ uint64_t keep_in_register(uint64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

// p, of which the compiler does not know any more where it leads: what is written there is in memory.
template <typename T>
__device__ __forceinline__ T* unknown_pointer(T* p) {
  asm volatile("" : "+l"(p)::"memory");
  return p;
}
// At least so many cycles of the multiprocessor's clock; other warps have the issue slots meanwhile.
__device__ __forceinline__ void wait_cycles(int cycles) {
  const int64_t begin = clock64();
  while (clock64() - begin < cycles) __nanosleep(50);
}

// In a rare branch, for it to stay one: the compiler would select each register that it changes, every time.
__device__ __forceinline__ void keep_branch() {
  asm volatile("");
}

// ---- Barriers (barrier.sync) ---------------------------------------------------------------------------------------

// Of a part of the block: `threads` threads, a multiple of 32, always the same number at barrier `id`, 1 to 15.
//
// compute-sanitizer's racecheck counts the barriers that a thread comes to, so that those of a part make it report what
// they order. It follows mbarriers, if all threads arrive themselves: with KIMI_RACECHECK these functions are the same
// by mbarriers (target kimi_racecheck).

#ifndef KIMI_RACECHECK

inline constexpr bool kRacecheck = false;

// By all threads of the block, at its beginning, for each barrier.
__device__ __forceinline__ void barrier_begin(int /*id*/, int /*threads*/) {}

// Waits for all.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Comes to the barrier and does not wait: others do, with barrier_sync(), and find what was written here before.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#else

inline constexpr bool kRacecheck = true;

__device__ __forceinline__ uint32_t barrier_address(int id) {
  __shared__ uint64_t barriers[16];
  return shared_address(&barriers[id]);
}
__device__ __forceinline__ void barrier_begin(int id, int threads) {
  if (threadIdx.x == 0)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier_address(id)), "r"(threads) : "memory");
  __syncthreads();
}
__device__ __forceinline__ void barrier_sync(int id, int /*threads*/) {
  asm volatile(
      "{.reg .b64 phase; .reg .pred done; mbarrier.arrive.shared::cta.b64 phase, [%0]; "
      "again: mbarrier.test_wait.shared::cta.b64 done, [%0], phase; @!done bra again;}" ::"r"(barrier_address(id))
      : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int /*threads*/) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier_address(id)) : "memory");
}

#endif

}  // namespace kimi::cuda
