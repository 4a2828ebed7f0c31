// CUDA backend of short_conv (kimi/short_conv.h). Portable.
//
// Grid: (run of tokens) x (block of channels), channels fastest. A thread owns the channels of one 16-byte vector and
// walks down its run with the last three inputs and the taps in registers. The inputs ahead of it come in by
// asynchronous copies through a ring in shared memory of which it uses its own column alone, so nobody waits for
// anybody: 8 copies a thread, 64 KB an SM under way all the time. x is read and out written once (2 * size_of(dtype)
// bytes an element; 3 rows of a run are read twice, out of L2), bound by memory. SiLU takes two special-function
// operations an element, half of the time that the bytes take.
//
// Who touches a slot: the thread that owns a channel of the sequence's first token, and nobody else. It reads the old
// state and then writes the new one, whose inputs it takes from wherever in x the sequence ends. So that no other run
// needs the old state, the second and third token of a sequence always belong to the run of its first. Snapshots lie 64
// or more tokens behind the start, so they hold no old state; the run that reaches one writes it.
#include "kimi/short_conv.h"

#include "cuda/common/activations.h"
#include "cuda/common/launch.h"
#include "cuda/common/packed.h"
#include "cuda/common/ptx.h"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 128;      // 1,024 channels in 16-bit types
constexpr int kAhead = 8;          // tokens whose inputs are under way for a thread; a multiple of the taps
constexpr int kResident = 4;       // blocks that an SM holds: 128 registers a thread
constexpr int kMaxRunTokens = 32;  // so that reading 3 rows twice and the taps (64 bytes a thread) hardly count
constexpr int kBlocksPerSm = 8;    // shorter runs only where longer ones would not give each SM this many
constexpr int kPast = kShortConvTaps - 1;

template <typename T, int Width>
struct ShortConvShared {
  Packed<T, Width> ring[kAhead][kThreads];
};

// How many of the sorted from[0, count) are <= bound. By a whole warp.
__device__ __forceinline__ int64_t count_up_to(const int32_t* from, int64_t count, int64_t bound) {
  const int lane = threadIdx.x % kWarp;
  int64_t low = 0;  // entries before it are <= bound, entries from low + size on are > bound
  for (int64_t size = count; size > 0;) {
    const int64_t step = ceil_div<int64_t>(size, kWarp), at = lane * step;
    const int hits = __popc(__ballot_sync(0xffffffffu, at < size && from[low + at] <= bound));
    if (hits == 0) return low;
    low += (hits - 1) * step + 1;
    size = (hits * step < size ? hits * step : size) - (hits - 1) * step - 1;
  }
  return low;
}

// One thread's channels.
template <typename T, int Width>
struct Channels {
  using Values = Packed<T, Width>;
  const ShortConvParams& p;
  ShortConvShared<T, Width>& shared;
  int64_t channel;
  float taps[kShortConvTaps][Width];

  __device__ __forceinline__ const T* input(int64_t token) const {
    return static_cast<const T*>(p.x) + token * p.x_stride + channel;
  }
  __device__ __forceinline__ T* output(int64_t token) const {
    return static_cast<T*>(p.out) + token * p.out_stride + channel;
  }
  __device__ __forceinline__ T* state_row(int32_t slot, int row) const {
    return static_cast<T*>(p.state) + slot * p.state_slot_stride + row * p.num_channels + channel;
  }

  __device__ __forceinline__ void load_taps() {
    const T* weight = static_cast<const T*>(p.weight) + channel * kShortConvTaps;
#pragma unroll
    for (int part = 0; part < kShortConvTaps; ++part) {
      float w[Width];
      load_packed<T, Width>(weight + part * Width).unpack(w);
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        const int at = part * Width + i;
        taps[at % kShortConvTaps][at / kShortConvTaps] = w[i];
      }
    }
  }

  // Starts to copy the input of a token to place i of the ring.
  __device__ __forceinline__ void fetch(int64_t token, bool exists, int i) {
    Values* to = &shared.ring[i][threadIdx.x];
    if constexpr (Width > 1) {
      if (exists) cp_async_16(to, input(token));
      cp_async_commit();
    } else {
      if (exists) *to = load_packed<T, Width>(input(token));
    }
  }

  // The state after `tokens` tokens of the sequence; `old` is the state before it.
  __device__ __forceinline__ void write_state(int32_t slot, int64_t begin, int64_t tokens, const Values (&old)[kPast]) {
    Values rows[kPast];
#pragma unroll
    for (int i = 0; i < kPast; ++i) {
      const int64_t at = tokens - kPast + i;
      if (at >= 0) {
        rows[i] = load_packed<T, Width>(input(begin + at));
      } else {
        rows[i] = old[0];
#pragma unroll
        for (int j = 1; j < kPast; ++j)
          if (at == j - kPast) rows[i] = old[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kPast; ++i) store_packed(state_row(slot, i), rows[i]);
  }

  // Tokens [first, last) of the pack, all of them in sequence n, which is [begin, end).
  __device__ __forceinline__ void run(int64_t n, int64_t begin, int64_t end, int64_t first, int64_t last) {
    const int32_t slot = p.slots[n];
    if (slot < 0) {
      for (int64_t t = first; t < last; ++t) store_packed(output(t), Values{});
      return;
    }

    // Phase 1: the first inputs of the run are called for.
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(first + i, first + i < last, i);

    // Phase 2: the three inputs before `first`; at the start of the sequence, also its new state.
    Values past[kPast] = {};
    if (first > begin) {
#pragma unroll
      for (int i = 0; i < kPast; ++i) past[i] = load_packed<T, Width>(input(first - kPast + i));
    } else {
      if (!p.has_initial_state || p.has_initial_state[n]) {
#pragma unroll
        for (int i = 0; i < kPast; ++i) past[i] = load_packed<T, Width>(state_row(slot, i));
      }
      int64_t commit = end - begin;
      if (p.num_commit && p.num_commit[n] < commit) commit = p.num_commit[n];
      if (commit > 0) write_state(slot, begin, commit, past);
    }

    // Phase 3: convolution. row[(j + i) % 4] is tap j's input of token i of a group of kAhead.
    float row[kShortConvTaps][Width];
#pragma unroll
    for (int i = 0; i < kPast; ++i) past[i].unpack(row[i]);
    for (int64_t group = first; group < last; group += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t t = group + i;
        if (t >= last) break;
        cp_async_wait<kAhead - 1>();
        shared.ring[i][threadIdx.x].unpack(row[(kPast + i) % kShortConvTaps]);
        fetch(t + kAhead, t + kAhead < last, i);
        float y[Width];
#pragma unroll
        for (int c = 0; c < Width; ++c) {
          float sum = taps[0][c] * row[i % kShortConvTaps][c];
#pragma unroll
          for (int j = 1; j < kShortConvTaps; ++j) sum = fmaf(taps[j][c], row[(i + j) % kShortConvTaps][c], sum);
          y[c] = silu(sum);
        }
        store_packed(output(t), Values::pack(y));
      }
    }

    // Phase 4: snapshots that end in this run. One that names the sequence's own slot loses against its new state.
    for (int64_t m = (first - begin) / kSnapshotTokens; m < p.num_snapshots; ++m) {
      const int64_t tokens = (m + 1) * kSnapshotTokens;
      if (begin + tokens > last) break;
      const int32_t to = p.snapshot_slots[n * p.num_snapshots + m];
      if (to >= 0 && to != slot) write_state(to, begin, tokens, past);
    }
  }
};

// `Width` channels a thread: kVec<T> where everything is aligned for it, else 1.
// SASS: 16-byte loads
template <typename T, int Width>
__global__ void __launch_bounds__(kThreads, kResident)
    short_conv_kernel(ShortConvParams p, int run_tokens, int channel_blocks) {
  const int64_t run_begin = static_cast<int64_t>(blockIdx.x / channel_blocks) * run_tokens;
  const int64_t run_end = run_begin + run_tokens < p.num_tokens ? run_begin + run_tokens : p.num_tokens;
  const int64_t vector = static_cast<int64_t>(blockIdx.x % channel_blocks) * blockDim.x + threadIdx.x;
  Channels<T, Width> channels{p, shared_memory<ShortConvShared<T, Width>>(), vector * Width};

  // The sequence that the run's first token lies in, or the first one after it.
  int64_t n = 0;
  if (p.cu_seqlens) {
    n = count_up_to(p.cu_seqlens, p.num_sequences + 1, run_begin) - 1;
    if (n < 0) n = 0;  // tokens before the first sequence
  } else if (p.tokens_per_sequence > 0) {
    n = run_begin / p.tokens_per_sequence;
  }
  if (n >= p.num_sequences || channels.channel >= p.num_channels) return;
  channels.load_taps();
  int64_t begin = p.cu_seqlens ? p.cu_seqlens[n] : n * p.tokens_per_sequence;
  while (begin < run_end) {
    const int64_t end = p.cu_seqlens ? p.cu_seqlens[n + 1] : begin + p.tokens_per_sequence;
    const int64_t head_end = end - begin < kPast ? end : begin + kPast;  // of the tokens that stay with the first one
    int64_t first = begin, last = end < run_end ? end : run_end;
    if (begin < run_begin) {
      first = head_end < run_begin ? run_begin : head_end;
    } else if (last < head_end) {
      last = head_end;
    }
    if (first < last) channels.run(n, begin, end, first, last);
    if (++n >= p.num_sequences) return;
    begin = end;
  }
}

}  // namespace

void short_conv(const ShortConvParams& p, cudaStream_t stream) {
  if (p.num_sequences == 0) return;
  dispatch_dtype(p.dtype, [&]<typename T>() {
    const auto run = [&]<int Width>() {
      const int64_t vectors = ceil_div<int64_t>(p.num_channels, Width);
      const int64_t threads = round_up<int64_t>(vectors < kThreads ? vectors : kThreads, kWarp);
      const int64_t channel_blocks = ceil_div(vectors, threads);
      int64_t run_tokens = p.num_tokens * channel_blocks / (kBlocksPerSm * multiprocessors());
      run_tokens = run_tokens < 1 ? 1 : run_tokens > kMaxRunTokens ? kMaxRunTokens : run_tokens;
      const int64_t blocks = ceil_div(p.num_tokens, run_tokens) * channel_blocks;
      launch(short_conv_kernel<T, Width>, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
             sizeof(ShortConvShared<T, Width>), stream, p, static_cast<int>(run_tokens),
             static_cast<int>(channel_blocks));
    };
    const bool wide = aligned_to(16, p.x, p.weight, p.state, p.out) &&
                      multiples_of(kVec<T>, p.num_channels, p.x_stride, p.out_stride, p.state_slot_stride);
    wide ? run.template operator()<kVec<T>>() : run.template operator()<1>();
  });
}

}  // namespace kimi::cuda
