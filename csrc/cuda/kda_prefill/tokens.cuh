// The recurrence itself, token by token in fp32, for 16 rows of the state in one warp: the generic kernel, and the way
// out of the chunked path for chunks whose numbers 16-bit operands cannot hold.
//
// Lane 4 g + t holds rows g (r = 0) and g + 8 (r = 1) of a block of 16 values, in the numbering of image.cuh, and of
// each block j of 32 key channels the eight from 32 j + 8 t on: element s[4 j + i / 2][2 r + i % 2], as in mma
// accumulators.
#pragma once

#include "cuda/common/activations.h"
#include "cuda/common/reduce.h"
#include "cuda/kda_prefill/image.cuh"

namespace kimi::cuda {

// Row r of lane quad g within the block of 16 values.
__device__ __forceinline__ int value_row(int g, int r) {
  return 4 * (g / 2) + g % 2 + 2 * r;
}

// Runs body(pointer to 8 consecutive channels, j, r) for the lane's pieces of a state [value_dim, key_dim].
template <int J, typename Body>
__device__ __forceinline__ void for_state_pieces(float* rows, int key_dim, Body&& body) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int j = 0; j < J; ++j) {
      if (32 * j + 8 * t < key_dim) body(rows + static_cast<int64_t>(value_row(g, r)) * key_dim + 32 * j + 8 * t, j, r);
    }
  }
}

// s <- 16 rows of the pool (channels past key_dim become 0), or zeros.
template <int J>
__device__ __forceinline__ void load_state(float (&s)[4 * J][4], const float* rows, int key_dim, bool wide,
                                           bool zeros) {
#pragma unroll
  for (int x = 0; x < 4 * J; ++x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[x][i] = 0.0f;
  }
  if (zeros) return;
  for_state_pieces<J>(const_cast<float*>(rows), key_dim, [&](const float* from, int j, int r) {
    if (wide) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto piece = load_vec<float, 4>(from + 4 * half);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[4 * j + 2 * half + i / 2][2 * r + i % 2] = piece.x[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) s[4 * j + i / 2][2 * r + i % 2] = from[i];
    }
  });
}

template <int J>
__device__ __forceinline__ void store_state(const float (&s)[4 * J][4], float* rows, int key_dim, bool wide) {
  for_state_pieces<J>(rows, key_dim, [&](float* to, int j, int r) {
    if (wide) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vec<float, 4> piece;
#pragma unroll
        for (int i = 0; i < 4; ++i) piece.x[i] = s[4 * j + 2 * half + i / 2][2 * r + i % 2];
        store_vec(to + 4 * half, piece);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = s[4 * j + i / 2][2 * r + i % 2];
    }
  });
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
    for (int r = 0; r < 2; ++r) raw.v[r] = to_float(v[value_row(g, r)]);
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
      if (t == r) out[value_row(g, r)] = from_float<T>(o);
    }
  }
}

// The same with the state in memory, `rows` of the lane's block in the pool. Not inlined: who calls it where it is
// hardly ever needed keeps its registers.
template <typename T, int J>
__device__ __noinline__ void run_tokens_in_pool(const KdaPrefillParams& p, int head, int first_value, int64_t begin,
                                                int64_t end, float* rows, bool wide) {
  float s[4 * J][4];
  load_state<J>(s, rows, static_cast<int>(p.key_dim), wide, false);
  run_tokens<T, J>(TokenReader<T, J>(p, head, first_value), begin, end, s);
  store_state<J>(s, rows, static_cast<int>(p.key_dim), wide);
}

}  // namespace kimi::cuda
