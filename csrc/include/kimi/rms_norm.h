// rms_norm: y[t, c] = x[t, c] / sqrt(mean_c x[t, c]^2 + eps) * weight[c]
//
// With a residual, first residual[t, c] += x[t, c] (rounded to its dtype and stored), then the norm of the sum.
// The statistics come from the stored (rounded) sum, so that the result is a function of what the caller can see.
// Source: Zhang & Sennrich 2019, arXiv 1910.07467.
#pragma once

#include "kimi/common.h"

namespace kimi {

struct RmsNormParams {
  const void* x = nullptr;       // [num_tokens, dim] dtype
  const void* weight = nullptr;  // [dim] dtype, contiguous
  void* residual = nullptr;      // [num_tokens, dim] dtype, updated in place; may be null
  void* out = nullptr;           // [num_tokens, dim] dtype; may be x

  int64_t num_tokens = 0;
  int64_t dim = 0;
  int64_t x_stride = 0;  // elements from one token to the next; columns are contiguous
  int64_t residual_stride = 0;
  int64_t out_stride = 0;

  float eps = 1e-5f;
  DType dtype = DType::kF32;
};

void validate(const RmsNormParams& p);

namespace cpu {
void rms_norm(const RmsNormParams& p);
}

namespace cuda {
void rms_norm(const RmsNormParams& p, cudaStream_t stream);
}

}  // namespace kimi
