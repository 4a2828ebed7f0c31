#include "asynchronous.h"

#include <cuda_fp16.h>

#include <array>
#include <deque>
#include <map>
#include <vector>

namespace kimi::emulator {
namespace {

constexpr int kWarpgroup = 128;
// Numbers rather than NaN, from which a kernel that looks for overflows recovers unnoticed.
constexpr float kPoison = -1234.5f;
constexpr int kPoisonByte = 0x5a;  // 203 in fp16
constexpr uint64_t kSignature = 0x7265697272616221;

// ---- mbarrier and bulk copies
// ----------------------------------------------------------------------------------------

struct MBarrier {
  int expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;    // still to come in this phase
  int initialised = 0;  // by this thread
  bool fenced = false;  // and others may see it
  std::vector<int> waiting;
};

struct BulkCopy {
  bool late;  // ends only when nothing else can go on
  int rank;
  uint32_t to, barrier, bytes;  // shared-memory addresses
  const void* from;
  std::vector<Copy> of_thread = {};  // or these, all together, which arrive at the barrier
  std::vector<Copy> box = {};        // or these, `bytes` of them
};

std::map<std::pair<int, uint32_t>, MBarrier> barriers;  // by rank and address
std::deque<BulkCopy> bulk_copies;

// What a thread has not waited for.
struct TensorStores {
  std::vector<Copy> copies;                 // those that have not read shared memory yet
  bool under_way = false, in_group = true;  // whether there are any; whether all are in a group
};
std::map<int, TensorStores> tensor_stores;  // by thread

uint32_t bytes_of(const cuda::TensorShape& shape) {
  return 2 * shape.tokens_of_box * static_cast<uint32_t>(shape.channels);
}
// Of a box, by 16 bytes: `shared` its place there. The swizzle is one of addresses: of rows through all of the box.
std::vector<Copy> copies_of(unsigned char* shared, const cuda::TensorShape& shape, int head, int token, bool store) {
  const uint32_t place = shared_address(shared);
  if (place % (shape.swizzled ? 1024 : 128) != 0) fail("a box of a tensor at a misaligned address");
  if (shared_pointer(current->rank, place, bytes_of(shape)) == nullptr)
    fail("a box of a tensor past the shared memory");
  if (head < 0 || token < 0 || head >= shape.heads) fail("a box outside its tensor");
  std::vector<Copy> copies;
  for (int piece = 0; piece < shape.channels / shape.piece; ++piece) {
    for (int row = 0; row < shape.tokens_of_box; ++row) {
      for (int i = 0; i < shape.piece / 8; ++i) {
        const int row_of_box = piece * shape.tokens_of_box + row;
        unsigned char* const here =
            shared + 2 * shape.piece * row_of_box + (shape.swizzled ? i ^ row_of_box % 8 : i) * 16;
        const auto* const there =
            static_cast<const unsigned char*>(shape.data) +
            2 * (shape.piece * piece + 8 * i + head * shape.head_stride + (token + row) * shape.token_stride);
        const bool inside = token + row < shape.tokens;
        if (!store)
          copies.push_back({here, there, 16, inside, 0});
        else if (inside)
          copies.push_back({const_cast<unsigned char*>(there), here, 16, true, 0});
      }
    }
  }
  return copies;
}

// null, with a failure noted, where there is none.
MBarrier* find_barrier(int rank, uint32_t address) {
  const auto found = barriers.find({rank, address});
  const unsigned char* place = shared_pointer(rank, address, sizeof kSignature);
  if (found == barriers.end()) {
    note_failure("an mbarrier that nobody initialised");
  } else if (std::memcmp(place, &kSignature, sizeof kSignature) != 0) {
    note_failure("an mbarrier that was overwritten");
  } else if (!found->second.fenced && (current == nullptr || running_thread() != found->second.initialised)) {
    note_failure("an mbarrier is used without a fence after its initialisation");
  } else {
    return &found->second;
  }
  return nullptr;
}

void end_phase_if_complete(MBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  barrier.phase ^= 1;
  for (int thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

void stop_here() {
  sleep();
  __builtin_unreachable();
}

MBarrier& need_barrier(int rank, const uint64_t* barrier) {
  if (rank >= 0 && rank != current->rank && has_ended(rank)) fail("an mbarrier of a block that has ended");
  MBarrier* found = find_barrier(rank < 0 ? current->rank : rank, shared_address(barrier));
  if (found == nullptr) stop_here();
  return *found;
}

// ---- wgmma
// -----------------------------------------------------------------------------------------------------------

// Accumulators that products are under way to: their values, which the threads do not see yet.
struct Accumulators {
  std::array<float*, kWarpgroup> registers;
  int tiles, last_group;
  std::vector<float> values;  // [thread][tile][4]
};

struct PendingProduct {
  std::array<std::array<uint32_t, 4>, kWarpgroup> a;
  Product shape;
  int accumulators, group;  // their number
};

struct Warpgroup {
  std::map<int, Accumulators> accumulators;  // by a number of their own
  int next_number = 0;
  std::deque<PendingProduct> products;  // not computed yet
};

struct ThreadState {
  bool fenced = false;
  int group = 0, complete = 0;  // the group that is open; those before `complete` are waited for
  bool open = false;            // has products that are not committed
};

std::map<int, Warpgroup> warpgroups;
std::map<int, ThreadState> states;

struct Descriptor {
  uint32_t start, leading, stride;
  int swizzle;  // bytes: 0, 32, 64 or 128
};

bool decode(uint64_t bits, Descriptor& d) {
  const uint64_t kFields = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
  d.start = static_cast<uint32_t>(bits & 0x3fff) << 4;
  d.leading = static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4;
  d.stride = static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4;
  d.swizzle = std::array{0, 128, 64, 32}[bits >> 62];
  return (bits & ~kFields) == 0 && (bits >> 49 & 7) == 0;
}

// Where element (k, n) of the operand lies: the canonical layouts of the PTX ISA for 16-bit elements.
uint32_t place(const Descriptor& d, bool mn_major, int k, int n) {
  const uint32_t row = mn_major ? k : n, column = mn_major ? n : k;  // `column` is contiguous
  if (d.swizzle == 0) {  // matrices of 8 rows of 16 bytes, 128 bytes in a row
    const uint32_t across = mn_major ? d.stride : d.leading, down = mn_major ? d.leading : d.stride;
    return d.start + row / 8 * down + row % 8 * 16 + column / 8 * across + column % 8 * 2;
  }
  const uint32_t width = d.swizzle;
  uint32_t at = d.start + row / 8 * d.stride + row % 8 * width + column * 2 % width;
  if (mn_major) at += column * 2 / width * d.leading;
  return at ^ ((at >> 7) & (width / 16 - 1)) << 4;
}

bool compute(Warpgroup& warpgroup, const PendingProduct& product, int rank) {
  Descriptor d;
  const int tiles = product.shape.tiles;
  if (!decode(product.shape.b, d)) {
    note_failure("a matrix descriptor with bits that mean nothing, or a base offset");
    return false;
  }
  std::vector<double> b(16 * 8 * tiles);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < 8 * tiles; ++n) {
      const unsigned char* from = shared_pointer(rank, place(d, product.shape.mn_major, k, n), 2);
      if (from == nullptr) {
        note_failure("a matrix descriptor that leads out of the shared memory");
        return false;
      }
      __half x;
      std::memcpy(&x, from, 2);
      b[k * 8 * tiles + n] = __half2float(x);
    }
  }
  double a[64][16];
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        const uint16_t bits = static_cast<uint16_t>(product.a[thread][i] >> 16 * half);
        a[row + i % 2 * 8][2 * t + half + i / 2 * 8] = __half2float(kimi_bits<__half>(bits));
      }
    }
  }
  if (product.shape.a_shared) {
    Descriptor left;
    if (!decode(product.shape.a_descriptor, left)) {
      note_failure("a matrix descriptor with bits that mean nothing, or a base offset");
      return false;
    }
    for (int row = 0; row < 64; ++row) {
      for (int k = 0; k < 16; ++k) {
        const unsigned char* from = shared_pointer(rank, place(left, false, k, row), 2);
        if (from == nullptr) {
          note_failure("a matrix descriptor that leads out of the shared memory");
          return false;
        }
        __half x;
        std::memcpy(&x, from, 2);
        a[row][k] = __half2float(x);
      }
    }
  }
  Accumulators& to = warpgroup.accumulators.at(product.accumulators);
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (int tile = 0; tile < tiles; ++tile) {
      for (int i = 0; i < 4; ++i) {
        float& value = to.values[(static_cast<size_t>(thread) * tiles + tile) * 4 + i];
        const int n = 8 * tile + 2 * t + i % 2;
        double sum = product.shape.accumulate ? value : 0.0;
        for (int k = 0; k < 16; ++k) sum += a[row + i / 2 * 8][k] * b[k * 8 * tiles + n];
        value = static_cast<float>(sum);
      }
    }
  }
  return true;
}

// Computes, in order, the products of the groups before `end`.
void compute_before(Warpgroup& warpgroup, int end, int rank) {
  while (!warpgroup.products.empty() && warpgroup.products.front().group < end) {
    if (!compute(warpgroup, warpgroup.products.front(), rank)) return;
    warpgroup.products.pop_front();
  }
}

// The accumulators of the threads' next product; -1, with a failure noted, if some are under way in another shape.
int find_accumulators(Warpgroup& warpgroup, const Product* const* threads, int group) {
  const int tiles = threads[0]->tiles;
  for (auto& [number, other] : warpgroup.accumulators) {
    if (other.registers[0] == threads[0]->d && other.tiles == tiles) {
      other.last_group = group;
      return number;
    }
    if (threads[0]->d < other.registers[0] + 4 * other.tiles && other.registers[0] < threads[0]->d + 4 * tiles) {
      note_failure("accumulators of wgmma that are under way in another shape");
      return -1;
    }
  }
  Accumulators next{{}, tiles, group, std::vector<float>(kWarpgroup * 4 * tiles)};
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    next.registers[thread] = threads[thread]->d;
    std::copy_n(threads[thread]->d, 4 * tiles, &next.values[static_cast<size_t>(thread) * 4 * tiles]);
    std::fill_n(threads[thread]->d, 4 * tiles, kPoison);
  }
  warpgroup.accumulators.emplace(warpgroup.next_number, std::move(next));
  return warpgroup.next_number++;
}

struct WgmmaCall {
  const Product* product;
  int thread, rank, warpgroup;
  bool good;
};

void issue(void* const* arguments) {
  WgmmaCall* const* calls = reinterpret_cast<WgmmaCall* const*>(arguments);
  const WgmmaCall& first = *calls[0];
  Warpgroup& warpgroup = warpgroups[first.warpgroup];
  const ThreadState& state = states[first.thread];
  const Product* products[kWarpgroup];
  for (int i = 0; i < kWarpgroup; ++i) {
    const Product &x = *calls[i]->product, &y = *first.product;
    products[i] = &x;
    calls[i]->good = false;
    const ThreadState& other = states[calls[i]->thread];
    if (x.b != y.b || x.tiles != y.tiles || x.mn_major != y.mn_major || x.accumulate != y.accumulate ||
        x.a_shared != y.a_shared || x.a_descriptor != y.a_descriptor)
      return note_failure("the threads of a warpgroup do not agree about a wgmma");
    if (!other.fenced) return note_failure("wgmma without a fence since the last wait");
    if (other.group != state.group || other.complete != state.complete)
      return note_failure("the threads of a warpgroup have different groups of wgmma");
  }
  // Forget what everybody has waited for.
  std::erase_if(warpgroup.accumulators, [&](const auto& x) { return x.second.last_group < state.complete; });
  PendingProduct next{{}, *first.product, find_accumulators(warpgroup, products, state.group), state.group};
  if (next.accumulators < 0) return;
  for (int i = 0; i < kWarpgroup; ++i) std::copy_n(products[i]->a, 4, next.a[i].begin());
  warpgroup.products.push_back(next);
  if (next_random() % 2 == 0) compute_before(warpgroup, state.group + 1, first.rank);
  for (int i = 0; i < kWarpgroup; ++i) {
    calls[i]->good = true;
    states[calls[i]->thread].open = true;
  }
}

}  // namespace

namespace asynchronous {

void reset() {
  barriers.clear();
  bulk_copies.clear();
  warpgroups.clear();
  states.clear();
  tensor_stores.clear();
}

void at_return() {
  const ThreadState& state = states[running_thread()];
  if (state.open || state.complete < state.group) fail("a thread that returns while its wgmma is under way");
  if (tensor_stores[running_thread()].under_way) fail("a thread that returns while its stores are under way");
}

bool has_copies(bool idle) {
  return std::any_of(bulk_copies.begin(), bulk_copies.end(), [&](const BulkCopy& copy) { return idle || !copy.late; });
}

void end_a_copy(bool idle) {
  size_t pick = next_random() % bulk_copies.size();
  while (!idle && bulk_copies[pick].late) pick = (pick + 1) % bulk_copies.size();
  std::swap(bulk_copies[pick], bulk_copies.back());
  const BulkCopy copy = bulk_copies.back();
  bulk_copies.pop_back();
  if (has_ended(copy.rank)) return note_failure("a bulk copy into the shared memory of a block that has ended");
  if (copy.from != nullptr) std::memcpy(shared_pointer(copy.rank, copy.to, copy.bytes), copy.from, copy.bytes);
  for (const Copy& part : copy.box) finish(part);
  for (const Copy& part : copy.of_thread) finish(part);
  if (MBarrier* barrier = find_barrier(copy.rank, copy.barrier)) {
    barrier->bytes -= copy.bytes;
    if (copy.bytes == 0) {
      if (barrier->pending == 0) return note_failure("more arrivals at an mbarrier than it expects");
      --barrier->pending;
    }
    end_phase_if_complete(*barrier);
  }
}

}  // namespace asynchronous

void mbarrier_init(uint64_t* barrier, int arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) fail("an mbarrier at a misaligned address");
  *barrier = kSignature;
  barriers[{current->rank, shared_address(barrier)}] = {arrivals, arrivals, 0, 0, running_thread(), false, {}};
}

void mbarrier_init_fence() {
  for (auto& [place, barrier] : barriers) {
    if (barrier.initialised == running_thread()) barrier.fenced = true;
  }
}

void mbarrier_arrive(uint64_t* barrier, int rank, uint32_t expected_bytes) {
  MBarrier& b = need_barrier(rank, barrier);
  if (b.pending == 0) fail("more arrivals at an mbarrier than it expects");
  b.bytes += expected_bytes;
  --b.pending;
  end_phase_if_complete(b);
}

void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  need_barrier(-1, barrier).bytes += bytes;
}

void mbarrier_wait(uint64_t* barrier, int parity) {
  while (need_barrier(-1, barrier).phase == parity) {
    need_barrier(-1, barrier).waiting.push_back(running_thread());
    sleep();
  }
}

void mbarrier_arrive_after_copies(uint64_t* barrier) {
  need_barrier(-1, barrier);
  bulk_copies.push_back({next_random() % 2 == 0, current->rank, 0, shared_address(barrier), 0, nullptr, take_copies()});
}

void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, unsigned blocks) {
  const uintptr_t places = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes;
  if (places % 16 != 0 || bytes == 0) fail("a bulk copy that is not of multiples of 16 bytes");
  const uint32_t to = shared_address(shared), at = shared_address(barrier);
  for (int rank = 0; blocks >> rank != 0; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    if (rank >= cluster_blocks()) fail("a bulk copy to a block that is not in the cluster");
    unsigned char* place = shared_pointer(rank, to, bytes);
    if (place == nullptr) fail("a bulk copy past the shared memory");
    if (has_ended(rank)) fail("a bulk copy to a block that has ended");
    const MBarrier* counter = find_barrier(rank, at);
    if (counter == nullptr) stop_here();
    if (!counter->fenced) fail("a bulk copy with an mbarrier that nobody fenced after its initialisation");
    std::memset(place, kPoisonByte, bytes);
    bulk_copies.push_back({next_random() % 2 == 0, rank, to, at, bytes, global});
  }
}

void tensor_copy(void* shared, const cuda::TensorShape& shape, int head, int token, uint64_t* barrier) {
  if (!need_barrier(-1, barrier).fenced)
    fail("a bulk copy with an mbarrier that nobody fenced after its initialisation");
  const uint32_t bytes = bytes_of(shape);
  auto copies = copies_of(static_cast<unsigned char*>(shared), shape, head, token, false);
  std::memset(shared, kPoisonByte, bytes);
  bulk_copies.push_back({next_random() % 2 == 0,
                         current->rank,
                         shared_address(shared),
                         shared_address(barrier),
                         bytes,
                         nullptr,
                         {},
                         std::move(copies)});
}

void tensor_store(const void* shared, const cuda::TensorShape& shape, int head, int token) {
  auto copies = copies_of(static_cast<unsigned char*>(const_cast<void*>(shared)), shape, head, token, true);
  TensorStores& stores = tensor_stores[running_thread()];
  stores.under_way = true;
  stores.in_group = false;
  if (next_random() % 2 == 0) {
    for (const Copy& part : copies) finish(part);  // at once
  } else {
    stores.copies.insert(stores.copies.end(), copies.begin(), copies.end());
  }
}

void tensor_store_commit() {
  tensor_stores[running_thread()].in_group = true;
}

void tensor_store_wait_read() {
  TensorStores& stores = tensor_stores[running_thread()];
  if (!stores.in_group) fail("a wait for stores that are in no group");
  for (const Copy& part : stores.copies) finish(part);
  stores = {};
}

void wgmma(const Product& product) {
  WgmmaCall call{&product, running_thread(), current->rank, current->warpgroup, false};
  warpgroup_collective(&call, issue);
  if (!call.good) stop_here();
}

void wgmma_fence() {
  states[running_thread()].fenced = true;
}

void wgmma_commit() {
  ThreadState& state = states[running_thread()];
  ++state.group;
  state.open = false;
}

void wgmma_wait(int newest_groups_left) {
  ThreadState& state = states[running_thread()];
  state.complete = std::max(state.complete, state.group - newest_groups_left);
  state.fenced = false;
  Warpgroup& warpgroup = warpgroups[current->warpgroup];
  compute_before(warpgroup, state.complete, current->rank);
  const int thread = current->linear % kWarpgroup;
  for (auto& [number, x] : warpgroup.accumulators) {
    if (x.last_group >= state.complete || x.registers[thread] == nullptr) continue;
    float* registers = x.registers[thread];
    if (!std::all_of(registers, registers + 4 * x.tiles, [](float value) { return value == kPoison; }))
      fail("accumulators of wgmma that were written while it was under way");
    std::copy_n(&x.values[static_cast<size_t>(thread) * 4 * x.tiles], 4 * x.tiles, registers);
    x.registers[thread] = nullptr;
  }
}

}  // namespace kimi::emulator
