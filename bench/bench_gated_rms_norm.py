"""gated_rms_norm against the same three lines of torch (and fla's kernel on a GPU), at the width of the model (32 heads of 128)."""

from collections.abc import Iterator
from functools import partial

import peers
import torch
import torch.nn.functional as F
from harness import Call, Case, Job, Peer, close, main, name_of
from shapes import DECODE_BATCHES, DIM, HEADS

from kimi_native.ops import gated_rms_norm

EPS = 1e-5


def job(num_tokens: int, dtype: torch.dtype, device: str) -> Job:
    x, gate, out = (torch.randn(num_tokens, HEADS, DIM, dtype=dtype, device=device) for _ in range(3))
    weight = torch.randn(DIM, dtype=dtype, device=device)
    out.fill_(float("nan"))

    def ours() -> None:
        gated_rms_norm(x, gate, weight, EPS, out=out)

    def torch_way() -> torch.Tensor:
        return F.rms_norm(x.float(), (DIM,), weight.float(), EPS).mul_(gate.float().sigmoid_()).to(dtype)

    def reference() -> torch.Tensor:
        return F.rms_norm(x.double(), (DIM,), weight.double(), EPS) * gate.double().sigmoid()

    def check() -> None:
        ours()
        close(out, reference(), 1e-6 if dtype == torch.float32 else 2.5e-3)

    others: dict[str, Call | Peer] = {"torch": torch_way}
    fla = peers.fla("modules.norm.fused_norm_gate") if device == "cuda" else None
    if fla is not None:

        def fla_way() -> torch.Tensor:
            return fla.rms_norm_gated(x, gate, weight, None, activation="sigmoid", eps=EPS)

        others["fla"] = Peer(fla_way, lambda: close(fla_way(), reference(), 5e-3))
    return Job(
        run=ours,
        check=check,
        peers=others,
        flops=8 * num_tokens * HEADS * DIM,
        bytes=3 * num_tokens * HEADS * DIM * x.element_size(),
    )


def cases(device: str) -> Iterator[Case]:
    on_cpu = device == "cpu"
    for dtype in (torch.float32, torch.bfloat16) if on_cpu else (torch.bfloat16,):
        for num_tokens in (1, 64, 2048) if on_cpu else (*DECODE_BATCHES, 2048, 8192, 131072):
            name = f"T={num_tokens} H={HEADS} D={DIM} {name_of(dtype)}"
            yield Case("gated_rms_norm", name, partial(job, num_tokens, dtype, device), core=num_tokens in (64, 8192))


if __name__ == "__main__":
    main(cases)
