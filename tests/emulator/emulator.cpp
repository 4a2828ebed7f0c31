#include "emulator.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>

#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "kimi/common.h"

#ifndef __x86_64__
#error "the emulator's switch between fibers is written for x86-64"
#endif

// void kimi_switch_fiber(void** save_stack_pointer, void* stack_pointer): saves what the ABI wants kept, and goes on
// where the other stack was left.
asm(R"(
.text
.globl kimi_switch_fiber
.hidden kimi_switch_fiber
.type kimi_switch_fiber, @function
kimi_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kimi_switch_fiber, .-kimi_switch_fiber
)");
extern "C" void kimi_switch_fiber(void** save_stack_pointer, void* stack_pointer);

namespace kimi::emulator {

Thread* current = nullptr;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kMaxThreads = 1024, kMaxBarriers = 16;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
  int group;
};

struct Fiber {
  Thread thread;
  void* stack_pointer = nullptr;
  bool done = false;
  std::vector<Copy> copies;
  int group = 0;
};

struct Barrier {
  int expected = 0;  // 0: all threads that have not returned
  std::vector<int> waiting;
};

struct Warp {
  void* arguments[32];
  void (*combine)(void* const*) = nullptr;
  int arrived = 0, size = 0;
};

struct Block {
  std::vector<Fiber> fibers{kMaxThreads};
  std::vector<Warp> warps{kMaxThreads / 32};
  Barrier barriers[kMaxBarriers];
  std::vector<int> ready;
  unsigned char* stacks = nullptr;
  void* scheduler_stack_pointer = nullptr;
  const std::function<void()>* body = nullptr;
  int running = 0, alive = 0, size = 0, predicates = 0, counted = 0;
  uint64_t random = 0x9e3779b97f4a7c15;
  std::string failure;
};
Block block;

uint64_t next_random() {
  block.random ^= block.random << 13;
  block.random ^= block.random >> 7;
  block.random ^= block.random << 17;
  return block.random;
}

// The running fiber waits until somebody puts it into `ready`.
void wait() {
  kimi_switch_fiber(&block.fibers[block.running].stack_pointer, block.scheduler_stack_pointer);
}

void release_if_complete(Barrier& barrier) {
  const int expected = barrier.expected == 0 ? block.alive : barrier.expected;
  if (barrier.waiting.empty() || static_cast<int>(barrier.waiting.size()) < expected) return;
  block.ready.insert(block.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

void fiber_main() {
  (*block.body)();
  Fiber& self = block.fibers[block.running];
  self.done = true;
  --block.alive;
  release_if_complete(block.barriers[0]);
  wait();
}

// The block's shared memory: it ends, rounded up to its alignment, at a page that must not be touched; what is left up
// to there, and some bytes in front, hold a pattern that must stay.
class SharedMemory {
 public:
  unsigned char* of(size_t bytes) {
    if (base_ == nullptr) {
      void* p =
          mmap(nullptr, kBytes + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      KIMI_CHECK(p != MAP_FAILED, "no memory");
      base_ = static_cast<unsigned char*>(p);
      KIMI_CHECK(mprotect(base_ + kBytes, kGuard, PROT_NONE) == 0, "mprotect");
    }
    first_ = base_ + kBytes - (bytes + kAlign - 1) / kAlign * kAlign;
    last_ = first_ + bytes;
    return first_;
  }
  void fill() {
    std::memset(first_ - kAlign, kPattern, kAlign);
    std::memset(first_, 0xff, last_ - first_);  // NaN
    std::memset(last_, kPattern, base_ + kBytes - last_);
  }
  bool pattern_stands() const {
    const auto stands = [](const unsigned char* from, const unsigned char* to) {
      return std::all_of(from, to, [](unsigned char x) { return x == kPattern; });
    };
    return stands(first_ - kAlign, first_) && stands(last_, base_ + kBytes);
  }
  bool guards(const void* address) const {
    const auto* p = static_cast<const unsigned char*>(address);
    return base_ != nullptr && p >= base_ + kBytes && p < base_ + kBytes + kGuard;
  }

 private:
  static constexpr size_t kBytes = 256 << 10, kGuard = 1 << 20, kAlign = 1024;
  static constexpr unsigned char kPattern = 0xa5;
  unsigned char *base_ = nullptr, *first_ = nullptr, *last_ = nullptr;
};
SharedMemory shared_memory_pages;

// While kernels run, a touch of the page behind the shared memory is a failure of the fiber; any other fault is whose
// it was.
class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action = {};
    action.sa_sigaction = &on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler does not return to the kernel, the signal stays unblocked
    sigaction(SIGSEGV, &action, &before_);
  }
  ~FaultHandler() { sigaction(SIGSEGV, &before_, nullptr); }

 private:
  static void on_fault(int, siginfo_t* info, void*) {
    if (shared_memory_pages.guards(info->si_addr)) fail("an access past the shared memory");
    sigaction(SIGSEGV, &before_, nullptr);  // and the instruction faults again
  }
  static inline struct sigaction before_;
};

std::set<const void*> launched;

void start(int index) {
  unsigned char* top = block.stacks + (static_cast<size_t>(index) + 1) * kStackBytes;
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;                               // alignment: at entry rsp + 8 is a multiple of 16
  *--sp = reinterpret_cast<void*>(&fiber_main);  // where the switch returns to
  for (int i = 0; i < 6; ++i) *--sp = nullptr;   // saved registers
  Fiber& fiber = block.fibers[index];
  fiber.stack_pointer = sp;
  fiber.done = false;
  fiber.copies.clear();
  fiber.group = 0;
}

void run_block(dim3 grid, dim3 size, uint3 at, unsigned char* shared) {
  block.size = block.alive = static_cast<int>(size.x * size.y * size.z);
  block.ready.clear();
  block.predicates = block.counted = 0;
  for (Barrier& barrier : block.barriers) barrier.waiting.clear();
  for (int i = 0; i < block.size; ++i) {
    Thread& thread = block.fibers[i].thread;
    const unsigned u = static_cast<unsigned>(i);
    thread = {{u % size.x, u / size.x % size.y, u / (size.x * size.y)}, at, size, grid, i, shared};
    start(i);
    block.ready.push_back(i);
  }
  for (int w = 0; w < (block.size + 31) / 32; ++w) {
    block.warps[w].arrived = 0;
    block.warps[w].size = std::min(32, block.size - 32 * w);
  }
  while (!block.ready.empty() && block.failure.empty()) {
    const size_t pick = next_random() % block.ready.size();
    block.running = block.ready[pick];
    block.ready[pick] = block.ready.back();
    block.ready.pop_back();
    current = &block.fibers[block.running].thread;
    kimi_switch_fiber(&block.scheduler_stack_pointer, block.fibers[block.running].stack_pointer);
  }
  current = nullptr;
  if (block.failure.empty() && block.alive > 0) {
    block.failure =
        "deadlock: " + std::to_string(block.alive) + " of " + std::to_string(block.size) + " threads wait for ever";
  }
  if (block.failure.empty() && !shared_memory_pages.pattern_stands())
    block.failure = "a write outside the shared memory";
  if (!block.failure.empty()) {
    const std::string text = "emulator: " + block.failure + " in block " + std::to_string(at.x) + ", " +
                             std::to_string(at.y) + ", " + std::to_string(at.z);
    block.failure.clear();
    throw Error(text);
  }
}

}  // namespace

void fail(const char* what) {
  block.failure = std::string(what) + ", thread " + std::to_string(current->linear);
  wait();
  __builtin_unreachable();
}

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  if (block.stacks == nullptr) {
    void* p = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    KIMI_CHECK(p != MAP_FAILED, "no memory for the stacks");
    block.stacks = static_cast<unsigned char*>(p);
  }
  block.body = &body;
  unsigned char* shared = shared_memory_pages.of(shared_bytes);
  const FaultHandler handler;
  // Blocks come in any order: from a random one on, in steps that share no factor with their number.
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  uint64_t step = count > 0 ? next_random() % count : 0;
  while (std::gcd(step, count) > 1) ++step;
  uint64_t at = next_random() % std::max<uint64_t>(count, 1);
  for (uint64_t i = 0; i < count; ++i, at = (at + step) % count) {
    shared_memory_pages.fill();
    run_block(grid, size,
              {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
               static_cast<unsigned>(at / grid.x / grid.y)},
              shared);
  }
}

void note_launch(const void* kernel) {
  launched.insert(kernel);
}

void block_barrier(int id, int threads) {
  Barrier& barrier = block.barriers[id];
  if (!barrier.waiting.empty() && barrier.expected != threads) fail("a barrier with two different thread counts");
  barrier.expected = threads;
  barrier.waiting.push_back(block.running);
  release_if_complete(barrier);
  wait();
}

int block_count(bool predicate) {
  if (block.counted == block.alive) block.predicates = block.counted = 0;  // the first thread of the next count
  block.predicates += predicate;
  ++block.counted;
  block_barrier(0, 0);
  const int count = block.predicates;
  block_barrier(0, 0);
  return count;
}

void warp_collective(void* argument, void (*combine)(void* const*)) {
  Warp& warp = block.warps[block.running / 32];
  if (warp.size != 32) fail("a warp collective in a warp of fewer than 32 threads");
  if (warp.arrived > 0 && warp.combine != combine) fail("lanes of a warp are at different collectives");
  warp.combine = combine;
  warp.arguments[block.running % 32] = argument;
  if (++warp.arrived < 32) return wait();
  warp.arrived = 0;
  combine(warp.arguments);
  const int first = block.running / 32 * 32;
  for (int i = first; i < first + 32; ++i) {
    if (i != block.running) block.ready.push_back(i);
  }
  block.ready.push_back(block.running);  // the order after a collective is drawn anew
  wait();
}

void copy_async(void* shared, const void* global, size_t bytes, bool valid) {
  const auto is_aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if (!is_aligned(shared) || (valid && !is_aligned(global))) fail("cp.async to or from a misaligned address");
  Fiber& self = block.fibers[block.running];
  std::memset(shared, 0xff, bytes);
  self.copies.push_back({shared, global, bytes, valid, self.group});
}

void copy_async_commit() {
  ++block.fibers[block.running].group;
}

void copy_async_wait(int newest_groups_left) {
  Fiber& self = block.fibers[block.running];
  const int last = self.group - 1 - newest_groups_left;
  size_t kept = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group > last) {
      self.copies[kept++] = copy;
    } else if (copy.valid) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  self.copies.resize(kept);
}

}  // namespace kimi::emulator

// The kernels that ran since the last call, as offsets in this library; how many there are.
extern "C" __attribute__((visibility("default"))) int kimi_emulator_launches(uint64_t* offsets, int capacity) {
  int count = 0;
  for (const void* kernel : kimi::emulator::launched) {
    Dl_info library;
    if (count < capacity && dladdr(kernel, &library) != 0)
      offsets[count++] =
          static_cast<uint64_t>(static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase));
  }
  kimi::emulator::launched.clear();
  return count;
}
