// mla_prefill: causal attention in the expanded form over packed sequences, with an optional prefix of earlier keys
//
//   s[i, j] = scale * (q[i, h, :nope_dim] . k_nope[j, h] + q[i, h, nope_dim:] . k_rope[j])
//   out[i, h] = sum_j softmax_j(s[i])[j] * v[j, h],   lse[i, h] = log sum_j e^s[i, j]        (natural logarithm)
//
// Query i of sequence n sees its key j iff j <= q_begin[n] + i, both counted within the sequence: q_begin is the
// position of the first query among the keys, by default len_k - len_q. It may be negative (the first rows see nothing:
// out 0, lse -inf) or past the end (all keys are seen), so that a long prefix can be attended to in pieces which are
// then merged by their lse. k_rope is shared by all heads.
//
// Blocks of 64 keys are anchored at key 0 of the sequence, so a query's bits depend on its own keys only, not on
// the other queries of the call: a prompt may be cut into calls anywhere.
// Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; FlashAttention-2, arXiv 2307.08691.
#pragma once

#include "kimi/common.h"

namespace kimi {

struct MlaPrefillParams {
  const void* q = nullptr;                // [num_queries, num_heads, nope_dim + rope_dim] dtype
  const void* k_nope = nullptr;           // [num_keys, num_heads, nope_dim] dtype
  const void* k_rope = nullptr;           // [num_keys, rope_dim] dtype
  const void* v = nullptr;                // [num_keys, num_heads, value_dim] dtype
  const int32_t* cu_seqlens_q = nullptr;  // [num_seqs + 1], contiguous; from 0, not decreasing
  const int32_t* cu_seqlens_k = nullptr;  // [num_seqs + 1], contiguous
  const int32_t* q_begin = nullptr;       // [num_seqs], contiguous; null: len_k - len_q
  void* out = nullptr;                    // [num_queries, num_heads, value_dim] out_dtype
  float* lse = nullptr;                   // [num_queries, num_heads], contiguous; may be null
  void* workspace = nullptr;              // cpu only: mla_prefill_workspace_bytes(p) bytes, aligned to 64

  int64_t num_queries = 0;
  int64_t num_seqs = 0;
  int64_t num_heads = 0;
  int64_t nope_dim = 0;
  int64_t rope_dim = 0;
  int64_t value_dim = 0;
  int64_t q_stride = 0;  // strides in elements, from token to token and from head to head; columns are contiguous
  int64_t q_head_stride = 0;
  int64_t k_nope_stride = 0;
  int64_t k_nope_head_stride = 0;
  int64_t k_rope_stride = 0;
  int64_t v_stride = 0;
  int64_t v_head_stride = 0;
  int64_t out_stride = 0;
  int64_t out_head_stride = 0;

  float scale = 0;
  DType dtype = DType::kF32;
  DType out_dtype = DType::kF32;  // dtype or kF32
};

void validate(const MlaPrefillParams& p);

namespace cpu {
// From the sizes alone (num_seqs and the dims) and the number of threads, which must be that of the run.
size_t mla_prefill_workspace_bytes(const MlaPrefillParams& p);
void mla_prefill(const MlaPrefillParams& p);
}  // namespace cpu

namespace cuda {
void mla_prefill(const MlaPrefillParams& p, cudaStream_t stream);
}  // namespace cuda

}  // namespace kimi
