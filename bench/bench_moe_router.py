"""moe_router against the same written in torch (fp32 linear, sigmoid, topk, gather, normalise), at the size of the model."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, Job, close, main, name_of
from shapes import DECODE_BATCHES, EXPERTS, HIDDEN, TOP_K

from kimi_native.ops import moe_router

SCALE = 2.446
TIE = 1e-6  # biased scores closer than this may come in either order after fp32 rounding


def job(num_tokens: int, dtype: torch.dtype, device: str) -> Job:
    x = torch.randn(num_tokens, HIDDEN, dtype=dtype, device=device)
    weight = torch.randn(EXPERTS, HIDDEN, dtype=dtype, device=device) * HIDDEN**-0.5
    bias = torch.randn(EXPERTS, device=device) * 0.1
    weight_f32 = weight.float()
    weights, ids = (
        torch.full((num_tokens, TOP_K), float("nan"), device=device),
        torch.full((num_tokens, TOP_K), -1, dtype=torch.int32, device=device),
    )

    def ours() -> None:
        moe_router(x, weight, bias, top_k=TOP_K, scale=SCALE, out=(weights, ids))

    def torch_way() -> tuple[torch.Tensor, torch.Tensor]:
        scores = F.linear(x.float(), weight_f32).sigmoid()
        chosen = (scores + bias).topk(TOP_K, sorted=True).indices
        w = scores.gather(1, chosen)
        return w / (w.sum(1, keepdim=True) + 1e-20) * SCALE, chosen

    def check() -> None:
        ours()
        chosen = ids.long()
        assert (chosen.sort(1).values.diff(dim=1) > 0).all(), "an expert twice"
        scores = F.linear(x.double(), weight.double()).sigmoid()
        biased = scores + bias.double()
        worse = biased.topk(TOP_K).values - biased.gather(1, chosen)
        assert worse.max() < TIE, f"not the best experts, by {worse.max():.1e}"
        w = scores.gather(1, chosen)
        close(weights, w / (w.sum(1, keepdim=True) + 1e-20) * SCALE, 1e-5)

    return Job(
        run=ours,
        check=check,
        peers={"torch": torch_way},
        flops=2 * num_tokens * EXPERTS * HIDDEN,
        bytes=(num_tokens + EXPERTS) * HIDDEN * x.element_size() + num_tokens * TOP_K * 8,
    )


def cases(device: str) -> Iterator[Case]:
    on_cpu = device == "cpu"
    for dtype in (torch.float32, torch.bfloat16) if on_cpu else (torch.bfloat16,):
        for num_tokens in (1, 16, 512, 2048) if on_cpu else (*DECODE_BATCHES, 2048, 16384):
            name = f"T={num_tokens} E={EXPERTS} k={TOP_K} D={HIDDEN} {name_of(dtype)}"
            yield Case("moe_router", name, partial(job, num_tokens, dtype, device), core=num_tokens in (64, 16384))


if __name__ == "__main__":
    main(cases)
