// The recurrence itself, token by token in fp32, for 16 rows of the state in one warp: the generic kernel, and the way
// out of the chunked path for chunks whose numbers 16-bit operands cannot hold.
//
// Lane 4 g + t holds rows g (r = 0) and g + 8 (r = 1) of a block of 16 values, and of each block j of 32 key channels
// the eight from 32 j + 8 t on: element s[4 j + i / 2][2 r + i % 2], as in mma accumulators.
#pragma once

#include "cuda/common/activations.h"
#include "cuda/common/packed.h"
#include "cuda/common/reduce.h"
#include "cuda/kda_prefill/image.cuh"

namespace kimi::cuda {

// 16 rows of a state [value_dim, key_dim] in the pool, of float or Bf16. What follows runs about once a sequence.
struct StateRows {
  void* data;
  DType dtype;
  bool wide;  // whether 8 channels are aligned to 16 bytes
};

__device__ __forceinline__ StateRows state_rows(const KdaPrefillParams& p, bool wide, int slot, int head,
                                                int first_value) {
  const int64_t at = slot * p.state_slot_stride + (head * p.value_dim + first_value) * p.key_dim;
  return {static_cast<char*>(p.state) + at * (p.state_dtype == DType::kF32 ? 4 : 2), p.state_dtype, wide};
}

// Runs body(offset of 8 consecutive channels, j, r) for the lane's pieces of 16 rows.
template <int J, typename Body>
__device__ __forceinline__ void for_state_pieces(int key_dim, Body&& body) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int j = 0; j < J; ++j) {
      if (32 * j + 8 * t < key_dim) body((g + 8 * r) * key_dim + 32 * j + 8 * t, j, r);
    }
  }
}

// 8 channels of the pool, `at` elements from where `rows` begin. Past the L1 cache: another kernel that is still
// running may have written them.
template <typename S>
__device__ __forceinline__ void load_piece_of(const StateRows& rows, int at, float (&x)[8]) {
  const S* from = static_cast<const S*>(rows.data) + at;
  constexpr int kWide = 16 / sizeof(S);
  if (rows.wide) {
#pragma unroll
    for (int part = 0; part < 8; part += kWide) {
      float of_part[kWide];
      bits_as<Packed<S, kWide>>(__ldcg(reinterpret_cast<const uint4*>(from + part))).unpack(of_part);
#pragma unroll
      for (int i = 0; i < kWide; ++i) x[part + i] = of_part[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = to_float(__ldcg(from + i));
  }
}
template <typename S>
__device__ __forceinline__ void store_piece_of(const StateRows& rows, int at, const float (&x)[8]) {
  S* to = static_cast<S*>(rows.data) + at;
  constexpr int kWide = 16 / sizeof(S);
#pragma unroll
  for (int part = 0; part < 8; part += kWide) {
    float of_part[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) of_part[i] = x[part + i];
    if (rows.wide) {
      store_packed(to + part, Packed<S, kWide>::pack(of_part));
    } else {
#pragma unroll
      for (int i = 0; i < kWide; ++i) to[part + i] = from_float<S>(of_part[i]);
    }
  }
}

// s <- 16 rows of the pool (channels past key_dim become 0), or zeros.
template <int J>
__device__ __forceinline__ void load_state(float (&s)[4 * J][4], const StateRows& rows, int key_dim, bool zeros) {
#pragma unroll
  for (int x = 0; x < 4 * J; ++x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[x][i] = 0.0f;
  }
  if (zeros) return;
  for_state_pieces<J>(key_dim, [&](int at, int j, int r) {
    float x[8];
    if (rows.dtype == DType::kF32) {
      load_piece_of<float>(rows, at, x);
    } else {
      load_piece_of<Bf16>(rows, at, x);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) s[4 * j + i / 2][2 * r + i % 2] = x[i];
  });
}

// Rounds where the pool is of Bf16.
template <int J>
__device__ __forceinline__ void store_state(const float (&s)[4 * J][4], const StateRows& rows, int key_dim) {
  for_state_pieces<J>(key_dim, [&](int at, int j, int r) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = s[4 * j + i / 2][2 * r + i % 2];
    if (rows.dtype == DType::kF32) {
      store_piece_of<float>(rows, at, x);
    } else {
      store_piece_of<Bf16>(rows, at, x);
    }
  });
}

// Two channels of the pool, one by one.
__device__ __forceinline__ float2 load_pair(const StateRows& rows, int at) {
  if (rows.dtype == DType::kF32) {
    const float* from = static_cast<const float*>(rows.data) + at;
    return make_float2(__ldcg(from), __ldcg(from + 1));
  }
  const Bf16* from = static_cast<const Bf16*>(rows.data) + at;
  return make_float2(to_float(__ldcg(from)), to_float(__ldcg(from + 1)));
}
__device__ __forceinline__ void store_pair(const StateRows& rows, int at, float x, float y) {
  if (rows.dtype == DType::kF32) {
    float* to = static_cast<float*>(rows.data) + at;
    to[0] = x;
    to[1] = y;
  } else {
    Bf16* to = static_cast<Bf16*>(rows.data) + at;
    to[0] = from_float<Bf16>(x);
    to[1] = from_float<Bf16>(y);
  }
}

// One token of one value head as memory has it (g with dt_bias added), element by element: lane l holds key channels
// 32 j + l.
template <int J>
struct RawToken {
  float q[J], k[J], g[J], beta, v[2];
};

// Ready for the recurrence.
template <int J>
struct ReadyToken {
  float q[J], k[J], decay[J], beta, v[2];
};

template <typename T>
__device__ __forceinline__ float load_element(const void* base, DType dtype, int64_t at) {
  return dtype == DType::kF32 ? static_cast<const float*>(base)[at] : to_float(static_cast<const T*>(base)[at]);
}

// One value head of one sequence, as 16 of its value channels (from `first_value` on) need it.
template <typename T, int J>
struct TokenReader {
  const KdaPrefillParams& p;
  int head, first_value;
  float rate;

  __device__ __forceinline__ TokenReader(const KdaPrefillParams& p, int head, int first_value)
      : p(p), head(head), first_value(first_value) {
    rate = p.A_log ? expf(p.A_log[head]) : 1.0f;
  }

  __device__ __forceinline__ static int channel(int j) { return 32 * j + static_cast<int>(threadIdx.x) % kWarp; }

  __device__ __forceinline__ RawToken<J> load(int64_t token) const {
    RawToken<J> raw;
    const int qk_head = head / static_cast<int>(p.num_value_heads / p.num_heads);
    const T* q = static_cast<const T*>(p.q) + token * p.q_token_stride + qk_head * p.q_head_stride;
    const T* k = static_cast<const T*>(p.k) + token * p.k_token_stride + qk_head * p.k_head_stride;
    const T* v = static_cast<const T*>(p.v) + token * p.v_token_stride + head * p.v_head_stride + first_value;
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const int c = channel(j);
      const bool valid = c < p.key_dim;
      raw.q[j] = valid ? to_float(q[c]) : 0.0f;
      raw.k[j] = valid ? to_float(k[c]) : 0.0f;
      raw.g[j] = valid ? load_element<T>(p.g, p.g_dtype, token * p.g_token_stride + head * p.g_head_stride + c) : 0.0f;
      if (valid && p.dt_bias && p.gate != KdaGate::kLogDecay) raw.g[j] += p.dt_bias[head * p.key_dim + c];
    }
    raw.beta = load_element<T>(p.beta, p.beta_dtype, token * p.beta_token_stride + head * p.beta_head_stride);
    const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) raw.v[r] = to_float(v[g + 8 * r]);
    return raw;
  }

  // x / sqrt(sum x^2 + 1e-6), also where the squares overflow.
  __device__ __forceinline__ static void normalize(float (&x)[J]) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < J; ++j) squares = fmaf(x[j], x[j], squares);
    squares = warp_sum(squares);
    if (!(squares < 1e37f)) {  // the same in all lanes
      squares = 0.0f;
#pragma unroll
      for (int j = 0; j < J; ++j) {
        x[j] *= 0x1p-80f;
        squares = fmaf(x[j], x[j], squares);
      }
      squares = warp_sum(squares);
    } else {
      squares += 1e-6f;
    }
    const float norm = sqrtf(squares);
#pragma unroll
    for (int j = 0; j < J; ++j) x[j] /= norm;
  }

  __device__ __forceinline__ float decay_of(float x) const {
    if (p.gate == KdaGate::kLogDecay) return expf(x);
    if (p.gate == KdaGate::kBounded) return expf(p.lower_bound / (1.0f + expf(-rate * x)));
    return expf(-rate * softplus(x));
  }

  __device__ __forceinline__ ReadyToken<J> prepare(const RawToken<J>& raw) const {
    ReadyToken<J> ready;
#pragma unroll
    for (int j = 0; j < J; ++j) {
      ready.q[j] = raw.q[j];
      ready.k[j] = raw.k[j];
      ready.decay[j] = decay_of(raw.g[j]);
    }
    if (p.use_qk_l2norm) {
      normalize(ready.q);
      normalize(ready.k);
    }
#pragma unroll
    for (int j = 0; j < J; ++j) ready.q[j] *= p.scale;
    ready.beta = p.use_beta_sigmoid ? sigmoid(raw.beta) : raw.beta;
    ready.v[0] = raw.v[0];
    ready.v[1] = raw.v[1];
    return ready;
  }
};

// Tokens [begin, end) of the pack, all of the reader's sequence: s becomes the state after them, their outputs are
// written.
template <typename T, int J>
__device__ __forceinline__ void run_tokens(const TokenReader<T, J>& reader, int64_t begin, int64_t end,
                                           float (&s)[4 * J][4]) {
  const KdaPrefillParams& p = reader.p;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  constexpr bool kAhead = J <= 4;  // the next token's loads overlap with this one, where there are registers for them
  RawToken<J> next;
  if (kAhead) next = reader.load(begin);
#pragma unroll 1
  for (int64_t token = begin; token < end; ++token) {
    if (!kAhead) next = reader.load(token);
    const ReadyToken<J> x = reader.prepare(next);
    if (kAhead && token + 1 < end) next = reader.load(token + 1);

    // Lane 8 t + i of the warp has channel 32 j + 8 t + i: element c = 8 j + i of this lane's rows.
    const auto of_channel = [&](const float (&values)[J], int c) {
      return __shfl_sync(kFullWarp, values[c / 8], 8 * t + c % 8);
    };
    // Phase 1: decay, and the row sums along k.
    float along_k[2][2] = {};
#pragma unroll
    for (int c = 0; c < 8 * J; ++c) {
      if (!kAhead && c % 8 == 0) __syncwarp();  // where registers are short, not too many shuffles at once
      const float decay = of_channel(x.decay, c), k = of_channel(x.k, c);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& element = s[c / 2][2 * r + c % 2];
        element *= decay;
        along_k[r][c % 2] = fmaf(element, k, along_k[r][c % 2]);
      }
    }
    // Phase 2: the delta, and the row sums along q of the updated state.
    float delta[2], along_q[2][2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) delta[r] = x.beta * (x.v[r] - warp_sum<4>(along_k[r][0] + along_k[r][1]));
#pragma unroll
    for (int c = 0; c < 8 * J; ++c) {
      if (!kAhead && c % 8 == 0) __syncwarp();
      const float k = of_channel(x.k, c), q = of_channel(x.q, c);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& element = s[c / 2][2 * r + c % 2];
        element = fmaf(delta[r], k, element);
        along_q[r][c % 2] = fmaf(element, q, along_q[r][c % 2]);
      }
    }
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride + reader.head * p.out_head_stride + reader.first_value;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float o = warp_sum<4>(along_q[r][0] + along_q[r][1]);
      if (t == r) out[g + 8 * r] = from_float<T>(o);
    }
  }
}

// The same with the state in memory, `rows` of the lane's block in the pool. Not inlined: who calls it where it is
// hardly ever needed keeps its registers.
template <typename T, int J>
__device__ __noinline__ void run_tokens_in_pool(const KdaPrefillParams& p, int head, int first_value, int64_t begin,
                                                int64_t end, StateRows rows) {
  float s[4 * J][4];
  load_state<J>(s, rows, static_cast<int>(p.key_dim), false);
  run_tokens<T, J>(TokenReader<T, J>(p, head, first_value), begin, end, s);
  store_state<J>(s, rows, static_cast<int>(p.key_dim));
}

}  // namespace kimi::cuda
