#include "kimi/mla_prefill.h"

#include "bindings.h"

namespace kimi::bindings {

static const Register mla_prefill([](Module& m) {
  using P = MlaPrefillParams;
  Params<P>(m, "MlaPrefillParams")
      .pointer("q", &P::q)
      .pointer("k_nope", &P::k_nope)
      .pointer("k_rope", &P::k_rope)
      .pointer("v", &P::v)
      .pointer("cu_seqlens_q", &P::cu_seqlens_q)
      .pointer("cu_seqlens_k", &P::cu_seqlens_k)
      .pointer("q_begin", &P::q_begin)
      .pointer("out", &P::out)
      .pointer("lse", &P::lse)
      .pointer("workspace", &P::workspace)
      .value("num_queries", &P::num_queries)
      .value("num_seqs", &P::num_seqs)
      .value("num_heads", &P::num_heads)
      .value("nope_dim", &P::nope_dim)
      .value("rope_dim", &P::rope_dim)
      .value("value_dim", &P::value_dim)
      .value("q_stride", &P::q_stride)
      .value("q_head_stride", &P::q_head_stride)
      .value("k_nope_stride", &P::k_nope_stride)
      .value("k_nope_head_stride", &P::k_nope_head_stride)
      .value("k_rope_stride", &P::k_rope_stride)
      .value("v_stride", &P::v_stride)
      .value("v_head_stride", &P::v_head_stride)
      .value("out_stride", &P::out_stride)
      .value("out_head_stride", &P::out_head_stride)
      .value("scale", &P::scale)
      .value("dtype", &P::dtype)
      .value("out_dtype", &P::out_dtype);
  cpu_size<P>(m, "mla_prefill_workspace_bytes_cpu", &cpu::mla_prefill_workspace_bytes);
  cpu_entry<P>(m, "mla_prefill_cpu", &cpu::mla_prefill);
#ifdef KIMI_CUDA
  cuda_entry<P>(m, "mla_prefill_cuda", &cuda::mla_prefill);
#endif
});

}  // namespace kimi::bindings
