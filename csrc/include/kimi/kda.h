// Kimi Delta Attention: what kda_prefill and kda_decode share.
//
// One value head hv of one sequence, q/k head h = hv / (num_value_heads / num_heads), state S[value_dim, key_dim] in
// fp32 arithmetic:
//
//   q, k   <- x / sqrt(sum x^2 + 1e-6)  (use_qk_l2norm),  q <- scale * q
//   beta   <- sigmoid(beta)             (use_beta_sigmoid)
//   decay  <- exp(log_decay)  per key channel, from the raw gate g by one of the forms below; always in [0, 1]
//   S[v,c] <- S[v,c] * decay[c]                               decay first,
//   u[v]   <- beta * (v[v] - sum_c S[v,c] * k[c])             delta against the decayed state,
//   S[v,c] <- S[v,c] + u[v] * k[c]
//   o[v]   <- sum_c S[v,c] * q[c]                             output from the updated state
//
// Nothing here ever forms exp of a positive gate sum: decays of |log_decay| in the thousands are common in the released
// model, and then just zero. Source: Kimi Linear, arXiv 2510.26692.
#pragma once

#include "kimi/common.h"

namespace kimi {

// How the log-decay of key channel c comes from the raw gate g.
enum class KdaGate : int32_t {
  kSoftplus = 0,  // -exp(A_log[hv]) * softplus(g + dt_bias[hv, c]): unbounded; Kimi-Linear-48B-A3B
  kBounded = 1,   // lower_bound * sigmoid(exp(A_log[hv]) * (g + dt_bias[hv, c])): later Kimi models
  kLogDecay = 2,  // g itself
};

constexpr const char* name_of(KdaGate gate) {
  return gate == KdaGate::kSoftplus ? "softplus" : gate == KdaGate::kBounded ? "bounded" : "log_decay";
}

}  // namespace kimi
