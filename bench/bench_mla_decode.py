"""mla_decode over a paged latent cache, at the sizes of the model (32 heads, rows of 512 + 64), from 1k to 1M tokens.

Peers: two torch matmuls and a softmax, which get their rows gathered (a contiguous [B, length, 576] copy of the pages), and on a
GPU FlashMLA, which reads the same pages through the same table.
"""

from collections.abc import Iterator

import peers
import torch
from harness import Call, Case, Job, Peer, close, main, name_of
from shapes import HEADS, LATENT, NOPE, ROPE
from torch import Tensor

from kimi_native.ops import mla_decode

SCALE = (NOPE + ROPE) ** -0.5
MAX_R = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}
MAX_PEER_R = 2e-2  # the same function; torch rounds its logits and probabilities to bf16
MAX_GATHERED = 1 << 20  # rows of all sequences; above it no copy is made for torch


def job(lengths: tuple[int, ...], dtype: torch.dtype, device: str) -> Job:
    batch, pages = len(lengths), [-(-length // 64) for length in lengths]
    cache = torch.randn(sum(pages), 64, LATENT + ROPE, dtype=dtype, device=device)
    q = torch.randn(batch, HEADS, LATENT + ROPE, dtype=dtype, device=device)
    # Logits of sigma 2: a softmax that is neither flat nor decided by one row.
    q *= 2 / (SCALE * (LATENT + ROPE) ** 0.5)
    table = torch.full((batch, max(pages)), -1, dtype=torch.int32, device=device)
    for n, part in enumerate(torch.randperm(sum(pages), device=device).to(torch.int32).split(pages)):
        table[n, : pages[n]] = part
    seen = torch.tensor(lengths, dtype=torch.int32, device=device)
    out = torch.full((batch, HEADS, LATENT), float("nan"), dtype=dtype, device=device)

    def rows_of(n: int) -> Tensor:
        return cache[table[n, : pages[n]].long()].flatten(0, 1)[: lengths[n]]

    def ours() -> None:
        mla_decode(q, cache, table, seen, SCALE, latent_dim=LATENT, out=out)

    def check_output(found: Tensor, max_r: float) -> None:
        for n in range(batch):
            rows = rows_of(n).double()
            ref = torch.softmax(q[n].double() @ rows.T * SCALE, -1) @ rows[:, :LATENT]
            close(found[n], ref, max_r, f"sequence {n}")

    def check() -> None:
        ours()
        check_output(out, MAX_R[dtype])

    others: dict[str, Call | Peer] = {}
    if len(set(lengths)) == 1 and sum(lengths) <= MAX_GATHERED:
        rows = torch.stack([rows_of(n) for n in range(batch)])

        def torch_way() -> Tensor:
            p = torch.softmax((q @ rows.mT).float() * SCALE, -1).to(dtype)
            return torch.matmul(p, rows[..., :LATENT])

        others["torch unpaged"] = Peer(torch_way, lambda: check_output(torch_way(), MAX_PEER_R))
    if device == "cuda":
        flash = peers.flash_mla(q, cache, table.clamp(min=0), seen, SCALE, LATENT)
        if flash is not None:
            others["FlashMLA"] = Peer(flash, lambda: check_output(flash()[0], MAX_PEER_R))
    return Job(
        run=ours,
        check=check,
        peers=others,
        flops=2 * sum(lengths) * HEADS * (2 * LATENT + ROPE),
        bytes=(sum(lengths) * (LATENT + ROPE) + q.numel() + out.numel()) * q.element_size(),
    )


def cases(device: str) -> Iterator[Case]:
    def case(batch: int, length: int, dtype: torch.dtype) -> Case:
        core = (batch, length) in ((1, 1 << 13), (1, 1 << 17), (16, 1 << 13), (64, 1 << 13), (256, 1 << 10))
        return Case("mla_decode", f"B={batch} L={length} H={HEADS} {name_of(dtype)}", lambda: job((length,) * batch, dtype, device), core)

    if device == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            for batch, length in ((1, 512), (1, 8192), (1, 32768), (16, 2048)):
                yield case(batch, length, dtype)
        return
    for batch, up_to in ((1, 1 << 20), (4, 1 << 17), (16, 1 << 17), (64, 1 << 15), (128, 1 << 15), (256, 1 << 13)):
        for length in (1 << 10, 1 << 13, 1 << 15, 1 << 17, 1 << 20):
            if length <= up_to:
                yield case(batch, length, torch.bfloat16)
    ragged = tuple(256 * (1 + (37 * n) % 64) for n in range(64))  # 256 to 16,384, a permutation of the multiples
    name = f"B={len(ragged)} L={min(ragged)}..{max(ragged)} H={HEADS} bf16"
    yield Case("mla_decode", name, lambda: job(ragged, torch.bfloat16, device))


if __name__ == "__main__":
    main(cases)
