// That the emulator finds what is wrong: each kernel here has one of the mistakes it is there for, and must end in an
// error of the emulator or in a wrong result; beside it stands the same kernel done right. What is right everywhere is
// in tests/cuda/test_cuda_common.cu.
#include <functional>

#include "../cuda/buffer.h"
#include "check.h"
#include "cuda/common/launch.h"
#include "wrong_kernels_sm90.h"

namespace kimi::cuda {
namespace {

using kimi_test::Buffer;
using kimi_test::Checker;

constexpr int kBlocks = 8;

struct Shared {
  int values[kThreads];
};

// out[i] = 1 + in[i + 33]: needs a barrier between the write and the read of shared memory.
__global__ void neighbours(const int* in, int* out, bool barrier) {
  auto& shared = shared_memory<Shared>();
  const int i = threadIdx.x;
  shared.values[i] = in[i];
  if (barrier) __syncthreads();
  out[i] = 1 + shared.values[(i + 33) % kThreads];
}

// The same within a warp.
__global__ void lanes(const int* in, int* out, bool barrier) {
  auto& shared = shared_memory<Shared>();
  const int i = threadIdx.x;
  shared.values[i] = in[i];
  if (barrier) __syncwarp();
  out[i] = 1 + shared.values[i / 32 * 32 + (i + 9) % 32];
}

// out[i] = in[i + 8]: the values turn by one place eight times. The second barrier keeps a fast thread from overwriting
// what a slow one has not read yet.
__global__ void turning(const int* in, int* out, bool barrier) {
  auto& shared = shared_memory<Shared>();
  const int i = threadIdx.x;
  shared.values[i] = in[i];
  for (int turn = 0; turn < 8; ++turn) {
    __syncthreads();
    const int next = shared.values[(i + 1) % kThreads];
    if (barrier) __syncthreads();
    shared.values[i] = next;
  }
  out[i] = shared.values[i];
}

// Two named barriers for two halves; wrong, both halves use the first one and one of them comes once less.
__global__ void halves(int* out, bool right) {
  const int half = threadIdx.x / 64;
  barrier_sync(right ? 1 + half : 1, 64);
  if (half == 0) barrier_sync(1, right ? 64 : 128);
  out[threadIdx.x] = half;
}

// A barrier for more threads than come.
__global__ void too_few(int* out, bool right) {
  if (threadIdx.x < 64) barrier_sync(1, right ? 64 : 96);
  out[threadIdx.x] = 1;
}

// One half of the block hands numbers over to the other, eight times; each comes to the other one's barrier and goes
// on. out[i]: their sum. Modes: 0 right, 1 a warp does not come, 2 both come before they write or read, 3 one half
// comes for fewer threads than the other one waits for.
__global__ void arrivals(const int* in, int* out, int mode) {
  auto& shared = shared_memory<Shared>();
  const int i = threadIdx.x;
  int sum = 0;
  if (mode == 1 && i < 32) return;
  for (int round = 0; round < 8; ++round) {
    if (i < 64) {
      if (round > 0) barrier_sync(2, 128);
      if (mode == 2) barrier_arrive(1, 128);
      shared.values[i] = in[64 + i] + round;
      if (mode != 2) barrier_arrive(1, mode == 3 ? 96 : 128);
    } else {
      barrier_sync(1, 128);
      if (mode == 2 && round < 7) barrier_arrive(2, 128);
      sum += shared.values[i - 64];
      if (mode != 2 && round < 7) barrier_arrive(2, 128);
    }
  }
  out[i] = sum;
}

// Copies in two groups. Wrong: waits for one group too few, or not at all.
__global__ void copies(const int* in, int* out, int mode) {
  auto& shared = shared_memory<Shared>();
  const int i = threadIdx.x;
  if (i < 64) cp_async_4(&shared.values[i], in + i);
  cp_async_commit();
  if (i >= 64) cp_async_4(&shared.values[i], in + i);
  cp_async_commit();
  if (mode == 0) cp_async_wait<0>();
  if (mode == 1) cp_async_wait<1>();
  if (mode != 3) __syncthreads();
  if (mode == 3) {  // waits, but only for itself
    cp_async_wait<0>();
    out[i] = shared.values[(i + 1) % kThreads];
    return;
  }
  out[i] = shared.values[i];
}

// A copy of the last tile that was never closed by a commit.
__global__ void copy_without_commit(const int* in, int* out, bool commit) {
  auto& shared = shared_memory<Shared>();
  const int i = threadIdx.x;
  cp_async_4(&shared.values[i], in + i);
  if (commit) cp_async_commit();
  cp_async_wait<0>();
  out[i] = shared.values[i];
}

__global__ void misaligned_copy(const int* in, int* out, int offset) {
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x == 0) cp_async_16(&shared.values[4], in + offset);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = threadIdx.x < 4 ? shared.values[4 + threadIdx.x] : 0;
}

__global__ void shuffle_in_a_branch(int* out, int lanes) {
  int value = static_cast<int>(threadIdx.x);
  if (value % 32 < lanes) value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

__global__ void different_collectives(int* out, bool wrong) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  out[threadIdx.x] = wrong && lane == 3 ? __any_sync(0xffffffffu, lane == 3) : __shfl_sync(0xffffffffu, lane, 5);
}

__global__ void partial_mask(int* out, unsigned mask) {
  out[threadIdx.x] = static_cast<int>(__ballot_sync(mask, 1));
}

// Writes `beyond` values past the end of shared memory, or in front of it.
__global__ void outside(int* out, int beyond) {
  auto& shared = shared_memory<Shared>();
  volatile int* values = shared.values;
  values[static_cast<int>(threadIdx.x) + beyond] = 1;
  out[threadIdx.x] = 1;
}

// A thread that leaves before a barrier does not hold up the others; one that leaves before a collective does.
__global__ void early_return(int* out, bool collective) {
  out[threadIdx.x] = 1;
  if (threadIdx.x >= 100) return;
  if (collective) {
    out[threadIdx.x] = __any_sync(0xffffffffu, 1);
  } else {
    __syncthreads();
  }
}

__global__ void misaligned_rows(const int* in, int* out, int offset) {
  auto& shared = shared_memory<Shared>();
  shared.values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, reinterpret_cast<unsigned char*>(shared.values) + threadIdx.x % 30 * 16 + offset);
  out[threadIdx.x] = static_cast<int>(r[0]);
}

__global__ void trap(int* out, bool wrong) {
  out[threadIdx.x] = 1;
  if (wrong && threadIdx.x == 77) __trap();
}

// out[block] = out[block - 1] + 1, as if blocks came one after the other.
__global__ void chain(int* out, bool wrong) {
  const int block = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) out[block] = wrong ? (block == 0 ? 0 : out[block - 1]) + 1 : block + 1;
}

// Reads shared memory that nothing wrote.
__global__ void uninitialised(float* out, bool wrong) {
  struct Floats {
    float values[kThreads];
  };
  auto& shared = shared_memory<Floats>();
  if (!wrong || threadIdx.x != 5) shared.values[threadIdx.x] = 1.0f;
  out[threadIdx.x] = shared.values[threadIdx.x];
}

class EmulatorTest {
 public:
  EmulatorTest() : in_(numbers()), out_(kThreads) {}

  // Ends without an error, and out is as expected (any, where `expected` is empty).
  template <typename... Params, typename... Args>
  void right(const std::string& name, const std::function<int(int)>& expected, void (*kernel)(Params...),
             Args... args) {
    std::string error;
    const bool same = run(error, expected, kernel, args...);
    checker_.check(error.empty() && same, name + (error.empty() ? "" : ": " + error));
  }
  // Ends in an error with this text.
  template <typename... Params, typename... Args>
  void error(const std::string& name, const std::string& text, void (*kernel)(Params...), Args... args) {
    std::string error;
    run(error, {}, kernel, args...);
    checker_.check(error.find(text) != std::string::npos, name + ": " + (error.empty() ? "no error" : error));
  }
  // Gives a wrong result.
  template <typename... Params, typename... Args>
  void wrong(const std::string& name, const std::function<int(int)>& expected, void (*kernel)(Params...),
             Args... args) {
    std::string error;
    const bool same = run(error, expected, kernel, args...);
    checker_.check(!same && error.empty(), name + (error.empty() ? "" : ": " + error));
  }

  // The kernels after this in clusters of two blocks of half the threads, or in one block again.
  void use_blocks(unsigned blocks, size_t shared_bytes = sizeof(CopyShared)) {
    blocks_ = blocks;
    shared_bytes_ = shared_bytes;
  }

  const int* in() { return in_.get(); }
  int* out() { return out_.get(); }
  int summary() const { return checker_.summary(); }

 private:
  static std::vector<int> numbers() {
    std::vector<int> values(kThreads);
    for (int i = 0; i < kThreads; ++i) values[i] = 1000 + i;
    return values;
  }
  template <typename... Params, typename... Args>
  bool run(std::string& error, const std::function<int(int)>& expected, void (*kernel)(Params...), Args... args) {
    std::fill_n(out_.get(), kThreads, -1);
    try {
      launch({.cluster = blocks_}, kernel, blocks_, kThreads / blocks_, shared_bytes_, nullptr, args...);
    } catch (const Error& e) {
      error = e.what();
      return false;
    }
    for (int i = 0; i < kThreads && expected; ++i) {
      if (out_.get()[i] != expected(i)) return false;
    }
    return true;
  }

  Checker checker_;
  Buffer<int> in_, out_;
  unsigned blocks_ = 1;
  size_t shared_bytes_ = sizeof(Shared);
};

int run() {
  EmulatorTest t;
  const int* in = t.in();
  int* out = t.out();
  const auto input = [](int i) { return 1000 + i; };
  const auto one = [](int) { return 1; };

  const auto neighbour = [&](int i) { return 1 + input((i + 33) % kThreads); };
  t.right("a barrier between write and read", neighbour, neighbours, in, out, true);
  t.wrong("no barrier between write and read", neighbour, neighbours, in, out, false);
  const auto lane = [&](int i) { return 1 + input(i / 32 * 32 + (i + 9) % 32); };
  t.right("a warp barrier between write and read", lane, lanes, in, out, true);
  t.wrong("no warp barrier between write and read", lane, lanes, in, out, false);
  const auto turned = [&](int i) { return input((i + 8) % kThreads); };
  t.right("a barrier between read and overwriting", turned, turning, in, out, true);
  t.wrong("no barrier between read and overwriting", turned, turning, in, out, false);

  t.right("named barriers", [](int i) { return i / 64; }, halves, out, true);
  t.error("one barrier with two thread counts", "a barrier with two different thread counts", halves, out, false);
  t.right("a barrier for some threads", one, too_few, out, true);
  t.error("a barrier for more threads than come", "deadlock: 64 of 128 threads wait for ever", too_few, out, false);
  const auto handed_over = [&](int i) { return i < 64 ? 0 : 8 * input(i) + 28; };
  t.right("arrivals at a barrier", handed_over, arrivals, in, out, 0);
  t.error("fewer arrivals than a barrier waits for", "deadlock: 96 of 128 threads wait for ever", arrivals, in, out, 1);
  t.right("arrivals at a barrier, after such a block", handed_over, arrivals, in, out, 0);
  t.wrong("arrivals before the write, or the read", handed_over, arrivals, in, out, 2);
  t.error("arrivals for another thread count", "a barrier with two different thread counts", arrivals, in, out, 3);
  t.right("return before a barrier", one, early_return, out, false);
  t.error("return before a collective", "deadlock: 4 of 128", early_return, out, true);

  t.right("two groups of copies", input, copies, in, out, 0);
  t.wrong("cp_async_wait<1> instead of <0>", input, copies, in, out, 1);
  t.wrong("no cp_async_wait", input, copies, in, out, 2);
  t.wrong("no barrier after cp_async_wait", [&](int i) { return input((i + 1) % kThreads); }, copies, in, out, 3);
  t.right("a committed copy", input, copy_without_commit, in, out, true);
  t.wrong("a copy without commit", input, copy_without_commit, in, out, false);
  t.right("an aligned copy", [&](int i) { return i < 4 ? input(i + 8) : 0; }, misaligned_copy, in, out, 8);
  t.error("a misaligned copy", "misaligned address", misaligned_copy, in, out, 9);
  t.right("ldmatrix of aligned rows", {}, misaligned_rows, in, out, 0);
  t.error("ldmatrix of misaligned rows", "not a multiple of 16", misaligned_rows, in, out, 4);

  t.right("a shuffle of the whole warp", [](int i) { return i ^ 1; }, shuffle_in_a_branch, out, 32);
  t.error("a shuffle of half a warp", "deadlock: 64 of 128", shuffle_in_a_branch, out, 16);
  t.right("one collective", [](int) { return 5; }, different_collectives, out, false);
  t.error("lanes at different collectives", "lanes of a warp are at different collectives", different_collectives, out,
          true);
  t.right("a full mask", [](int) { return -1; }, partial_mask, out, 0xffffffffu);
  t.error("a partial mask", "a warp collective with a partial mask", partial_mask, out, 0xffffu);

  t.right("the last of the shared memory", one, outside, out, 0);
  t.error("a write just past the shared memory", "a write outside the shared memory", outside, out, 1);
  t.error("a write far past the shared memory", "an access past the shared memory", outside, out, 4096);
  t.error("a write in front of the shared memory", "a write outside the shared memory", outside, out, -3);
  t.right("no trap", one, trap, out, false);
  t.error("a trap", "__trap(), thread 77", trap, out, true);

  t.use_blocks(1);
  t.right("bulk copies", input, bulk_copies, in, out, 0);
  t.wrong("nobody waits for bulk copies", input, bulk_copies, in, out, 1);
  t.error("a barrier that expects more bytes", "deadlock: 128 of 128", bulk_copies, in, out, 2);
  t.error("no fence after mbarrier_init", "nobody fenced", bulk_copies, in, out, 3);
  t.error("no mbarrier_init", "an mbarrier that nobody initialised", bulk_copies, in, out, 4);
  t.error("an odd bulk copy", "not of multiples of 16", bulk_copies, in, out, 5);
  t.error("too many arrivals", "more arrivals at an mbarrier than it expects", bulk_copies, in, out, 6);
  const auto in_ring = [&](int i) { return 36 * input(i); };
  const auto backwards = [&](int i) { return input(kThreads - 1 - i); };
  t.right("copies that arrive", backwards, copies_that_arrive, in, out, 0);
  t.wrong("nobody waits for copies that arrive", backwards, copies_that_arrive, in, out, 1);
  t.wrong("threads that arrive before their copies", backwards, copies_that_arrive, in, out, 2);
  t.error("too many copies that arrive", "more arrivals at an mbarrier than it expects", copies_that_arrive, in, out,
          3);
  t.right("a ring of two stages", in_ring, ring, in, out, true);
  t.error("a ring that is filled too early", "threads wait for ever", ring, in, out, false);

  const auto product = [](int) { return 8 * 8 * (1 * 1 + 2 * 2 + 3 * 3 + 4 * 4); };
  t.right("wgmma", product, products, out, 0);
  t.wrong("wgmma with other strides", product, products, out, 1);
  t.wrong("wgmma, results before the wait", product, products, out, 2);
  t.wrong("wgmma, operand overwritten before the wait", product, products, out, 3);
  t.error("wgmma, accumulators written before the wait", "written while it was under way", products, out, 4);
  t.error("wgmma without a fence", "wgmma without a fence", products, out, 5);
  t.error("wgmma with different operands", "do not agree", products, out, 6);
  t.error("return from wgmma", "returns while its wgmma is under way", products, out, 7);
  t.error("wgmma, accumulators of two shapes", "in another shape", products, out, 8);
  t.error("wgmma in a branch", "do not agree", products, out, 9);
  t.error("wgmma past the shared memory", "leads out of the shared memory", products, out, 10);

  const auto of_shared = [](int) { return 32 * 8 * (16 * 17 / 2); };
  t.right("wgmma, a in shared memory", of_shared, products_of_shared, out, 0);
  t.wrong("wgmma, a overwritten before the wait", of_shared, products_of_shared, out, 1);
  t.error("wgmma with different a", "do not agree", products_of_shared, out, 2);
  t.error("wgmma, a past the shared memory", "leads out of the shared memory", products_of_shared, out, 3);
  t.wrong("wgmma, a with other strides", of_shared, products_of_shared, out, 4);

  t.use_blocks(1, sizeof(BoxShared));
  TensorMap in_map, in_rows, in_swizzled, out_map;
  const bool mapped = make_tensor_map({in, 32, 1, 8, 8, 8, 4, 8}, in_map) &&
                      make_tensor_map({in, 4, 1, 64, 64, 64, 4, 64}, in_rows) &&
                      make_tensor_map({in, 4, 1, 64, 64, 64, 4, 64, true}, in_swizzled) &&
                      make_tensor_map({out, 32, 1, 8, 8, 8, 4, 8}, out_map);
  if (!mapped) return 1;
  t.right("boxes", input, boxes, in_map, out, 0);
  t.wrong("nobody waits for boxes", input, boxes, in_map, out, 1);
  t.error("a barrier that expects more than a box", "deadlock: 128 of 128", boxes, in_map, out, 2);
  t.error("a misaligned box", "a box of a tensor at a misaligned address", boxes, in_map, out, 3);
  t.error("a box of another tensor", "a box outside its tensor", boxes, in_map, out, 4);
  t.error("boxes without a fence", "nobody fenced", boxes, in_map, out, 5);
  t.right("a box of rows", input, one_box, in_rows, out, 0, false);
  t.right("a swizzled box", input, one_box, in_swizzled, out, 0, true);
  t.wrong("a swizzled box, not read as such", input, one_box, in_swizzled, out, 0, false);
  t.right("a box at a multiple of 128 bytes", input, one_box, in_rows, out, 32, false);
  t.error("a swizzled box at one", "a box of a tensor at a misaligned address", one_box, in_swizzled, out, 32, true);
  t.error("a box past the shared memory", "a box of a tensor past the shared memory", one_box, in_rows, out, 448,
          false);
  t.right("stores", input, stores, in, out_map, 0);
  t.wrong("stores, overwritten before the wait", input, stores, in, out_map, 1);
  t.error("return from stores", "a thread that returns while its stores are under way", stores, in, out_map, 2);
  t.error("stores in no group", "a wait for stores that are in no group", stores, in, out_map, 3);
  t.wrong("stores of another thread", input, stores, in, out_map, 4);
  t.error("a misaligned store", "a box of a tensor at a misaligned address", stores, in, out_map, 5);

  t.use_blocks(2);
  t.right("a copy to both blocks of a cluster", input, to_neighbour, in, out, 0);
  t.wrong("a neighbour that does not wait for it", input, to_neighbour, in, out, 1);
  t.error("a neighbour that has left", "a block that has ended", to_neighbour, in, out, 2);
  t.error("a copy out of the cluster", "not in the cluster", to_neighbour, in, out, 3);
  t.error("a copy to a block that is not ready", "an mbarrier", to_neighbour, in, out, 4);
  t.right("arrivals at the neighbour", one, arrive_at_neighbour, out, true);
  t.error("arrivals at a neighbour that has left", "a block that has ended", arrive_at_neighbour, out, false);

  Checker checker;
  const auto runs_in_any_order = [](bool wrong) {
    for (int repeat = 0; repeat < 4; ++repeat) {
      Buffer<int> result(kBlocks);
      launch(chain, kBlocks, 32, 0, nullptr, result.get(), wrong);
      for (int i = 0; i < kBlocks; ++i) {
        if (result.get()[i] != i + 1) return false;
      }
    }
    return true;
  };
  checker.check(runs_in_any_order(false), "blocks on their own");
  checker.check(!runs_in_any_order(true), "blocks that rely on the one before");
  const auto finite = [](bool wrong) {
    Buffer<float> result(kThreads);
    launch(uninitialised, 1, kThreads, kThreads * sizeof(float), nullptr, result.get(), wrong);
    return std::all_of(result.get(), result.get() + kThreads, [](float x) { return std::isfinite(x); });
  };
  checker.check(finite(false), "shared memory that was written");
  checker.check(!finite(true), "shared memory that was not written is NaN");
  return t.summary() | checker.summary();
}

}  // namespace
}  // namespace kimi::cuda

int main() {
  return kimi::cuda::run();
}
