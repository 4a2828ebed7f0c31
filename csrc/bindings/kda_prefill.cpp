#include "kimi/kda_prefill.h"

#include "bindings.h"

namespace kimi::bindings {

static const Register kda_prefill([](Module& m) {
  using P = KdaPrefillParams;
  Params<P>(m, "KdaPrefillParams")
      .pointer("q", &P::q)
      .pointer("k", &P::k)
      .pointer("v", &P::v)
      .pointer("g", &P::g)
      .pointer("beta", &P::beta)
      .pointer("A_log", &P::A_log)
      .pointer("dt_bias", &P::dt_bias)
      .pointer("state", &P::state)
      .pointer("slots", &P::slots)
      .pointer("cu_seqlens", &P::cu_seqlens)
      .pointer("has_initial_state", &P::has_initial_state)
      .pointer("snapshot_slots", &P::snapshot_slots)
      .pointer("out", &P::out)
      .pointer("workspace", &P::workspace)
      .value("num_tokens", &P::num_tokens)
      .value("num_sequences", &P::num_sequences)
      .value("num_snapshots", &P::num_snapshots)
      .value("max_seqlen", &P::max_seqlen)
      .value("num_heads", &P::num_heads)
      .value("num_value_heads", &P::num_value_heads)
      .value("key_dim", &P::key_dim)
      .value("value_dim", &P::value_dim)
      .value("q_token_stride", &P::q_token_stride)
      .value("q_head_stride", &P::q_head_stride)
      .value("k_token_stride", &P::k_token_stride)
      .value("k_head_stride", &P::k_head_stride)
      .value("v_token_stride", &P::v_token_stride)
      .value("v_head_stride", &P::v_head_stride)
      .value("g_token_stride", &P::g_token_stride)
      .value("g_head_stride", &P::g_head_stride)
      .value("beta_token_stride", &P::beta_token_stride)
      .value("beta_head_stride", &P::beta_head_stride)
      .value("out_token_stride", &P::out_token_stride)
      .value("out_head_stride", &P::out_head_stride)
      .value("state_slot_stride", &P::state_slot_stride)
      .value("scale", &P::scale)
      .value("lower_bound", &P::lower_bound)
      .value("gate", &P::gate)  // 0 softplus, 1 bounded, 2 log_decay
      .value("use_qk_l2norm", &P::use_qk_l2norm)
      .value("use_beta_sigmoid", &P::use_beta_sigmoid)
      .value("dtype", &P::dtype)
      .value("g_dtype", &P::g_dtype)
      .value("beta_dtype", &P::beta_dtype)
      .value("state_dtype", &P::state_dtype);
  cpu_size<P>(m, "kda_prefill_workspace_bytes_cpu", &cpu::kda_prefill_workspace_bytes);
  cpu_entry<P>(m, "kda_prefill_cpu", &cpu::kda_prefill);
#ifdef KIMI_CUDA
  cuda_size<P>(m, "kda_prefill_workspace_bytes_cuda", &cuda::kda_prefill_workspace_bytes);
  cuda_entry<P>(m, "kda_prefill_cuda", &cuda::kda_prefill);
#endif
});

}  // namespace kimi::bindings
