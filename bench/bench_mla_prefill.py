"""mla_prefill against torch's scaled_dot_product_attention, at the head sizes of the model (128 + 64 / 128), causal.

torch gets its operands ready: keys with the shared part already copied to every head, head-major and contiguous; packs of equal
sequences as a batch. On a CPU "sdpa" is the plain call, which has no fast path for values narrower than keys, and "sdpa padded
v" has values padded to 192 columns, so that torch's flash attention takes it. On a GPU it is the cuDNN backend, which takes
192/128 as it is. "flops" counts the pairs of query and key that a causal mask leaves.
"""

from collections.abc import Iterator

import peers
import torch
import torch.nn.functional as F
from harness import Call, Case, Job, Peer, close, main, name_of
from shapes import DIM as VALUE
from shapes import HEADS, NOPE, PREFILL_TOKENS, RAGGED, ROPE, name_of_lengths, packed
from torch import Tensor

from kimi_native.ops import mla_prefill

SCALE = (NOPE + ROPE) ** -0.5
MAX_R = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}
MAX_PEER_R = 1e-2
CHECKED_ROWS = 64  # of a sequence, besides its first and its last ones


def job(lengths: tuple[int, ...], prefix: int, dtype: torch.dtype, device: str) -> Job:
    """Sequences of `lengths` queries, each behind `prefix` earlier keys."""
    batch, num_queries, num_keys = len(lengths), sum(lengths), sum(lengths) + len(lengths) * prefix
    q = torch.randn(num_queries, HEADS, NOPE + ROPE, dtype=dtype, device=device) * 2  # logits of sigma 2
    kv = torch.randn(num_keys, HEADS, NOPE + VALUE, dtype=dtype, device=device)
    k_rope = torch.randn(num_keys, ROPE, dtype=dtype, device=device)
    cu_q, cu_k = packed(lengths, device), packed([length + prefix for length in lengths], device)
    out = torch.full((num_queries, HEADS, VALUE), float("nan"), dtype=dtype, device=device)
    begins_q, begins_k = cu_q.tolist(), cu_k.tolist()

    def ours() -> None:
        mla_prefill(q, kv[..., :NOPE], k_rope, kv[..., NOPE:], cu_q, cu_k, SCALE, out=out)

    def check_output(found: Tensor, max_r: float) -> None:
        """Rows of every sequence, all heads, against fp64."""
        for n, length in enumerate(lengths):
            count = CHECKED_ROWS if batch <= 8 else 8
            middle = torch.randint(length, (count,), device=device)
            edges = torch.arange(min(8, length), device=device)
            rows = torch.cat([edges, middle, length - 1 - edges]).unique()
            keys = slice(begins_k[n], begins_k[n + 1])
            hidden = torch.arange(length + prefix, device=device) > (rows + prefix)[:, None]
            for head in range(HEADS):
                k = torch.cat([kv[keys, head, :NOPE], k_rope[keys]], 1).double()
                s = (q[begins_q[n] + rows, head].double() @ k.T * SCALE).masked_fill_(hidden, -torch.inf)
                ref = torch.softmax(s, -1) @ kv[keys, head, NOPE:].double()
                close(found[begins_q[n] + rows, head], ref, max_r, f"sequence {n}, head {head}")

    def check() -> None:
        ours()
        check_output(out, MAX_R[dtype])

    others: dict[str, Call | Peer] = {}
    if len(set(lengths)) == 1 and (prefix == 0 or device == "cpu"):
        k = torch.cat([kv[..., :NOPE], k_rope[:, None].expand(-1, HEADS, -1)], -1)

        def ready(t: Tensor) -> Tensor:  # [B T, H, D] -> [B, H, T, D]
            return t.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()

        q_ready, k_ready, v_ready = ready(q), ready(k), ready(kv[..., NOPE:])
        mask = None if prefix == 0 else torch.ones(lengths[0], lengths[0] + prefix, dtype=torch.bool, device=device).tril(prefix)

        def sdpa(v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q_ready, k_ready, v, attn_mask=mask, is_causal=mask is None, scale=SCALE)

        def cudnn() -> Tensor:
            with peers.cudnn_attention():
                return sdpa(v_ready)

        if device == "cpu":
            padded = F.pad(v_ready, (0, NOPE + ROPE - VALUE))
            others = {"sdpa": lambda: sdpa(v_ready), "sdpa padded v": lambda: sdpa(padded)}
        else:
            others["sdpa cuDNN"] = Peer(cudnn, lambda: check_output(cudnn().transpose(1, 2).flatten(0, 1), MAX_PEER_R))
    pairs = sum(length * prefix + length * (length + 1) // 2 for length in lengths)
    return Job(
        run=ours,
        check=check,
        peers=others,
        flops=2 * pairs * HEADS * (NOPE + ROPE + VALUE),
        bytes=(q.numel() + kv.numel() + k_rope.numel() + out.numel()) * q.element_size(),
    )


def cases(device: str) -> Iterator[Case]:
    def case(lengths: tuple[int, ...], dtype: torch.dtype, prefix: int = 0) -> Case:
        name = name_of_lengths(lengths) + (f" prefix={prefix}" if prefix else "")
        core = lengths in ((2048,), (8192,), (1024,) * 8) and prefix in (0, 32768)
        return Case("mla_prefill", f"{name} H={HEADS} {name_of(dtype)}", lambda: job(lengths, prefix, dtype, device), core)

    if device == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            for num_queries, num_keys in ((512, 512), (2048, 2048), (64, 2048)):
                yield case((num_queries,), dtype, num_keys - num_queries)
        return
    for num_tokens in PREFILL_TOKENS:
        yield case((num_tokens,), torch.bfloat16)
    for lengths in ((1024,) * 8, (256,) * 32, RAGGED):
        yield case(lengths, torch.bfloat16)
    for num_queries, prefix in ((512, 8192), (2048, 32768), (8192, 131072)):
        yield case((num_queries,), torch.bfloat16, prefix)


if __name__ == "__main__":
    main(cases)
