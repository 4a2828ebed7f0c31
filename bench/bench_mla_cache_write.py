"""mla_cache_write against rms_norm, cat and index_copy_ of torch, at the width of the model (512 + 64)."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, Job, close, main, name_of
from shapes import DECODE_BATCHES, LATENT, ROPE

from kimi_native.ops import mla_cache_write

EPS = 1e-5


def job(num_tokens: int, dtype: torch.dtype, device: str) -> Job:
    kv, weight = torch.randn(num_tokens, LATENT + ROPE, dtype=dtype, device=device), torch.randn(LATENT, dtype=dtype, device=device)
    cache = torch.zeros(num_tokens // 64 + 1, 64, LATENT + ROPE, dtype=dtype, device=device)
    slots = torch.randperm(cache.shape[0] * 64, device=device)[:num_tokens].contiguous()
    rows = cache.view(-1, LATENT + ROPE)

    def ours() -> None:
        mla_cache_write(kv, weight, EPS, cache, slots)

    def torch_way() -> None:
        rows.index_copy_(0, slots, torch.cat([F.rms_norm(kv[:, :LATENT], (LATENT,), weight, EPS), kv[:, LATENT:]], 1))

    def check() -> None:
        ours()
        latent = F.rms_norm(kv[:, :LATENT].double(), (LATENT,), weight.double(), EPS)
        close(rows[slots, :LATENT], latent, 1e-6 if dtype == torch.float32 else 2.5e-3)
        assert torch.equal(rows[slots, LATENT:], kv[:, LATENT:])

    return Job(
        run=ours,
        check=check,
        peers={"torch": torch_way},
        flops=4 * num_tokens * LATENT,
        bytes=(2 * kv.numel() + LATENT) * kv.element_size() + 8 * num_tokens,
    )


def cases(device: str) -> Iterator[Case]:
    on_cpu = device == "cpu"
    for dtype in (torch.float32, torch.bfloat16) if on_cpu else (torch.bfloat16,):
        for num_tokens in (1, 64, 2048) if on_cpu else (*DECODE_BATCHES, 2048, 8192, 131072):
            name = f"T={num_tokens} D={LATENT}+{ROPE} {name_of(dtype)}"
            yield Case("mla_cache_write", name, partial(job, num_tokens, dtype, device), core=num_tokens in (64, 8192))


if __name__ == "__main__":
    main(cases)
