#include "kimi/mla_merge.h"

#include "bindings.h"

namespace kimi::bindings {

static const Register mla_merge([](Module& m) {
  using P = MlaMergeParams;
  Params<P>(m, "MlaMergeParams")
      .pointer("out", &P::out)
      .pointer("lse", &P::lse)
      .pointer("other_out", &P::other_out)
      .pointer("other_lse", &P::other_lse)
      .value("num_rows", &P::num_rows)
      .value("dim", &P::dim);
  cpu_entry<P>(m, "mla_merge_cpu", &cpu::mla_merge);
#ifdef KIMI_CUDA
  cuda_entry<P>(m, "mla_merge_cuda", &cuda::mla_merge);
#endif
});

}  // namespace kimi::bindings
