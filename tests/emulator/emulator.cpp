#include "emulator.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>

#include <array>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "asynchronous.h"
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
constexpr int kWarp = 32;
constexpr int kMaxThreads = 2048, kMaxBarriers = 16, kMaxCluster = 8;  // threads of a cluster of blocks

struct Fiber {
  Thread thread;
  void* stack_pointer = nullptr;
  bool done = false;
  std::vector<Copy> copies;
  int group = 0;
  bool vote = false;  // what the last barrier with a predicate gave
};

struct Barrier {
  int expected = 0;  // 0: all threads of the block that have not returned
  bool any = false;  // of the predicates of those that wait
  int arrived = 0;   // threads that have come and do not wait
  std::vector<int> waiting;
};

// The threads that have come to a collective of a warp or a warpgroup.
struct Collective {
  void* arguments[128];
  void (*combine)(void* const*) = nullptr;
  int arrived = 0, size = 0;
};

struct Block {
  uint3 index;
  Barrier barriers[kMaxBarriers];
  int alive = 0, predicates = 0, counted = 0;
};

// The blocks that run at the same time: those of a cluster, usually one. Threads are numbered through all of them.
struct Cluster {
  std::vector<Fiber> fibers{kMaxThreads};
  std::vector<Collective> warps{kMaxThreads / 32}, warpgroups{kMaxThreads / 128 + kMaxCluster};
  Block blocks[kMaxCluster];
  Barrier barrier;
  std::vector<int> ready;
  unsigned char* stacks = nullptr;
  void* scheduler_stack_pointer = nullptr;
  const std::function<void()>* body = nullptr;
  int running = 0, alive = 0, size = 0, block_size = 0;
  uint64_t random = 0x9e3779b97f4a7c15;
  std::string failure;
};
Cluster cluster;

// The running fiber waits until somebody puts it into `ready`.
void wait() {
  kimi_switch_fiber(&cluster.fibers[cluster.running].stack_pointer, cluster.scheduler_stack_pointer);
}

void release_if_complete(Barrier& barrier, int alive) {
  const int expected = barrier.expected == 0 ? alive : barrier.expected;
  const int come = static_cast<int>(barrier.waiting.size()) + barrier.arrived;
  if (come == 0 || come < expected) return;
  for (int i : barrier.waiting) cluster.fibers[i].vote = barrier.any;
  cluster.ready.insert(cluster.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
  barrier.arrived = 0;
  barrier.any = false;
}

Block& own_block() {
  return cluster.blocks[current->rank];
}

void fiber_main() {
  (*cluster.body)();
  asynchronous::at_return();
  cluster.fibers[cluster.running].done = true;
  --cluster.alive;
  release_if_complete(own_block().barriers[0], --own_block().alive);
  release_if_complete(cluster.barrier, cluster.alive);
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
  bool holds(const void* address, size_t bytes) const {
    const auto* p = static_cast<const unsigned char*>(address);
    return p >= first_ && p < last_ && bytes <= static_cast<size_t>(last_ - p);
  }
  unsigned char* first() const { return first_; }

 private:
  static constexpr size_t kBytes = 256 << 10, kGuard = 1 << 20, kAlign = 1024;
  static constexpr unsigned char kPattern = 0xa5;
  unsigned char *base_ = nullptr, *first_ = nullptr, *last_ = nullptr;
};
SharedMemory shared_memory_pages[kMaxCluster];  // of each block

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
    for (const SharedMemory& pages : shared_memory_pages) {
      if (pages.guards(info->si_addr)) fail("an access past the shared memory");
    }
    sigaction(SIGSEGV, &before_, nullptr);  // and the instruction faults again
  }
  static inline struct sigaction before_;
};

std::set<const void*> launched;

void start(int index) {
  unsigned char* top = cluster.stacks + (static_cast<size_t>(index) + 1) * kStackBytes;
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;                               // alignment: at entry rsp + 8 is a multiple of 16
  *--sp = reinterpret_cast<void*>(&fiber_main);  // where the switch returns to
  for (int i = 0; i < 6; ++i) *--sp = nullptr;   // saved registers
  Fiber& fiber = cluster.fibers[index];
  fiber.stack_pointer = sp;
  fiber.done = false;
  fiber.copies.clear();
  fiber.group = 0;
  cluster.ready.push_back(index);
}

// The block `at` becomes the next one of the cluster.
void add_block(dim3 grid, dim3 size, uint3 at, size_t shared_bytes) {
  const int threads = static_cast<int>(size.x * size.y * size.z), rank = cluster.size / threads;
  cluster.block_size = threads;
  Block& block = cluster.blocks[rank];
  block.index = at;
  block.alive = threads;
  block.predicates = block.counted = 0;
  for (Barrier& barrier : block.barriers) {
    barrier.waiting.clear();
    barrier.arrived = 0;
    barrier.any = false;
  }
  unsigned char* shared = shared_memory_pages[rank].of(shared_bytes);
  shared_memory_pages[rank].fill();
  const int warps = (threads + 31) / 32, warpgroups = (threads + 127) / 128;
  for (int i = 0; i < threads; ++i) {
    const unsigned u = static_cast<unsigned>(i);
    Thread& thread = cluster.fibers[cluster.size + i].thread;
    thread = {{u % size.x, u / size.x % size.y, u / (size.x * size.y)}, at, size, grid, i, shared};
    thread.rank = rank;
    thread.warp = rank * warps + i / 32;
    thread.warpgroup = rank * warpgroups + i / 128;
    start(cluster.size + i);
  }
  for (int w = 0; w < warps; ++w) {
    cluster.warps[rank * warps + w].arrived = 0;
    cluster.warps[rank * warps + w].size = std::min(32, threads - 32 * w);
  }
  for (int w = 0; w < warpgroups; ++w) {
    cluster.warpgroups[rank * warpgroups + w].arrived = 0;
    cluster.warpgroups[rank * warpgroups + w].size = std::min(128, threads - 128 * w);
  }
  cluster.size += threads;
  cluster.alive += threads;
}

// Which of the ready threads is next, drawn at random. One warp, or a warpgroup or a block, is held back for a while:
// no thread may rely on others being equally fast.
size_t pick_ready() {
  static int held_back = 0, held_size = kWarp;
  static uint64_t held_for = 1;  // draws, on average: from a few steps of a block to more than a phase of a kernel
  if (next_random() % held_for == 0) {
    held_for = std::array{512, 8192, 65536}[next_random() % 3];
    held_size = std::array{kWarp, 128, cluster.block_size}[next_random() % 3];
    held_back = static_cast<int>(next_random() % ((cluster.size + held_size - 1) / held_size));
  }
  size_t pick = next_random() % cluster.ready.size();
  for (int i = 0; i < 16 && cluster.ready[pick] / held_size == held_back; ++i) pick = (pick + 1) % cluster.ready.size();
  return pick;
}

void run_cluster(int blocks) {
  const Block* where = &cluster.blocks[0];  // the first block unless it is known better
  while (cluster.failure.empty()) {
    const bool idle = cluster.ready.empty();
    if ((idle || next_random() % 64 == 0) && asynchronous::has_copies(idle)) {
      asynchronous::end_a_copy(idle);
      continue;
    }
    if (idle) break;
    const size_t pick = pick_ready();
    cluster.running = cluster.ready[pick];
    cluster.ready[pick] = cluster.ready.back();
    cluster.ready.pop_back();
    current = &cluster.fibers[cluster.running].thread;
    kimi_switch_fiber(&cluster.scheduler_stack_pointer, cluster.fibers[cluster.running].stack_pointer);
    if (!cluster.failure.empty()) where = &own_block();
  }
  current = nullptr;
  if (cluster.failure.empty() && cluster.alive > 0) {
    cluster.failure =
        "deadlock: " + std::to_string(cluster.alive) + " of " + std::to_string(cluster.size) + " threads wait for ever";
  }
  for (int rank = 0; rank < blocks; ++rank) {
    if (cluster.failure.empty() && !shared_memory_pages[rank].pattern_stands()) {
      cluster.failure = "a write outside the shared memory";
      where = &cluster.blocks[rank];
    }
  }
  if (!cluster.failure.empty()) {
    const uint3 at = where->index;
    const std::string text = "emulator: " + cluster.failure + " in block " + std::to_string(at.x) + ", " +
                             std::to_string(at.y) + ", " + std::to_string(at.z);
    cluster.failure.clear();
    throw Error(text);
  }
}

}  // namespace

uint64_t next_random() {
  cluster.random ^= cluster.random << 13;
  cluster.random ^= cluster.random >> 7;
  cluster.random ^= cluster.random << 17;
  return cluster.random;
}

void fail(const char* what) {
  note_failure(std::string(what) + ", thread " + std::to_string(current->linear));
  wait();
  __builtin_unreachable();
}

void note_failure(const std::string& what) {
  if (cluster.failure.empty()) cluster.failure = what;
}

void run_grid(dim3 grid, dim3 size, unsigned cluster_blocks, size_t shared_bytes, const std::function<void()>& body) {
  if (cluster.stacks == nullptr) {
    void* p = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    KIMI_CHECK(p != MAP_FAILED, "no memory for the stacks");
    cluster.stacks = static_cast<unsigned char*>(p);
  }
  KIMI_CHECK(cluster_blocks > 0 && cluster_blocks <= kMaxCluster && grid.x % cluster_blocks == 0, "clusters of ",
             cluster_blocks, " blocks in a grid of ", grid.x);
  KIMI_CHECK(size.x * size.y * size.z * cluster_blocks <= kMaxThreads, "too many threads in a cluster");
  cluster.body = &body;
  const FaultHandler handler;
  // Clusters come in any order: from a random one on, in steps that share no factor with their number.
  const unsigned width = grid.x / cluster_blocks;
  const uint64_t count = uint64_t{width} * grid.y * grid.z;
  uint64_t step = count > 0 ? next_random() % count : 0;
  while (std::gcd(step, count) > 1) ++step;
  uint64_t at = next_random() % std::max<uint64_t>(count, 1);
  for (uint64_t i = 0; i < count; ++i, at = (at + step) % count) {
    cluster.size = cluster.alive = 0;
    cluster.ready.clear();
    cluster.barrier.waiting.clear();
    asynchronous::reset();
    for (unsigned rank = 0; rank < cluster_blocks; ++rank) {
      add_block(grid, size,
                {static_cast<unsigned>(at % width) * cluster_blocks + rank, static_cast<unsigned>(at / width % grid.y),
                 static_cast<unsigned>(at / width / grid.y)},
                shared_bytes);
    }
    run_cluster(static_cast<int>(cluster_blocks));
  }
}

void note_launch(const void* kernel) {
  launched.insert(kernel);
}

void block_barrier(int id, int threads) {
  block_barrier_or(id, threads, false);
}

namespace {

Barrier& named_barrier(int id, int threads) {
  Barrier& barrier = own_block().barriers[id];
  if ((barrier.arrived > 0 || !barrier.waiting.empty()) && barrier.expected != threads)
    fail("a barrier with two different thread counts");
  barrier.expected = threads;
  return barrier;
}

}  // namespace

void block_barrier_arrive(int id, int threads) {
  Barrier& barrier = named_barrier(id, threads);
  ++barrier.arrived;
  release_if_complete(barrier, own_block().alive);
  // Others may go on first: what this thread does next is not ordered before them.
  cluster.ready.push_back(cluster.running);
  wait();
}

bool block_barrier_or(int id, int threads, bool predicate) {
  Barrier& barrier = named_barrier(id, threads);
  barrier.any |= predicate;
  barrier.waiting.push_back(cluster.running);
  release_if_complete(barrier, own_block().alive);
  wait();
  return cluster.fibers[cluster.running].vote;
}

void cluster_barrier() {
  cluster.barrier.waiting.push_back(cluster.running);
  release_if_complete(cluster.barrier, cluster.alive);
  wait();
}

int block_count(bool predicate) {
  Block& block = own_block();
  if (block.counted == block.alive) block.predicates = block.counted = 0;  // the first thread of the next count
  block.predicates += predicate;
  ++block.counted;
  block_barrier(0, 0);
  const int count = block.predicates;
  block_barrier(0, 0);
  return count;
}

namespace {

void collective(Collective& group, int size, int lane, void* argument, void (*combine)(void* const*)) {
  if (group.arrived > 0 && group.combine != combine) {
    fail(size == 32 ? "lanes of a warp are at different collectives" : "a warpgroup is at different collectives");
  }
  group.combine = combine;
  group.arguments[lane] = argument;
  if (++group.arrived < size) return wait();
  group.arrived = 0;
  combine(group.arguments);
  // The order after a collective is drawn anew.
  for (int i = 0; i < size; ++i) cluster.ready.push_back(cluster.running - lane + i);
  wait();
}

}  // namespace

void warp_collective(void* argument, void (*combine)(void* const*)) {
  Collective& warp = cluster.warps[current->warp];
  if (warp.size != 32) fail("a warp collective in a warp of fewer than 32 threads");
  collective(warp, 32, current->linear % 32, argument, combine);
}

void warpgroup_collective(void* argument, void (*combine)(void* const*)) {
  Collective& warpgroup = cluster.warpgroups[current->warpgroup];
  if (warpgroup.size != 128) fail("a warpgroup of fewer than 128 threads");
  collective(warpgroup, 128, current->linear % 128, argument, combine);
}

int running_thread() {
  return cluster.running;
}
void sleep() {
  wait();
}
void wake(int thread) {
  cluster.ready.push_back(thread);
}

int cluster_blocks() {
  return cluster.size / static_cast<int>(current->block_size.x * current->block_size.y * current->block_size.z);
}
bool has_ended(int rank) {
  return cluster.blocks[rank].alive == 0;
}

uint32_t shared_address(const void* shared) {
  const SharedMemory& pages = shared_memory_pages[current->rank];
  if (!pages.holds(shared, 1)) fail("a shared-memory address outside the block's");
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - pages.first()) + kSharedBase;
}
unsigned char* shared_pointer(int rank, uint32_t address, size_t bytes) {
  unsigned char* p = shared_memory_pages[rank].first() + (static_cast<int64_t>(address) - kSharedBase);
  return address >= kSharedBase && shared_memory_pages[rank].holds(p, bytes) ? p : nullptr;
}

void copy_async(void* shared, const void* global, size_t bytes, bool valid) {
  const auto is_aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if (!is_aligned(shared) || (valid && !is_aligned(global))) fail("cp.async to or from a misaligned address");
  Fiber& self = cluster.fibers[cluster.running];
  std::memset(shared, 0xff, bytes);
  self.copies.push_back({shared, global, bytes, valid, self.group});
}

void copy_async_commit() {
  ++cluster.fibers[cluster.running].group;
}

std::vector<Copy> take_copies() {
  return std::exchange(cluster.fibers[cluster.running].copies, {});
}

void finish(const Copy& copy) {
  if (copy.valid)
    std::memcpy(copy.to, copy.from, copy.bytes);
  else
    std::memset(copy.to, 0, copy.bytes);
}

void copy_async_wait(int newest_groups_left) {
  Fiber& self = cluster.fibers[cluster.running];
  const int last = self.group - 1 - newest_groups_left;
  size_t kept = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group > last)
      self.copies[kept++] = copy;
    else
      finish(copy);
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
