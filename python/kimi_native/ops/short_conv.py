"""Causal depthwise convolution of 4 taps with SiLU, over packed sequences and over one token of each sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def short_conv(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    *,
    has_initial_state: Tensor | None = None,
    snapshot_slots: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``y[t] = silu(weight[:, 0] x[t-3] + weight[:, 1] x[t-2] + weight[:, 2] x[t-1] + weight[:, 3] x[t])`` per channel.

    T tokens of N sequences are packed; a sequence continues from its slot of the state pool and leaves its last three
    inputs there.

    Args:
        x: ``[T, C]``, float32, bfloat16 or (on a GPU) float16, contiguous in the last dimension.
        weight: ``[C, 4]``, the dtype of ``x``; column 3 multiplies the current token.
        state: ``[S, 3, C]``, the dtype of ``x``, each slot contiguous; row 0 is the oldest input. Updated in place.
        slots: ``[N]`` int32, the slot of each sequence. -1: the sequence's output rows are zeroed, nothing else happens.
            Two sequences must not share a slot.
        cu_seqlens: ``[N + 1]`` int32, where sequences begin and end among the tokens. Empty sequences are legal and
            leave their slot alone; tokens outside of all sequences are neither read nor written.
        has_initial_state: ``[N]`` bool; false takes the state as zero, whatever the slot holds. All true by default.
        snapshot_slots: ``[N, M]`` int32; ``[n, m]`` is the slot that gets a copy of sequence n's state after its first
            ``(m + 1) * 64`` tokens of this call, if it has that many. -1: none.
        out: where to write, not ``x``. A new tensor by default.

    Returns:
        ``out``, ``[T, C]`` in the dtype of ``x``. All in fp32, one rounding at the end.

    Raises:
        RuntimeError: shapes, dtypes or devices do not agree; the text names the tensor.

    A sequence's result depends neither on its neighbours nor on where it is cut into calls, to the bit.
    Source: Kimi Linear, arXiv:2510.26692.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops.kimi_native.short_conv(x, weight, state, slots, cu_seqlens, has_initial_state, snapshot_slots, out)
    return out


def short_conv_update(x: Tensor, weight: Tensor, state: Tensor, slots: Tensor, *, out: Tensor | None = None) -> Tensor:
    """:func:`short_conv` of one token per sequence, with the same bits: ``x`` is ``[B, C]``, ``slots`` is ``[B]`` int32.

    Args:
        x: ``[B, C]``, float32, bfloat16 or (on a GPU) float16, contiguous in the last dimension.
        weight: ``[C, 4]``, the dtype of ``x``.
        state: ``[S, 3, C]``, the dtype of ``x``; updated in place.
        slots: ``[B]`` int32; -1: the output row is zeroed, nothing else happens.
        out: where to write, not ``x``. A new tensor by default.

    Returns:
        ``out``, ``[B, C]`` in the dtype of ``x``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not agree; the text names the tensor.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops.kimi_native.short_conv_update(x, weight, state, slots, out)
    return out


@torch.library.register_fake("kimi_native::short_conv")
def _(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    has_initial_state: Tensor | None,
    snapshot_slots: Tensor | None,
    out: Tensor,
) -> None:
    return None


@torch.library.register_fake("kimi_native::short_conv_update")
def _(x: Tensor, weight: Tensor, state: Tensor, slots: Tensor, out: Tensor) -> None:
    return None
