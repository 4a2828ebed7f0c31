"""fp64 meaning of mla_prefill: query i of a sequence sees its keys j <= q_begin + i."""

import torch

# Rounding the output alone costs 1.7e-3 in bf16 and 2.1e-4 in fp16, and on tensor cores rounding the probabilities as much again.
MAX_R = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}
# Logits of sigma 10 to 30: their rounding is an error of e^s.
MAX_R_PEAKED = {torch.float32: 5e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}
MAX_R_LSE = 1e-6


def mla_prefill(q, k_nope, k_rope, v, cu_seqlens_q, cu_seqlens_k, scale, q_begin=None):
    """Returns (out [Tq, H, Dv], lse [Tq, H]) in fp64; rows that see nothing: 0 and -inf."""
    num_queries, num_heads, _ = q.shape
    q, v = q.double(), v.double()
    k = torch.cat([k_nope.double(), k_rope.double()[:, None].expand(-1, num_heads, -1)], -1)
    out = torch.zeros(num_queries, num_heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((num_queries, num_heads), -torch.inf, dtype=torch.float64)
    cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n in range(len(cu_q) - 1):
        len_q, len_k = cu_q[n + 1] - cu_q[n], cu_k[n + 1] - cu_k[n]
        begin = len_k - len_q if q_begin is None else int(q_begin[n])
        for i in range(len_q):
            seen = slice(cu_k[n], cu_k[n] + max(0, min(begin + i + 1, len_k)))
            if seen.stop > seen.start:
                s = scale * torch.einsum("hd,jhd->hj", q[cu_q[n] + i], k[seen])
                out[cu_q[n] + i] = torch.einsum("hj,jhd->hd", torch.softmax(s, -1), v[seen])
                lse[cu_q[n] + i] = torch.logsumexp(s, -1)
    return out, lse
