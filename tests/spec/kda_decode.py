"""fp64 meaning of kda_decode and kda_decode_fused, for one sequence of S new tokens."""

import torch
from spec.gated_rms_norm import gated_rms_norm
from spec.kda_prefill import MAX_R as MAX_R_PREFILL
from spec.kda_prefill import MAX_R_STATE, kda
from spec.short_conv import short_conv

__all__ = ["MAX_R", "MAX_R_FUSED", "MAX_R_STATE", "kda_decode", "kda_decode_fused"]

MAX_R = MAX_R_PREFILL | {torch.float16: 3.2e-4}  # rounding the output to fp16 alone costs 2.1e-4
# On a CPU the fused form rounds q, k, v and o to bf16 between its parts, as separate operators do. On a GPU it does not.
MAX_R_FUSED = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def kda_decode(q, k, v, g, beta, state, num_commit=None, **options):
    """As spec.kda_prefill.kda; the state returned is that after the leading num_commit tokens (None: all)."""
    o, after = kda(q, k, v, g, beta, state, **options)
    if num_commit is not None:
        after = kda(*(x[:num_commit] for x in (q, k, v, g, beta)), state, **options)[1]
    return o, after


def kda_decode_fused(
    qkv, conv_weight, past, g, beta, state, num_heads, num_commit=None, norm_gate=None, norm_weight=None, norm_eps=1e-5, **options
):
    """qkv [S, C], past [3, C], the rest as in kda. Returns (o, next past, state)."""
    heads, value_dim, key_dim = state.shape
    y, _ = short_conv(qkv, conv_weight, past)
    q, k, v = y.split([num_heads * key_dim, num_heads * key_dim, heads * value_dim], dim=1)
    q, k, v = q.unflatten(1, (num_heads, key_dim)), k.unflatten(1, (num_heads, key_dim)), v.unflatten(1, (heads, value_dim))
    o, after = kda_decode(q, k, v, g, beta, state, num_commit, **options)
    if norm_gate is not None:
        o = gated_rms_norm(o, norm_gate, norm_weight, norm_eps)
    return o, short_conv(qkv[:num_commit], conv_weight, past)[1], after
