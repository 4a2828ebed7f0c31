#include "kimi/moe_experts.h"

#include "torch/common.h"

namespace kimi::torch_glue {
namespace {

MoeExpertsParams moe_experts_params(const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& topk_weights,
                                    const Tensor& topk_ids, const OptionalTensor& shared_w13,
                                    const OptionalTensor& shared_w2, const Tensor& out) {
  KIMI_CHECK(x.dim() == 2, "moe_experts: x must have shape [num_tokens, dim], got ", shape_of(x));
  KIMI_CHECK(w2.dim() == 3, "moe_experts: w2 must have shape [num_experts, dim, inner], got ", shape_of(w2));
  MoeExpertsParams p;
  p.num_tokens = x.size(0);
  p.dim = x.size(1);
  p.num_experts = w2.size(0);
  p.inner = w2.size(2);
  check_shape(w2, "moe_experts: w2", {p.num_experts, p.dim, p.inner});
  check_shape(w13, "moe_experts: w13", {p.num_experts, 2 * p.inner, p.dim});
  check_like(w13, "moe_experts: w13", x);
  check_like(w2, "moe_experts: w2", x);
  check_contiguous(w13, "moe_experts: w13");
  check_contiguous(w2, "moe_experts: w2");
  check_last_contiguous(x, "moe_experts: x");
  KIMI_CHECK(topk_ids.dim() == 2, "moe_experts: topk_ids must have shape [num_tokens, top_k], got ",
             shape_of(topk_ids));
  p.top_k = topk_ids.size(1);
  check_shape(topk_ids, "moe_experts: topk_ids", {p.num_tokens, p.top_k});
  check_shape(topk_weights, "moe_experts: topk_weights", {p.num_tokens, p.top_k});
  check_i32(topk_ids, "moe_experts: topk_ids");
  check_f32(topk_weights, "moe_experts: topk_weights");
  check_device(topk_ids, "moe_experts: topk_ids", x);
  check_device(topk_weights, "moe_experts: topk_weights", x);
  check_contiguous(topk_ids, "moe_experts: topk_ids");
  check_contiguous(topk_weights, "moe_experts: topk_weights");
  KIMI_CHECK(shared_w13.has_value() == shared_w2.has_value(),
             "moe_experts: shared_w13 and shared_w2 must be given together");
  if (shared_w2) {
    KIMI_CHECK(shared_w2->dim() == 2, "moe_experts: shared_w2 must have shape [dim, shared_inner], got ",
               shape_of(*shared_w2));
    p.shared_inner = shared_w2->size(1);
    check_shape(*shared_w2, "moe_experts: shared_w2", {p.dim, p.shared_inner});
    check_shape(*shared_w13, "moe_experts: shared_w13", {2 * p.shared_inner, p.dim});
    check_like(*shared_w13, "moe_experts: shared_w13", x);
    check_like(*shared_w2, "moe_experts: shared_w2", x);
    check_contiguous(*shared_w13, "moe_experts: shared_w13");
    check_contiguous(*shared_w2, "moe_experts: shared_w2");
  }
  check_shape(out, "moe_experts: out", {p.num_tokens, p.dim});
  check_like(out, "moe_experts: out", x);
  check_last_contiguous(out, "moe_experts: out");
  p.x = pointer(x);
  p.w13 = pointer(w13);
  p.w2 = pointer(w2);
  p.topk_weights = pointer<float>(topk_weights);
  p.topk_ids = pointer<int32_t>(topk_ids);
  p.shared_w13 = pointer(shared_w13);
  p.shared_w2 = pointer(shared_w2);
  p.out = mutable_pointer(out);
  p.x_stride = x.stride(0);
  p.out_stride = out.stride(0);
  p.dtype = dtype_of(x, "moe_experts: x");
  return p;
}

void moe_experts(const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& topk_weights,
                 const Tensor& topk_ids, const OptionalTensor& shared_w13, const OptionalTensor& shared_w2,
                 const Tensor& out) {
  MoeExpertsParams p = moe_experts_params(x, w13, w2, topk_weights, topk_ids, shared_w13, shared_w2, out);
  if (p.num_tokens == 0) return validate(p);
  const auto bytes = static_cast<int64_t>(workspace_bytes(x, p, KIMI_BACKENDS(moe_experts_workspace_bytes)));
  const Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  p.workspace = mutable_pointer(workspace);
  validate(p);
  run(x, p, KIMI_BACKENDS(moe_experts));
}

}  // namespace
}  // namespace kimi::torch_glue

STABLE_TORCH_LIBRARY_FRAGMENT(kimi_native, m) {
  m.def(
      "moe_experts(Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, Tensor? shared_w13, "
      "Tensor? shared_w2, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CPU, m) {
  m.impl("moe_experts", TORCH_BOX(&kimi::torch_glue::moe_experts));
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CUDA, m) {
  m.impl("moe_experts", TORCH_BOX(&kimi::torch_glue::moe_experts));
}
