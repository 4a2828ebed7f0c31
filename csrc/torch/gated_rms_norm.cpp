#include "kimi/gated_rms_norm.h"

#include "torch/common.h"

namespace kimi::torch_glue {
namespace {

void gated_rms_norm(const Tensor& x, const Tensor& gate, const Tensor& weight, double eps, const Tensor& out) {
  KIMI_CHECK(x.dim() == 3, "gated_rms_norm: x must have shape [num_tokens, num_heads, dim], got ", shape_of(x));
  const int64_t num_tokens = x.size(0), num_heads = x.size(1), dim = x.size(2);
  check_shape(gate, "gated_rms_norm: gate", {num_tokens, num_heads, dim});
  check_shape(weight, "gated_rms_norm: weight", {dim});
  check_shape(out, "gated_rms_norm: out", {num_tokens, num_heads, dim});
  check_like(gate, "gated_rms_norm: gate", x);
  check_like(weight, "gated_rms_norm: weight", x);
  check_like(out, "gated_rms_norm: out", x);
  check_last_contiguous(x, "gated_rms_norm: x");
  check_last_contiguous(gate, "gated_rms_norm: gate");
  check_contiguous(weight, "gated_rms_norm: weight");
  check_last_contiguous(out, "gated_rms_norm: out");
  GatedRmsNormParams p;
  p.x = pointer(x);
  p.gate = pointer(gate);
  p.weight = pointer(weight);
  p.out = mutable_pointer(out);
  p.num_tokens = num_tokens;
  p.num_heads = num_heads;
  p.dim = dim;
  p.x_token_stride = x.stride(0);
  p.x_head_stride = x.stride(1);
  p.gate_token_stride = gate.stride(0);
  p.gate_head_stride = gate.stride(1);
  p.out_token_stride = out.stride(0);
  p.out_head_stride = out.stride(1);
  p.eps = static_cast<float>(eps);
  p.dtype = dtype_of(x, "gated_rms_norm: x");
  validate(p);
  run(x, p, KIMI_BACKENDS(gated_rms_norm));
}

}  // namespace
}  // namespace kimi::torch_glue

STABLE_TORCH_LIBRARY_FRAGMENT(kimi_native, m) {
  m.def("gated_rms_norm(Tensor x, Tensor gate, Tensor weight, float eps, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CPU, m) {
  m.impl("gated_rms_norm", TORCH_BOX(&kimi::torch_glue::gated_rms_norm));
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CUDA, m) {
  m.impl("gated_rms_norm", TORCH_BOX(&kimi::torch_glue::gated_rms_norm));
}
