"""moe_experts in the widths of the model, with the shared expert, from one token to 16,384.

On a CPU there are 64 experts instead of 256, so that fp32 fits and set-up is short (a decode step reads the same bytes either way),
and the peer is a loop over the experts that are hit, with F.linear (the way of transformers). On a GPU the peer is the same layer
by `grouped_mm` (the fast way of transformers): sort, gather, two grouped products, SwiGLU, weighted sum. Routing is uniform, or
skewed: the popularity of the n-th expert is 1 / n, so that the busiest of them takes most of the tokens.
"""

from collections.abc import Iterator
from functools import lru_cache

import peers
import torch
import torch.nn.functional as F
from harness import Call, Case, Job, Peer, close, main, name_of
from shapes import EXPERTS, HIDDEN, INNER, TOP_K
from torch import Tensor

from kimi_native.ops import moe_experts

MAX_R = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}
MAX_PEER_R = 2e-2
Weights = tuple[Tensor, Tensor, Tensor, Tensor]


@lru_cache(maxsize=1)
def layer(num_experts: int, dtype: torch.dtype, device: str) -> Weights:
    def random(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).uniform_(-1, 1).mul_((3 / shape[-1]) ** 0.5)

    w13, w2 = random(num_experts, 2 * INNER, HIDDEN), random(num_experts, HIDDEN, INNER)
    return w13, w2, random(2 * INNER, HIDDEN), random(HIDDEN, INNER)


def routing(num_tokens: int, num_experts: int, skewed: bool, device: str) -> Tensor:
    """[T, k] distinct experts of each token, drawn by popularity (Gumbel's way)."""
    torch.manual_seed(0)
    popularity = 1 / torch.arange(1, num_experts + 1, device=device) if skewed else torch.ones(num_experts, device=device)
    keys = popularity.log() - torch.empty(num_tokens, num_experts, device=device).exponential_().log()
    shuffled = torch.randperm(num_experts, device=device)
    return shuffled[keys.topk(TOP_K, dim=1).indices].to(torch.int32).contiguous()


def expert(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    gate, up = F.linear(x, w13).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w2)


def job(num_tokens: int, num_experts: int, skewed: bool, dtype: torch.dtype, device: str) -> Job:
    w13, w2, shared_w13, shared_w2 = layer(num_experts, dtype, device)
    ids = routing(num_tokens, num_experts, skewed, device)
    x = torch.randn(num_tokens, HIDDEN, dtype=dtype, device=device)
    topk_weights = torch.rand(num_tokens, TOP_K, device=device)
    out = torch.full_like(x, float("nan"))

    def ours() -> None:
        moe_experts(x, w13, w2, topk_weights, ids, shared_w13=shared_w13, shared_w2=shared_w2, out=out)

    def loop() -> Tensor:
        result = torch.zeros_like(x)
        mask = F.one_hot(ids.long(), num_experts).permute(2, 1, 0)
        for e in (mask.sum((1, 2)) > 0).nonzero().flatten().tolist():
            slot, token = torch.where(mask[e])
            y = expert(x[token], w13[e], w2[e]) * topk_weights[token, slot, None]
            result.index_add_(0, token, y.to(x.dtype))
        return result + expert(x, shared_w13, shared_w2)

    grouped_mm = peers.grouped_mm()

    def grouped() -> Tensor:
        assert grouped_mm is not None
        flat = ids.flatten()
        order = flat.argsort()
        ends = torch.histc(flat.float(), bins=num_experts, min=0, max=num_experts - 1).cumsum(0).to(torch.int32)
        gate, up = grouped_mm(x[order // TOP_K], w13.mT, offs=ends).chunk(2, dim=-1)
        y = grouped_mm(F.silu(gate) * up, w2.mT, offs=ends) * topk_weights.flatten()[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        return (y[back].view(num_tokens, TOP_K, HIDDEN).sum(1) + expert(x, shared_w13, shared_w2)).to(dtype)

    def check_output(found: Tensor, max_r: float) -> None:
        """Some tokens against fp64: the first ones, the last ones, and some of those that take the busiest expert."""
        count = 2 if device == "cpu" else 6
        busiest = (ids == ids.flatten().mode().values).any(1).nonzero().flatten()
        tokens = torch.cat([torch.arange(min(count, num_tokens), device=device), busiest[:count], busiest[-count:]]).unique()
        tokens = torch.cat([tokens, torch.tensor([num_tokens - 1], device=device)]).unique()
        rows = x[tokens].double()
        ref = expert(rows, shared_w13.double(), shared_w2.double())
        for e in ids[tokens].unique().tolist():
            row, slot = (ids[tokens] == e).nonzero(as_tuple=True)
            ref[row] += topk_weights[tokens[row], slot, None].double() * expert(rows[row], w13[e].double(), w2[e].double())
        close(found[tokens], ref, max_r)

    def check() -> None:
        ours()
        check_output(out, MAX_R[dtype])
        assert out.isfinite().all()

    others: dict[str, Call | Peer] = {}
    if device == "cpu":
        others["torch loop"] = loop
    elif grouped_mm is not None:
        others["torch grouped_mm"] = Peer(grouped, lambda: check_output(grouped(), MAX_PEER_R))
    experts_hit = ids.unique().numel() + 1
    return Job(
        run=ours,
        check=check,
        peers=others,
        flops=2 * num_tokens * (TOP_K + 1) * 3 * INNER * HIDDEN,
        bytes=(experts_hit * 3 * INNER * HIDDEN + 2 * num_tokens * HIDDEN) * x.element_size() + 8 * ids.numel(),
    )


def cases(device: str) -> Iterator[Case]:
    def case(num_tokens: int, num_experts: int, skewed: bool, dtype: torch.dtype) -> Case:
        kind = "" if device == "cpu" else " skewed" if skewed else " uniform"
        name = f"T={num_tokens}{kind} E={num_experts} k={TOP_K} D={HIDDEN} I={INNER} +shared {name_of(dtype)}"
        core = num_tokens in (256,) if skewed else num_tokens in (1, 16, 64, 256, 4096)
        return Case("moe_experts", name, lambda: job(num_tokens, num_experts, skewed, dtype, device), core)

    if device == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            for num_tokens in (1, 4, 32, 256, 1024):
                yield case(num_tokens, 64, False, dtype)
    else:
        for skewed in (False, True):
            for num_tokens in (1, 4, 16, 64, 128, 256, 1024, 4096, 16384):
                if num_tokens > 1 or not skewed:
                    yield case(num_tokens, EXPERTS, skewed, torch.bfloat16)
    layer.cache_clear()


if __name__ == "__main__":
    main(cases)
