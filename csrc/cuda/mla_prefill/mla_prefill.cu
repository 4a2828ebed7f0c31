// CUDA backend of mla_prefill (kimi/mla_prefill.h): picks the kernel by dims and dtype.
//
// 2 * (key_dim + value_dim) flops a pair of query and visible key and head: at the released dims 320 * T * T * 32 flops
// for T tokens under a causal mask, 0.69 Tflop at 8192. The bytes (q, k, v read and out written once, 0.4 GB there) are
// nothing against that: bound by the tensor cores from a few hundred tokens on.
#include "kimi/mla_prefill.h"

#include "cuda/mla_prefill/generic.cuh"
#include "cuda/mla_prefill/portable.cuh"

namespace kimi::cuda {

void mla_prefill(const MlaPrefillParams& p, cudaStream_t stream) {
  namespace detail = mla_prefill_detail;
  if (p.num_queries == 0 || p.num_seqs == 0) return;
  const bool released_dims =
      p.nope_dim == detail::kNopeDim && p.rope_dim == detail::kRopeDim && p.value_dim == detail::kValueDim;
  const bool fits = max_shared_bytes() >= static_cast<int>(sizeof(detail::PrefillShared<Bf16>));
  if (p.dtype != DType::kF32 && released_dims && fits) {
    dispatch_half(p.dtype, [&]<typename T>() { detail::launch_portable<T>(p, stream); });
  } else {
    dispatch_dtype(p.dtype, [&]<typename T>() { detail::launch_generic<T>(p, stream); });
  }
}

}  // namespace kimi::cuda
