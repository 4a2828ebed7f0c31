#include "kimi/rms_norm.h"

#include "bindings.h"

namespace kimi::bindings {

static const Register rms_norm([](Module& m) {
  using P = RmsNormParams;
  Params<P>(m, "RmsNormParams")
      .pointer("x", &P::x)
      .pointer("weight", &P::weight)
      .pointer("residual", &P::residual)
      .pointer("out", &P::out)
      .value("num_tokens", &P::num_tokens)
      .value("dim", &P::dim)
      .value("x_stride", &P::x_stride)
      .value("residual_stride", &P::residual_stride)
      .value("out_stride", &P::out_stride)
      .value("eps", &P::eps)
      .value("dtype", &P::dtype);
  cpu_entry<P>(m, "rms_norm_cpu", &cpu::rms_norm);
#ifdef KIMI_CUDA
  cuda_entry<P>(m, "rms_norm_cuda", &cuda::rms_norm);
#endif
});

}  // namespace kimi::bindings
