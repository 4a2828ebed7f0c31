#include "kimi/moe_router.h"

#include "bindings.h"

namespace kimi::bindings {

static const Register moe_router([](Module& m) {
  using P = MoeRouterParams;
  Params<P>(m, "MoeRouterParams")
      .pointer("x", &P::x)
      .pointer("weight", &P::weight)
      .pointer("bias", &P::bias)
      .pointer("logits", &P::logits)
      .pointer("weights", &P::weights)
      .pointer("ids", &P::ids)
      .pointer("workspace", &P::workspace)
      .value("num_tokens", &P::num_tokens)
      .value("dim", &P::dim)
      .value("num_experts", &P::num_experts)
      .value("top_k", &P::top_k)
      .value("x_stride", &P::x_stride)
      .value("weight_stride", &P::weight_stride)
      .value("logits_stride", &P::logits_stride)
      .value("scale", &P::scale)
      .value("renormalize", &P::renormalize)
      .value("dtype", &P::dtype);
  cpu_size<P>(m, "moe_router_workspace_bytes_cpu", &cpu::moe_router_workspace_bytes);
  cpu_entry<P>(m, "moe_router_cpu", &cpu::moe_router);
#ifdef KIMI_CUDA
  cuda_size<P>(m, "moe_router_workspace_bytes_cuda", &cuda::moe_router_workspace_bytes);
  cuda_entry<P>(m, "moe_router_cuda", &cuda::moe_router);
#endif
});

}  // namespace kimi::bindings
