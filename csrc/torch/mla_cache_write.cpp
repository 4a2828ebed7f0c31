#include "kimi/mla_cache_write.h"

#include "torch/common.h"

namespace kimi::torch_glue {
namespace {

MlaCacheWriteParams mla_cache_write_params(const Tensor& kv, const Tensor& norm_weight, double eps, const Tensor& cache,
                                           const Tensor& slot_mapping) {
  KIMI_CHECK(kv.dim() == 2, "mla_cache_write: kv must have shape [num_tokens, latent_dim + rope_dim], got ",
             shape_of(kv));
  const int64_t num_tokens = kv.size(0), width = kv.size(1);
  check_shape(norm_weight, "mla_cache_write: norm_weight", {kAny});
  const int64_t latent_dim = norm_weight.size(0);
  KIMI_CHECK(latent_dim <= width, "mla_cache_write: norm_weight has ", latent_dim, " values and kv only ", width,
             " columns");
  check_shape(cache, "mla_cache_write: cache", {kAny, kAny, width});
  check_shape(slot_mapping, "mla_cache_write: slot_mapping", {num_tokens});
  check_like(norm_weight, "mla_cache_write: norm_weight", kv);
  check_like(cache, "mla_cache_write: cache", kv);
  check_device(slot_mapping, "mla_cache_write: slot_mapping", kv);
  check_i64(slot_mapping, "mla_cache_write: slot_mapping");
  check_last_contiguous(kv, "mla_cache_write: kv");
  check_contiguous(norm_weight, "mla_cache_write: norm_weight");
  check_contiguous_from(cache, "mla_cache_write: cache", 1);
  check_contiguous(slot_mapping, "mla_cache_write: slot_mapping");
  MlaCacheWriteParams p;
  p.kv = pointer(kv);
  p.weight = pointer(norm_weight);
  p.slot_mapping = pointer<int64_t>(slot_mapping);
  p.cache = mutable_pointer(cache);
  p.num_tokens = num_tokens;
  p.latent_dim = latent_dim;
  p.rope_dim = width - latent_dim;
  p.page_size = cache.size(1);
  p.kv_stride = kv.stride(0);
  p.page_stride = cache.stride(0);
  p.eps = static_cast<float>(eps);
  p.dtype = dtype_of(kv, "mla_cache_write: kv");
  validate(p);
  return p;
}

void mla_cache_write(const Tensor& kv, const Tensor& norm_weight, double eps, const Tensor& cache,
                     const Tensor& slot_mapping) {
  run(kv, mla_cache_write_params(kv, norm_weight, eps, cache, slot_mapping), KIMI_BACKENDS(mla_cache_write));
}

}  // namespace
}  // namespace kimi::torch_glue

STABLE_TORCH_LIBRARY_FRAGMENT(kimi_native, m) {
  m.def("mla_cache_write(Tensor kv, Tensor norm_weight, float eps, Tensor(a!) cache, Tensor slot_mapping) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CPU, m) {
  m.impl("mla_cache_write", TORCH_BOX(&kimi::torch_glue::mla_cache_write));
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CUDA, m) {
  m.impl("mla_cache_write", TORCH_BOX(&kimi::torch_glue::mla_cache_write));
}
