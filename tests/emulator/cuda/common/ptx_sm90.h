// The emulator's form of csrc/cuda/common/ptx_sm90.h: what each instruction does, from the PTX ISA.
#pragma once

#include "asynchronous.h"
#include "cuda/common/ptx.h"
#include "cuda/common/tensor_map.h"

namespace kimi::cuda {

inline constexpr bool kHasSm90 = true;

// ---- mbarrier ------------------------------------------------------------------------------------------------------

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulator::mbarrier_init(barrier, arrivals);
}
inline void mbarrier_init_fence() {
  emulator::mbarrier_init_fence();
}
inline void mbarrier_arrive(uint64_t* barrier) {
  emulator::mbarrier_arrive(barrier, -1, 0);
}
inline void mbarrier_arrive_cluster(uint64_t* barrier, int rank) {
  emulator::mbarrier_arrive(barrier, rank, 0);
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  emulator::mbarrier_arrive(barrier, -1, bytes);
}
inline void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
  emulator::mbarrier_expect(barrier, bytes);
}
inline void mbarrier_wait(uint64_t* barrier, int parity) {
  emulator::mbarrier_wait(barrier, parity);
}
inline void cp_async_mbarrier_arrive(uint64_t* barrier) {
  emulator::mbarrier_arrive_after_copies(barrier);
}

// ---- Bulk copies ---------------------------------------------------------------------------------------------------

inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  emulator::bulk_copy(shared, global, bytes, barrier, 1u << emulator::current->rank);
}
inline void bulk_copy_multicast(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, uint16_t blocks) {
  emulator::bulk_copy(shared, global, bytes, barrier, blocks);
}

inline void tensor_copy(void* shared, const TensorMap& map, int head, int token, uint64_t* barrier) {
  emulator::tensor_copy(shared, map.shape, head, token, barrier);
}
inline void tensor_store(const void* shared, const TensorMap& map, int head, int token) {
  emulator::tensor_store(shared, map.shape, head, token);
}
inline void tensor_store_commit() {
  emulator::tensor_store_commit();
}
inline void bulk_prefetch_l2(const void*, uint32_t) {}
inline void tensor_store_wait_read() {
  emulator::tensor_store_wait_read();
}

// ---- Clusters, dependent launches ----------------------------------------------------------------------------------

inline int cluster_rank() {
  return emulator::current->rank;
}
inline void cluster_sync() {
  emulator::cluster_barrier();
}
inline void grid_dependency_wait() {}  // kernels run one after the other here
inline void grid_launch_dependents() {}

// ---- wgmma ---------------------------------------------------------------------------------------------------------

inline void wgmma_fence() {
  emulator::wgmma_fence();
}
inline void wgmma_commit() {
  emulator::wgmma_commit();
}
template <int N>
void wgmma_wait() {
  emulator::wgmma_wait(N);
}

inline void register_fence(float (&)[4]) {}
inline void register_fence(uint32_t (&)[4]) {}

template <bool kMnMajor>
uint64_t wgmma_descriptor(const void* shared, int k_stride, int column_stride) {
  return uint64_t{emulator::shared_address(shared)} >> 4 | uint64_t(k_stride >> 4) << 16 |
         uint64_t(column_stride >> 4) << 32;
}

inline uint64_t wgmma_descriptor_swizzle_64(const void* shared, int across, int down) {
  return wgmma_descriptor<false>(shared, across, down) | uint64_t{2} << 62;
}

template <bool kMnMajor, int kTiles>
void wgmma_fp16(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulator::wgmma({&d[0][0], kTiles, {a[0], a[1], a[2], a[3]}, b, kMnMajor, accumulate});
}
template <bool kMnMajor, int kTiles>
void wgmma_fp16(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulate) {
  emulator::wgmma({&d[0][0], kTiles, {}, b, kMnMajor, accumulate, true, a});
}
template <bool kMnMajor>
void wgmma_m64n64k16(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate) {
  wgmma_fp16<kMnMajor>(d, a, b, accumulate);
}
template <bool kMnMajor>
void wgmma_m64n64k16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  wgmma_fp16<kMnMajor>(d, a, b, accumulate);
}
template <bool kMnMajor>
void wgmma_m64n128k16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  wgmma_fp16<kMnMajor>(d, a, b, accumulate);
}

// ---- Matrices to shared memory -------------------------------------------------------------------------------------

inline void fence_proxy_async() {}

template <bool kTranspose>
void store_matrices(void* shared_row, const uint32_t (&r)[4]) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0)
    emulator::fail("stmatrix to an address that is not a multiple of 16");
  struct Lane {
    void* row;
    const uint32_t* r;
  } x{shared_row, r};
  emulator::warp_collective(&x, [](void* const* lanes) {
    const auto row_of = [&](int lane) { return static_cast<char*>(static_cast<Lane*>(lanes[lane])->row); };
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const uint32_t word = static_cast<Lane*>(lanes[lane])->r[matrix];
        for (int half = 0; half < 2; ++half) {
          const uint16_t element = static_cast<uint16_t>(word >> 16 * half);
          const int row = lane / 4, column = 2 * (lane % 4) + half;
          std::memcpy(row_of(8 * matrix + (kTranspose ? column : row)) + 2 * (kTranspose ? row : column), &element, 2);
        }
      }
    }
  });
}
inline void stmatrix_x4(void* shared_row, const uint32_t (&r)[4]) {
  store_matrices<false>(shared_row, r);
}
inline void stmatrix_x4_trans(void* shared_row, const uint32_t (&r)[4]) {
  store_matrices<true>(shared_row, r);
}

// ---- Registers -----------------------------------------------------------------------------------------------------

template <int kCount>
void set_max_registers_up() {}
template <int kCount>
void set_max_registers_down() {}

// ---- Barriers ------------------------------------------------------------------------------------------------------

inline bool barrier_or(int id, int threads, bool predicate) {
  return emulator::block_barrier_or(id, threads, predicate);
}

}  // namespace kimi::cuda
