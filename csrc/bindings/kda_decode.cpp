#include "kimi/kda_decode.h"

#include "bindings.h"

namespace kimi::bindings {

static const Register kda_decode([](Module& m) {
  using P = KdaDecodeParams;
  Params<P>(m, "KdaDecodeParams")
      .pointer("q", &P::q)
      .pointer("k", &P::k)
      .pointer("v", &P::v)
      .pointer("g", &P::g)
      .pointer("beta", &P::beta)
      .pointer("A_log", &P::A_log)
      .pointer("dt_bias", &P::dt_bias)
      .pointer("state", &P::state)
      .pointer("slots", &P::slots)
      .pointer("num_commit", &P::num_commit)
      .pointer("out", &P::out)
      .pointer("workspace", &P::workspace)
      .value("num_sequences", &P::num_sequences)
      .value("tokens_per_sequence", &P::tokens_per_sequence)
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
      .value("num_slots", &P::num_slots)
      .value("scale", &P::scale)
      .value("lower_bound", &P::lower_bound)
      .value("gate", &P::gate)
      .value("use_qk_l2norm", &P::use_qk_l2norm)
      .value("use_beta_sigmoid", &P::use_beta_sigmoid)
      .value("dtype", &P::dtype)
      .value("g_dtype", &P::g_dtype)
      .value("beta_dtype", &P::beta_dtype)
      .value("state_dtype", &P::state_dtype);
  cpu_size<P>(m, "kda_decode_workspace_bytes_cpu", &cpu::kda_decode_workspace_bytes);
  cpu_entry<P>(m, "kda_decode_cpu", &cpu::kda_decode);
#ifdef KIMI_CUDA
  cuda_size<P>(m, "kda_decode_workspace_bytes_cuda", &cuda::kda_decode_workspace_bytes);
  cuda_entry<P>(m, "kda_decode_cuda", &cuda::kda_decode);
#endif

  using F = KdaDecodeFusedParams;
  Params<F>(m, "KdaDecodeFusedParams")
      .pointer("qkv", &F::qkv)
      .pointer("conv_weight", &F::conv_weight)
      .pointer("conv_state", &F::conv_state)
      .pointer("norm_gate", &F::norm_gate)
      .pointer("norm_weight", &F::norm_weight)
      .pointer("workspace", &F::workspace)
      .value("qkv_token_stride", &F::qkv_token_stride)
      .value("conv_state_slot_stride", &F::conv_state_slot_stride)
      .value("norm_gate_token_stride", &F::norm_gate_token_stride)
      .value("norm_gate_head_stride", &F::norm_gate_head_stride)
      .value("norm_eps", &F::norm_eps)
      .fields_of(&F::kda);
  cpu_size<F>(m, "kda_decode_fused_workspace_bytes_cpu", &cpu::kda_decode_fused_workspace_bytes);
  cpu_entry<F>(m, "kda_decode_fused_cpu", &cpu::kda_decode_fused);
#ifdef KIMI_CUDA
  cuda_size<F>(m, "kda_decode_fused_workspace_bytes_cuda", &cuda::kda_decode_fused_workspace_bytes);
  cuda_entry<F>(m, "kda_decode_fused_cuda", &cuda::kda_decode_fused);
#endif
});

}  // namespace kimi::bindings
