// gated_rms_norm: y[t, h, c] = x[t, h, c] / sqrt(mean_c x[t, h, c]^2 + eps) * weight[c] * sigmoid(gate[t, h, c])
//
// The output stage of a KDA layer: one norm per value head, the weight shared by all heads. All in fp32, one rounding.
// Source: Kimi Linear, arXiv 2510.26692, section 4 (output gate).
#pragma once

#include "kimi/common.h"

namespace kimi {

struct GatedRmsNormParams {
  const void* x = nullptr;       // [num_tokens, num_heads, dim] dtype
  const void* gate = nullptr;    // [num_tokens, num_heads, dim] dtype, before the sigmoid
  const void* weight = nullptr;  // [dim] dtype, contiguous
  void* out = nullptr;           // [num_tokens, num_heads, dim] dtype; may be x or gate

  int64_t num_tokens = 0;
  int64_t num_heads = 0;
  int64_t dim = 0;
  int64_t x_token_stride = 0;  // elements from one token (head) to the next; the last dimension is contiguous
  int64_t x_head_stride = 0;
  int64_t gate_token_stride = 0;
  int64_t gate_head_stride = 0;
  int64_t out_token_stride = 0;
  int64_t out_head_stride = 0;

  float eps = 1e-5f;
  DType dtype = DType::kF32;
};

void validate(const GatedRmsNormParams& p);

namespace cpu {
void gated_rms_norm(const GatedRmsNormParams& p);
}

namespace cuda {
void gated_rms_norm(const GatedRmsNormParams& p, cudaStream_t stream);
}

}  // namespace kimi
