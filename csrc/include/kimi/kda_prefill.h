// kda_prefill: Kimi Delta Attention (kda.h) over packed sequences, with the state in a pool of slots.
//
// A sequence continues from its slot's state and leaves its final state there. Its result depends on nothing but
// itself, to the bit: not on its neighbours, nor on where it is cut into calls. On a CPU it may be cut anywhere, down
// to single tokens of kda_decode; on a GPU, after multiples of 64 tokens.
#pragma once

#include "kimi/kda.h"

namespace kimi {

struct KdaPrefillParams {
  const void* q = nullptr;         // [num_tokens, num_heads, key_dim] dtype
  const void* k = nullptr;         // [num_tokens, num_heads, key_dim] dtype
  const void* v = nullptr;         // [num_tokens, num_value_heads, value_dim] dtype
  const void* g = nullptr;         // [num_tokens, num_value_heads, key_dim] g_dtype: raw gate
  const void* beta = nullptr;      // [num_tokens, num_value_heads] beta_dtype
  const float* A_log = nullptr;    // [num_value_heads]; may be null (rate 1) with the bounded gate
  const float* dt_bias = nullptr;  // [num_value_heads, key_dim] contiguous; may be null (0)
  void* state = nullptr;           // [slots, num_value_heads, value_dim, key_dim] state_dtype, a slot is contiguous
  const int32_t* slots = nullptr;  // [num_sequences]; -1: zeroed output rows, nothing else
  const int32_t* cu_seqlens = nullptr;      // [num_sequences + 1]
  const bool* has_initial_state = nullptr;  // [num_sequences]; false: zeros, whatever the slot holds; null: all true
  const int32_t* snapshot_slots = nullptr;  // [num_sequences, num_snapshots]; [n, m]: slot that gets the state after
                                            // (m + 1) * 64 tokens of this call, if there are that many; -1: none
  void* out = nullptr;                      // [num_tokens, num_value_heads, value_dim] dtype
  void* workspace = nullptr;                // kda_prefill_workspace_bytes(p) of the backend

  int64_t num_tokens = 0;  // those outside of all sequences are neither read nor written
  int64_t num_sequences = 0;
  int64_t num_snapshots = 0;
  int64_t max_seqlen = 0;  // tokens of the longest sequence if the host knows it, else 0; a hint: whatever it is,
                           // results are the same, only speed may depend on it
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

void validate(const KdaPrefillParams& p);

namespace cpu {
size_t kda_prefill_workspace_bytes(const KdaPrefillParams& p);
void kda_prefill(const KdaPrefillParams& p);
}  // namespace cpu

namespace cuda {
size_t kda_prefill_workspace_bytes(const KdaPrefillParams& p);
void kda_prefill(const KdaPrefillParams& p, cudaStream_t stream);
}  // namespace cuda

}  // namespace kimi
