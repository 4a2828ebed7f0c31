#include "kimi/mla_decode.h"

#include "bindings.h"

namespace kimi::bindings {

static const Register mla_decode([](Module& m) {
  using P = MlaDecodeParams;
  Params<P>(m, "MlaDecodeParams")
      .pointer("q", &P::q)
      .pointer("cache", &P::cache)
      .pointer("block_table", &P::block_table)
      .pointer("lengths", &P::lengths)
      .pointer("out", &P::out)
      .pointer("lse", &P::lse)
      .pointer("workspace", &P::workspace)
      .value("num_seqs", &P::num_seqs)
      .value("num_heads", &P::num_heads)
      .value("latent_dim", &P::latent_dim)
      .value("rope_dim", &P::rope_dim)
      .value("page_size", &P::page_size)
      .value("max_pages", &P::max_pages)
      .value("q_seq_stride", &P::q_seq_stride)
      .value("q_head_stride", &P::q_head_stride)
      .value("page_stride", &P::page_stride)
      .value("block_table_stride", &P::block_table_stride)
      .value("out_seq_stride", &P::out_seq_stride)
      .value("out_head_stride", &P::out_head_stride)
      .value("scale", &P::scale)
      .value("dtype", &P::dtype);
  cpu_size<P>(m, "mla_decode_workspace_bytes_cpu", &cpu::mla_decode_workspace_bytes);
  cpu_entry<P>(m, "mla_decode_cpu", &cpu::mla_decode);
#ifdef KIMI_CUDA
  cuda_size<P>(m, "mla_decode_workspace_bytes_cuda", &cuda::mla_decode_workspace_bytes);
  cuda_entry<P>(m, "mla_decode_cuda", &cuda::mla_decode);
#endif
});

}  // namespace kimi::bindings
