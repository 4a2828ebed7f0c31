// Both kernels of the chunked path in one, on Hopper, for where there are heads enough to fill the chip: the images
// never leave shared memory.
//
// A block has a multiprocessor and takes one head of a sequence after the other. Eight warps make the image of a chunk
// but for T (prep.cuh, phases 1 to 4), and a warpgroup makes T of the one before and takes the state through it (as
// chain_sm90.cuh does, but it has all values: S in fp16 is in shared memory, and the values go one tile of 64 after the
// other). T is the second half's because that waits for the first one, and four warps are enough for it. There is one
// image: the second half reads it, and what T is made of, while the first one makes the next chunk's gates. Where
// chunks are whole, the copy engine brings q, k, gates and values and takes the output away. The first half goes on to
// the next head while the second one ends this one.
//
// While its first inputs come, the first half rehearses (rehearsal_of() below): its code comes from memory too.
//
// The products are those of the two kernels, in the same order: the same bits.
//
// Bytes: 80 KB a chunk at K = V = 128, instead of 212 with images in memory. Time: the first half's.
#pragma once

#include "cuda/kda_prefill/careful_sm90.cuh"
#include "cuda/kda_prefill/prep.cuh"

namespace kimi::cuda {

// The tensors, by boxes of a chunk.
struct WholeMaps {
  TensorMap q, k, g, v, out;
};

// When the blocks begin. Two neighbouring multiprocessors (of a TPC: blocks 2 n and 2 n + 1) share the way that
// instructions come by, of which this kernel has too many for the nearest cache: they had better do the same at the
// same time. All others had better not: when all states come and go at once, memory takes half as long again. So each
// of eight pairs begins a bit later than the one before; and where some blocks have a head fewer than others, those
// begin late, and are spread over the chip.
struct WholeStart {
  int step;             // between neighbouring pairs, in cycles
  int late, late_from;  // what the blocks of the places from late_from on wait instead
};

// Of the block among all: the number of its first task. The order of pairs is such that the last places are all over
// the chip, for neighbours in number are neighbours there.
__device__ __forceinline__ int place_of_block() {
  const int pairs = static_cast<int>(gridDim.x / 2), pair = static_cast<int>(blockIdx.x / 2), part = pair % 4;
  if (pair == pairs) return static_cast<int>(blockIdx.x);  // the last one of an odd number
  return 2 * (part * (pairs / 4) + min(part, pairs % 4) + pair / 4) + static_cast<int>(blockIdx.x % 2);
}
__device__ __forceinline__ int cycles_to_start(const WholeStart& start, int place) {
  return place >= start.late_from ? start.late : static_cast<int>(blockIdx.x / 2 % 8) * start.step;
}

// What the first half has next; no tokens at the end.
struct alignas(16) PrepWork {
  int first_token, count, head, qk_head;
  const char* beta;  // of the first token, for PrepInputs::load_beta()
  int is_box;        // the copy engine brings it
};

// A task: a head of a sequence.
struct WholeTask {
  int number, sequence, head, begin, end, slot;
};

// The warp that looks ahead: the next chunk's task and first token, and the task after it.
struct PrepAhead {
  WholeTask task, next;
  int first_token, qk_head;
};

template <int K, int V>
struct WholeShared {
  SwizzledRows v[V / 64];  // tiles of 64 values; then the output
  struct alignas(512) {    // as the swizzle of the factors wants it
    ChunkImageSm90<K, true> image;
  } image;
  SharedState<K> state[V / 64];
  alignas(128) PrepShared<K> prep;
  alignas(128) uint4 gate_rows[kChunk][K / 8];  // as they are in memory
  alignas(16) float bias[K];                    // of the gates
  alignas(16) float ones[K];
  float rate;
  PrepWork work;
  PrepAhead ahead;
  WholeTask chain, chain_next;  // what the second half is at
  int boxes;                    // of values, in front of that
  // Barriers that count bytes: gates, with the work that they are for; q and k; values.
  uint64_t gates, keys, values;
};

// Barriers, beside those of the first half and of the warpgroup: the image is there but for T; all have read it; T is
// made. At the latter two the second half arrives once before all chunks too, and the first half comes once behind
// them.
inline constexpr int kFullBarrier = 4, kFreeBarrier = 5, kSolvedBarrier = 6;
// The first inputs of the first half are on their way, before the second half asks for its first state.
inline constexpr int kStartedBarrier = 7;

template <int V>
inline constexpr int kWholeThreads = kPrepThreads + kWarpgroup;

// What the second half reads of a chunk.
template <int K>
struct WholeStage {
  const ChunkFactorsSm90<K>& factors;
  const ChunkHeaderSm90<K>& header;
  SwizzledRows& v;
};

// x in shared memory, for the compiler to read it anew: in registers of a loop it would be spilled.
__device__ __forceinline__ int read_anew(const int& x) {
  return *const_cast<const volatile int*>(&x);
}

// Whether a task of this sequence is behind the last one.
__device__ __forceinline__ bool is_behind_last(const KdaPrefillParams& p, int sequence) {
  return sequence >= static_cast<int>(p.num_sequences);
}

// Starts the loads of a task, by one thread, for take_task().
__device__ __forceinline__ void load_task(const KdaPrefillParams& p, int number, WholeTask& task) {
  const int heads = static_cast<int>(p.num_value_heads), sequence = number / heads;
  task.number = number;
  task.sequence = sequence;
  task.head = number - sequence * heads;
  if (!is_behind_last(p, sequence)) {
    cp_async_4(&task.begin, p.cu_seqlens + sequence);
    cp_async_4(&task.end, p.cu_seqlens + sequence + 1);
    cp_async_4(&task.slot, p.slots + sequence);
  }
  cp_async_commit();
}
// The task whose loads were started, or an empty one behind the last; `next` is then on its way to the one after it.
__device__ __forceinline__ WholeTask take_task(const KdaPrefillParams& p, WholeTask& next) {
  cp_async_wait<0>();
  WholeTask task = next;
  if (is_behind_last(p, task.sequence))
    task.begin = task.end = 0;
  else
    load_task(p, task.number + static_cast<int>(gridDim.x), next);
  return task;
}

// What the first half does between the phases of a chunk, the block's `number`-th.
template <typename T, int K, int V>
struct BetweenWholePhases {
  static constexpr int kAhead = kGroups / 2;  // the warp that looks ahead: one that has no sums to add in phase 2

  const KdaPrefillParams& p;
  const Segment& segment;
  const WholeMaps& maps;
  const PrepLane& at;
  const int number;
  WholeShared<K, V>& shared;
  const PrepPart rehearsal = PrepPart::kAll;

  // A rehearsal: while the first inputs are on their way, each warp does one part of the work with whatever is in
  // shared memory, or with the first tokens, so that the code of all parts comes to the multiprocessor at the same
  // time, and not one piece after the other when it is needed (from memory, that takes as long as two chunks). What
  // these warps write, nobody reads before it is written again (which racecheck cannot know): the barrier at the end of
  // phase 1 is behind all rehearsals. Operands are for warps that write nothing where q and k are to land.
  __device__ __forceinline__ static PrepPart rehearsal_of(int group) {
    switch (group) {
      case 0:
        return PrepPart::kGates;
      case 2:
        return PrepPart::kFactors;
      case 3:
        return PrepPart::kOperands;
      case kAhead:
        return PrepPart::kAll;  // it starts the loads
      default:
        return PrepPart::kSystems;
    }
  }
  __device__ __forceinline__ PrepPart part() const { return rehearsal; }
  __device__ __forceinline__ bool is_rehearsal() const { return rehearsal != PrepPart::kAll; }
  // The second half only arrives there.
  __device__ __forceinline__ void sync_gates() {
    mbarrier_wait(&shared.keys, number & 1);
    barrier_sync(kSolvedBarrier, kWholeThreads<V>);
  }
  __device__ __forceinline__ void in_phase_2() {
    if (at.group == kAhead && at.lane == 0) start_gates();
  }
  __device__ __forceinline__ void before_image() { barrier_sync(kFreeBarrier, kWholeThreads<V>); }
  __device__ __forceinline__ void behind_image() {
    fence_proxy_async();  // for the products, and the copies that take the place of operands
    barrier_arrive(kFullBarrier, kWholeThreads<V>);
  }
  __device__ __forceinline__ void behind_phase_4() {
    if (at.group == kAhead) start_keys();
  }

  // Finds the next chunk of the block, and starts the copy of its gates, if it is a box.
  __device__ __forceinline__ void start_gates() {
    auto& ahead = shared.ahead;
    ahead.first_token += kChunk;
    if (ahead.first_token >= ahead.task.end) {
      do {
        ahead.task = take_task(p, ahead.next);
      } while (!is_behind_last(p, ahead.task.sequence) && (ahead.task.begin >= ahead.task.end || ahead.task.slot < 0));
      ahead.first_token = ahead.task.begin;
      ahead.qk_head = ahead.task.head;
      if (p.num_value_heads != p.num_heads)
        ahead.qk_head /= static_cast<int>(p.num_value_heads) / static_cast<int>(p.num_heads);
    }
    const int first_token = ahead.first_token, head = ahead.task.head;
    const int count = min(ahead.task.end - first_token, kChunk), is_box = segment.boxes && count == kChunk;
    if (is_box) {
      mbarrier_expect_tx(&shared.gates, sizeof(shared.gate_rows));
      tensor_copy(&shared.gate_rows, maps.g, head, first_token, &shared.gates);
    }
    const int64_t to_beta = first_token * int64_t{segment.beta_token_bytes} + head * segment.beta_head_bytes;
    shared.work = {first_token, count, head, ahead.qk_head, segment.beta + to_beta, is_box};
  }
  // And that of its q and k; the constants of the gates, if it is the first of a head. By the whole warp.
  __device__ __forceinline__ void start_keys() {
    if (at.lane == 0) {
      const PrepWork work = shared.work;
      if (work.is_box) {
        mbarrier_expect_tx(&shared.keys, 2 * sizeof(T) * kChunk * K);
        tensor_copy(&shared.prep.k_then_k_half, maps.k, work.qk_head, work.first_token, &shared.keys);
        tensor_copy(&shared.prep.q, maps.q, work.qk_head, work.first_token, &shared.keys);
      }
      mbarrier_arrive(&shared.keys);
    }
    __syncwarp();
    if (read_anew(shared.work.count) > 0 && read_anew(shared.work.first_token) == read_anew(shared.ahead.task.begin)) {
      PrepInputs<T, K, true> constants;
      constants.template load_constants<false>(at.lane, p, read_anew(shared.work.head));
      if (at.lane == 0) shared.rate = constants.rate;
      store_vec(&shared.bias[K / kWarp * at.lane], constants.bias);
    }
    mbarrier_arrive(&shared.gates);
  }
};

// The first half: all images but for T, one after the other.
template <typename T, int K, int V>
__device__ __forceinline__ void make_images(const KdaPrefillParams& p, const Segment& segment, const WholeMaps& maps,
                                            const WholeStart& start, WholeShared<K, V>& shared) {
  using Inputs = PrepInputs<T, K, true>;
  using Between = BetweenWholePhases<T, K, V>;
  {
    const PrepLane at(threadIdx.x);
    Between before_all{p, segment, maps, at, -1, shared};
    if (at.group == Between::kAhead) {
      if (at.lane == 0) {
        const int place = place_of_block();
        load_task(p, place, shared.ahead.next);
        wait_cycles(cycles_to_start(start, place));
        before_all.start_gates();
      }
      __syncwarp();
      before_all.start_keys();
      barrier_arrive(kStartedBarrier, kWarp + kWarpgroup);
    }
  }
  int number = 0;
  const bool rehearses = segment.boxes && !kRacecheck;
  PrepPart rehearsal = rehearses ? Between::rehearsal_of(static_cast<int>(threadIdx.x / kWarp)) : PrepPart::kAll;
#pragma unroll 1
  while (true) {
    if (rehearsal == PrepPart::kAll) mbarrier_wait(&shared.gates, number & 1);
    // A number that the compiler cannot see through: it would keep all addresses that depend on it alone, and spill.
    const PrepLane at(__shfl_sync(kFullWarp, static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.x)));
    PrepWork work{0, kChunk, 0, 0, segment.beta, 1};  // a rehearsal's: any would do
    if (rehearsal == PrepPart::kAll) work = shared.work;
    if (work.count == 0) break;
    PrepTask task;
    task.head = work.head;
    task.qk_head = work.qk_head;
    task.first_token = work.first_token;
    task.count = work.count;
    Inputs inputs;
    inputs.load_beta(
        p, work.beta + static_cast<unsigned>(Inputs::row_of(at, work.count)) * uint64_t{segment.beta_token_bytes});
    inputs.rate = shared.rate;
    inputs.bias = load_vec<float, Inputs::kChannels>(&shared.bias[Inputs::kChannels * at.lane]);
    uint4* const gate_rows = &shared.gate_rows[0][0];
    if (!work.is_box) [[unlikely]] {
      if (segment.wide_inputs) {
        Inputs::template copy_gates<true>(at, p, task, gate_rows);
        Inputs::template copy_keys<true>(at, p, task, shared.prep);
      } else {
        Inputs::template copy_gates<false>(at, p, task, gate_rows);
        Inputs::template copy_keys<false>(at, p, task, shared.prep);
      }
      cp_async_commit();
      cp_async_wait<0>();
      fence_proxy_async();  // for the next copy of gates
      __syncwarp();
    }
    inputs.take_gates(at, gate_rows);
    make_all_but_t(at, p, task, inputs, shared.prep, shared.image.image,
                   Between{p, segment, maps, at, number, shared, rehearsal});
    if (rehearsal == PrepPart::kAll) ++number;
    rehearsal = PrepPart::kAll;
  }
  barrier_sync(kSolvedBarrier, kWholeThreads<V>);
  barrier_sync(kFreeBarrier, kWholeThreads<V>);
}

// A warp of the second half has 16 tokens of all values, in rows of 64: lane l octet l % 8 of tokens l / 8 + 4 n.
struct RowLane {
  int token, octet;
  __device__ __forceinline__ explicit RowLane(unsigned thread)
      : token(static_cast<int>(thread / kWarp * 16 + thread % kWarp / 8)), octet(static_cast<int>(thread % 8)) {}
};

// 64 values of a chunk, the first of its first token at `values`, to shared memory. `length` tokens are left.
template <typename T>
__device__ __forceinline__ void copy_values(int thread, const T* values, int64_t token_stride, int length, bool wide,
                                            SwizzledRows& rows) {
  const RowLane at(thread);
  const T* from = values + at.token * token_stride + 8 * at.octet;
#pragma unroll 1
  for (int n = 0; n < 16; n += 4, from += 4 * token_stride)
    (&rows.octets[0][0])[SwizzledRows::place(at.token + n, at.octet)] = load_octet(from, wide, at.token + n < length);
}

// The output of such values to memory.
template <typename T>
__device__ __forceinline__ void write_out(int thread, const SwizzledRows& rows, int length, bool wide, T* out,
                                          int64_t token_stride) {
  const RowLane at(thread);
  T* to = out + at.token * token_stride + 8 * at.octet;
#pragma unroll 1
  for (int n = 0; n < 16; n += 4, to += 4 * token_stride) {
    if (at.token + n < length) store_octet(to, (&rows.octets[0][0])[SwizzledRows::place(at.token + n, at.octet)], wide);
  }
}

// To the L2 cache: the state of a task whose loads were started.
template <int K, int V>
__device__ __forceinline__ void prefetch_state(const KdaPrefillParams& p, int thread, const WholeTask& task) {
  const int slot = read_anew(task.slot);
  if (is_behind_last(p, read_anew(task.sequence)) || slot < 0) return;
  const char* const state =
      static_cast<const char*>(p.state) + (slot * p.state_slot_stride + read_anew(task.head) * (K * V)) * sizeof(float);
#pragma unroll
  for (int i = 0; i < K * V * static_cast<int>(sizeof(float)) / (128 * kWarpgroup); ++i)
    prefetch_l2(state + 128 * (i * kWarpgroup + thread));
}

// The second half, of a warp: its 16 values of each tile.
template <typename T, int K, int V>
__device__ __forceinline__ void run_states(const KdaPrefillParams& p, const Segment& segment, const WholeMaps& maps,
                                           WholeShared<K, V>& shared) {
  constexpr int kTiles = V / 64;
  ChainWarp<T, K, true> x[kTiles];
  int thread;
  // In each chunk anew: the compiler would keep all addresses that depend on it, and spill.
  const auto find_place = [&] {
    thread = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x - kPrepThreads), static_cast<int>(threadIdx.x));
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      x[i].shared_state = &shared.state[i];
      x[i].find_place(thread);
    }
  };
  const auto head = [&] { return read_anew(shared.chain.head); };
  const auto sequence = [&] { return read_anew(shared.chain.sequence); };
  const auto slot = [&] { return read_anew(shared.chain.slot); };
  const auto first_token = [&](int chunk) { return read_anew(shared.chain.begin) + chunk * kChunk; };
  const auto tokens_left = [&](int chunk) { return read_anew(shared.chain.end) - first_token(chunk); };
  const auto rows_of = [&](int of_slot, int tile) {
    return state_rows(p, segment.wide_state, of_slot, head(), 64 * tile + 16 * x[0].warp);
  };
  const auto load_states = [&](int from_slot, bool zeros) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) x[i].load(rows_of(from_slot, i), zeros);
  };
  const auto store_states = [&](int to_slot) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) x[i].store(rows_of(to_slot, i));
  };
  const auto out_of = [&](int chunk) {
    return static_cast<T*>(p.out) + first_token(chunk) * p.out_token_stride + head() * p.out_head_stride;
  };
  const auto is_box = [&](int chunk) { return segment.boxes && tokens_left(chunk) >= kChunk; };
  const auto write_all = [&](int chunk) {
    if (is_box(chunk)) {
      if (thread == 0) {
        tensor_store(&shared.v, maps.out, head(), first_token(chunk));
        tensor_store_commit();
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        write_out(thread, shared.v[i], tokens_left(chunk), segment.wide_out, out_of(chunk) + 64 * i,
                  p.out_token_stride);
    }
  };
  const auto stage_of = [&](int tile) {
    return WholeStage<K>{shared.image.image.factors, shared.image.image.header, shared.v[tile]};
  };

  find_place();
  if (thread == 0) load_task(p, place_of_block(), shared.chain_next);
  barrier_arrive(kSolvedBarrier, kWholeThreads<V>);
  barrier_arrive(kFreeBarrier, kWholeThreads<V>);
  barrier_sync(kStartedBarrier, kWarp + kWarpgroup);
#pragma unroll 1
  while (true) {
    find_place();
    if (thread == 0) {
      if (segment.boxes && shared.chain.slot >= 0) shared.boxes += (shared.chain.end - shared.chain.begin) / kChunk;
      shared.chain = take_task(p, shared.chain_next);
    }
    barrier_sync(kWarpgroupBarrier, kWarpgroup);
    if (is_behind_last(p, sequence())) break;
    if (tokens_left(0) > 0 && slot() < 0) {
      const int lane = x[0].lane;
#pragma unroll 1
      for (int token = lane / 2; token < tokens_left(0); token += kWarp / 2) {
        for (int i = 0; i < kTiles; ++i)
          store_octet(out_of(0) + token * p.out_token_stride + 64 * i + 16 * x[0].warp + 8 * (lane % 2),
                      make_uint4(0, 0, 0, 0), segment.wide_out);
      }
    }
    if (tokens_left(0) > 0 && slot() >= 0) {
      load_states(slot(), p.has_initial_state && !p.has_initial_state[sequence()]);
      int chunk = 0;
#pragma unroll 1
      for (; tokens_left(chunk) > 0; ++chunk) {
        find_place();
#pragma unroll
        for (int i = 0; i < kTiles; ++i) x[i].round_state();
        x[0].share_state();  // with a barrier: the output before is there too
        if (chunk > 0) write_all(chunk - 1);
        if (is_box(chunk)) {
          if (thread == 0) {
            tensor_store_wait_read();  // the output before, in the place of these values
            mbarrier_arrive_expect_tx(&shared.values, sizeof(shared.v));
            tensor_copy(&shared.v, maps.v, head(), first_token(chunk), &shared.values);
            cp_async_wait<0>();  // for prefetch_state()
          }
          mbarrier_wait(&shared.values, (read_anew(shared.boxes) + chunk) & 1);
        } else {
          if (thread == 0) {
            tensor_store_wait_read();
            cp_async_wait<0>();
          }
          barrier_sync(kWarpgroupBarrier, kWarpgroup);
#pragma unroll
          for (int i = 0; i < kTiles; ++i)
            copy_values(
                thread,
                static_cast<const T*>(p.v) + first_token(chunk) * p.v_token_stride + head() * p.v_head_stride + 64 * i,
                p.v_token_stride, tokens_left(chunk), segment.wide_inputs, shared.v[i]);
        }
        barrier_sync(kFullBarrier, kWholeThreads<V>);
        make_t(PrepLane(thread), shared.prep, shared.image.image.header.exact != 0, shared.image.image);
        barrier_arrive(kSolvedBarrier, kWholeThreads<V>);
        fence_proxy_async();
        barrier_sync(kWarpgroupBarrier, kWarpgroup);
        // One tile after the other, but for the first product: registers are too few for more.
        bool plain[kTiles] = {};
        x[0].start_values(stage_of(0));
        x[0].multiply_k(stage_of(0));
        const auto finish = [&](int i) {
          wgmma_results(x[i].s);
          wgmma_results(x[i].out());
          if (plain[i]) x[i].round_out(p.scale, shared.v[i]);
        };
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if (i > 0) {
            wgmma_wait<1>();
            finish(i - 1);
          }
          wgmma_wait<0>();
          wgmma_results(x[i].values);
          x[i].round_values();
          x[i].multiply_t(stage_of(i));
          wgmma_wait<0>();
          wgmma_results(x[i].values);
          x[i].round_values();
          plain[i] = is_fit(x[i].operand);
          if (!plain[i]) [[unlikely]]
            x[i].clear_operand_rarely();
          x[i].multiply_q(stage_of(i));
          x[i].decay_state(plain[i] ? shared.image.image.header.decay : shared.ones);
          wgmma_results(x[i].operand);
          x[i].multiply_kg(stage_of(i));
          x[i].multiply_a_qk(stage_of(i));
          if (i + 1 < kTiles) {
            x[i + 1].start_values(stage_of(i + 1));
            x[i + 1].multiply_k(stage_of(i + 1));
          }
        }
        wgmma_wait<0>();
        finish(kTiles - 1);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if (!plain[i]) [[unlikely]] {
            ChainTask of_tile;
            of_tile.sequence = sequence();
            of_tile.head = head();
            of_tile.first_value = 64 * i + 16 * x[0].warp;
            of_tile.begin = first_token(0);
            of_tile.length = tokens_left(0);
            WholeStage<K> stage = stage_of(i);
            careful_chunk(p, segment, of_tile, stage, chunk, thread, x[i]);
          }
        }
        barrier_sync(kWarpgroupBarrier, kWarpgroup);  // nobody reads the states of this chunk any more
        barrier_arrive(kFreeBarrier, kWholeThreads<V>);
        // Before the last chunk, if there is one before.
        if (tokens_left(chunk) > kChunk ? tokens_left(chunk) <= 2 * kChunk : chunk == 0)
          prefetch_state<K, V>(p, thread, shared.chain_next);
        if (chunk < p.num_snapshots && tokens_left(chunk) >= kChunk) [[unlikely]] {
          const int to = p.snapshot_slots[sequence() * p.num_snapshots + chunk];
          if (to >= 0) store_states(to);
        }
      }
      find_place();
      x[0].share_state();
      write_all(chunk - 1);
      store_states(slot());
    }
    barrier_sync(kWarpgroupBarrier, kWarpgroup);  // nobody reads what the task is any more
  }
  if (threadIdx.x == kPrepThreads) tensor_store_wait_read();
}

template <typename T, int K, int V>
__device__ __forceinline__ void run_whole(const KdaPrefillParams& p, const Segment& segment, const WholeMaps& maps,
                                          const WholeStart& start) {
  auto& shared = shared_memory<WholeShared<K, V>>();
  barrier_begin(kFullBarrier, kWholeThreads<V>);
  barrier_begin(kFreeBarrier, kWholeThreads<V>);
  barrier_begin(kSolvedBarrier, kWholeThreads<V>);
  barrier_begin(kStartedBarrier, kWarp + kWarpgroup);
  barrier_begin(kPrepBarrier, kPrepThreads);
  barrier_begin(kWarpgroupBarrier, kWarpgroup);
  if (threadIdx.x < K) shared.ones[threadIdx.x] = 1.0f;
  if (threadIdx.x == 0) {
    shared.ahead.first_token = shared.ahead.task.end = 0;
    shared.chain.begin = shared.chain.end = shared.chain.slot = shared.boxes = 0;
    mbarrier_init(&shared.gates, kWarp);
    mbarrier_init(&shared.keys, 1);
    mbarrier_init(&shared.values, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kPrepThreads) {
    set_max_registers_down<128>();
    make_images<T, K, V>(p, segment, maps, start, shared);
  } else {
    set_max_registers_up<248>();
    run_states<T, K, V>(p, segment, maps, shared);
  }
}

// SASS: tensor cores, 16-byte loads, stack 256 (the state in careful_chunk(), which is rare)
template <typename T, int K, int V>
__global__ void __launch_bounds__(kWholeThreads<V>, 1)
    kda_whole_sm90_kernel(const __grid_constant__ KdaPrefillParams p, const __grid_constant__ Segment segment,
                          const __grid_constant__ WholeMaps maps, const __grid_constant__ WholeStart start) {
  if constexpr (kHasSm90)
    run_whole<T, K, V>(p, segment, maps, start);
  else
    __trap();
}

}  // namespace kimi::cuda
