// batch_invariant_linear: out[t, g, n] = sum_k x[t, g, k] * weight[g, n, k]
//
// A dense projection whose every output element is computed in one order of operations, whatever the number of tokens,
// the other groups or the number of threads: a token's bits are the same alone and in any batch. fp32 accumulation, one
// rounding at the end. One group is an ordinary linear layer; several are one matrix per head (absorbed attention).
#pragma once

#include "kimi/common.h"

namespace kimi {

struct BatchInvariantLinearParams {
  const void* x = nullptr;       // [num_tokens, num_groups, in_features] dtype
  const void* weight = nullptr;  // [num_groups, out_features, in_features] dtype
  void* out = nullptr;           // [num_tokens, num_groups, out_features] out_dtype; not x

  int64_t num_tokens = 0;
  int64_t num_groups = 1;
  int64_t in_features = 0;
  int64_t out_features = 0;
  int64_t x_token_stride = 0;  // strides in elements; the last dimension is contiguous
  int64_t x_group_stride = 0;
  int64_t weight_group_stride = 0;
  int64_t weight_row_stride = 0;
  int64_t out_token_stride = 0;
  int64_t out_group_stride = 0;

  DType dtype = DType::kF32;
  DType out_dtype = DType::kF32;  // dtype, or float32
};

void validate(const BatchInvariantLinearParams& p);

namespace cpu {  // dtype float32 or bfloat16
void batch_invariant_linear(const BatchInvariantLinearParams& p);
}

namespace cuda {
void batch_invariant_linear(const BatchInvariantLinearParams& p, cudaStream_t stream);
}

}  // namespace kimi
