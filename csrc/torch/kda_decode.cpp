#include "kimi/kda_decode.h"

#include <algorithm>

#include "kimi/short_conv.h"
#include "torch/kda.h"

namespace kimi::torch_glue {
namespace {

void set_num_commit(KdaDecodeParams& p, const char* name, const OptionalTensor& num_commit, const Tensor& first) {
  if (!num_commit) return;
  check_per_sequence(*num_commit, name, p.num_sequences, first);
  check_i32(*num_commit, name);
  p.num_commit = pointer<int32_t>(num_commit);
}

void kda_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                const Tensor& state, const Tensor& slots, const OptionalTensor& A_log, const OptionalTensor& dt_bias,
                const OptionalTensor& num_commit, int64_t gate, double lower_bound, double scale, bool use_qk_l2norm,
                bool use_beta_sigmoid, const Tensor& out) {
  KIMI_CHECK(q.dim() == 4, "kda_decode: q must have shape [batch, tokens, num_heads, key_dim], got ", shape_of(q));
  KdaDecodeParams p;
  p.tokens_per_sequence = q.size(1);
  p.num_heads = q.size(2);
  p.dtype = dtype_of(q, "kda_decode: q");
  set_sizes(p, "kda_decode", state, slots);
  set_qkv(p, "kda_decode", q, k, v, 2);
  set_kda_params(p, "kda_decode", q, g, beta, state, slots,
                 {A_log, dt_bias, gate, lower_bound, scale, use_qk_l2norm, use_beta_sigmoid}, out, 2);
  check_shape(slots, "kda_decode: slots", {q.size(0)});
  p.num_slots = state.size(0);
  set_num_commit(p, "kda_decode: num_commit", num_commit, q);
  const Tensor workspace = workspace_of(q, workspace_bytes(q, p, KIMI_BACKENDS(kda_decode_workspace_bytes)));
  p.workspace = mutable_pointer(workspace);
  validate(p);
  run(q, p, KIMI_BACKENDS(kda_decode));
}

void kda_decode_fused(const Tensor& qkv, const Tensor& conv_weight, const Tensor& conv_state, const Tensor& g,
                      const Tensor& beta, const Tensor& state, const Tensor& slots, const OptionalTensor& A_log,
                      const OptionalTensor& dt_bias, const OptionalTensor& num_commit, const OptionalTensor& norm_gate,
                      const OptionalTensor& norm_weight, int64_t num_heads, int64_t gate, double lower_bound,
                      double scale, bool use_qk_l2norm, bool use_beta_sigmoid, double norm_eps, const Tensor& out) {
  KIMI_CHECK(qkv.dim() == 3, "kda_decode_fused: qkv must have shape [batch, tokens, channels], got ", shape_of(qkv));
  KdaDecodeFusedParams p;
  p.kda.tokens_per_sequence = qkv.size(1);
  p.kda.num_heads = num_heads;
  p.kda.dtype = dtype_of(qkv, "kda_decode_fused: qkv");
  set_sizes(p.kda, "kda_decode_fused", state, slots);
  set_kda_params(p.kda, "kda_decode_fused", qkv, g, beta, state, slots,
                 {A_log, dt_bias, gate, lower_bound, scale, use_qk_l2norm, use_beta_sigmoid}, out, 2);
  const int64_t value_heads = p.kda.num_value_heads, value_dim = p.kda.value_dim;
  const int64_t channels = 2 * num_heads * p.kda.key_dim + value_heads * value_dim;
  check_shape(slots, "kda_decode_fused: slots", {qkv.size(0)});
  check_shape(qkv, "kda_decode_fused: qkv", {kAny, kAny, channels});
  check_last_contiguous(qkv, "kda_decode_fused: qkv");
  check_shape(conv_weight, "kda_decode_fused: conv_weight", {channels, kShortConvTaps});
  check_like(conv_weight, "kda_decode_fused: conv_weight", qkv);
  check_contiguous(conv_weight, "kda_decode_fused: conv_weight");
  check_shape(conv_state, "kda_decode_fused: conv_state", {kAny, kShortConvTaps - 1, channels});
  check_like(conv_state, "kda_decode_fused: conv_state", qkv);
  check_contiguous_from(conv_state, "kda_decode_fused: conv_state", 1);
  set_num_commit(p.kda, "kda_decode_fused: num_commit", num_commit, qkv);
  if (norm_weight) {
    check_shape(*norm_weight, "kda_decode_fused: norm_weight", {value_dim});
    check_like(*norm_weight, "kda_decode_fused: norm_weight", qkv);
    check_contiguous(*norm_weight, "kda_decode_fused: norm_weight");
    p.norm_weight = pointer(norm_weight);
  }
  if (norm_gate) {
    check_shape(*norm_gate, "kda_decode_fused: norm_gate", {qkv.size(0), qkv.size(1), value_heads, value_dim});
    check_like(*norm_gate, "kda_decode_fused: norm_gate", qkv);
    check_last_contiguous(*norm_gate, "kda_decode_fused: norm_gate");
    p.norm_gate = pointer(norm_gate);
    p.norm_gate_token_stride = token_stride_of(*norm_gate, "kda_decode_fused: norm_gate", 2);
    p.norm_gate_head_stride = norm_gate->stride(2);
  }
  p.qkv = pointer(qkv);
  p.conv_weight = pointer(conv_weight);
  p.conv_state = mutable_pointer(conv_state);
  p.qkv_token_stride = token_stride_of(qkv, "kda_decode_fused: qkv", 2);
  p.conv_state_slot_stride = conv_state.stride(0);
  p.kda.num_slots = std::min(state.size(0), conv_state.size(0));
  p.norm_eps = static_cast<float>(norm_eps);
  const Tensor workspace = workspace_of(qkv, workspace_bytes(qkv, p, KIMI_BACKENDS(kda_decode_fused_workspace_bytes)));
  p.workspace = mutable_pointer(workspace);
  validate(p);
  run(qkv, p, KIMI_BACKENDS(kda_decode_fused));
}

}  // namespace
}  // namespace kimi::torch_glue

STABLE_TORCH_LIBRARY_FRAGMENT(kimi_native, m) {
  m.def(
      "kda_decode(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor slots, Tensor? A_log, "
      "Tensor? dt_bias, Tensor? num_commit, int gate, float lower_bound, float scale, bool use_qk_l2norm, "
      "bool use_beta_sigmoid, Tensor(b!) out) -> ()");
  m.def(
      "kda_decode_fused(Tensor qkv, Tensor conv_weight, Tensor(a!) conv_state, Tensor g, Tensor beta, "
      "Tensor(b!) state, Tensor slots, Tensor? A_log, Tensor? dt_bias, Tensor? num_commit, Tensor? norm_gate, "
      "Tensor? norm_weight, int num_heads, int gate, float lower_bound, float scale, bool use_qk_l2norm, "
      "bool use_beta_sigmoid, float norm_eps, Tensor(c!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CPU, m) {
  m.impl("kda_decode", TORCH_BOX(&kimi::torch_glue::kda_decode));
  m.impl("kda_decode_fused", TORCH_BOX(&kimi::torch_glue::kda_decode_fused));
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CUDA, m) {
  m.impl("kda_decode", TORCH_BOX(&kimi::torch_glue::kda_decode));
  m.impl("kda_decode_fused", TORCH_BOX(&kimi::torch_glue::kda_decode_fused));
}
