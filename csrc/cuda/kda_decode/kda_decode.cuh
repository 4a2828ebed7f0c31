// The kernel of kda_decode and kda_decode_fused (kimi/kda_decode.h, recurrence in kimi/kda.h). Portable; on Hopper its
// launch may overlap the kernel in front.
//
// Grid: (slice of state rows, value head, sequence). A row of the state (one value dimension) evolves
// on its own, so slices never change a bit; the fused form with its norm over all rows takes one block per head.
//
// The state is read once and written once, 2 * 4 * value_dim * key_dim bytes a head (128 KB at 128 x 128; half of it
// for a state in bf16), whatever the number of tokens: that is what bounds the kernel. It goes straight to registers
// and back, in accesses of four elements, and the loads of a block (of a block of kFewWarps with a whole head, those of
// its first half) are under way before anything else is looked at:
//
//   a warp reads 4 rows at once, 8 lanes a row; lane l of a row holds columns 4 l .. 4 l + 3 of every 32
//   a thread holds kRows such rows: 64 floats at key_dim 128, so that 256 threads hold a head of 128 x 128
//
// 8 lanes a row, not 32: a sum over the row then takes 3 shuffles, and as q, k and decay come from shared memory
// anyway, the columns a thread holds cost no registers. Per token and thread at 128 x 128: 272 FMA-pipe operations, 16
// shared loads of 16 bytes and 27 shuffles, about 0.4 us a head and SM against the 4 us that its state takes at full
// bandwidth.
//
// Shared memory: per token q, k, decay (normalised, fp32) and v, o and norm gates: 4.6 KB at 128 x 128.
//
// Sums have one order: 4 adjacent columns after each other for every 32, then a tree over 8 lanes.
#pragma once

#include "cuda/common/activations.h"
#include "cuda/common/launch.h"
#include "cuda/common/packed.h"
#include "cuda/common/ptx_sm90.h"
#include "cuda/common/reduce.h"
#include "kimi/kda_decode.h"
#include "kimi/short_conv.h"

namespace kimi::cuda::kda_decode_impl {

inline constexpr int kMaxWarps = 8;  // two such blocks on an SM, 128 registers a thread: 128 KB of state under way
inline constexpr int kFewWarps = 4;  // four such blocks on an SM, which wait for memory at different times
inline constexpr int kRowLanes = 8;  // lanes of one row
inline constexpr int kRowsAtOnce = kWarp / kRowLanes;
inline constexpr int kMaxDim = 256;  // of keys and of values
inline constexpr int kPast = kShortConvTaps - 1;
inline constexpr int64_t kMaxGridZ = 65535;

// How the kernel is compiled. kVectors: 16-byte vectors that a thread holds of each of its rows. Ordinarily key_dim is
// exactly 32 * kVectors and all memory is aligned for accesses of four elements; with kGeneral it is anything up to
// that, and elements are accessed one by one. Zeros beyond key_dim change no sum, so that both give the same bits.
template <typename Element, typename StateElement, int kVectors_, bool kFused_, bool kGeneral_>
struct Config {
  using T = Element;
  using State = StateElement;  // float or Bf16
  static constexpr int kVectors = kVectors_;
  static constexpr bool kFused = kFused_, kGeneral = kGeneral_;
  static constexpr int kKeys = kRowLanes * 4 * kVectors;
  static constexpr int kRows = kVectors == 8 ? 1 : 4;  // of a thread: 64 registers of state at key_dim 128, else 32
  static constexpr int kWarpRows = kRowsAtOnce * kRows;
  static constexpr int kParts = kKeys > 128 ? 2 : 1;  // of 128 elements, 4 a lane, that a warp prepares at once
};

// A token, ready for the recurrence; keys past key_dim are zero.
template <int kKeys>
struct alignas(16) Token {
  float q[kKeys], k[kKeys], decay[kKeys];
  float v[kMaxDim], o[kMaxDim];
  float norm[kMaxDim];  // weight * sigmoid(gate) of the output norm
  float beta;
};

template <int kKeys>
struct SharedStorage {
  Token<kKeys> token[kMaxDecodeTokens];  // the first tokens_per_sequence of them are allocated
};

// Four elements, in one access where everything is aligned for it.
template <bool kGeneral, typename T>
__device__ __forceinline__ Packed<T, 4> load4(const T* from) {
  if constexpr (kGeneral) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = to_float(from[i]);
    return Packed<T, 4>::pack(x);
  } else {
    return load_packed<T, 4>(from);
  }
}
template <bool kGeneral, typename T>
__device__ __forceinline__ void store4(T* to, const Packed<T, 4>& v) {
  if constexpr (kGeneral) {
    float x[4];
    v.unpack(x);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = from_float<T>(x[i]);
  } else {
    store_packed(to, v);
  }
}

// The short convolution of one sequence.
template <typename T, bool kGeneral>
struct Convolution {
  const T *qkv, *weight;  // qkv: of the sequence's first token
  T* state;               // of its slot
  int64_t token_stride, num_channels;

  __device__ __forceinline__ Convolution(const KdaDecodeFusedParams& p, int64_t n, int32_t slot)
      : qkv(static_cast<const T*>(p.qkv) + n * p.kda.tokens_per_sequence * p.qkv_token_stride),
        weight(static_cast<const T*>(p.conv_weight)),
        state(static_cast<T*>(p.conv_state) + slot * p.conv_state_slot_stride),
        token_stride(p.qkv_token_stride),
        num_channels(2 * p.kda.num_heads * p.kda.key_dim + p.kda.num_value_heads * p.kda.value_dim) {}

  // Input of 4 channels at token t of this call; -3 to -1 are those before it.
  __device__ __forceinline__ Packed<T, 4> input(int t, int64_t channel) const {
    return load4<kGeneral>((t < 0 ? state + (kPast + t) * num_channels : qkv + t * token_stride) + channel);
  }

  // silu(sum_j weight[c, j] * input[t - 3 + j, c]) of 4 channels.
  __device__ __forceinline__ void output(int t, int64_t channel, float (&y)[4]) const {
    Packed<T, 4> in[kShortConvTaps], taps[4];
#pragma unroll
    for (int j = 0; j < kShortConvTaps; ++j) in[j] = input(t - kPast + j, channel);
#pragma unroll
    for (int c = 0; c < 4; ++c) taps[c] = load4<kGeneral>(weight + (channel + c) * kShortConvTaps);
    float x[kShortConvTaps][4];
#pragma unroll
    for (int j = 0; j < kShortConvTaps; ++j) in[j].unpack(x[j]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float w[kShortConvTaps];
      taps[c].unpack(w);
      float sum = w[0] * x[0][c];
#pragma unroll
      for (int j = 1; j < kShortConvTaps; ++j) sum = fmaf(w[j], x[j][c], sum);
      y[c] = silu(sum);
    }
  }

  // The last three inputs of the first `commit` tokens become the state: all of `next_state` before any `write_state`.
  __device__ __forceinline__ void next_state(int commit, int64_t channel, Packed<T, 4> (&rows)[kPast]) const {
#pragma unroll
    for (int i = 0; i < kPast; ++i) rows[i] = input(commit - kPast + i, channel);
  }
  __device__ __forceinline__ void write_state(int64_t channel, const Packed<T, 4> (&rows)[kPast]) const {
#pragma unroll
    for (int i = 0; i < kPast; ++i) store4<kGeneral>(state + i * num_channels + channel, rows[i]);
  }
};

__device__ __forceinline__ int tokens_committed(const KdaDecodeParams& p, int64_t n) {
  const int tokens = static_cast<int>(p.tokens_per_sequence);
  if (p.num_commit == nullptr || p.num_commit[n] >= tokens) return tokens;
  return p.num_commit[n] < 0 ? 0 : p.num_commit[n];
}

// 1 / sqrt(sum x^2 / count + eps) over a warp. Values whose squares leave the range of fp32 are brought back by a power
// of two.
template <int kParts>
__device__ __forceinline__ float inverse_norm(const float (&x)[kParts][4], float count, float eps) {
  const auto sum = [&](float shrink) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) squares = fmaf(x[i][c] * shrink, x[i][c] * shrink, squares);
    }
    return warp_sum(squares) / count;
  };
  const float plain = sum(1.0f);
  if (plain < 3e38f) return rsqrtf(plain + eps);
  constexpr float kShrink = 0x1p-80f;
  return kShrink * rsqrtf(sum(kShrink) + eps * kShrink * kShrink);
}

// One value head of one sequence: where its inputs are, and how they become a Token. All functions are called by whole
// warps; lane l has elements 4 l .. 4 l + 3 of every 128.
template <typename Config>
struct Head {
  using T = typename Config::T;
  static constexpr bool kFused = Config::kFused, kGeneral = Config::kGeneral;
  static constexpr int kKeys = Config::kKeys, kParts = Config::kParts;
  enum Task { kQ, kK, kDecay, kValues };  // of a token; kValues + i: values from 128 * kParts * i on
  const KdaDecodeFusedParams& p;
  const Convolution<T, kGeneral> conv;
  int64_t n;
  int h, hv;
  int first_row, end_row;  // of the values
  int lane;

  __device__ __forceinline__ int key_dim() const { return kGeneral ? static_cast<int>(p.kda.key_dim) : kKeys; }
  __device__ __forceinline__ int64_t token_at(int t) const { return n * p.kda.tokens_per_sequence + t; }
  __device__ __forceinline__ int q_channel() const { return h * key_dim(); }
  __device__ __forceinline__ int k_channel() const { return (static_cast<int>(p.kda.num_heads) + h) * key_dim(); }
  __device__ __forceinline__ int v_channel() const {
    return 2 * static_cast<int>(p.kda.num_heads) * key_dim() + hv * static_cast<int>(p.kda.value_dim);
  }
  __device__ __forceinline__ int num_tasks() const { return kValues + ceil_div(end_row - first_row, 128 * kParts); }

  __device__ __forceinline__ void prepare(int task, int t, Token<kKeys>& token) const {
    if (task == kDecay) return prepare_decay_and_beta(t, token);
    const bool is_values = task >= kValues;
    const int first = is_values ? first_row + (task - kValues) * 128 * kParts : 0;
    const int end = is_values ? end_row : key_dim();
    const void* plain = task == kQ ? p.kda.q : task == kK ? p.kda.k : p.kda.v;
    const int64_t offset = task == kQ   ? token_at(t) * p.kda.q_token_stride + h * p.kda.q_head_stride
                           : task == kK ? token_at(t) * p.kda.k_token_stride + h * p.kda.k_head_stride
                                        : token_at(t) * p.kda.v_token_stride + hv * p.kda.v_head_stride;
    const int channel = task == kQ ? q_channel() : task == kK ? k_channel() : v_channel();
    float x[kParts][4] = {};
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int at = first + 128 * i + 4 * lane;
      if (at >= end) continue;
      if constexpr (kFused) {
        conv.output(t, channel + at, x[i]);
      } else {
        load4<kGeneral>(static_cast<const T*>(plain) + offset + at).unpack(x[i]);
      }
    }
    float scale = 1.0f;
    if (!is_values) {
      constexpr float kEps = 1e-6f;
      if (p.kda.use_qk_l2norm) scale = inverse_norm(x, 1.0f, kEps);
      if (task == kQ) scale *= p.kda.scale;
    }
    float* to = task == kQ ? token.q : task == kK ? token.k : token.v;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int at = first + 128 * i + 4 * lane;
      if (at >= (is_values ? end : kKeys)) continue;
      store_vec(to + at, Vec<float, 4>{x[i][0] * scale, x[i][1] * scale, x[i][2] * scale, x[i][3] * scale});
      if (kFused && is_values && p.norm_gate) prepare_norm(t, at, token);
    }
  }

  __device__ __forceinline__ void prepare_norm(int t, int at, Token<kKeys>& token) const {
    const int64_t offset = token_at(t) * p.norm_gate_token_stride + hv * p.norm_gate_head_stride;
    float gate[4], weight[4];
    load4<kGeneral>(static_cast<const T*>(p.norm_gate) + offset + at).unpack(gate);
    load4<kGeneral>(static_cast<const T*>(p.norm_weight) + at).unpack(weight);
#pragma unroll
    for (int j = 0; j < 4; ++j) token.norm[at + j] = weight[j] * sigmoid(gate[j]);
  }

  __device__ __forceinline__ float element(const void* from, DType dtype, int64_t at) const {
    return dtype == DType::kF32 ? static_cast<const float*>(from)[at] : to_float(static_cast<const T*>(from)[at]);
  }

  __device__ __forceinline__ void prepare_decay_and_beta(int t, Token<kKeys>& token) const {
    const int64_t offset = token_at(t) * p.kda.g_token_stride + hv * p.kda.g_head_stride;
    const float beta =
        element(p.kda.beta, p.kda.beta_dtype, token_at(t) * p.kda.beta_token_stride + hv * p.kda.beta_head_stride);
    const float rate = p.kda.A_log ? expf(p.kda.A_log[hv]) : 1.0f;
    if (lane == 0) token.beta = p.kda.use_beta_sigmoid ? 1.0f / (1.0f + expf(-beta)) : beta;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int at = 128 * i + 4 * lane;
      if (at >= kKeys) continue;
      float bias[4] = {}, g[4] = {};
      if (at < key_dim()) {
        if (p.kda.dt_bias) load4<kGeneral>(p.kda.dt_bias + hv * key_dim() + at).unpack(bias);
        if (p.kda.g_dtype == DType::kF32) {
          load4<kGeneral>(static_cast<const float*>(p.kda.g) + offset + at).unpack(g);
        } else {
          load4<kGeneral>(static_cast<const T*>(p.kda.g) + offset + at).unpack(g);
        }
      }
      // All four elements at once through each of the long functions.
      if (p.kda.gate == KdaGate::kSoftplus) {
#pragma unroll
        for (int c = 0; c < 4; ++c) g[c] = -rate * softplus(g[c] + bias[c]);
      } else if (p.kda.gate == KdaGate::kBounded) {
#pragma unroll
        for (int c = 0; c < 4; ++c) g[c] = p.kda.lower_bound / (1.0f + expf(-rate * (g[c] + bias[c])));
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) g[c] = at < key_dim() ? expf(g[c]) : 0.0f;
      store_vec(token.decay + at, Vec<float, 4>{g[0], g[1], g[2], g[3]});
    }
  }

  __device__ __forceinline__ T* out(int t) const {
    return static_cast<T*>(p.kda.out) + token_at(t) * p.kda.out_token_stride + hv * p.kda.out_head_stride;
  }

  // o, normalised in the fused form.
  __device__ __forceinline__ void write_out(int t, const Token<kKeys>& token) const {
    constexpr int kValueParts = kMaxDim / 128;
    float o[kValueParts][4] = {};
#pragma unroll
    for (int i = 0; i < kValueParts; ++i) {
      const int at = first_row + 128 * i + 4 * lane;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (at < end_row) o[i][j] = token.o[at + j];
    }
    const bool has_norm = kFused && p.norm_gate;
    const float scale = has_norm ? inverse_norm(o, static_cast<float>(p.kda.value_dim), p.norm_eps) : 1.0f;
#pragma unroll
    for (int i = 0; i < kValueParts; ++i) {
      const int at = first_row + 128 * i + 4 * lane;
      if (at >= end_row) continue;
      if (has_norm) {
#pragma unroll
        for (int j = 0; j < 4; ++j) o[i][j] *= scale * token.norm[at + j];
      }
      store4<kGeneral>(out(t) + at, Packed<T, 4>::pack(o[i]));
    }
  }

  __device__ __forceinline__ void write_zeros(int t) const {
    for (int at = first_row + 4 * lane; at < end_row; at += 4 * kWarp) store4<kGeneral>(out(t) + at, Packed<T, 4>{});
  }
};

// Four elements of the state, to and from memory. It is read once and written once, and the memory is fastest when a
// line stays in the L2 cache from the one to the other, and leaves it as all lines do then.
template <typename State>
__device__ __forceinline__ Packed<State, 4> load_state(const State* from) {
  if constexpr (sizeof(State) == 4) {
    return bits_as<Packed<State, 4>>(load_16_hint(from, l2_evict_last()));
  } else {
    return bits_as<Packed<State, 4>>(load_8_hint(from, l2_evict_last()));
  }
}
template <typename State>
__device__ __forceinline__ void store_state(State* to, const Packed<State, 4>& v) {
  if constexpr (sizeof(State) == 4) {
    store_16_hint(to, bits_as<uint4>(v), l2_evict_normal());
  } else {
    store_8_hint(to, bits_as<uint2>(v), l2_evict_normal());
  }
}

// A thread's share of kRows rows of the state.
template <typename Config>
struct StateTile {
  static constexpr int kRows = Config::kRows, kVectors = Config::kVectors, kKeys = Config::kKeys;
  static constexpr bool kGeneral = Config::kGeneral;
  using State = typename Config::State;
  float s[kRows][kVectors][4];

  // `at`: the thread's first column of its first row, `lane` its place in the row.
  __device__ __forceinline__ void load(const State* at, int lane, int key_dim) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const State* from = at + r * kRowsAtOnce * key_dim + 32 * j;
        if constexpr (kGeneral) {
          Packed<State, 4> v = {};
          if (32 * j + 4 * lane < key_dim) v = load4<true>(from);
          v.unpack(s[r][j]);
        } else {
          load_state(from).unpack(s[r][j]);
        }
      }
    }
  }
  __device__ __forceinline__ void store(State* at, int lane, int key_dim) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        State* to = at + r * kRowsAtOnce * key_dim + 32 * j;
        const auto v = Packed<State, 4>::pack(s[r][j]);
        if constexpr (kGeneral) {
          if (32 * j + 4 * lane < key_dim) store4<true>(to, v);
        } else {
          store_state(to, v);
        }
      }
    }
  }

  // One token: decay, delta rule, output. `row` is the thread's first row.
  __device__ __forceinline__ void step(Token<kKeys>& token, int row, int lane) {
    float along_k[kRows] = {}, along_q[kRows] = {}, qk = 0.0f;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const Vec<float, 4> d = load_vec<float, 4>(token.decay + 32 * j + 4 * lane);
      const Vec<float, 4> k = load_vec<float, 4>(token.k + 32 * j + 4 * lane);
      const Vec<float, 4> q = load_vec<float, 4>(token.q + 32 * j + 4 * lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        qk = fmaf(q.x[i], k.x[i], qk);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          s[r][j][i] *= d.x[i];
          along_k[r] = fmaf(s[r][j][i], k.x[i], along_k[r]);
          along_q[r] = fmaf(s[r][j][i], q.x[i], along_q[r]);
        }
      }
    }
    qk = warp_sum<kRowLanes>(qk);
    float u[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      u[r] = token.beta * (token.v[row + r * kRowsAtOnce] - warp_sum<kRowLanes>(along_k[r]));
      const float o = fmaf(qk, u[r], warp_sum<kRowLanes>(along_q[r]));
      if (lane == 0) token.o[row + r * kRowsAtOnce] = o;
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const Vec<float, 4> k = load_vec<float, 4>(token.k + 32 * j + 4 * lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) s[r][j][i] = fmaf(k.x[i], u[r], s[r][j][i]);
      }
    }
  }
};

// How a launch begins on Hopper. Few heads wait for latencies, one after the other: their blocks look ahead. Many heads
// wait for memory, which is fastest when some blocks read while others write: the first blocks, which would all read at
// once, begin one after the other.
struct Beginning {
  bool look_ahead;
  int paced_blocks, cycles;  // how many blocks, and between one and the next
};

// Brings half of the block's rows, and the state of its convolution, to the L2 cache while the kernel in front may
// still run; by one warp. Should that kernel write `slots`, it may be another slot's memory that comes, and nothing
// changes.
template <typename Config>
__device__ __forceinline__ void look_ahead(const KdaDecodeFusedParams& p, int64_t n, int h, int hv, int first_row,
                                           int rows, int lane) {
  constexpr int kKeys = Config::kKeys;
  const int32_t slot = load_relaxed(p.kda.slots + n);
  if (slot < 0 || slot >= p.kda.num_slots) return;
  if (lane == 0) {
    const auto* state = static_cast<const typename Config::State*>(p.kda.state) + slot * p.kda.state_slot_stride;
    const uint32_t row_bytes = sizeof(*state) * kKeys;
    bulk_prefetch_l2(state + (hv * p.kda.value_dim + first_row) * kKeys,
                     row_bytes * static_cast<uint32_t>(ceil_div(rows, 2)));
  }
  if constexpr (Config::kFused) {
    using T = typename Config::T;
    constexpr int kLine = 128 / sizeof(T);
    const Convolution<T, false> conv(p, n, slot);
    const Head<Config> head{p, conv, n, h, hv, first_row, first_row + rows, lane};
    const auto prefetch = [&](int first_channel, int channels) {
      for (int i = kLine * lane; i < kPast * channels; i += kLine * kWarp)
        prefetch_l2(conv.state + i / channels * conv.num_channels + first_channel + i % channels);
    };
    prefetch(head.q_channel(), kKeys);
    prefetch(head.k_channel(), kKeys);
    prefetch(head.v_channel(), rows);
  }
}

// Grid: (slice, value head, sequence from first_sequence on): blocks in the order of their memory. key_heads_per_head:
// num_heads / num_value_heads times 2^32, rounded up.
// SASS: 16-byte loads
template <typename Config>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2)
    kda_decode_kernel(KdaDecodeFusedParams p, Beginning beginning, uint64_t key_heads_per_head,
                      int64_t first_sequence) {
  using T = typename Config::T;
  constexpr int kKeys = Config::kKeys, kWarpRows = Config::kWarpRows;
  auto& shared = shared_memory<SharedStorage<kKeys>>();
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t n = first_sequence + blockIdx.z;
  const int hv = static_cast<int>(blockIdx.y);
  const int num_tokens = static_cast<int>(p.kda.tokens_per_sequence);
  const int key_dim = Config::kGeneral ? static_cast<int>(p.kda.key_dim) : kKeys;
  const int value_dim = static_cast<int>(p.kda.value_dim);
  const int slice_rows = gridDim.x == 1 ? value_dim : warps * kWarpRows, first_row = blockIdx.x * slice_rows;
  const int end_row = first_row + slice_rows < value_dim ? first_row + slice_rows : value_dim;
  const auto key_head = [&] { return static_cast<int>(blockIdx.y * key_heads_per_head >> 32); };
  // On Hopper, where the launch may overlap the kernel in front. The one behind may start as well, and will wait here.
  if constexpr (kHasSm90) {
    if constexpr (!Config::kGeneral) {
      if (beginning.look_ahead && warp == warps - 1)
        look_ahead<Config>(p, n, key_head(), hv, first_row, end_row - first_row, lane);
    }
    grid_dependency_wait();
    grid_launch_dependents();
    const int64_t block = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (block < beginning.paced_blocks) wait_cycles(static_cast<int>(block) * beginning.cycles);
  }
  const int32_t slot = p.kda.slots[n];

  // Phase 1: all loads of the state.
  const int row_lane = lane % kRowLanes;
  int row = first_row + warp * kWarpRows + lane / kRowLanes;
  auto* at = static_cast<typename Config::State*>(p.kda.state) + slot * p.kda.state_slot_stride +
             (static_cast<int64_t>(hv) * value_dim + row) * key_dim + 4 * row_lane;
  StateTile<Config> tile;
  if (slot >= 0 && row < end_row) tile.load(at, row_lane, key_dim);

  // Phase 2: a skipped sequence has zeros and nothing else.
  const Head<Config> head{p, {p, n, slot}, n, key_head(), hv, first_row, end_row, lane};
  if (slot < 0) {
    for (int t = warp; t < num_tokens; t += warps) head.write_zeros(t);
    return;
  }

  // What the state of the convolution becomes, four channels a thread: those of v, and of q and k where no other value
  // head reads them (else a second launch writes them). The last threads, whose warps may have no task.
  const int commit = tokens_committed(p.kda, n);
  Packed<T, 4> next[kPast];
  int channel = -1;
  if constexpr (Config::kFused) {
    int at = 4 * (blockDim.x - 1 - threadIdx.x);
    if (p.kda.num_heads == p.kda.num_value_heads) {
      if (at < key_dim) channel = head.q_channel() + at;
      at -= key_dim;
      if (at >= 0 && at < key_dim) channel = head.k_channel() + at;
      at -= key_dim;
    }
    if (at >= 0 && at < value_dim) channel = head.v_channel() + at;
    if (commit == 0) channel = -1;
    if (channel >= 0) head.conv.next_state(commit, channel, next);
  }

  // Phase 3: the tokens, into shared memory.
  for (int t = 0, task = warp; t < num_tokens;) {
    const int tasks = head.num_tasks();
    if (task < tasks) {
      head.prepare(task, t, shared.token[t]);
      task += warps;
    } else {
      task -= tasks;
      ++t;
    }
  }
  __syncthreads();  // the tokens are there, and nobody needs the old state of the convolution any more
  if constexpr (Config::kFused) {
    if (channel >= 0) head.conv.write_state(channel, next);
  }

  // Phase 4: the recurrence. Warps do not wait for each other.
  while (row < end_row) {
    for (int t = 0; t < num_tokens; ++t) {
      tile.step(shared.token[t], row, row_lane);
      if (t + 1 == commit) tile.store(at, row_lane, key_dim);
    }
    row += warps * kWarpRows;
    at += warps * kWarpRows * key_dim;
    if (row < end_row) tile.load(at, row_lane, key_dim);
  }
  __syncthreads();

  // Phase 5: the outputs.
  for (int t = warp; t < num_tokens; t += warps) head.write_out(t, shared.token[t]);
}

// How a head is cut: warps of a block, slices (blocks) of a head.
struct Shape {
  int warps, slices;
};

// Whether there are more heads than fit on the device at once in blocks of kMaxWarps.
inline bool many_heads(const KdaDecodeParams& p) {
  return p.num_sequences * p.num_value_heads > 2 * multiprocessors();
}

template <typename Config>
Beginning beginning_of(const KdaDecodeParams& p, const Shape& shape) {
  constexpr int kStateBytes = sizeof(typename Config::State);
  if (!use_sm90()) return {};
  // Bulk copies need addresses that are multiples of 16.
  if (!many_heads(p)) return {.look_ahead = p.num_slots > 0 && p.state_slot_stride * kStateBytes % 16 == 0};
  // What a block loads at once, in as many cycles as memory takes to read it while it writes half as much: 2,400 bytes
  // a cycle of an H200.
  const int bytes = shape.warps * Config::kWarpRows * Config::kKeys * kStateBytes;
  return {.paced_blocks = multiprocessors() * (2 * kMaxWarps / shape.warps), .cycles = bytes / 1600};
}

// Launches the kernel, on Hopper so that its blocks are in place when the kernel in front ends. `aligned`: whether
// accesses of four elements are; shape_of(rows that a warp holds) is a Shape.
template <bool kFused, typename ShapeOf>
void launch_kernel(const KdaDecodeFusedParams& p, bool aligned, ShapeOf&& shape_of, cudaStream_t stream) {
  dispatch_dtype(p.kda.dtype, [&]<typename T>() {
    const auto run = [&]<typename Config>() {
      const Shape shape = shape_of(Config::kWarpRows);
      const Beginning beginning = beginning_of<Config>(p.kda, shape);
      for (int64_t first = 0; first < p.kda.num_sequences; first += kMaxGridZ) {
        const int64_t left = p.kda.num_sequences - first;
        launch({.overlap = use_sm90()}, kda_decode_kernel<Config>,
               dim3(static_cast<unsigned>(shape.slices), static_cast<unsigned>(p.kda.num_value_heads),
                    static_cast<unsigned>(left < kMaxGridZ ? left : kMaxGridZ)),
               dim3(static_cast<unsigned>(shape.warps * kWarp)),
               p.kda.tokens_per_sequence * sizeof(Token<Config::kKeys>), stream, p, beginning,
               ceil_div<uint64_t>(uint64_t{1} << 32, p.kda.num_value_heads / p.kda.num_heads), first);
      }
    };
    const auto run_with_state = [&]<typename State>() {
      if (aligned && p.kda.key_dim == 64) {
        run.template operator()<Config<T, State, 2, kFused, false>>();
      } else if (aligned && p.kda.key_dim == 128) {
        run.template operator()<Config<T, State, 4, kFused, false>>();
      } else if (aligned && p.kda.key_dim == 256) {
        run.template operator()<Config<T, State, 8, kFused, false>>();
      } else {
        run.template operator()<Config<T, State, 8, kFused, true>>();
      }
    };
    if constexpr (sizeof(T) == 2) {
      if (p.kda.state_dtype == DType::kBF16) return run_with_state.template operator()<Bf16>();
    }
    run_with_state.template operator()<float>();
  });
}

// Whether accesses of four elements are aligned, in what both operators read and write.
inline bool aligned_kda(const KdaDecodeParams& p) {
  return aligned_to(16, p.state, p.dt_bias) && aligned_to(4 * size_of(p.dtype), p.out) &&
         aligned_to(4 * size_of(p.g_dtype), p.g) &&
         multiples_of(4, p.state_slot_stride, p.out_token_stride, p.out_head_stride, p.g_token_stride, p.g_head_stride);
}

}  // namespace kimi::cuda::kda_decode_impl
