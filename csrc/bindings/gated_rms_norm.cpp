#include "kimi/gated_rms_norm.h"

#include "bindings.h"

namespace kimi::bindings {

static const Register gated_rms_norm([](Module& m) {
  using P = GatedRmsNormParams;
  Params<P>(m, "GatedRmsNormParams")
      .pointer("x", &P::x)
      .pointer("gate", &P::gate)
      .pointer("weight", &P::weight)
      .pointer("out", &P::out)
      .value("num_tokens", &P::num_tokens)
      .value("num_heads", &P::num_heads)
      .value("dim", &P::dim)
      .value("x_token_stride", &P::x_token_stride)
      .value("x_head_stride", &P::x_head_stride)
      .value("gate_token_stride", &P::gate_token_stride)
      .value("gate_head_stride", &P::gate_head_stride)
      .value("out_token_stride", &P::out_token_stride)
      .value("out_head_stride", &P::out_head_stride)
      .value("eps", &P::eps)
      .value("dtype", &P::dtype);
  cpu_entry<P>(m, "gated_rms_norm_cpu", &cpu::gated_rms_norm);
#ifdef KIMI_CUDA
  cuda_entry<P>(m, "gated_rms_norm_cuda", &cuda::gated_rms_norm);
#endif
});

}  // namespace kimi::bindings
