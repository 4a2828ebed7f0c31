// kda_decode: Kimi Delta Attention (kda.h) over 1 to 8 new tokens of each sequence, in place on the state pool.
// kda_decode_fused: short_conv before it and gated_rms_norm after it in the same call.
//
// Tokens are [num_sequences, tokens_per_sequence] flattened. num_commit, for verifying drafts: outputs are computed for
// all tokens of a sequence, and only the leading num_commit[n] of them enter its state.
#pragma once

#include "kimi/kda.h"

namespace kimi {

inline constexpr int kMaxDecodeTokens = 8;

struct KdaDecodeParams {
  const void* q = nullptr;         // [num_sequences * tokens_per_sequence, num_heads, key_dim] dtype
  const void* k = nullptr;         // as q
  const void* v = nullptr;         // [num_sequences * tokens_per_sequence, num_value_heads, value_dim] dtype
  const void* g = nullptr;         // [num_sequences * tokens_per_sequence, num_value_heads, key_dim] g_dtype
  const void* beta = nullptr;      // [num_sequences * tokens_per_sequence, num_value_heads] beta_dtype
  const float* A_log = nullptr;    // [num_value_heads]; may be null (rate 1) with the bounded gate
  const float* dt_bias = nullptr;  // [num_value_heads, key_dim] contiguous; may be null (0)
  void* state = nullptr;           // [slots, num_value_heads, value_dim, key_dim] state_dtype, a slot is contiguous
  const int32_t* slots = nullptr;  // [num_sequences]; -1: zeroed output rows, nothing else
  const int32_t* num_commit = nullptr;  // [num_sequences], 0 to tokens_per_sequence; null: all
  void* out = nullptr;                  // as v
  void* workspace = nullptr;            // kda_decode_workspace_bytes(p) of the backend; null where that is 0

  int64_t num_sequences = 0;
  int64_t tokens_per_sequence = 0;  // 1 to 8
  int64_t num_heads = 0;
  int64_t num_value_heads = 0;  // a multiple of num_heads
  int64_t key_dim = 0;          // multiples of 16 from 16 to 256
  int64_t value_dim = 0;
  int64_t q_token_stride = 0;  // elements from one token (head) to the next; the last dimension is contiguous
  int64_t q_head_stride = 0;
  int64_t k_token_stride = 0;
  int64_t k_head_stride = 0;
  int64_t v_token_stride = 0;
  int64_t v_head_stride = 0;
  int64_t g_token_stride = 0;
  int64_t g_head_stride = 0;
  int64_t beta_token_stride = 0;
  int64_t beta_head_stride = 0;
  int64_t out_token_stride = 0;
  int64_t out_head_stride = 0;
  int64_t state_slot_stride = 0;
  int64_t num_slots = 0;  // that state has, and conv_state of the fused form; 0: not known, which may take longer

  float scale = 1.0f;
  float lower_bound = -5.0f;  // of the bounded gate, natural log; negative
  KdaGate gate = KdaGate::kSoftplus;
  bool use_qk_l2norm = true;
  bool use_beta_sigmoid = true;
  DType dtype = DType::kF32;
  DType g_dtype = DType::kF32;  // dtype or float32
  DType beta_dtype = DType::kF32;
  DType state_dtype = DType::kF32;  // or bfloat16, with inputs of 16 bits: rounded once at the end of a call
};

struct KdaDecodeFusedParams {
  KdaDecodeParams kda;  // its q, k, v and their strides and its workspace are ignored: they come from qkv

  // C = 2 * num_heads * key_dim + num_value_heads * value_dim channels: all q heads, all k heads, all v heads
  const void* qkv = nullptr;          // [num_sequences * tokens_per_sequence, C] dtype, before the convolution
  const void* conv_weight = nullptr;  // [C, 4] dtype, contiguous
  void* conv_state = nullptr;         // [slots, 3, C] dtype, a slot is contiguous; updated in place
  const void* norm_gate = nullptr;    // as v: gate of the output norm, before its sigmoid; null: no norm
  const void* norm_weight = nullptr;  // [value_dim] dtype, contiguous
  void* workspace = nullptr;          // kda_decode_fused_workspace_bytes(p) of the backend; null where that is 0

  int64_t qkv_token_stride = 0;
  int64_t conv_state_slot_stride = 0;
  int64_t norm_gate_token_stride = 0;
  int64_t norm_gate_head_stride = 0;

  float norm_eps = 1e-5f;
};

void validate(const KdaDecodeParams& p);
void validate(const KdaDecodeFusedParams& p);

namespace cpu {
size_t kda_decode_workspace_bytes(const KdaDecodeParams& p);
void kda_decode(const KdaDecodeParams& p);
size_t kda_decode_fused_workspace_bytes(const KdaDecodeFusedParams& p);
void kda_decode_fused(const KdaDecodeFusedParams& p);
}  // namespace cpu

namespace cuda {
size_t kda_decode_workspace_bytes(const KdaDecodeParams& p);
void kda_decode(const KdaDecodeParams& p, cudaStream_t stream);
size_t kda_decode_fused_workspace_bytes(const KdaDecodeFusedParams& p);
void kda_decode_fused(const KdaDecodeFusedParams& p, cudaStream_t stream);
}  // namespace cuda

}  // namespace kimi
