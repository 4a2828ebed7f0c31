#include "kimi/mla_prefill.h"

#include "torch/common.h"

namespace kimi::torch_glue {
namespace {

void check_index(const Tensor& t, const char* name, int64_t size, const Tensor& first) {
  check_shape(t, name, {size});
  check_device(t, name, first);
  check_i32(t, name);
  check_contiguous(t, name);
}

MlaPrefillParams mla_prefill_params(const Tensor& q, const Tensor& k_nope, const Tensor& k_rope, const Tensor& v,
                                    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double scale,
                                    const OptionalTensor& q_begin, const Tensor& out, const OptionalTensor& lse) {
  KIMI_CHECK(q.dim() == 3, "mla_prefill: q must have shape [num_queries, num_heads, nope_dim + rope_dim], got ",
             shape_of(q));
  const int64_t num_queries = q.size(0), num_heads = q.size(1), key_dim = q.size(2);
  check_shape(k_nope, "mla_prefill: k_nope", {kAny, num_heads, kAny});
  const int64_t num_keys = k_nope.size(0), nope_dim = k_nope.size(2);
  KIMI_CHECK(nope_dim <= key_dim, "mla_prefill: k_nope has ", nope_dim, " columns and q only ", key_dim);
  check_shape(k_rope, "mla_prefill: k_rope", {num_keys, key_dim - nope_dim});
  check_shape(v, "mla_prefill: v", {num_keys, num_heads, kAny});
  check_shape(out, "mla_prefill: out", {num_queries, num_heads, v.size(2)});
  check_shape(cu_seqlens_q, "mla_prefill: cu_seqlens_q", {kAny});
  const int64_t num_seqs = cu_seqlens_q.size(0) - 1;
  KIMI_CHECK(num_seqs >= 0, "mla_prefill: cu_seqlens_q must have at least one element");
  check_index(cu_seqlens_q, "mla_prefill: cu_seqlens_q", num_seqs + 1, q);
  check_index(cu_seqlens_k, "mla_prefill: cu_seqlens_k", num_seqs + 1, q);
  if (q_begin) check_index(*q_begin, "mla_prefill: q_begin", num_seqs, q);
  check_like(k_nope, "mla_prefill: k_nope", q);
  check_like(k_rope, "mla_prefill: k_rope", q);
  check_like(v, "mla_prefill: v", q);
  check_device(out, "mla_prefill: out", q);
  check_last_contiguous(q, "mla_prefill: q");
  check_last_contiguous(k_nope, "mla_prefill: k_nope");
  check_last_contiguous(k_rope, "mla_prefill: k_rope");
  check_last_contiguous(v, "mla_prefill: v");
  check_last_contiguous(out, "mla_prefill: out");
  if (lse) {
    check_shape(*lse, "mla_prefill: lse", {num_queries, num_heads});
    check_device(*lse, "mla_prefill: lse", q);
    check_f32(*lse, "mla_prefill: lse");
    check_contiguous(*lse, "mla_prefill: lse");
  }
  MlaPrefillParams p;
  p.q = pointer(q);
  p.k_nope = pointer(k_nope);
  p.k_rope = pointer(k_rope);
  p.v = pointer(v);
  p.cu_seqlens_q = pointer<int32_t>(cu_seqlens_q);
  p.cu_seqlens_k = pointer<int32_t>(cu_seqlens_k);
  p.q_begin = pointer<int32_t>(q_begin);
  p.out = mutable_pointer(out);
  p.lse = mutable_pointer<float>(lse);
  p.num_queries = num_queries;
  p.num_seqs = num_seqs;
  p.num_heads = num_heads;
  p.nope_dim = nope_dim;
  p.rope_dim = key_dim - nope_dim;
  p.value_dim = v.size(2);
  p.q_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.k_nope_stride = k_nope.stride(0);
  p.k_nope_head_stride = k_nope.stride(1);
  p.k_rope_stride = k_rope.stride(0);
  p.v_stride = v.stride(0);
  p.v_head_stride = v.stride(1);
  p.out_stride = out.stride(0);
  p.out_head_stride = out.stride(1);
  p.scale = static_cast<float>(scale);
  p.dtype = dtype_of(q, "mla_prefill: q");
  p.out_dtype = dtype_of(out, "mla_prefill: out");
  return p;
}

void mla_prefill(const Tensor& q, const Tensor& k_nope, const Tensor& k_rope, const Tensor& v,
                 const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double scale, const OptionalTensor& q_begin,
                 const Tensor& out, const OptionalTensor& lse) {
  MlaPrefillParams p = mla_prefill_params(q, k_nope, k_rope, v, cu_seqlens_q, cu_seqlens_k, scale, q_begin, out, lse);
  OptionalTensor workspace;
  if (!on_cuda(q)) {
    workspace =
        torch::stable::new_empty(q, {static_cast<int64_t>(cpu::mla_prefill_workspace_bytes(p))}, ScalarType::Byte);
    p.workspace = mutable_pointer(workspace);
  }
  validate(p);
  run(q, p, KIMI_BACKENDS(mla_prefill));
}

}  // namespace
}  // namespace kimi::torch_glue

STABLE_TORCH_LIBRARY_FRAGMENT(kimi_native, m) {
  m.def(
      "mla_prefill(Tensor q, Tensor k_nope, Tensor k_rope, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "float scale, Tensor? q_begin, Tensor(a!) out, Tensor(b!)? lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CPU, m) {
  m.impl("mla_prefill", TORCH_BOX(&kimi::torch_glue::mla_prefill));
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CUDA, m) {
  m.impl("mla_prefill", TORCH_BOX(&kimi::torch_glue::mla_prefill));
}
