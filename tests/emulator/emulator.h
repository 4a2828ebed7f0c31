// Runs the CUDA kernels of csrc/cuda on a CPU, for tests on machines without a GPU: what is found here is wrong
// indexing, missing barriers and waits, divergent collectives and the like; what is not found is anything about speed.
//
// Every csrc/cuda/**/*.cu is compiled as C++ with this header in front of it and tests/emulator before csrc in the
// include path, so that the headers which hold machine code or talk to the driver (those in tests/emulator/cuda/common)
// come from here. Blocks run one after the other; the threads of a block are fibers that switch only where they wait.
// Which fiber runs next is drawn at random, shared memory starts as NaN, and an asynchronous copy poisons its target
// until it is waited for: a kernel that leaves out a barrier or a wait gives wrong results here, usually at once.
//
// What a kernel may use is what is defined below; all collectives need the whole warp (mask 0xffffffff).
#pragma once

#include <cuda_runtime.h>
// after it: the headers above declare some of these names

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static_assert(false, "use shared_memory<SharedStorage>()")

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace kimi::emulator {

// The thread that is running: its indexes, and the block's shared memory.
struct Thread {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
  int linear = 0;  // of thread_index
  unsigned char* shared = nullptr;
  int rank = 0;                 // of the block in its cluster
  int warp = 0, warpgroup = 0;  // counted through the cluster
};
extern Thread* current;

// Runs body() once per thread of the grid, the blocks of a cluster (neighbours in x) at the same time.
void run_grid(dim3 grid, dim3 block, unsigned cluster_blocks, size_t shared_bytes, const std::function<void()>& body);

// Remembers which kernels ran, for tests/launches.py.
void note_launch(const void* kernel);

// Waits until `threads` threads (0: all that have not returned) of the block are at barrier `id`.
void block_barrier(int id, int threads);
void block_barrier_arrive(int id, int threads);              // comes to it and does not wait
bool block_barrier_or(int id, int threads, bool predicate);  // whether the predicate of any of them holds
void cluster_barrier();                                      // of all threads of the cluster that have not returned

// Waits for all 32 lanes of the warp; the last one to come calls combine(lanes) with the argument of each lane. All
// lanes must call with the same `combine`.
void warp_collective(void* argument, void (*combine)(void* const* lanes));
void warpgroup_collective(void* argument, void (*combine)(void* const* threads));  // the same with 128 threads

// For what waits in other ways: the number of the running thread in its cluster; to stop it until somebody wakes it.
int running_thread();
void sleep();
void wake(int thread);
uint64_t next_random();

// Blocks of the cluster, by rank. Shared memory has addresses as the hardware has them, small numbers.
inline constexpr uint32_t kSharedBase = 1024;
int cluster_blocks();
bool has_ended(int rank);
uint32_t shared_address(const void* shared);
unsigned char* shared_pointer(int rank, uint32_t address, size_t bytes);  // null if it is not inside
void note_failure(const std::string& what);                               // for who is not a thread

// Copies that wait for cp_async_wait.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;  // if not, zeros
  int group;
};
void copy_async(void* shared, const void* global, size_t bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int newest_groups_left);
std::vector<Copy> take_copies();  // those of the running thread, for who ends them otherwise
void finish(const Copy& copy);

template <typename T>
struct Exchange {
  T value, result;
  int source;
};

// Every lane gets the value of lane `source`.
template <typename T>
T shuffle(T value, int source) {
  Exchange<T> x{value, T(), source};
  warp_collective(&x, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<Exchange<T>*>(lanes[i]);
      to->result = static_cast<Exchange<T>*>(lanes[to->source])->value;
    }
  });
  return x.result;
}

inline unsigned ballot(bool predicate) {
  Exchange<unsigned> x{predicate, 0, 0};
  warp_collective(&x, [](void* const* lanes) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<Exchange<unsigned>*>(lanes[i])->value << i;
    for (int i = 0; i < 32; ++i) static_cast<Exchange<unsigned>*>(lanes[i])->result = bits;
  });
  return x.result;
}

int block_count(bool predicate);  // of the threads for which it holds
inline int lane() {
  return current->linear % 32;
}

[[noreturn]] void fail(const char* what);
inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp collective with a partial mask");
}

}  // namespace kimi::emulator

#define threadIdx (::kimi::emulator::current->thread_index)
#define blockIdx (::kimi::emulator::current->block_index)
#define blockDim (::kimi::emulator::current->block_size)
#define gridDim (::kimi::emulator::current->grid_size)

inline void __syncthreads() {
  kimi::emulator::block_barrier(0, 0);
}
inline int __syncthreads_count(int predicate) {
  return kimi::emulator::block_count(predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return __syncthreads_count(predicate) > 0;
}
inline int __syncthreads_and(int predicate) {
  return __syncthreads_count(!predicate) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  kimi::emulator::check_mask(mask);
  kimi::emulator::ballot(true);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  kimi::emulator::check_mask(mask);
  const int lane = kimi::emulator::lane();
  return kimi::emulator::shuffle(value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  kimi::emulator::check_mask(mask);
  const int lane = kimi::emulator::lane(), source = lane ^ bits;
  return kimi::emulator::shuffle(value, source / width <= lane / width ? source : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  kimi::emulator::check_mask(mask);
  const int lane = kimi::emulator::lane(), d = static_cast<int>(distance);
  return kimi::emulator::shuffle(value, lane % width >= d ? lane - d : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  kimi::emulator::check_mask(mask);
  const int lane = kimi::emulator::lane(), d = static_cast<int>(distance);
  return kimi::emulator::shuffle(value, lane % width + d < width ? lane + d : lane);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  for (int bits = 16; bits > 0; bits /= 2) value = std::max(value, __shfl_xor_sync(mask, value, bits));
  return value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  kimi::emulator::check_mask(mask);
  return kimi::emulator::ballot(predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == 0xffffffffu;
}

// One thread runs at a time, so plain accesses are atomic.
template <typename T>
T atomicAdd(T* to, std::type_identity_t<T> x) {
  const T old = *to;
  *to = old + x;
  return old;
}
template <typename T>
T atomicMax(T* to, std::type_identity_t<T> x) {
  const T old = *to;
  *to = std::max(old, x);
  return old;
}
template <typename T>
T atomicOr(T* to, std::type_identity_t<T> x) {
  const T old = *to;
  *to = old | x;
  return old;
}
template <typename T>
T atomicExch(T* to, std::type_identity_t<T> x) {
  const T old = *to;
  *to = x;
  return old;
}
template <typename T>
T atomicCAS(T* to, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  const T old = *to;
  if (old == expected) *to = x;
  return old;
}
// The increment that goes back to zero after `last`.
inline unsigned atomicInc(unsigned* to, unsigned last) {
  const unsigned old = *to;
  *to = old >= last ? 0 : old + 1;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T x) {
  *to = x;
}
template <typename T>
void __stcg(T* to, T x) {
  *to = x;
}

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
template <typename To, typename From>
To kimi_bits(From x) {
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline unsigned __float_as_uint(float x) {
  return kimi_bits<unsigned>(x);
}
inline int __float_as_int(float x) {
  return kimi_bits<int>(x);
}
inline float __uint_as_float(unsigned x) {
  return kimi_bits<float>(x);
}
inline float __int_as_float(int x) {
  return kimi_bits<float>(x);
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;  // no contraction with what follows
  return product;
}
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline void __trap() {
  kimi::emulator::fail("__trap()");
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
