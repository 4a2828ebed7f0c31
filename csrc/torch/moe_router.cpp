#include "kimi/moe_router.h"

#include "torch/common.h"

namespace kimi::torch_glue {
namespace {

MoeRouterParams moe_router_params(const OptionalTensor& x, const OptionalTensor& weight, const Tensor& bias,
                                  const OptionalTensor& logits, int64_t top_k, double scale, bool renormalize,
                                  const Tensor& weights, const Tensor& ids) {
  KIMI_CHECK(logits.has_value() != (x.has_value() || weight.has_value()) && x.has_value() == weight.has_value(),
             "moe_router: takes either x and weight, or logits");
  KIMI_CHECK(bias.dim() == 1, "moe_router: bias must have shape [num_experts], got ", shape_of(bias));
  const Tensor& first = logits ? *logits : *x;
  KIMI_CHECK(first.dim() == 2, "moe_router: ", logits ? "logits" : "x", " must have two dimensions, got ",
             shape_of(first));
  MoeRouterParams p;
  p.num_tokens = first.size(0);
  p.num_experts = bias.size(0);
  p.top_k = top_k;
  if (logits) {
    check_shape(*logits, "moe_router: logits", {p.num_tokens, p.num_experts});
    check_f32(*logits, "moe_router: logits");
    check_last_contiguous(*logits, "moe_router: logits");
    p.logits_stride = logits->stride(0);
  } else {
    p.dim = x->size(1);
    check_shape(*weight, "moe_router: weight", {p.num_experts, p.dim});
    check_like(*weight, "moe_router: weight", *x);
    check_last_contiguous(*x, "moe_router: x");
    check_last_contiguous(*weight, "moe_router: weight");
    p.x_stride = x->stride(0);
    p.weight_stride = weight->stride(0);
    p.dtype = dtype_of(*x, "moe_router: x");
  }
  check_device(bias, "moe_router: bias", first);
  check_f32(bias, "moe_router: bias");
  check_contiguous(bias, "moe_router: bias");
  check_shape(weights, "moe_router: weights", {p.num_tokens, top_k});
  check_shape(ids, "moe_router: ids", {p.num_tokens, top_k});
  check_f32(weights, "moe_router: weights");
  check_i32(ids, "moe_router: ids");
  check_device(weights, "moe_router: weights", first);
  check_device(ids, "moe_router: ids", first);
  check_contiguous(weights, "moe_router: weights");
  check_contiguous(ids, "moe_router: ids");
  p.x = pointer(x);
  p.weight = pointer(weight);
  p.bias = pointer<float>(bias);
  p.logits = pointer<float>(logits);
  p.weights = mutable_pointer<float>(weights);
  p.ids = mutable_pointer<int32_t>(ids);
  p.scale = static_cast<float>(scale);
  p.renormalize = renormalize;
  return p;
}

void moe_router(const OptionalTensor& x, const OptionalTensor& weight, const Tensor& bias, const OptionalTensor& logits,
                int64_t top_k, double scale, bool renormalize, const Tensor& weights, const Tensor& ids) {
  MoeRouterParams p = moe_router_params(x, weight, bias, logits, top_k, scale, renormalize, weights, ids);
  OptionalTensor workspace;
  if (const size_t bytes = workspace_bytes(bias, p, KIMI_BACKENDS(moe_router_workspace_bytes)); bytes > 0) {
    workspace = torch::stable::new_empty(bias, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    p.workspace = mutable_pointer(workspace);
  }
  validate(p);
  run(bias, p, KIMI_BACKENDS(moe_router));
}

}  // namespace
}  // namespace kimi::torch_glue

STABLE_TORCH_LIBRARY_FRAGMENT(kimi_native, m) {
  m.def(
      "moe_router(Tensor? x, Tensor? weight, Tensor bias, Tensor? logits, int top_k, float scale, bool renormalize, "
      "Tensor(a!) weights, Tensor(b!) ids) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CPU, m) {
  m.impl("moe_router", TORCH_BOX(&kimi::torch_glue::moe_router));
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CUDA, m) {
  m.impl("moe_router", TORCH_BOX(&kimi::torch_glue::moe_router));
}
