// CUDA backend of kda_prefill (kimi/kda_prefill.h).
//
// fp16 and bf16 at head sizes 64 x 64 and 128 x 128 take the chunked path on tensor cores: prep.cuh makes all factors
// of every 64 tokens in parallel, chain.cuh runs the state through them. Everything else, fp32 above all, is the
// recurrence of tokens.cuh, one warp for 16 rows of a state. Which of the two depends on dtype and head sizes alone,
// the chunks are counted from where a sequence begins in the call, and rows of the state never meet, so a sequence's
// bits depend on nothing but itself, and a cut after a multiple of 64 tokens does not change them.
//
// Long inputs go through the two kernels in segments, so that the workspace stays below kSegmentBytes; the state waits
// in its slot between them. On Hopper the second kernel has a form of its own (chain_sm90.cuh), and another one for few
// heads (strip_sm90.cuh), with the same bits. Where it leaves multiprocessors idle, segments are short: the first
// kernel of the next one runs on those beside it. Where sequences times heads fill the chip evenly, as far as
// max_seqlen tells, one kernel does all of it there, with the same bits (whole_sm90.cuh).
#include <cmath>

#include "cuda/common/launch.h"
#include "cuda/kda_prefill/chain.cuh"
#include "cuda/kda_prefill/chain_sm90.cuh"
#include "cuda/kda_prefill/prep.cuh"
#include "cuda/kda_prefill/strip_sm90.cuh"
#include "cuda/kda_prefill/tokens.cuh"
#include "cuda/kda_prefill/whole_sm90.cuh"

namespace kimi::cuda {
namespace {

// Images of 12,000 tokens of 32 heads of 128 x 128. Fewer would leave the chip idle at the end of each kernel more
// often.
constexpr int64_t kSegmentBytes = int64_t{384} << 20;
// Of a segment whose second kernel leaves multiprocessors idle, at most: short, so that the kernels of different
// segments overlap, but the second one loses about 10 us at each of their ends (docs/kda.md).
constexpr int64_t kOverlappedImages = 3072;
// What the kernels take, in us, by which such segments are sized: the first one of a multiprocessor for an image, the
// second one for a chunk of a head, whatever the number of heads that have multiprocessors, and the same in strips.
constexpr double kPrepTime = 4.6, kChainTime = 1.1, kStripTime = 0.8;
// How far the first kernel looks ahead for inputs (measured: 128 and 256 are alike; 512, a whole wave of blocks,
// loses).
constexpr int kPrefetchTokens = 128;
constexpr int kTokenThreads = 128;  // of a block of the generic kernel, at most

// ---- The generic path
// ------------------------------------------------------------------------------------------------

// Block = (sequence, value head, 64 values or less); key_dim <= 32 J.
// SASS: 16-byte loads, stack 64 (registers are full: constants of the token loop read once in 64 tokens)
template <typename T, int J>
__global__ void __launch_bounds__(kTokenThreads, 1)
    kda_tokens_kernel(const __grid_constant__ KdaPrefillParams p, bool wide_state) {
  const int warp = threadIdx.x / kWarp;
  const int key_dim = static_cast<int>(p.key_dim), value_dim = static_cast<int>(p.value_dim);
  const unsigned slices = ceil_div(value_dim, 16 * static_cast<int>(blockDim.x / kWarp));
  const int first_value = (static_cast<int>(blockIdx.x % slices) * static_cast<int>(blockDim.x / kWarp) + warp) * 16;
  const int head = static_cast<int>(blockIdx.x / slices % p.num_value_heads);
  const int sequence = static_cast<int>(blockIdx.x / slices / p.num_value_heads);
  const int64_t begin = p.cu_seqlens[sequence], end = p.cu_seqlens[sequence + 1];
  if (first_value >= value_dim || begin >= end) return;
  const int slot = p.slots[sequence];
  if (slot < 0) {
    for (int64_t token = begin; token < end; ++token) {
      T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride + first_value;
      if (threadIdx.x % kWarp < 16) out[threadIdx.x % kWarp] = from_float<T>(0.0f);
    }
    return;
  }
  const auto rows_of = [&](int of_slot) { return state_rows(p, wide_state, of_slot, head, first_value); };
  float s[4 * J][4];
  load_state<J>(s, rows_of(slot), key_dim, p.has_initial_state && !p.has_initial_state[sequence]);
  const TokenReader<T, J> reader(p, head, first_value);
  for (int64_t token = begin; token < end; token += kChunk) {
    const int64_t next = token + kChunk < end ? token + kChunk : end;
    run_tokens(reader, token, next, s);
    const int64_t snapshot = (token - begin) / kChunk;
    if (next - token == kChunk && snapshot < p.num_snapshots) {
      const int to = p.snapshot_slots[sequence * p.num_snapshots + snapshot];
      if (to >= 0) store_state<J>(s, rows_of(to), key_dim);
    }
  }
  store_state<J>(s, rows_of(slot), key_dim);
}

bool wide_state(const KdaPrefillParams& p) {
  return aligned_to(16, p.state) && multiples_of(16 / size_of(p.state_dtype), p.state_slot_stride);
}

int64_t beta_token_bytes(const KdaPrefillParams& p) {
  return p.beta_token_stride * static_cast<int64_t>(size_of(p.beta_dtype));
}

void run_tokens(const KdaPrefillParams& p, cudaStream_t stream) {
  const int64_t warps = std::min<int64_t>(kTokenThreads / kWarp, p.value_dim / 16);
  const int64_t blocks = p.num_sequences * p.num_value_heads * ceil_div<int64_t>(p.value_dim, 16 * warps);
  dispatch_dtype(p.dtype, [&]<typename T>() {
    const auto run = [&]<int J>() {
      launch(kda_tokens_kernel<T, J>, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(warps * kWarp)),
             0, stream, p, wide_state(p));
    };
    if (p.key_dim <= 32) return run.template operator()<1>();
    if (p.key_dim <= 64) return run.template operator()<2>();
    if (p.key_dim <= 128) return run.template operator()<4>();
    run.template operator()<8>();
  });
}

// ---- The chunked path
// --------------------------------------------------------------------------------------------------

// Shared memory that a block may use, by compute capability (Programming Guide, table of technical specifications).
size_t max_shared_bytes() {
  const int capability = compute_capability();
  if (capability == 90 || capability == 100 || capability == 103) return 227 << 10;
  return capability == 80 || capability == 87 ? 163 << 10 : 99 << 10;
}

bool is_chunked(const KdaPrefillParams& p) {
  if (p.dtype == DType::kF32 || p.key_dim != p.value_dim) return false;
  return p.key_dim == 64 || (p.key_dim == 128 && max_shared_bytes() >= 2 * sizeof(ChainShared<128, 8>));
}

// run.template operator()<K>() for key_dim = value_dim = K.
template <typename Run>
decltype(auto) dispatch_head(const KdaPrefillParams& p, Run&& run) {
  return p.key_dim == 64 ? run.template operator()<64>() : run.template operator()<128>();
}

// Whether the second kernel on Hopper has blocks of 16 values instead of 64: where those need no more than half of the
// chip, the first kernel keeps up on the other half.
bool takes_strips(const KdaPrefillParams& p) {
  return use_sm90() && 2 * p.num_sequences * p.num_value_heads * (p.value_dim / 16) <= multiprocessors();
}

// How the chunks are split into segments, and the workspace for the images of one or, where the kernels of two segments
// overlap, of two.
//
// Segments that overlap. Nothing runs beside the first kernel of the first one, nor beside the second kernel of the
// last one; between, the first kernel of a segment has the multiprocessors that the second kernel of the one in front
// leaves. If it needs longer there than that one (many heads), segments are alike but for a shorter last one, else they
// grow from a short first one.
struct Plan {
  int64_t chunks, most, first;  // chunks: all, of the largest segment, of the first one
  double growth = 1.0;          // from segment to segment
  size_t image_bytes, workspace_bytes;
  const bool strips;
  bool overlapped = false;

  explicit Plan(const KdaPrefillParams& p) : strips(takes_strips(p)) {
    image_bytes = p.num_value_heads * dispatch_head(p, [&]<int K>() {
                    return use_sm90() ? sizeof(ChunkImageSm90<K>) : sizeof(ChunkImage<K>);
                  });
    chunks = max_chunks(p.num_tokens, p.num_sequences);
    most = std::max<int64_t>(1, kSegmentBytes / static_cast<int64_t>(image_bytes));
    // Not with a state in bfloat16, which every end of a segment rounds; nor for many sequences, of which each segment
    // has a few: their states would come and go, and blocks without work take up multiprocessors.
    if (use_sm90() && p.state_dtype == DType::kF32 && p.num_sequences * p.num_value_heads <= multiprocessors()) {
      most = std::min(std::max<int64_t>(1, most / 2), ceil_div(kOverlappedImages, p.num_value_heads));
      overlapped = chunks > most;
    }
    if (overlapped)
      overlap(p);
    else
      first = most = ceil_div(chunks, ceil_div(chunks, most));
    workspace_bytes = image_bytes * most * (overlapped ? 2 : 1);
  }

  void overlap(const KdaPrefillParams& p) {
    const int64_t heads = p.num_value_heads, blocks = p.value_dim / (strips ? 16 : 64);  // of a head
    const double idle = static_cast<double>(multiprocessors() - blocks * heads);
    growth = (strips ? kStripTime : kChainTime) * idle / (kPrepTime * heads);
    if (growth > 1.0) {
      first = ceil_div<int64_t>(most, strips ? 8 : 4);
    } else {
      growth = 1.0;  // and the last one 0.6 of the others
      const double segments = std::ceil(chunks / static_cast<double>(most) + 0.4);
      first = most = static_cast<int64_t>(std::ceil(chunks / (segments - 0.4)));
    }
  }

  // Chunks of the segment behind one of `previous`.
  int64_t next(int64_t previous) const { return std::min(most, static_cast<int64_t>(std::ceil(previous * growth))); }
};

// Whether the one kernel for whole heads is the faster way, as far as the caller lets us know: it is where no block has
// much more to do than others. In us; kWholeTime for a chunk of a head, which takes 6.0 where the chip is even.
constexpr double kWholeTime = 7.0, kWholeStart = 6.0, kChunkedStart = 12.0;
bool are_alike(const KdaPrefillParams& p) {
  return std::min(p.max_seqlen, p.num_tokens) * p.num_sequences == p.num_tokens;
}
bool is_whole(const KdaPrefillParams& p) {
  if (p.max_seqlen <= 0 || p.state_dtype != DType::kF32 || p.g_dtype != p.dtype || !use_sm90()) return false;
  if (beta_token_bytes(p) > UINT32_MAX) return false;
  const int64_t tokens = std::min(p.max_seqlen, p.num_tokens);  // of the longest sequence
  const double blocks = multiprocessors(), longest = ceil_div<int64_t>(tokens, kChunk);
  const double share = ceil_div<int64_t>(p.num_tokens, kChunk) * p.num_value_heads / blocks;  // of a block, in chunks
  // Of the block that has most: where sequences are alike, so many of them; else an upper bound, if it begins its
  // longest one last.
  const double most = are_alike(p) ? std::ceil(p.num_sequences * p.num_value_heads / blocks) * longest
                                   : std::max(longest, share + (longest - 1) * (1 - 1 / blocks));
  const double chunked =
      std::max(share * (kPrepTime + 3 * kChainTime), longest * (takes_strips(p) ? kStripTime : kChainTime));
  return kWholeStart + kWholeTime * most < kChunkedStart + chunked;
}

template <typename T, int K, int kWarps>
void launch_chain(const KdaPrefillParams& p, Segment segment, cudaStream_t stream) {
  using Shared = ChainShared<K, kWarps>;
  segment.stages = 3 * sizeof(Shared) <= max_shared_bytes() ? 3 : 2;
  const dim3 blocks(static_cast<unsigned>(p.num_sequences), static_cast<unsigned>(p.num_value_heads),
                    K / (16 * kWarps));
  launch(kda_chain_kernel<T, K, K, kWarps>, blocks, dim3(kWarps * kWarp), segment.stages * sizeof(Shared), stream, p,
         segment);
}

// As many slices of a head as find multiprocessors of their own; when the heads are enough for those, a block for the
// whole head, which copies the images once. The same bits in any case.
template <typename T, int K>
void launch_portable_chain(const KdaPrefillParams& p, const Segment& segment, cudaStream_t stream) {
  const int64_t heads = p.num_sequences * p.num_value_heads, processors = multiprocessors();
  if (heads <= ceil_div<int64_t>(processors, 4))
    launch_chain<T, K, K / 64>(p, segment, stream);
  else if (heads <= ceil_div<int64_t>(processors, 2))
    launch_chain<T, K, K / 32>(p, segment, stream);
  else
    launch_chain<T, K, K / 16>(p, segment, stream);
}

// A cluster of blocks for each head, whose rows they share: 64 a block, or a strip of 16.
template <typename T, int K>
void launch_sm90_chain(const KdaPrefillParams& p, const Segment& segment, bool strips, cudaStream_t stream) {
  const auto run = [&](unsigned cluster, auto kernel, int threads, size_t shared_bytes) {
    const dim3 blocks(static_cast<unsigned>(p.num_sequences) * cluster, static_cast<unsigned>(p.num_value_heads));
    launch({.cluster = cluster, .overlap = true}, kernel, blocks, dim3(static_cast<unsigned>(threads)), shared_bytes,
           stream, p, segment);
  };
  if (strips)
    run(K / 16, kda_strip_sm90_kernel<T, K, K>, kStripThreads, sizeof(StripShared<K>));
  else
    run(K / 64, kda_chain_sm90_kernel<T, K, K>, kChainThreadsSm90, sizeof(ChainSharedSm90<K>));
}

// When the blocks of that kernel begin: where there are heads behind the first ones, pairs one after the other; and
// where heads are alike and some blocks have one fewer, those about half a head late.
constexpr int kStartStep = 1000, kHalfChunk = 5000;  // cycles
WholeStart whole_start(const KdaPrefillParams& p, int64_t blocks) {
  const int64_t heads = p.num_sequences * p.num_value_heads;
  WholeStart start{heads > blocks ? kStartStep : 0, 0, static_cast<int>(blocks)};
  if (heads > blocks && heads % blocks > 0 && are_alike(p)) {
    const int64_t chunks = ceil_div<int64_t>(p.num_tokens / p.num_sequences, kChunk);
    start.late = static_cast<int>(std::min<int64_t>(kHalfChunk * chunks, INT32_MAX));
    start.late_from = static_cast<int>(heads % blocks);
  }
  return start;
}

// One kernel for whole heads.
template <typename T, int K>
void run_whole(const KdaPrefillParams& p, Segment segment, cudaStream_t stream) {
  WholeMaps maps = {};
  segment.beta = static_cast<const char*>(p.beta) + size_of(p.beta_dtype) - 2;
  segment.beta_token_bytes = static_cast<uint32_t>(beta_token_bytes(p));
  segment.beta_head_bytes = p.beta_head_stride * static_cast<int64_t>(size_of(p.beta_dtype));
  const auto map = [&](const void* data, int64_t heads, int64_t token_stride, int64_t head_stride, int piece,
                       bool swizzled, TensorMap& to) {
    return make_tensor_map({data, p.num_tokens, heads, K, token_stride, head_stride, kChunk, piece, swizzled}, to);
  };
  segment.boxes = segment.wide_inputs && segment.wide_out && p.num_tokens >= kChunk &&
                  map(p.q, p.num_heads, p.q_token_stride, p.q_head_stride, 32, false, maps.q) &&
                  map(p.k, p.num_heads, p.k_token_stride, p.k_head_stride, 32, false, maps.k) &&
                  map(p.g, p.num_value_heads, p.g_token_stride, p.g_head_stride, K, false, maps.g) &&
                  map(p.v, p.num_value_heads, p.v_token_stride, p.v_head_stride, 64, true, maps.v) &&
                  map(p.out, p.num_value_heads, p.out_token_stride, p.out_head_stride, 64, true, maps.out);
  const int64_t blocks = std::min<int64_t>(p.num_sequences * p.num_value_heads, multiprocessors());
  launch(kda_whole_sm90_kernel<T, K, K>, dim3(static_cast<unsigned>(blocks)), dim3(kWholeThreads<K>),
         sizeof(WholeShared<K, K>), stream, p, segment, maps, whole_start(p, blocks));
}

// All kernels, segment by segment: P0 C0 P1 C1 ... Where the plan has them overlap, each may begin before the one in
// front of it has ended, in so far: C(s) waits for P(s); P(s) begins when all blocks of C(s - 1) run, and writes the
// images that C(s - 2) has read; it ends only after C(s - 1), so that C(s) waits for that too. P0 waits for what is in
// front of it on the stream.
template <typename T, int K, typename Image>
void run_chunks(const KdaPrefillParams& p, cudaStream_t stream) {
  constexpr bool kSm90 = std::is_same_v<Image, ChunkImageSm90<K>>;
  Segment segment;
  segment.wide_inputs = aligned_to(16, p.q, p.k, p.v, p.g, p.dt_bias) &&
                        multiples_of(8, p.q_token_stride, p.q_head_stride, p.k_token_stride, p.k_head_stride,
                                     p.v_token_stride, p.v_head_stride, p.g_token_stride, p.g_head_stride);
  segment.wide_out = aligned_to(16, p.out) && multiples_of(8, p.out_token_stride, p.out_head_stride);
  segment.wide_state = wide_state(p);

  if constexpr (kSm90) {
    if (is_whole(p)) return run_whole<T, K>(p, segment, stream);
  }
  const Plan plan(p);
  segment.forward = plan.overlapped;
  segment.prefetch = plan.overlapped ? kPrefetchTokens : -kPrefetchTokens;
  int64_t size = plan.first;
  for (int64_t first = 0, index = 0; first < plan.chunks; first += size, size = plan.next(size), ++index) {
    segment.first = static_cast<int>(first);
    segment.count = static_cast<int>(std::min(size, plan.chunks - first));
    segment.images = static_cast<char*>(p.workspace) + (plan.overlapped ? index % 2 * plan.image_bytes * plan.most : 0);
    const dim3 blocks(static_cast<unsigned>(p.num_value_heads), static_cast<unsigned>(segment.count));
    launch({.overlap = plan.overlapped && index > 0}, kda_prep_kernel<T, K, Image>, blocks, dim3(kPrepThreads),
           sizeof(PrepShared<K>), stream, p, segment);
    if constexpr (kSm90)
      launch_sm90_chain<T, K>(p, segment, plan.strips, stream);
    else
      launch_portable_chain<T, K>(p, segment, stream);
  }
}

}  // namespace

size_t kda_prefill_workspace_bytes(const KdaPrefillParams& p) {
  if (p.num_tokens == 0 || p.num_sequences == 0 || !is_chunked(p) || is_whole(p)) return 16;  // not null
  return Plan(p).workspace_bytes;
}

void kda_prefill(const KdaPrefillParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_sequences == 0) return;
  if (!is_chunked(p)) return run_tokens(p, stream);
  dispatch_half(p.dtype, [&]<typename T>() {
    dispatch_head(p, [&]<int K>() {
      if (use_sm90())
        run_chunks<T, K, ChunkImageSm90<K>>(p, stream);
      else
        run_chunks<T, K, ChunkImage<K>>(p, stream);
    });
  });
}

}  // namespace kimi::cuda
