#include "kimi/mla_cache_write.h"

#include "bindings.h"

namespace kimi::bindings {

static const Register mla_cache_write([](Module& m) {
  using P = MlaCacheWriteParams;
  Params<P>(m, "MlaCacheWriteParams")
      .pointer("kv", &P::kv)
      .pointer("weight", &P::weight)
      .pointer("slot_mapping", &P::slot_mapping)
      .pointer("cache", &P::cache)
      .value("num_tokens", &P::num_tokens)
      .value("latent_dim", &P::latent_dim)
      .value("rope_dim", &P::rope_dim)
      .value("page_size", &P::page_size)
      .value("kv_stride", &P::kv_stride)
      .value("page_stride", &P::page_stride)
      .value("eps", &P::eps)
      .value("dtype", &P::dtype);
  cpu_entry<P>(m, "mla_cache_write_cpu", &cpu::mla_cache_write);
#ifdef KIMI_CUDA
  cuda_entry<P>(m, "mla_cache_write_cuda", &cuda::mla_cache_write);
#endif
});

}  // namespace kimi::bindings
