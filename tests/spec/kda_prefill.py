"""fp64 meaning of Kimi Delta Attention, for one sequence, token by token."""

import torch

# Everything inside in fp32. Rounding the output alone costs 1.7e-3 in bf16 and 2.1e-4 in fp16.
MAX_R = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}
MAX_R_STATE = 1e-6  # the state is fp32 whatever the inputs are

# Chunks on tensor cores (GPU, 16-bit inputs): operands of fp16, 2.4e-4 a rounding, of which an output sums up a dozen.
MAX_R_CHUNKED = {torch.bfloat16: 2.5e-3, torch.float16: 1.2e-3}
MAX_R_STATE_CHUNKED = 1e-3


def log_decay(g, gate, A_log=None, dt_bias=None, lower_bound=-5.0):
    """Natural log of the decay, [T, HV, K] fp64, from the raw gate."""
    g = g.double()
    if gate == "log_decay":
        return g
    if dt_bias is not None:
        g = g + dt_bias.double()
    rate = torch.ones(g.shape[1], dtype=torch.float64, device=g.device) if A_log is None else A_log.double().exp()
    if gate == "softplus":
        return -rate[:, None] * torch.nn.functional.softplus(g)
    return lower_bound * torch.sigmoid(rate[:, None] * g)


def kda(
    q,
    k,
    v,
    g,
    beta,
    state,
    gate="softplus",
    A_log=None,
    dt_bias=None,
    lower_bound=-5.0,
    scale=None,
    use_qk_l2norm=True,
    use_beta_sigmoid=True,
    dtype=torch.float64,
):
    """q, k [T, H, K], v [T, HV, V], g [T, HV, K], beta [T, HV], state [HV, V, K], any float dtype. Returns (o, state), computed in
    `dtype`: in float32 it is not the truth but what plain arithmetic of that precision makes of it."""
    q, k, v, beta, state = (x.to(dtype, copy=True) for x in (q, k, v, beta, state))
    decay = log_decay(g, gate, A_log, dt_bias, lower_bound).exp().to(dtype)
    if use_qk_l2norm:
        q = q / torch.sqrt(q.pow(2).sum(-1, keepdim=True) + 1e-6)
        k = k / torch.sqrt(k.pow(2).sum(-1, keepdim=True) + 1e-6)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    if use_beta_sigmoid:
        beta = torch.sigmoid(beta)
    value_heads = v.shape[1]
    q, k = (x.repeat_interleave(value_heads // x.shape[1], dim=1) for x in (q, k))  # value head hv uses head hv // (HV // H)
    o = torch.zeros_like(v)
    for t in range(len(q)):
        state = state * decay[t, :, None, :]
        u = beta[t, :, None] * (v[t] - torch.einsum("hvk,hk->hv", state, k[t]))
        state = state + torch.einsum("hv,hk->hvk", u, k[t])
        o[t] = torch.einsum("hvk,hk->hv", state, q[t])
    return o, state
