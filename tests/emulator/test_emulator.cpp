// That the emulator finds what is wrong: each kernel here has one of the mistakes it is there for, and must end in an
// error of the emulator or in a wrong result; beside it stands the same kernel done right. What is right everywhere is
// in tests/cuda/test_cuda_common.cu.
#include <functional>

#include "../cuda/buffer.h"
#include "check.h"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.h"

namespace kimi::cuda {
namespace {

using kimi_test::Buffer;
using kimi_test::Checker;

constexpr int kThreads = 128, kBlocks = 8;

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
    checker_.check(!run(error, expected, kernel, args...) && error.empty(), name);
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
      launch(kernel, 1, kThreads, sizeof(Shared), nullptr, args...);
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
