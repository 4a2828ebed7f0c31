// K2 of the chunked path on Hopper for few heads: chain_sm90.cuh with a block for each strip of 16 values of a head
// instead of 64. A chunk takes less time so, and more multiprocessors, which few heads leave idle.
//
// Block = (sequence, value head, 16 values): four warps, which also store the output, and one that copies images and
// values. The blocks of a head are a cluster: each copies its share of the factors to all of them, so that an image
// leaves the L2 cache once.
//
// The products (1) to (5) are those of chain_warp_sm90.cuh in the same order, by mma.m16n8k16, whose sums are wgmma's
// to the bit. Their columns are shared out: a warp has 16 tokens of x^T, v'^T and o^T and a quarter of the channels of
// S, all for the 16 values. So what comes out of a product is one or two pieces (of 16 tokens or channels) of the left
// operand of the next one, and goes to the other warps through shared memory, as fragments: S, x and v', each with a
// barrier behind.
//
// Time. What a chunk waits for is (1), x, (2), v', (4), S: 8, 4 and 4 products one behind the other (K = 128, 24 cycles
// each), and the three exchanges. The rest fills the time between: (3) beside (1), (5) beside (4); right operands come
// to registers before the left ones are there.
//
// Range. Whether v' is fit is known behind (4), when S as it was is still there. If it was not, the first warp does the
// chunk again for the whole strip (careful_sm90.cuh), from the image in memory, while the others wait.
//
// Shared memory: kStripStages * 66 KB (K = 128), and 22 KB.
#pragma once

#include "cuda/common/shared_memory.h"
#include "cuda/kda_prefill/careful_sm90.cuh"

namespace kimi::cuda {

inline constexpr int kStripThreads = kWarpgroup + kWarp;  // the last warp copies

// 16 values of each token of a chunk.
struct StripRows {
  static constexpr int kOctets = 2;
  uint4 octets[kChunk][kOctets];
  // By a swizzle an octet of eight tokens is in all banks.
  __device__ __forceinline__ static int place(int token, int octet) {
    return kOctets * token + (octet ^ token / 4 % 2);
  }
};

// An image comes in two parts: what is multiplied with S is wanted half a chunk before the rest, and both are free as
// soon as they are in registers.
template <int K>
struct alignas(512) StripStatePart {  // as the swizzle of the factors wants it
  StateFactorsSm90<K> factors;
  StripRows v;  // zeros past the last token
};
template <int K>
struct alignas(512) StripValuePart {
  ValueFactorsSm90<K> factors;
  ChunkHeaderSm90<K> header;
};

inline constexpr int kStripStages = 3;

// Barriers of a stage of one of the parts: full, its bytes have come; empty, the block's warps have read it; free, all
// blocks of the cluster say so. Every thread arrives for what it has itself read.
template <typename Part>
struct StripStages {
  Part parts[kStripStages];
  uint64_t full[kStripStages], empty[kStripStages], free[kStripStages];
};

template <int K>
struct StripShared {
  StripStages<StripStatePart<K>> of_state;
  StripStages<StripValuePart<K>> of_values;
  union {
    struct {
      uint4 state[K / 16][kWarp];       // S in fp16, as left operand
      uint4 x[kGroups / 2][kWarp];      // x^T, the same
      uint4 delta[kGroups / 2][kWarp];  // v'^T, the same
    };
    float4 all[K / 8][kWarp];  // S in fp32, for who does a chunk again
  };
  StripRows out;
  uint32_t marks[4];  // of the warps' v': Mark
  ValueRows rare;     // values and output of a chunk that is done again
};

// The stages of a part, as one of the warps sees them that read or fill them.
template <typename Part, int kCluster>
struct StripRing {
  StripStages<Part>& stages;
  int index = 0, parity = 0;

  __device__ __forceinline__ StripRing(StripStages<Part>& stages, int arrivals) : stages(stages) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStripStages; ++i) {
        mbarrier_init(&stages.full[i], arrivals);
        mbarrier_init(&stages.empty[i], kWarpgroup);
        mbarrier_init(&stages.free[i], kCluster);
      }
    }
  }
  __device__ __forceinline__ Part& part() const { return stages.parts[index]; }
  __device__ __forceinline__ uint64_t* full() const { return &stages.full[index]; }
  __device__ __forceinline__ void wait() const { mbarrier_wait(full(), parity); }
  __device__ __forceinline__ void release() const { mbarrier_arrive(&stages.empty[index]); }
  __device__ __forceinline__ void advance() {
    if (++index == kStripStages) index = 0, parity ^= 1;
  }
  // Until all blocks of the cluster have read what was here, of the warp that copies.
  __device__ __forceinline__ void wait_until_free() const {
    mbarrier_wait(&stages.empty[index], parity ^ 1);
    const int lane = threadIdx.x % kWarp;
    if (lane < kCluster) mbarrier_arrive_cluster(&stages.free[index], lane);
    mbarrier_wait(&stages.free[index], parity ^ 1);
  }
  // Its share of the factors to all blocks, by one thread, which arrives at `full`; `more` bytes come beside.
  template <typename Factors>
  __device__ __forceinline__ void copy(const Factors& from, uint32_t more) const {
    constexpr uint32_t kShare = sizeof(Factors) / kCluster;
    static_assert(kShare % 16 == 0 && kShare * kCluster == sizeof(Factors));
    const int at = static_cast<int>(kShare) * cluster_rank();
    mbarrier_arrive_expect_tx(full(), static_cast<uint32_t>(sizeof(Factors)) + more);
    bulk_copy_multicast(reinterpret_cast<char*>(&part().factors) + at, reinterpret_cast<const char*>(&from) + at,
                        kShare, full(), (1 << kCluster) - 1);
  }
};

// Both parts.
template <int K, int V>
struct StripRings {
  static constexpr int kCluster = V / 16;
  StripRing<StripStatePart<K>, kCluster> of_state;
  StripRing<StripValuePart<K>, kCluster> of_values;

  __device__ __forceinline__ explicit StripRings(StripShared<K>& shared)
      : of_state(shared.of_state, 1 + kWarp), of_values(shared.of_values, 1) {
    if (threadIdx.x == 0) mbarrier_init_fence();
    cluster_sync();
  }

  // A warp brings everything: image_of_chunk(i) being the i-th image, and the block's values of `length` tokens, the
  // first at `values`.
  template <typename T, typename ImageOfChunk>
  __device__ __forceinline__ void copy_all(int count, ImageOfChunk&& image_of_chunk, const T* values,
                                           int64_t token_stride, int length, bool wide) {
    const int lane = threadIdx.x % kWarp, token = lane / 2, octet = lane % 2;
    const T* from = values + token * token_stride + 8 * octet;
    const int64_t step = kWarp / 2 * token_stride;
#pragma unroll 1
    for (int i = 0; i < count; ++i, length -= kChunk) {
      const ChunkImageSm90<K>& image = image_of_chunk(i);
      if (i >= kStripStages) of_state.wait_until_free();
      if (lane == 0) of_state.copy(static_cast<const StateFactorsSm90<K>&>(image.factors), 0);
      __syncwarp();
      uint4* const to = &of_state.part().v.octets[0][0] + StripRows::place(token, octet);
      constexpr int kStep = kWarp / 2 * StripRows::kOctets;
      if (wide && length >= kChunk) {
        // Several addresses, for a copy reads its own late.
        const T* const rows[4] = {from, from + step, from + 2 * step, from + 3 * step};
#pragma unroll
        for (int r = 0; r < 4; ++r) cp_async_16(to + kStep * r, rows[r]);
        cp_async_mbarrier_arrive(of_state.full());
      } else {
#pragma unroll 1
        for (int r = 0; r < 4; ++r) to[kStep * r] = load_octet(from + r * step, wide, kWarp / 2 * r + token < length);
        mbarrier_arrive(of_state.full());
      }
      from += 4 * step;
      of_state.advance();

      if (i >= kStripStages) of_values.wait_until_free();
      if (lane == 0) {
        of_values.copy(static_cast<const ValueFactorsSm90<K>&>(image.factors), sizeof(image.header));
        bulk_copy(&of_values.part().header, &image.header, sizeof(image.header), of_values.full());
      }
      __syncwarp();
      of_values.advance();
    }
  }
};

// What is_fit() (chain_common.cuh) wants to know of v', here of a warp's 16 tokens; of all 64, these bits together.
enum Mark : uint32_t { kNotFinite = 1, kLarge = 2, kNotZero = 4 };

// What a warp of a strip holds and does, chunk by chunk.
template <typename T, int K>
struct StripWarp {
  static constexpr int kTiles = K / 32, kSteps = K / 64;  // of 8 and of 16 channels: the warp's quarter
  static constexpr int kSixteens = kGroups / 2;           // of tokens
  using Operand = uint32_t[4];
  StripShared<K>& shared;
  float s[kTiles][4], before[kTiles][4];  // S, and S in front of (4): rows g, g + 8; columns 8 i + 2 t, + 1
  float values[2][4], out[2][4];          // v^T, x^T, v'^T; o^T: of two groups of tokens
  Operand raw_values;                     // v^T in the dtype of memory
  // Right operands of (1), (3), (2), (5) and (4), and what S decays by.
  Operand k[2][K / 32], q[2][K / 32], t[kSixteens], a_qk[kSixteens], kg[kSixteens][kTiles / 2];
  float decay[kSteps][4];
  int warp, lane;
  // For ldmatrix: in a piece of k or q, in T and A_qk; and for stmatrix too, in StripRows, at the warp's tokens.
  int piece_row, triangle_row, matrix_place;

  __device__ __forceinline__ explicit StripWarp(StripShared<K>& shared) : shared(shared) {
    warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarp, 0);
    lane = static_cast<int>(threadIdx.x) % kWarp;
    piece_row = swizzled(4 * (lane % 8) + lane / 8);
    triangle_row = (lane / 8 % 2 * kGroups + lane / 16) * kWarp + 4 * (lane % 8);
    matrix_place = StripRows::place(16 * warp + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }

  // Behind it each of the four warps finds what the others have written.
  __device__ __forceinline__ static void meet() { barrier_sync(kWarpgroupBarrier, kWarpgroup); }

  // What lies in accumulators as left operand: of two neighbouring tiles.
  __device__ __forceinline__ static uint4 round(const float (&low)[4], const float (&high)[4]) {
    return make_uint4(pack2<Fp16>(low[0], low[1]), pack2<Fp16>(low[2], low[3]), pack2<Fp16>(high[0], high[1]),
                      pack2<Fp16>(high[2], high[3]));
  }
  template <int N>
  __device__ __forceinline__ void read(const uint4 (&pieces)[N][kWarp], Operand (&left)[N]) const {
#pragma unroll
    for (int x = 0; x < N; ++x) {
      const uint4 piece = pieces[x][lane];
      left[x][0] = piece.x, left[x][1] = piece.y, left[x][2] = piece.z, left[x][3] = piece.w;
    }
  }

  // Right operands, and v^T.
  __device__ __forceinline__ void load_rows(const uint4 (&rows)[kGroups][K / 32][kWarp], Operand (&right)[2][K / 32]) {
#pragma unroll
    for (int j = 0; j < K / 32; ++j) {
#pragma unroll
      for (int n = 0; n < 2; ++n) ldmatrix_x4(right[n][j], &rows[2 * warp + n][j][piece_row]);
    }
  }
  __device__ __forceinline__ void load_t(const StripValuePart<K>& part) {
#pragma unroll
    for (int x = 0; x < kSixteens; ++x) ldmatrix_x4_trans(t[x], &part.factors.t[2 * x][2 * warp][0] + triangle_row);
  }
  __device__ __forceinline__ void load_a_qk(const StripValuePart<K>& part) {
#pragma unroll
    for (int x = 0; x < kSixteens; ++x) ldmatrix_x4(a_qk[x], &part.factors.a_qk[2 * x][2 * warp][0] + triangle_row);
  }
  __device__ __forceinline__ void load_kg(const StripValuePart<K>& part) {
    const int octet = kTiles * warp;
#pragma unroll
    for (int x = 0; x < kSixteens; ++x) {
#pragma unroll
      for (int i = 0; i < kTiles / 2; ++i)
        ldmatrix_x4_trans(kg[x][i], &part.factors.kg[2 * x + lane / 8 % 2][octet / 4]
                                                    [swizzled(4 * (lane % 8) + octet % 4 + 2 * i + lane / 16)]);
    }
  }
  __device__ __forceinline__ void load_decay(const StripValuePart<K>& part) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const auto four = load_vec<float, 4>(&part.header.decay[16 * (kSteps * warp + i) + 4 * (lane % 4)]);
#pragma unroll
      for (int e = 0; e < 4; ++e) decay[i][e] = four.x[e];
    }
  }
  __device__ __forceinline__ void start_values(const StripRows& rows) {
    ldmatrix_x4_trans(raw_values, &rows.octets[0][0] + matrix_place);
    start_values();
  }
  __device__ __forceinline__ void start_values() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_pair<T>(raw_values[i]);
      values[i / 2][2 * (i % 2)] = pair.x;
      values[i / 2][2 * (i % 2) + 1] = pair.y;
    }
  }
  __device__ __forceinline__ static void clear(float (&sums)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = 0.0f;
  }

  __device__ __forceinline__ void share_state() {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) shared.state[kSteps * warp + i][lane] = round(s[2 * i], s[2 * i + 1]);
    meet();
  }
  // (1): values -= S k^T. (3): out <- S q^T. And what comes next is loaded.
  __device__ __forceinline__ void multiply_state(const StripValuePart<K>& part) {
    Operand left[K / 16];
    read(shared.state, left);
    load_decay(part);
    load_t(part);
    clear(out);
#pragma unroll
    for (int x = 0; x < K / 16; ++x) {
      const int half = 2 * (x % 2);
#pragma unroll
      for (int n = 0; n < 2; ++n) mma_m16n8k16<Fp16>(values[n], left[x], {k[n][x / 2][half], k[n][x / 2][half + 1]});
#pragma unroll
      for (int n = 0; n < 2; ++n) mma_m16n8k16<Fp16>(out[n], left[x], {q[n][x / 2][half], q[n][x / 2][half + 1]});
    }
    load_kg(part);
  }

  // (2): values <- x^T T^T. load_more() is called where there is time to load.
  __device__ __forceinline__ void multiply_x(auto&& load_more) {
    Operand left[kSixteens];
    shared.x[warp][lane] = round(values[0], values[1]);
    meet();
    read(shared.x, left);
    clear(values);
    load_more();
#pragma unroll
    for (int x = 0; x < kSixteens; ++x) {
#pragma unroll
      for (int n = 0; n < 2; ++n) mma_m16n8k16<Fp16>(values[n], left[x], {t[x][2 * n], t[x][2 * n + 1]});
    }
  }

  // (4): S = S D + v'^T kg. (5): out += v'^T A_qk^T. And the mark of v'.
  __device__ __forceinline__ void multiply_delta(auto&& load_more) {
    const uint4 delta = round(values[0], values[1]);
    shared.delta[warp][lane] = delta;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      float& element = s[i / 4][i % 4];
      before[i / 4][i % 4] = element;
      element *= decay[i / 8][i / 4 % 2 * 2 + i % 2];
    }
    meet();
    Operand left[kSixteens];
    read(shared.delta, left);
    load_more();
#pragma unroll
    for (int x = 0; x < kSixteens; ++x) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        mma_m16n8k16<Fp16>(s[i], left[x], {kg[x][i / 2][2 * (i % 2)], kg[x][i / 2][2 * (i % 2) + 1]});
#pragma unroll
      for (int n = 0; n < 2; ++n) mma_m16n8k16<Fp16>(out[n], left[x], {a_qk[x][2 * n], a_qk[x][2 * n + 1]});
    }
    const Operand mine[1] = {{delta.x, delta.y, delta.z, delta.w}};
    const uint32_t largest = largest_of(mine);
    const uint32_t mark = (__any_sync(kFullWarp, largest >= kHalfInfinity) ? kNotFinite : 0) |
                          (__any_sync(kFullWarp, largest >= kHalfSmall) ? kLarge : 0) |
                          (__any_sync(kFullWarp, largest > 0) ? kNotZero : 0);
    if (lane == 0) shared.marks[warp] = mark;
  }

  // As is_fit(), of what the four warps marked.
  __device__ __forceinline__ bool is_fit() const {
    const auto marks = load_vec<uint32_t, 4>(shared.marks);
    const uint32_t mark = marks.x[0] | marks.x[1] | marks.x[2] | marks.x[3];
    return (mark & kNotFinite) == 0 && (mark & (kLarge | kNotZero)) != kNotZero;
  }

  // `words` <- the output times `factor`, in the dtype of memory.
  __device__ __forceinline__ void round_out(float factor, Operand& words) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = pack2<T>(out[i / 2][2 * (i % 2)] * factor, out[i / 2][2 * (i % 2) + 1] * factor);
  }
  // Of a token lane / 2 of the warp's, eight values.
  __device__ __forceinline__ uint4 transpose_out(const Operand& words) {
    stmatrix_x4_trans(&shared.out.octets[0][0] + matrix_place, words);
    __syncwarp();
    return (&shared.out.octets[0][0])[StripRows::place(16 * warp + lane / 2, lane % 2)];
  }

  // S in fp32 for run_chunk_again(), and from it.
  __device__ __forceinline__ void save(const float (&from)[kTiles][4]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      shared.all[kTiles * warp + i][lane] = make_float4(from[i][0], from[i][1], from[i][2], from[i][3]);
  }
  __device__ __forceinline__ void restore() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float4 four = shared.all[kTiles * warp + i][lane];
      s[i][0] = four.x, s[i][1] = four.y, s[i][2] = four.z, s[i][3] = four.w;
    }
  }

  // The warp's quarter of S from the pool, or zeros; and back.
  __device__ __forceinline__ void load(const StateRows& rows, bool zeros) {
    for_pairs([&](int at, float& even, float& odd) {
      float2 pair = make_float2(0.0f, 0.0f);
      if (!zeros) {
        if (rows.dtype == DType::kF32 && rows.wide)
          pair = __ldcg(reinterpret_cast<const float2*>(static_cast<const float*>(rows.data) + at));
        else
          pair = load_pair(rows, at);
      }
      even = pair.x, odd = pair.y;
    });
  }
  __device__ __forceinline__ void store(const StateRows& rows) {
    for_pairs([&](int at, float& even, float& odd) {
      if (rows.dtype == DType::kF32 && rows.wide)
        *reinterpret_cast<float2*>(static_cast<float*>(rows.data) + at) = make_float2(even, odd);
      else
        store_pair(rows, at, even, odd);
    });
  }
  template <typename Body>
  __device__ __forceinline__ void for_pairs(Body&& body) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        body((lane / 4 + 8 * r) * K + 8 * (kTiles * warp + i) + 2 * (lane % 4), s[i][2 * r], s[i][2 * r + 1]);
    }
  }
};

template <int V>
__device__ __forceinline__ ChainTask find_strip_task(const KdaPrefillParams& p, const Segment& segment) {
  return find_task<V / 16, 1>(p, segment, 0);
}

// A chunk whose v' is not fit, by one warp: shared.all is S in front of it, then behind it. The output goes to memory.
template <typename T, int K, int V>
__device__ __noinline__ void run_chunk_again(const KdaPrefillParams& p, const Segment& segment, int chunk,
                                             StripShared<K>& shared) {
  const int lane = threadIdx.x % kWarp;
  const ChainTask task = find_strip_task<V>(p, segment);
  const auto& image =
      image_of<ChunkImageSm90<K>>(segment, task.first_of_sequence + chunk, task.head, p.num_value_heads);
  const int64_t begin = task.begin + static_cast<int64_t>(chunk) * kChunk;
  const int count = min(task.length - chunk * kChunk, kChunk);
  const T* const values =
      static_cast<const T*>(p.v) + begin * p.v_token_stride + task.head * p.v_head_stride + task.first_value;
  T* const out = static_cast<T*>(p.out) + begin * p.out_token_stride + task.head * p.out_head_stride + task.first_value;
  const auto octet_of = [&](int i) -> uint4& { return (&shared.rare.octets[0][0])[ValueRows::place(i / 2, i % 2)]; };

  WarpState<K> memory;
  WarpState<K>& s = *unknown_pointer(&memory);
#pragma unroll 1
  for (int i = 0; i < K / 8; ++i) {
    const float4 four = shared.all[i][lane];
    s[i][0] = four.x, s[i][1] = four.y, s[i][2] = four.z, s[i][3] = four.w;
  }
#pragma unroll 1
  for (int i = lane; i < 2 * kChunk; i += kWarp)
    octet_of(i) = load_octet(values + i / 2 * p.v_token_stride + 8 * (i % 2), segment.wide_inputs, i < 2 * count);
  __syncwarp();
  struct {
    const ChunkFactorsSm90<K>& factors;
    const ChunkHeaderSm90<K>& header;
    ValueRows& v;
  } stage{image.factors, image.header, shared.rare};
  careful_chunk<T, K, false, MemoryMatrices>(p, segment, task, stage, chunk, static_cast<unsigned>(lane), s);
#pragma unroll 1
  for (int i = lane; i < 2 * count; i += kWarp)
    store_octet(out + i / 2 * p.out_token_stride + 8 * (i % 2), octet_of(i), segment.wide_out);
#pragma unroll 1
  for (int i = 0; i < K / 8; ++i) shared.all[i][lane] = make_float4(s[i][0], s[i][1], s[i][2], s[i][3]);
}

// Phase 3 of one of the four warps: the state, through the chunks.
template <typename T, int K, int V>
__device__ __forceinline__ void run_strip(const KdaPrefillParams& p, const Segment& segment, const ChainTask& task,
                                          StripShared<K>& shared, StripRings<K, V>& rings) {
  const auto rows_of = [&](int slot) { return state_rows(p, segment.wide_state, slot, task.head, task.first_value); };
  auto& of_state = rings.of_state;
  auto& of_values = rings.of_values;
  StripWarp<T, K> x(shared);
  x.load(rows_of(task.slot), task.first == 0 && p.has_initial_state && !p.has_initial_state[task.sequence]);
  of_state.wait();
  x.load_rows(of_state.part().factors.k, x.k);
  x.load_rows(of_state.part().factors.q, x.q);
  x.start_values(of_state.part().v);
  of_state.release();
  x.share_state();
  of_values.wait();
  x.multiply_state(of_values.part());

  const int first_token = task.first * kChunk + 16 * x.warp + x.lane / 2;
  T* to = static_cast<T*>(p.out) + (task.begin + first_token) * p.out_token_stride + task.head * p.out_head_stride +
          task.first_value + 8 * (x.lane % 2);
  int left = task.length - first_token;
  const int last = task.last, num_snapshots = min(static_cast<int>(p.num_snapshots), task.length / kChunk);
#pragma unroll 1
  for (int chunk = task.first; chunk < last; ++chunk) {
    // Behind the last chunk nobody wants what is loaded, nor the products with it.
    const bool more = chunk + 1 < last;
    of_state.advance();
    x.multiply_x([&] {
      x.load_a_qk(of_values.part());
      of_values.release();
      if (more) of_state.wait();
      x.load_rows(of_state.part().factors.k, x.k);
    });
    of_values.advance();
    x.multiply_delta([&] {
      x.start_values(of_state.part().v);
      x.load_rows(of_state.part().factors.q, x.q);
      if (more) of_state.release();
    });
    uint32_t words[4];
    x.round_out(p.scale, words);
    x.share_state();
    if (more) of_values.wait();
    x.multiply_state(of_values.part());
    if (!x.is_fit()) [[unlikely]] {
      x.meet();  // nobody reads S any more
      x.save(x.before);
      x.meet();
      if (x.warp == 0) run_chunk_again<T, K, V>(p, segment, chunk, shared);
      x.meet();
      x.restore();
      x.meet();
      x.start_values();
      x.share_state();
      x.multiply_state(of_values.part());
    } else {
      const uint4 octet = x.transpose_out(words);
      if (left > 0) store_octet(to, octet, segment.wide_out);
    }
    to += kChunk * p.out_token_stride;
    left -= kChunk;
    if (chunk < num_snapshots) [[unlikely]] {
      const int slot = p.snapshot_slots[task.sequence * p.num_snapshots + chunk];
      if (slot >= 0) x.store(rows_of(slot));
    }
  }

  // Phase 4: the state, for the next segment or the caller.
  x.store(rows_of(task.slot));
}

template <typename T, int K, int V>
__device__ __forceinline__ void run_strips(const KdaPrefillParams& p, const Segment& segment) {
  auto& shared = shared_memory<StripShared<K>>();
  barrier_begin(kWarpgroupBarrier, kWarpgroup);
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarp, 0);

  // Phase 1: which of the sequence's chunks are in this segment. What the kernels in front write is not read yet.
  StripRings<K, V> rings(shared);
  const ChainTask task = find_strip_task<V>(p, segment);
  grid_dependency_wait();
  grid_launch_dependents();
  if (task.length <= 0 || task.first >= task.last) return;
  if (task.slot < 0) {
    write_zeros<T>(p, segment, task, warp, kStripThreads / kWarp);
    return;
  }

  // Phase 2: everybody to his place.
  if (warp == kWarpgroup / kWarp) {
    const int64_t first_token = task.begin + static_cast<int64_t>(task.first) * kChunk;
    const T* const values =
        static_cast<const T*>(p.v) + first_token * p.v_token_stride + task.head * p.v_head_stride + task.first_value;
    rings.copy_all(
        task.last - task.first,
        [&](int i) -> const auto& {
          return image_of<ChunkImageSm90<K>>(segment, task.first_of_sequence + task.first + i, task.head,
                                             p.num_value_heads);
        },
        values, p.v_token_stride, task.length - task.first * kChunk, segment.wide_inputs);
  } else {
    run_strip<T, K, V>(p, segment, task, shared, rings);
  }
  cluster_sync();  // nobody leaves while others copy to it, or arrive at its barriers
}

// SASS: tensor cores, 16-byte loads, stack 288 (256: the state in careful_chunk(), which is rare; the rest, registers
// of run_chunk_again())
template <typename T, int K, int V>
__global__ void __launch_bounds__(kStripThreads, 1)
    kda_strip_sm90_kernel(const __grid_constant__ KdaPrefillParams p, const __grid_constant__ Segment segment) {
  if constexpr (kHasSm90)
    run_strips<T, K, V>(p, segment);
  else
    __trap();
}

}  // namespace kimi::cuda
