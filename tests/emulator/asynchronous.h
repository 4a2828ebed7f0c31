// What goes on beside the threads on a Hopper: barriers in shared memory that count arrivals and bytes (mbarrier), bulk
// copies (cp.async.bulk) that end at some later time, and the matrix products of warpgroups (wgmma).
//
// A bulk copy poisons its target until it ends, soon or when nothing else can go on. A product poisons its accumulators
// until they are waited for; its operand in shared memory is read at the earliest or at the latest moment, whichever
// the dice say: what is not yet there, or no longer, gives wrong results.
#pragma once

#include "cuda/common/tensor_map.h"
#include "emulator.h"

namespace kimi::emulator {

// ---- For the scheduler
namespace asynchronous {

void reset();                // before a cluster
void at_return();            // of a thread
bool has_copies(bool idle);  // idle: no thread can go on; only then some copies end
void end_a_copy(bool idle);  // of those one at random

}  // namespace asynchronous

// ---- mbarrier. `rank`: of the block whose barrier at the same place is meant, -1 for the thread's own.
void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* barrier, int rank, uint32_t expected_bytes);
void mbarrier_expect(uint64_t* barrier, uint32_t bytes);  // without an arrival
void mbarrier_wait(uint64_t* barrier, int parity);
void mbarrier_arrive_after_copies(uint64_t* barrier);  // when the thread's copy_async() have ended, at some later time

// To this place in each of the blocks, whose barriers at the place of `barrier` count the bytes.
void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, unsigned blocks);

// A box of a tensor to shared memory, as one bulk copy; and back, at the latest when the thread waits for it. A thread
// must not return before.
void tensor_copy(void* shared, const cuda::TensorShape& shape, int head, int token, uint64_t* barrier);
void tensor_store(const void* shared, const cuda::TensorShape& shape, int head, int token);
void tensor_store_commit();
void tensor_store_wait_read();

// ---- wgmma, fp16, a [64, 16] from registers or shared memory, b [16, 8 tiles] from shared memory
struct Product {
  float* d;  // [tiles][4] of this thread
  int tiles;
  uint32_t a[4];
  uint64_t b;  // matrix descriptor
  bool mn_major, accumulate;
  bool a_shared = false;
  uint64_t a_descriptor = 0;  // k contiguous
};
void wgmma(const Product& product);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int newest_groups_left);

}  // namespace kimi::emulator
