#include "kimi/batch_invariant_linear.h"

#include "torch/common.h"

namespace kimi::torch_glue {
namespace {

BatchInvariantLinearParams batch_invariant_linear_params(const Tensor& x, const Tensor& weight, const Tensor& out) {
  const bool grouped = weight.dim() == 3;
  KIMI_CHECK(grouped || weight.dim() == 2,
             "batch_invariant_linear: weight must have shape [out, in] or [groups, out, in], got ", shape_of(weight));
  BatchInvariantLinearParams p;
  p.num_groups = grouped ? weight.size(0) : 1;
  p.out_features = weight.size(grouped ? 1 : 0);
  p.in_features = weight.size(grouped ? 2 : 1);
  if (grouped) {
    check_shape(x, "batch_invariant_linear: x", {kAny, p.num_groups, p.in_features});
    check_shape(out, "batch_invariant_linear: out", {x.size(0), p.num_groups, p.out_features});
  } else {
    check_shape(x, "batch_invariant_linear: x", {kAny, p.in_features});
    check_shape(out, "batch_invariant_linear: out", {x.size(0), p.out_features});
  }
  check_like(weight, "batch_invariant_linear: weight", x);
  check_device(out, "batch_invariant_linear: out", x);
  check_last_contiguous(x, "batch_invariant_linear: x");
  check_last_contiguous(weight, "batch_invariant_linear: weight");
  check_last_contiguous(out, "batch_invariant_linear: out");
  p.x = pointer(x);
  p.weight = pointer(weight);
  p.out = mutable_pointer(out);
  p.num_tokens = x.size(0);
  p.x_token_stride = x.stride(0);
  p.x_group_stride = grouped ? x.stride(1) : 0;
  p.weight_group_stride = grouped ? weight.stride(0) : 0;
  p.weight_row_stride = weight.stride(grouped ? 1 : 0);
  p.out_token_stride = out.stride(0);
  p.out_group_stride = grouped ? out.stride(1) : 0;
  p.dtype = dtype_of(x, "batch_invariant_linear: x");
  p.out_dtype = dtype_of(out, "batch_invariant_linear: out");
  validate(p);
  return p;
}

void batch_invariant_linear(const Tensor& x, const Tensor& weight, const Tensor& out) {
  run(x, batch_invariant_linear_params(x, weight, out), KIMI_BACKENDS(batch_invariant_linear));
}

}  // namespace
}  // namespace kimi::torch_glue

STABLE_TORCH_LIBRARY_FRAGMENT(kimi_native, m) {
  m.def("batch_invariant_linear(Tensor x, Tensor weight, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CPU, m) {
  m.impl("batch_invariant_linear", TORCH_BOX(&kimi::torch_glue::batch_invariant_linear));
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CUDA, m) {
  m.impl("batch_invariant_linear", TORCH_BOX(&kimi::torch_glue::batch_invariant_linear));
}
