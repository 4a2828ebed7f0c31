#include "kimi/moe_experts.h"

#include "bindings.h"

namespace kimi::bindings {

static const Register moe_experts([](Module& m) {
  using P = MoeExpertsParams;
  Params<P>(m, "MoeExpertsParams")
      .pointer("x", &P::x)
      .pointer("w13", &P::w13)
      .pointer("w2", &P::w2)
      .pointer("topk_weights", &P::topk_weights)
      .pointer("topk_ids", &P::topk_ids)
      .pointer("shared_w13", &P::shared_w13)
      .pointer("shared_w2", &P::shared_w2)
      .pointer("out", &P::out)
      .pointer("workspace", &P::workspace)
      .value("num_tokens", &P::num_tokens)
      .value("dim", &P::dim)
      .value("inner", &P::inner)
      .value("shared_inner", &P::shared_inner)
      .value("num_experts", &P::num_experts)
      .value("top_k", &P::top_k)
      .value("x_stride", &P::x_stride)
      .value("out_stride", &P::out_stride)
      .value("dtype", &P::dtype);
  cpu_size<P>(m, "moe_experts_workspace_bytes_cpu", &cpu::moe_experts_workspace_bytes);
  cpu_entry<P>(m, "moe_experts_cpu", &cpu::moe_experts);
#ifdef KIMI_CUDA
  cuda_size<P>(m, "moe_experts_workspace_bytes_cuda", &cuda::moe_experts_workspace_bytes);
  cuda_entry<P>(m, "moe_experts_cuda", &cuda::moe_experts);
#endif
});

}  // namespace kimi::bindings
