#include "kimi/rms_norm.h"

#include "torch/common.h"

namespace kimi::torch_glue {
namespace {

RmsNormParams rms_norm_params(const Tensor& x, const Tensor& weight, const OptionalTensor& residual, double eps,
                              const Tensor& out) {
  KIMI_CHECK(x.dim() == 2, "rms_norm: x must have shape [num_tokens, dim], got ", shape_of(x));
  const int64_t num_tokens = x.size(0), dim = x.size(1);
  check_shape(weight, "rms_norm: weight", {dim});
  check_shape(out, "rms_norm: out", {num_tokens, dim});
  check_like(weight, "rms_norm: weight", x);
  check_like(out, "rms_norm: out", x);
  check_last_contiguous(x, "rms_norm: x");
  check_contiguous(weight, "rms_norm: weight");
  check_last_contiguous(out, "rms_norm: out");
  if (residual) {
    check_shape(*residual, "rms_norm: residual", {num_tokens, dim});
    check_like(*residual, "rms_norm: residual", x);
    check_last_contiguous(*residual, "rms_norm: residual");
  }
  RmsNormParams p;
  p.x = pointer(x);
  p.weight = pointer(weight);
  p.residual = mutable_pointer(residual);
  p.out = mutable_pointer(out);
  p.num_tokens = num_tokens;
  p.dim = dim;
  p.x_stride = x.stride(0);
  p.residual_stride = residual ? residual->stride(0) : 0;
  p.out_stride = out.stride(0);
  p.eps = static_cast<float>(eps);
  p.dtype = dtype_of(x, "rms_norm: x");
  validate(p);
  return p;
}

void rms_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& residual, double eps, const Tensor& out) {
  run(x, rms_norm_params(x, weight, residual, eps, out), KIMI_BACKENDS(rms_norm));
}

}  // namespace
}  // namespace kimi::torch_glue

STABLE_TORCH_LIBRARY_FRAGMENT(kimi_native, m) {
  m.def("rms_norm(Tensor x, Tensor weight, Tensor(a!)? residual, float eps, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&kimi::torch_glue::rms_norm));
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&kimi::torch_glue::rms_norm));
}
