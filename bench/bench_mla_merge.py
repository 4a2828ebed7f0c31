"""mla_merge against the same in torch operations, at the model's 32 heads of 128."""

from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, Job, close, main
from shapes import DIM, HEADS

from kimi_native.ops import mla_merge


def torch_merge(out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor) -> None:
    both = torch.logaddexp(lse, other_lse)
    out.mul_(torch.exp(lse - both)[..., None]).add_(other_out * torch.exp(other_lse - both)[..., None])
    lse.copy_(both)


def job(num_tokens: int, device: str) -> Job:
    out, other = (torch.randn(num_tokens, HEADS, DIM, device=device) for _ in range(2))
    lse, other_lse = (torch.randn(num_tokens, HEADS, device=device) for _ in range(2))

    def check() -> None:
        ours, theirs = (out.clone(), lse.clone()), (out.double(), lse.double())
        mla_merge(*ours, other, other_lse)
        torch_merge(*theirs, other.double(), other_lse.double())
        close(ours[0], theirs[0], 1e-6)
        close(ours[1], theirs[1], 1e-6, "lse")

    return Job(
        run=lambda: mla_merge(out, lse, other, other_lse),
        check=check,
        peers={"torch": lambda: torch_merge(out, lse, other, other_lse)},
        flops=3 * out.numel(),
        bytes=3 * out.numel() * 4 + 3 * lse.numel() * 4,
    )


def cases(device: str) -> Iterator[Case]:
    for num_tokens in (64, 2048) if device == "cpu" else (512, 2048, 8192, 16384):
        name = f"T={num_tokens} H={HEADS} D={DIM} f32"
        yield Case("mla_merge", name, partial(job, num_tokens, device), core=num_tokens == 8192)


if __name__ == "__main__":
    main(cases)
