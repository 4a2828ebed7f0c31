"""fp64 meaning of mla_decode: softmax(scale * q . rows^T) . rows[:, :L] over the first `length` rows of each sequence."""

import torch

# fp32: sums of up to 576 products and of some thousand rows. Rounding the output alone costs 1.7e-3 in bf16 and 2.1e-4 in fp16, and on
# tensor cores rounding the probabilities as much again.
MAX_R = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}
# Logits of sigma 10 to 30: their rounding is an error of e^s.
MAX_R_PEAKED = {torch.float32: 5e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}
MAX_R_LSE = 1e-6


def mla_decode(q, cache, block_table, lengths, scale, latent_dim):
    """Returns (out [B, H, L], lse [B, H]) in fp64."""
    num_seqs, num_heads, _ = q.shape
    out = torch.zeros(num_seqs, num_heads, latent_dim, dtype=torch.float64)
    lse = torch.full((num_seqs, num_heads), -torch.inf, dtype=torch.float64)
    for b, length in enumerate(lengths.tolist()):
        if length > 0:
            page, row = torch.arange(length) // cache.shape[1], torch.arange(length) % cache.shape[1]
            rows = cache[block_table[b].long()[page], row].double()
            s = scale * q[b].double() @ rows.T
            out[b] = torch.softmax(s, -1) @ rows[:, :latent_dim]
            lse[b] = torch.logsumexp(s, -1)
    return out, lse
