"""rms_norm against torch.nn.functional.rms_norm (and fla's on a GPU), at the width of the model."""

from collections.abc import Iterator
from functools import partial

import peers
import torch
import torch.nn.functional as F
from harness import Call, Case, Job, Peer, close, main, name_of
from shapes import DECODE_BATCHES, HIDDEN

from kimi_native.ops import rms_norm

EPS = 1e-5


def job(num_tokens: int, dtype: torch.dtype, with_residual: bool, device: str) -> Job:
    x, weight = torch.randn(num_tokens, HIDDEN, dtype=dtype, device=device), torch.randn(HIDDEN, dtype=dtype, device=device)
    residual = torch.zeros_like(x) if with_residual else None
    out = torch.full_like(x, float("nan"))

    def ours() -> None:
        rms_norm(x, weight, EPS, residual=residual, out=out)

    def torch_way() -> torch.Tensor:
        if residual is None:
            return F.rms_norm(x, (HIDDEN,), weight, EPS)
        residual.add_(x)
        return F.rms_norm(residual, (HIDDEN,), weight, EPS)

    def reference() -> torch.Tensor:
        return F.rms_norm((x if residual is None else residual).double(), (HIDDEN,), weight.double(), EPS)

    def check() -> None:
        ours()
        close(out, reference(), 1e-6 if dtype == torch.float32 else 2.5e-3)

    others: dict[str, Call | Peer] = {"torch": torch_way}
    fla = peers.fla("modules.norm.layernorm") if device == "cuda" else None
    if fla is not None:

        def fla_way() -> torch.Tensor:
            result = fla.rms_norm(x, weight, None, residual=residual, eps=EPS, prenorm=residual is not None)
            return result if residual is None else result[0]

        def fla_check() -> None:
            if residual is not None:
                residual.zero_()
            found = fla_way()
            close(found, F.rms_norm(x.double(), (HIDDEN,), weight.double(), EPS), 5e-3)

        others["fla"] = Peer(fla_way, fla_check)

    passes = 4 if with_residual else 2  # x (and residual) in, out (and residual) out
    return Job(
        run=ours,
        check=check,
        peers=others,
        flops=(4 + with_residual) * num_tokens * HIDDEN,
        bytes=(passes * num_tokens + 1) * HIDDEN * x.element_size(),
    )


def cases(device: str) -> Iterator[Case]:
    on_cpu = device == "cpu"
    for dtype in (torch.float32, torch.bfloat16) if on_cpu else (torch.bfloat16,):
        for num_tokens in (1, 64, 2048) if on_cpu else (*DECODE_BATCHES, 2048, 8192, 131072):
            for with_residual in (False, True):
                name = f"T={num_tokens} D={HIDDEN} {name_of(dtype)}{' +residual' if with_residual else ''}"
                core = num_tokens in (64, 8192) and with_residual
                yield Case("rms_norm", name, partial(job, num_tokens, dtype, with_residual, device), core)


if __name__ == "__main__":
    main(cases)
