"""short_conv against torch's conv1d + SiLU (and fla's kernels on a GPU), at the width of the model (q, k and v: 12,288 channels)."""

from collections.abc import Iterator
from functools import partial

import peers
import torch
import torch.nn.functional as F
from harness import Call, Case, Job, Peer, close, main, name_of
from shapes import DECODE_BATCHES, DIM, HEADS, PREFILL_TOKENS, RAGGED, name_of_lengths, packed
from torch import Tensor

from kimi_native.ops import short_conv, short_conv_update

CHANNELS = 3 * HEADS * DIM
MAX_ERROR = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}
PIECE = 8192  # tokens of a reference at a time


def torch_conv(x: Tensor, weight: Tensor, past: Tensor) -> Tensor:
    """One sequence, x [T, C] with its three inputs before it."""
    history = torch.cat([past, x]).t().unsqueeze(0)
    return F.silu(F.conv1d(history, weight.unsqueeze(1), groups=weight.shape[0]))[0].t()


def check_sequence(out: Tensor, x: Tensor, weight: Tensor, past: Tensor, max_error: float) -> None:
    """One sequence against four shifted products in fp64, piece by piece."""
    for begin in range(0, len(x), PIECE):
        rows = x[max(begin - 3, 0) : begin + PIECE].double()
        if begin == 0:
            rows = torch.cat([past.double(), rows])
        count = len(rows) - 3
        taps = [rows[j : j + count] * weight[:, j].double() for j in range(4)]
        ref = F.silu(taps[0] + taps[1] + taps[2] + taps[3])
        close(out[begin : begin + PIECE], ref, max_error)


def prefill(lengths: tuple[int, ...], dtype: torch.dtype, device: str) -> Job:
    num_tokens, num_sequences = sum(lengths), len(lengths)
    x, weight = torch.randn(num_tokens, CHANNELS, dtype=dtype, device=device), torch.randn(CHANNELS, 4, dtype=dtype, device=device)
    state = torch.randn(num_sequences, 3, CHANNELS, dtype=dtype, device=device)
    slots, cu_seqlens = torch.arange(num_sequences, dtype=torch.int32, device=device), packed(lengths, device)
    out, past = torch.full_like(x, float("nan")), state.clone()
    begins = [sum(lengths[:n]) for n in range(num_sequences)]

    def ours() -> None:
        short_conv(x, weight, state, slots, cu_seqlens, out=out)

    def check_output(result: Tensor, max_error: float) -> None:
        for n, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
            part = slice(begin, begin + length)
            check_sequence(result[part], x[part], weight, past[n], max_error)

    def check() -> None:
        state.copy_(past)
        ours()
        check_output(out, MAX_ERROR[dtype])
        assert all(torch.equal(state[n], x[b + length - 3 : b + length]) for n, (b, length) in enumerate(zip(begins, lengths, strict=True)))

    others: dict[str, Call | Peer] = {}
    if num_sequences == 1 and num_tokens <= 8192:
        others["torch"] = lambda: torch_conv(x, weight, past[0])
    fla = peers.fla("modules.causal_conv1d.ops") if device == "cuda" else None
    if fla is not None:
        before = F.pad(past.transpose(1, 2), (1, 0)).contiguous()  # [N, C, 4], of which the last three count
        several = cu_seqlens.long() if num_sequences > 1 else None

        def fla_way() -> Tensor:
            y, _ = fla.causal_conv1d(x[None], weight, initial_state=before, output_final_state=True, activation="silu", cu_seqlens=several)
            return y[0]

        others["fla"] = Peer(fla_way, lambda: check_output(fla_way(), 5e-3))
    return Job(
        run=ours,
        check=check,
        peers=others,
        flops=12 * num_tokens * CHANNELS,
        bytes=(2 * num_tokens + 6 * num_sequences + 4) * CHANNELS * x.element_size(),
    )


def update(batch: int, dtype: torch.dtype, device: str) -> Job:
    x, weight = torch.randn(batch, CHANNELS, dtype=dtype, device=device), torch.randn(CHANNELS, 4, dtype=dtype, device=device)
    state = torch.randn(batch, 3, CHANNELS, dtype=dtype, device=device)
    peer_state = state.clone()
    slots, out = torch.randperm(batch, device=device).to(torch.int32), torch.full_like(x, float("nan"))

    def ours() -> None:
        short_conv_update(x, weight, state, slots, out=out)

    def torch_way() -> Tensor:
        window = torch.cat([peer_state, x.unsqueeze(1)], dim=1)
        peer_state.copy_(window[:, 1:])
        return F.silu((window * weight.t()).sum(1))

    def reference() -> Tensor:
        window = torch.cat([state[slots.long()], x.unsqueeze(1)], dim=1).double()
        return F.silu((window * weight.t().double()).sum(1))

    def check() -> None:
        ref = reference()
        ours()
        close(out, ref, MAX_ERROR[dtype])

    others: dict[str, Call | Peer] = {"torch": torch_way}
    fla = peers.fla("modules.causal_conv1d.ops") if device == "cuda" else None
    if fla is not None:
        cache = F.pad(state[slots.long()].transpose(1, 2), (1, 0)).contiguous()  # [B, C, 4]

        def fla_way() -> Tensor:
            return fla.causal_conv1d_update(x, cache, weight=weight, activation="silu")[0]

        def fla_check() -> None:
            cache[:, :, 1:] = state[slots.long()].transpose(1, 2)
            close(fla_way(), reference(), 5e-3)

        others["fla"] = Peer(fla_way, fla_check)
    return Job(
        run=ours,
        check=check,
        peers=others,
        flops=12 * batch * CHANNELS,
        bytes=(batch * (2 + 6) + 4) * CHANNELS * x.element_size(),
    )


def cases(device: str) -> Iterator[Case]:
    on_cpu = device == "cpu"
    loads: list[tuple[int, ...]] = [(64,), (2048,)] if on_cpu else [*((t,) for t in PREFILL_TOKENS), (1024,) * 8, (256,) * 32, RAGGED]
    for dtype in (torch.float32, torch.bfloat16) if on_cpu else (torch.bfloat16,):
        for lengths in loads:
            name = f"{name_of_lengths(lengths)} C={CHANNELS} {name_of(dtype)}"
            yield Case("short_conv", name, partial(prefill, lengths, dtype, device), core=lengths == (8192,))
        for batch in (1, 16) if on_cpu else DECODE_BATCHES:
            name = f"B={batch} C={CHANNELS} {name_of(dtype)}"
            yield Case("short_conv_update", name, partial(update, batch, dtype, device), core=batch == 64)


if __name__ == "__main__":
    main(cases)
