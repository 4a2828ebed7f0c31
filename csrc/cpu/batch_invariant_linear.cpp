// CPU backend of batch_invariant_linear: cpu/common/gemm.h with rows addressed by token and group. One token reads
// num_groups * out_features * in_features weights once and is bound by memory; many are bound by fp32 FMA.
#include "kimi/batch_invariant_linear.h"

#include "cpu/common/gemm.h"

namespace kimi::cpu::KIMI_ISA {

namespace {

template <typename T, typename Out>
void linear(const BatchInvariantLinearParams& p) {
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  Out* out = static_cast<Out*>(p.out);
  gemm(
      p.num_groups, p.num_tokens, p.out_features, p.in_features,
      [&](int64_t g, int64_t t) { return x + t * p.x_token_stride + g * p.x_group_stride; },
      [&](int64_t g, int64_t n) { return weight + g * p.weight_group_stride + n * p.weight_row_stride; },
      [&](int64_t g, int64_t t, int64_t n, const float* values, int count) {
        put_values(out + t * p.out_token_stride + g * p.out_group_stride + n, values, count);
      });
}

}  // namespace

void batch_invariant_linear(const BatchInvariantLinearParams& p) {
  if (p.num_tokens == 0 || p.num_groups == 0 || p.out_features == 0) return;
  KIMI_CPU_DISPATCH_DTYPE(p.dtype, T, [&] { p.out_dtype == DType::kF32 ? linear<T, float>(p) : linear<T, T>(p); });
}

}  // namespace kimi::cpu::KIMI_ISA

#ifdef KIMI_ISA_IS_BASE
void kimi::validate(const BatchInvariantLinearParams& p) {
  KIMI_CHECK(p.num_tokens >= 0, "batch_invariant_linear: num_tokens must not be negative, got ", p.num_tokens);
  KIMI_CHECK(p.num_groups >= 0, "batch_invariant_linear: num_groups must not be negative, got ", p.num_groups);
  KIMI_CHECK(p.out_features >= 0, "batch_invariant_linear: out_features must not be negative, got ", p.out_features);
  KIMI_CHECK(p.in_features >= 1, "batch_invariant_linear: in_features must be positive, got ", p.in_features);
  KIMI_CHECK(p.out_dtype == p.dtype || p.out_dtype == DType::kF32,
             "batch_invariant_linear: out must have the dtype of x or float32, got ", name_of(p.out_dtype));
  if (p.num_tokens == 0 || p.num_groups == 0 || p.out_features == 0) return;
  KIMI_CHECK(p.x && p.weight && p.out, "batch_invariant_linear: x, weight and out must not be null");
}
#endif

KIMI_CPU_ENTRY(void, batch_invariant_linear, BatchInvariantLinearParams)
