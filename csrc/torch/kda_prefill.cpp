#include "kimi/kda_prefill.h"

#include "torch/kda.h"

namespace kimi::torch_glue {
namespace {

void kda_prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                 const Tensor& state, const Tensor& slots, const Tensor& cu_seqlens, const OptionalTensor& A_log,
                 const OptionalTensor& dt_bias, const OptionalTensor& has_initial_state,
                 const OptionalTensor& snapshot_slots, int64_t gate, double lower_bound, double scale,
                 bool use_qk_l2norm, bool use_beta_sigmoid, const Tensor& out, int64_t max_seqlen) {
  KIMI_CHECK(q.dim() == 3, "kda_prefill: q must have shape [num_tokens, num_heads, key_dim], got ", shape_of(q));
  KdaPrefillParams p;
  p.num_tokens = q.size(0);
  p.num_heads = q.size(1);
  p.max_seqlen = max_seqlen;
  p.dtype = dtype_of(q, "kda_prefill: q");
  set_sizes(p, "kda_prefill", state, slots);
  set_qkv(p, "kda_prefill", q, k, v, 1);
  set_kda_params(p, "kda_prefill", q, g, beta, state, slots,
                 {A_log, dt_bias, gate, lower_bound, scale, use_qk_l2norm, use_beta_sigmoid}, out, 1);
  check_shape(cu_seqlens, "kda_prefill: cu_seqlens", {p.num_sequences + 1});
  check_i32(cu_seqlens, "kda_prefill: cu_seqlens");
  check_device(cu_seqlens, "kda_prefill: cu_seqlens", q);
  check_contiguous(cu_seqlens, "kda_prefill: cu_seqlens");
  p.cu_seqlens = pointer<int32_t>(cu_seqlens);
  if (has_initial_state) {
    check_per_sequence(*has_initial_state, "kda_prefill: has_initial_state", p.num_sequences, q);
    check_bool(*has_initial_state, "kda_prefill: has_initial_state");
    p.has_initial_state = pointer<bool>(has_initial_state);
  }
  if (snapshot_slots) {
    check_shape(*snapshot_slots, "kda_prefill: snapshot_slots", {p.num_sequences, kAny});
    check_i32(*snapshot_slots, "kda_prefill: snapshot_slots");
    check_device(*snapshot_slots, "kda_prefill: snapshot_slots", q);
    check_contiguous(*snapshot_slots, "kda_prefill: snapshot_slots");
    p.snapshot_slots = pointer<int32_t>(snapshot_slots);
    p.num_snapshots = snapshot_slots->size(1);
  }
  const Tensor workspace = workspace_of(q, workspace_bytes(q, p, KIMI_BACKENDS(kda_prefill_workspace_bytes)));
  p.workspace = mutable_pointer(workspace);
  validate(p);
  run(q, p, KIMI_BACKENDS(kda_prefill));
}

}  // namespace
}  // namespace kimi::torch_glue

// max_seqlen is a SymInt, so that a length which a trace keeps symbolic stays so.
STABLE_TORCH_LIBRARY_FRAGMENT(kimi_native, m) {
  m.def(
      "kda_prefill(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor slots, "
      "Tensor cu_seqlens, Tensor? A_log, Tensor? dt_bias, Tensor? has_initial_state, Tensor? snapshot_slots, int gate, "
      "float lower_bound, float scale, bool use_qk_l2norm, bool use_beta_sigmoid, Tensor(b!) out, SymInt max_seqlen=0) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CPU, m) {
  m.impl("kda_prefill", TORCH_BOX(&kimi::torch_glue::kda_prefill));
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CUDA, m) {
  m.impl("kda_prefill", TORCH_BOX(&kimi::torch_glue::kda_prefill));
}
