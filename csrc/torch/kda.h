// What the torch operators kda_prefill and kda_decode have in common: from tensors to the shared fields of their
// params.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "kimi/kda.h"
#include "torch/common.h"

namespace kimi::torch_glue {

// Elements from one token to the next of a tensor [num_tokens, ...] (token_dims 1) or [batch, tokens, ...] (2), where
// the tokens of all sequences must be evenly spaced.
inline int64_t token_stride_of(const Tensor& t, const char* name, int token_dims) {
  if (token_dims == 1 || t.size(1) == 1) return t.stride(0);
  KIMI_CHECK(t.size(0) <= 1 || t.stride(0) == t.size(1) * t.stride(1), name,
             " must have evenly spaced tokens (stride 0 = size 1 * stride 1), got strides ", t.stride(0), " and ",
             t.stride(1), " at shape ", shape_of(t));
  return t.stride(1);
}

inline Tensor workspace_of(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

struct KdaOptions {
  const OptionalTensor& A_log;
  const OptionalTensor& dt_bias;
  int64_t gate;
  double lower_bound, scale;
  bool use_qk_l2norm, use_beta_sigmoid;
};

// Sizes of `p`, from the state pool and the slots.
template <typename P>
void set_sizes(P& p, const std::string& op, const Tensor& state, const Tensor& slots) {
  KIMI_CHECK(state.dim() == 4, op, ": state must have shape [slots, num_value_heads, value_dim, key_dim], got ",
             shape_of(state));
  KIMI_CHECK(slots.dim() == 1, op, ": slots must have shape [num_sequences], got ", shape_of(slots));
  p.num_sequences = slots.size(0);
  p.num_value_heads = state.size(1);
  p.value_dim = state.size(2);
  p.key_dim = state.size(3);
}

// Everything but q, k, v and the options of one operator; sizes and dtype of `p` are set. The tensors' leading
// dimensions are the `token_dims` first ones of `first`: [T] or [B, S].
template <typename P>
void set_kda_params(P& p, const std::string& op, const Tensor& first, const Tensor& g, const Tensor& beta,
                    const Tensor& state, const Tensor& slots, const KdaOptions& options, const Tensor& out,
                    int token_dims) {
  const auto name = [&](const char* tensor) { return op + ": " + tensor; };
  const int64_t a = first.size(0), b = token_dims == 2 ? first.size(1) : 0;
  const auto check_tokens = [&](const Tensor& t, const char* tensor, std::initializer_list<int64_t> rest) {
    int64_t sizes[4] = {a, b};
    int n = token_dims;
    for (int64_t size : rest) sizes[n++] = size;
    if (n == 4)
      check_shape(t, name(tensor).c_str(), {sizes[0], sizes[1], sizes[2], sizes[3]});
    else if (n == 3)
      check_shape(t, name(tensor).c_str(), {sizes[0], sizes[1], sizes[2]});
    else
      check_shape(t, name(tensor).c_str(), {sizes[0], sizes[1]});
    check_device(t, name(tensor).c_str(), first);
  };
  check_tokens(g, "g", {p.num_value_heads, p.key_dim});
  check_tokens(beta, "beta", {p.num_value_heads});
  check_tokens(out, "out", {p.num_value_heads, p.value_dim});
  check_like(out, name("out").c_str(), first);
  check_device(state, name("state").c_str(), first);
  check_contiguous_from(state, name("state").c_str(), 1);
  check_i32(slots, name("slots").c_str());
  check_device(slots, name("slots").c_str(), first);
  check_contiguous(slots, name("slots").c_str());
  check_last_contiguous(g, name("g").c_str());
  check_last_contiguous(out, name("out").c_str());
  if (options.A_log) {
    check_shape(*options.A_log, name("A_log").c_str(), {p.num_value_heads});
    check_f32(*options.A_log, name("A_log").c_str());
    check_device(*options.A_log, name("A_log").c_str(), first);
    check_contiguous(*options.A_log, name("A_log").c_str());
  }
  if (options.dt_bias) {
    check_shape(*options.dt_bias, name("dt_bias").c_str(), {p.num_value_heads, p.key_dim});
    check_f32(*options.dt_bias, name("dt_bias").c_str());
    check_device(*options.dt_bias, name("dt_bias").c_str(), first);
    check_contiguous(*options.dt_bias, name("dt_bias").c_str());
  }
  p.g = pointer(g);
  p.beta = pointer(beta);
  p.A_log = pointer<float>(options.A_log);
  p.dt_bias = pointer<float>(options.dt_bias);
  p.state = mutable_pointer(state);
  p.slots = pointer<int32_t>(slots);
  p.out = mutable_pointer(out);
  p.g_token_stride = token_stride_of(g, name("g").c_str(), token_dims);
  p.g_head_stride = g.stride(token_dims);
  p.beta_token_stride = token_stride_of(beta, name("beta").c_str(), token_dims);
  p.beta_head_stride = beta.stride(token_dims);
  p.out_token_stride = token_stride_of(out, name("out").c_str(), token_dims);
  p.out_head_stride = out.stride(token_dims);
  p.state_slot_stride = state.stride(0);
  p.scale = static_cast<float>(options.scale);
  p.lower_bound = static_cast<float>(options.lower_bound);
  p.gate = static_cast<KdaGate>(options.gate);
  p.use_qk_l2norm = options.use_qk_l2norm;
  p.use_beta_sigmoid = options.use_beta_sigmoid;
  p.g_dtype = dtype_of(g, name("g").c_str());
  p.beta_dtype = dtype_of(beta, name("beta").c_str());
  p.state_dtype = dtype_of(state, name("state").c_str());
}

// q, k [tokens..., num_heads, key_dim] and v [tokens..., num_value_heads, value_dim]; sizes of `p` are set.
template <typename P>
void set_qkv(P& p, const std::string& op, const Tensor& q, const Tensor& k, const Tensor& v, int token_dims) {
  const auto name = [&](const char* tensor) { return op + ": " + tensor; };
  const auto check = [&](const Tensor& t, const char* tensor, int64_t heads, int64_t dim) {
    if (token_dims == 1)
      check_shape(t, name(tensor).c_str(), {q.size(0), heads, dim});
    else
      check_shape(t, name(tensor).c_str(), {q.size(0), q.size(1), heads, dim});
    check_like(t, name(tensor).c_str(), q);
    check_last_contiguous(t, name(tensor).c_str());
  };
  check(q, "q", p.num_heads, p.key_dim);
  check(k, "k", p.num_heads, p.key_dim);
  check(v, "v", p.num_value_heads, p.value_dim);
  p.q = pointer(q);
  p.k = pointer(k);
  p.v = pointer(v);
  p.q_token_stride = token_stride_of(q, name("q").c_str(), token_dims);
  p.q_head_stride = q.stride(token_dims);
  p.k_token_stride = token_stride_of(k, name("k").c_str(), token_dims);
  p.k_head_stride = k.stride(token_dims);
  p.v_token_stride = token_stride_of(v, name("v").c_str(), token_dims);
  p.v_head_stride = v.stride(token_dims);
}

// [num_sequences] flags or counts.
inline void check_per_sequence(const Tensor& t, const std::string& name, int64_t num_sequences, const Tensor& first) {
  check_shape(t, name.c_str(), {num_sequences});
  check_device(t, name.c_str(), first);
  check_contiguous(t, name.c_str());
}

}  // namespace kimi::torch_glue
