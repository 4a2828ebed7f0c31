// moe_experts: out[t] = sum_s topk_weights[t, s] * E(ids[t, s])(x[t]) + Shared(x[t])
//
//   E(e)(x) = w2[e] . (silu(w13[e, :I] . x) * (w13[e, I:] . x))        SwiGLU; the first I rows of w13 are the gate
//   Shared  = the same with shared_w13 and shared_w2, weight 1; left out when they are null
//
// A slot whose id is -1 (or outside [0, num_experts)) is skipped; a token of nothing but such slots gets the shared
// expert alone, or zeros. The sum runs over the slots in their order s = 0, 1, ..., then the shared expert. Everything
// between x and out is fp32, but for one thing: on a GPU the activations between the two products (silu(gate) * up) are
// rounded to dtype, since its matrix instructions take no fp32 operand beside 16-bit weights. Every element is computed
// in one order of operations whatever the other tokens are and whichever experts they take.
#pragma once

#include "kimi/common.h"

namespace kimi {

struct MoeExpertsParams {
  const void* x = nullptr;              // [num_tokens, dim] dtype
  const void* w13 = nullptr;            // [num_experts, 2 * inner, dim] dtype, contiguous: gate rows, then up rows
  const void* w2 = nullptr;             // [num_experts, dim, inner] dtype, contiguous
  const float* topk_weights = nullptr;  // [num_tokens, top_k], contiguous
  const int32_t* topk_ids = nullptr;    // [num_tokens, top_k], contiguous
  const void* shared_w13 = nullptr;     // [2 * shared_inner, dim] dtype, contiguous; may be null
  const void* shared_w2 = nullptr;      // [dim, shared_inner] dtype, contiguous; may be null
  void* out = nullptr;                  // [num_tokens, dim] dtype; may be x
  void* workspace = nullptr;            // moe_experts_workspace_bytes(p) bytes of the backend, aligned to 64

  int64_t num_tokens = 0;
  int64_t dim = 0;
  int64_t inner = 0;
  int64_t shared_inner = 0;  // 0 without a shared expert
  int64_t num_experts = 0;
  int64_t top_k = 0;
  int64_t x_stride = 0;  // elements from one token to the next; columns are contiguous
  int64_t out_stride = 0;

  DType dtype = DType::kF32;
};

void validate(const MoeExpertsParams& p);

// Workspace: the slots in the order of the experts, and their activations and results; the pointers of p are not read.
namespace cpu {  // dtype float32 or bfloat16
size_t moe_experts_workspace_bytes(const MoeExpertsParams& p);
void moe_experts(const MoeExpertsParams& p);
}  // namespace cpu

namespace cuda {  // num_experts up to 16384
size_t moe_experts_workspace_bytes(const MoeExpertsParams& p);
void moe_experts(const MoeExpertsParams& p, cudaStream_t stream);
}  // namespace cuda

}  // namespace kimi
