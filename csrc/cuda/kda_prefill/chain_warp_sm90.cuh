// What a warp of K2 on Hopper holds and does with a chunk, for chain_sm90.cuh and whole_sm90.cuh: matrix products of
// whole warpgroups (wgmma).
//
// A warpgroup has 64 rows of the state (values) x all key channels as fp32 accumulators, a warp 16 of them, as in
// chain.cuh. Per chunk, transposed, with -k, T, q, kg and A_qk as right operands in shared memory (image_sm90.cuh):
//
//   (1) x^T = v^T - S k^T   (2) v'^T = x^T T^T   (3) o^T = S q^T   (4) S = S D + v'^T kg   (5) o^T += v'^T A_qk^T
//
// Range: chain_common.cuh. A warp whose v' is not fit takes part in (4) and (5) with v' = 0 and a state that is not
// decayed, so nothing changes for it; then it does the chunk again, alone (careful_sm90.cuh). (0 times kg must be 0 for
// that: kg is finite also where nothing else of an image is valid.)
#pragma once

#include "cuda/common/ptx_sm90.h"
#include "cuda/kda_prefill/chain_common.cuh"
#include "cuda/kda_prefill/image_sm90.cuh"

namespace kimi::cuda {

inline constexpr int kWarpgroup = 4 * kWarp;
inline constexpr int kWarpgroupBarrier = 1;

// 64 values of each token of a chunk.
struct ValueRows {
  static constexpr int kOctets = 9;  // one unused, so that an octet of eight tokens is in all banks
  uint4 octets[kChunk][kOctets];
  __device__ __forceinline__ static int place(int token, int octet) { return kOctets * token + octet; }
};

// The same without padding: an octet of eight tokens is in all banks by a swizzle, the copy engine's of 128 bytes.
struct alignas(1024) SwizzledRows {
  static constexpr int kOctets = 8;
  uint4 octets[kChunk][kOctets];
  __device__ __forceinline__ static int place(int token, int octet) { return kOctets * token + (octet ^ token % 8); }
};

// A step between orders of channels: the bit `of_x` of the number x of s[x], in blocks of four, changes places with the
// bit `of_lane` of the lane's.
template <int K>
__device__ __forceinline__ void swap_bits(float (&s)[K / 8][4], int of_x, int of_lane) {
  const bool upper = threadIdx.x & of_lane;
#pragma unroll
  for (int x = 0; x < K / 8; ++x) {
    if (x & of_x) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float &low = s[x][i], &high = s[x | of_x][i];
      const float other = __shfl_xor_sync(kFullWarp, upper ? low : high, of_lane);
      (upper ? low : high) = other;
    }
  }
}

// Accumulators are read only after the wait for them, and operands are ready before the first product: the compiler
// would move either.
template <typename Word, int N>
__device__ __forceinline__ void wgmma_results(Word (&d)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) register_fence(d[i]);
}

// S of 64 values in fp16, as left operand in shared memory.
template <int K>
struct SharedState {
  uint4 octets[K / 8][64];  // [eight channels][value]
};

// What a warp of the chain holds and does, chunk by chunk. Left operands are in registers; with kShared S is in shared
// memory, and channels are in fours (image_sm90.cuh). `stage` is a ChainStageSm90 or what has the same members.
template <typename T, int K, bool kShared = false>
struct ChainWarp {
  using Rows = std::conditional_t<kShared, SwizzledRows, ValueRows>;
  static constexpr int kPiece = kShared ? 4 : 2;  // elements of a row of the state that a lane has next to each other
  using Piece = Vec<float, kPiece>;
  float s[K / 8][4];                        // the state: rows g, g + 8 of the warp's 16, columns 8 i + 2 t, + 1
  uint32_t state[kShared ? 1 : K / 16][4];  // in fp16, as left operand
  SharedState<K>* shared_state = nullptr;
  float values[kGroups][4];          // v^T, x^T, v'^T
  uint32_t operand[kGroups / 2][4];  // the latter two in fp16, as left operand
  float separate_out[kShared ? 1 : kGroups][4];
  __device__ __forceinline__ auto& out() {  // o^T. Registers of its own only where the next v^T comes before it goes.
    if constexpr (kShared)
      return values;
    else
      return separate_out;
  }

  int lane, warp;
  int matrix_place;  // for ldmatrix and stmatrix, in the first 16 of Rows, at the warp's 16 values

  __device__ __forceinline__ static int place(int token, int octet) { return Rows::place(token, octet); }
  __device__ __forceinline__ ChainWarp() { find_place(threadIdx.x); }
  __device__ __forceinline__ void find_place(unsigned thread) {  // no sign: divisions are shifts
    warp = static_cast<int>(thread / kWarp % 4);
    lane = static_cast<int>(thread % kWarp);
    matrix_place = Rows::place(static_cast<int>(thread % kWarp / 16 * 8 + thread % 8),
                               2 * warp + static_cast<int>(thread / 8 % 2));
    if constexpr (!kShared) {
      lane = keep_in_register(lane);
      matrix_place = keep_in_register(matrix_place);
    }
  }

  // state <- S; with kShared it is there only behind share_state().
  __device__ __forceinline__ void round_state() {
#pragma unroll
    for (int x = 0; x < K / 16; ++x) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = s[2 * x + i / 2];
        state[kShared ? 0 : x][i] = pack2<Fp16>(from[2 * (i % 2)], from[2 * (i % 2) + 1]);
      }
      if constexpr (kShared) stmatrix_x4(&shared_state->octets[2 * x + lane / 16][16 * warp + lane % 16], state[0]);
    }
  }
  __device__ __forceinline__ static void share_state() {
    if constexpr (kShared) {
      fence_proxy_async();
      barrier_sync(kWarpgroupBarrier, kWarpgroup);
    }
  }
  // A matrix descriptor for one product. With kShared the compiler would keep the descriptors of all products, and
  // spill them.
  __device__ __forceinline__ static uint64_t anew(uint64_t descriptor) {
    return kShared ? keep_in_register(descriptor) : descriptor;
  }
  // S as left operand, and its 16 channels 16 x ..
  __device__ __forceinline__ uint64_t left_state() const {
    if constexpr (kShared)
      return anew(wgmma_descriptor<false>(shared_state->octets, sizeof(shared_state->octets[0]), 128));
    else
      return 0;
  }
  __device__ __forceinline__ decltype(auto) sixteen_of(uint64_t left, int x) const {
    if constexpr (kShared)
      return left + x * (2 * sizeof(shared_state->octets[0]) / 16);
    else
      return (state[x]);
  }

  // values <- v^T.
  __device__ __forceinline__ void start_values(const auto& stage) {
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) {
      uint32_t v[4];
      ldmatrix_x4_trans(v, &stage.v.octets[16 * x][0] + matrix_place);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_pair<T>(v[i]);
        values[2 * x + i / 2][2 * (i % 2)] = pair.x;
        values[2 * x + i / 2][2 * (i % 2) + 1] = pair.y;
      }
    }
  }

  // From the first channels of k or q to the 16 x-th, in 16 bytes: pieces of 512 bytes have 32.
  __device__ __forceinline__ static int sixteen_channels(int x) { return x / 2 * 32 + x % 2 * 2; }

  // (1): values -= S k^T
  __device__ __forceinline__ void multiply_k(const auto& stage) {
    const uint64_t k = anew(wgmma_descriptor_swizzle_64(stage.factors.k, 0, 16 * K)), left = left_state();
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < K / 16; ++x) wgmma_m64n64k16<false>(values, sixteen_of(left, x), k + sixteen_channels(x), true);
    wgmma_commit();
  }

  // (2): values <- x^T T^T
  __device__ __forceinline__ void multiply_t(const auto& stage) {
    const uint64_t t = anew(wgmma_descriptor<true>(stage.factors.t, 128 * kGroups, 128));
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) wgmma_m64n64k16<true>(values, operand[x], t + 16 * kGroups * x, x > 0);
    wgmma_commit();
  }

  // (5): out += v'^T A_qk^T
  __device__ __forceinline__ void multiply_a_qk(const auto& stage) {
    const uint64_t a_qk = anew(wgmma_descriptor<false>(stage.factors.a_qk, 128 * kGroups, 128));
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) wgmma_m64n64k16<false>(out(), operand[x], a_qk + 16 * kGroups * x, true);
    wgmma_commit();
  }

  // (3): out <- S q^T. Without kShared behind (2), whose fence serves for both: another one would wait for (2).
  __device__ __forceinline__ void multiply_q(const auto& stage) {
    const uint64_t q = anew(wgmma_descriptor_swizzle_64(stage.factors.q, 0, 16 * K)), left = left_state();
    if constexpr (kShared) wgmma_fence();
#pragma unroll
    for (int x = 0; x < K / 16; ++x) wgmma_m64n64k16<false>(out(), sixteen_of(left, x), q + sixteen_channels(x), x > 0);
    wgmma_commit();
  }

  // (4): S += v'^T kg
  __device__ __forceinline__ void multiply_kg(const auto& stage) {
    const uint64_t kg = anew(wgmma_descriptor_swizzle_64(stage.factors.kg, 512, 16 * K));
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) {
      if constexpr (K == 128)
        wgmma_m64n128k16<true>(s, operand[x], kg + 2 * K * x, true);
      else
        wgmma_m64n64k16<true>(s, operand[x], kg + 2 * K * x, true);
    }
    wgmma_commit();
  }

  // operand <- values.
  __device__ __forceinline__ void round_values() {
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = values[2 * x + i / 2];
        operand[x][i] = pack2<Fp16>(from[2 * (i % 2)], from[2 * (i % 2) + 1]);
      }
    }
  }
  __device__ __forceinline__ void clear_operand() {
#pragma unroll
    for (int i = 0; i < 4 * (kGroups / 2); ++i) operand[i / 4][i % 4] = 0;
  }

  // For a warp whose v' is not fit, which is rare: (4) and (5) change nothing.
  __device__ __forceinline__ void stay(float (&decay)[K / 16][4]) {
    clear_operand_rarely();
    for (auto& four : decay) four[0] = four[1] = four[2] = four[3] = 1.0f;
  }
  __device__ __forceinline__ void clear_operand_rarely() {
    keep_branch();
    clear_operand();
  }

  // S *= D, of which a thread needs four elements in each 16 channels.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void load_decay(const float* decay, float (&fours)[K / 16][4]) const {
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      const auto four = load_vec<float, 4>(decay + 16 * i + 4 * (lane % 4));
#pragma unroll
      for (int e = 0; e < 4; ++e) fours[i][e] = four.x[e];
    }
  }
  __device__ __forceinline__ void decay_state(const float (&fours)[K / 16][4]) {
#pragma unroll
    for (int i = 0; i < K / 16; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) s[2 * i + e / 4][e % 4] *= fours[i][e / 4 * 2 + e % 2];
    }
  }

  // The same with fewer registers.
  __device__ __forceinline__ void decay_state(const float* decay) {
    decay += 4 * (lane % 4);
#pragma unroll
    for (int i = 0; i < K / 16; ++i) {
      const auto four = load_vec<float, 4>(decay + 16 * i);
#pragma unroll
      for (int e = 0; e < 8; ++e) s[2 * i + e / 4][e % 4] *= four.x[e / 4 * 2 + e % 2];
    }
  }

  // rows <- the output times `factor`, in the dtype of memory; the warp's columns.
  __device__ __forceinline__ void round_out(float factor, Rows& rows) {
#pragma unroll
    for (int x = 0; x < kGroups / 2; ++x) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = out()[2 * x + i / 2];
        words[i] = pack2<T>(from[2 * (i % 2)] * factor, from[2 * (i % 2) + 1] * factor);
      }
      stmatrix_x4_trans(&rows.octets[16 * x][0] + matrix_place, words);
    }
    __syncwarp();
  }

  // S from the pool, or zeros.
  __device__ __forceinline__ void load(const StateRows& rows, bool zeros) {
    const auto fill = [&](auto&& load_piece) {
      for_pieces([&](int at, auto&& element) {
        const Piece piece = load_piece(at);
#pragma unroll
        for (int e = 0; e < kPiece; ++e) element(e) = piece.x[e];
      });
    };
    using Words = std::conditional_t<kPiece == 4, float4, float2>;
    if (zeros)
      fill([](int) { return Piece{}; });
    else if (rows.dtype == DType::kF32 && rows.wide)
      fill([&](int at) {
        return bits_as<Piece>(__ldcg(reinterpret_cast<const Words*>(static_cast<const float*>(rows.data) + at)));
      });
    else
      fill([&](int at) {
        Piece piece;
#pragma unroll
        for (int e = 0; e < kPiece; e += 2) {
          const float2 pair = load_pair(rows, at + e);
          piece.x[e] = pair.x;
          piece.x[e + 1] = pair.y;
        }
        return piece;
      });
  }
  __device__ __forceinline__ void store(const StateRows& rows) {
    if (rows.dtype == DType::kF32 && rows.wide) {
      for_pieces([&](int at, auto&& element) {
        Piece piece;
#pragma unroll
        for (int e = 0; e < kPiece; ++e) piece.x[e] = element(e);
        store_vec(static_cast<float*>(rows.data) + at, piece);
      });
    } else {
      for_pieces([&](int at, auto&& element) {
#pragma unroll
        for (int e = 0; e < kPiece; e += 2) store_pair(rows, at + e, element(e), element(e + 1));
      });
    }
  }
  // body(place in the rows, its elements); a warp's are 32 or 64 bytes in each of eight rows.
  template <typename Body>
  __device__ __forceinline__ void for_pieces(Body&& body) {
    const int first =
        keep_in_register(lane / 4 * K + kPiece * (lane % 4));  // or addresses would fill registers all the time
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < K / (4 * kPiece); ++i)
        body(first + 8 * K * r + 4 * kPiece * i,
             [&](int e) -> float& { return s[kPiece / 2 * i + e / 2][2 * r + e % 2]; });
    }
  }

  // From the order of channels here to that of load_state() (lane t of four has channels 8 t + 2 x, + 1 of a block of
  // 32 in s[x]), and back. With a pair's number p3 p2 p1 p0 in binary: to t = p3 p2, x = p1 p0 from x = p3 p2, t = p1
  // p0, or, in fours, from x = p3 p0, t = p2 p1.
  __device__ __forceinline__ void to_token_order() {
    swap_bits<K>(s, 2, 2);
    swap_bits<K>(s, kShared ? 2 : 1, 1);
  }
  __device__ __forceinline__ void from_token_order() {
    swap_bits<K>(s, kShared ? 2 : 1, 1);
    swap_bits<K>(s, 2, 2);
  }
};

}  // namespace kimi::cuda
