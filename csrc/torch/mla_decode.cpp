#include "kimi/mla_decode.h"

#include "torch/common.h"

namespace kimi::torch_glue {
namespace {

MlaDecodeParams mla_decode_params(const Tensor& q, const Tensor& cache, const Tensor& block_table,
                                  const Tensor& lengths, double scale, const Tensor& out, const OptionalTensor& lse) {
  KIMI_CHECK(q.dim() == 3, "mla_decode: q must have shape [num_seqs, num_heads, latent_dim + rope_dim], got ",
             shape_of(q));
  const int64_t num_seqs = q.size(0), num_heads = q.size(1), width = q.size(2);
  check_shape(cache, "mla_decode: cache", {kAny, kAny, width});
  check_shape(block_table, "mla_decode: block_table", {num_seqs, kAny});
  check_shape(lengths, "mla_decode: lengths", {num_seqs});
  check_shape(out, "mla_decode: out", {num_seqs, num_heads, kAny});
  check_like(cache, "mla_decode: cache", q);
  check_like(out, "mla_decode: out", q);
  check_device(block_table, "mla_decode: block_table", q);
  check_device(lengths, "mla_decode: lengths", q);
  check_i32(block_table, "mla_decode: block_table");
  check_i32(lengths, "mla_decode: lengths");
  check_last_contiguous(q, "mla_decode: q");
  check_contiguous_from(cache, "mla_decode: cache", 1);
  check_last_contiguous(block_table, "mla_decode: block_table");
  check_contiguous(lengths, "mla_decode: lengths");
  check_last_contiguous(out, "mla_decode: out");
  if (lse) {
    check_shape(*lse, "mla_decode: lse", {num_seqs, num_heads});
    check_device(*lse, "mla_decode: lse", q);
    check_f32(*lse, "mla_decode: lse");
    check_contiguous(*lse, "mla_decode: lse");
  }
  MlaDecodeParams p;
  p.q = pointer(q);
  p.cache = pointer(cache);
  p.block_table = pointer<int32_t>(block_table);
  p.lengths = pointer<int32_t>(lengths);
  p.out = mutable_pointer(out);
  p.lse = mutable_pointer<float>(lse);
  p.num_seqs = num_seqs;
  p.num_heads = num_heads;
  p.latent_dim = out.size(2);
  p.rope_dim = width - out.size(2);
  p.page_size = cache.size(1);
  p.max_pages = block_table.size(1);
  p.q_seq_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.page_stride = cache.stride(0);
  p.block_table_stride = block_table.stride(0);
  p.out_seq_stride = out.stride(0);
  p.out_head_stride = out.stride(1);
  p.scale = static_cast<float>(scale);
  p.dtype = dtype_of(q, "mla_decode: q");
  return p;
}

void mla_decode(const Tensor& q, const Tensor& cache, const Tensor& block_table, const Tensor& lengths, double scale,
                const Tensor& out, const OptionalTensor& lse) {
  MlaDecodeParams p = mla_decode_params(q, cache, block_table, lengths, scale, out, lse);
  const size_t bytes = workspace_bytes(q, p, KIMI_BACKENDS(mla_decode_workspace_bytes));
  const Tensor workspace = torch::stable::new_empty(q, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  p.workspace = mutable_pointer(workspace);
  validate(p);
  run(q, p, KIMI_BACKENDS(mla_decode));
}

}  // namespace
}  // namespace kimi::torch_glue

STABLE_TORCH_LIBRARY_FRAGMENT(kimi_native, m) {
  m.def(
      "mla_decode(Tensor q, Tensor cache, Tensor block_table, Tensor lengths, float scale, Tensor(a!) out, "
      "Tensor(b!)? lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CPU, m) {
  m.impl("mla_decode", TORCH_BOX(&kimi::torch_glue::mla_decode));
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CUDA, m) {
  m.impl("mla_decode", TORCH_BOX(&kimi::torch_glue::mla_decode));
}
