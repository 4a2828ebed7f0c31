// moe_router: which experts each token takes, and with what weight.
//
//   logits[t, e] = sum_d x[t, d] * weight[e, d]        fp32, in one order whatever the other tokens are; or given
//   score        = sigmoid(logits)
//   ids[t, :]    = the top_k experts by score + bias   descending; of equal ones the lowest id; NaN comes last
//   weights[t,s] = score[t, ids[t, s]] * scale                                  without renormalize
//                = score[t, ids[t, s]] / (sum over s of score + 1e-20) * scale  with it
//
// The bias decides who is chosen and is no part of the weights. Sources: DeepSeek-V3 report, arXiv 2412.19437 (2.1.2);
// KimiLinearTopkRouter of transformers 5.23 (one expert group).
#pragma once

#include "kimi/common.h"

namespace kimi {

struct MoeRouterParams {
  static constexpr int64_t kMaxExperts = 512;
  static constexpr int64_t kMaxTopK = 32;

  const void* x = nullptr;        // [num_tokens, dim] dtype; null when logits are given
  const void* weight = nullptr;   // [num_experts, dim] dtype; null when logits are given
  const float* bias = nullptr;    // [num_experts], contiguous
  const float* logits = nullptr;  // [num_tokens, num_experts]; may be null
  float* weights = nullptr;       // [num_tokens, top_k], contiguous
  int32_t* ids = nullptr;         // [num_tokens, top_k], contiguous
  void* workspace = nullptr;      // moe_router_workspace_bytes(p) bytes of the backend, aligned to 64

  int64_t num_tokens = 0;
  int64_t dim = 0;
  int64_t num_experts = 0;
  int64_t top_k = 0;
  int64_t x_stride = 0;  // elements from one row to the next; columns are contiguous
  int64_t weight_stride = 0;
  int64_t logits_stride = 0;

  float scale = 1.0f;
  bool renormalize = true;
  DType dtype = DType::kF32;
};

void validate(const MoeRouterParams& p);

// Workspace: the logits when they are not given; of the pointers only whether `logits` is null is read.
namespace cpu {  // dtype float32 or bfloat16
size_t moe_router_workspace_bytes(const MoeRouterParams& p);
void moe_router(const MoeRouterParams& p);
}  // namespace cpu

namespace cuda {
size_t moe_router_workspace_bytes(const MoeRouterParams& p);
void moe_router(const MoeRouterParams& p, cudaStream_t stream);
}  // namespace cuda

}  // namespace kimi
