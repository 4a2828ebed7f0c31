#include "kimi/batch_invariant_linear.h"

#include "bindings.h"

namespace kimi::bindings {

static const Register batch_invariant_linear([](Module& m) {
  using P = BatchInvariantLinearParams;
  Params<P>(m, "BatchInvariantLinearParams")
      .pointer("x", &P::x)
      .pointer("weight", &P::weight)
      .pointer("out", &P::out)
      .value("num_tokens", &P::num_tokens)
      .value("num_groups", &P::num_groups)
      .value("in_features", &P::in_features)
      .value("out_features", &P::out_features)
      .value("x_token_stride", &P::x_token_stride)
      .value("x_group_stride", &P::x_group_stride)
      .value("weight_group_stride", &P::weight_group_stride)
      .value("weight_row_stride", &P::weight_row_stride)
      .value("out_token_stride", &P::out_token_stride)
      .value("out_group_stride", &P::out_group_stride)
      .value("dtype", &P::dtype)
      .value("out_dtype", &P::out_dtype);
  cpu_entry<P>(m, "batch_invariant_linear_cpu", &cpu::batch_invariant_linear);
#ifdef KIMI_CUDA
  cuda_entry<P>(m, "batch_invariant_linear_cuda", &cuda::batch_invariant_linear);
#endif
});

}  // namespace kimi::bindings
