"""Root-mean-square normalisation of every head, times the sigmoid of a gate."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-5, *, out: Tensor | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight * sigmoid(gate)`` over the last dimension: the output stage of a KDA layer.

    Args:
        x: ``[..., dim]``, float32, bfloat16 or (on a GPU) float16, contiguous in the last dimension. ``[tokens, heads, dim]`` may have any
            strides between tokens and between heads.
        gate: shape and dtype of ``x``; before the sigmoid.
        weight: ``[dim]``, the dtype of ``x``; shared by all heads.
        eps: added to the mean square; dimensionless.
        out: where to write; may be ``x`` or ``gate``. A new tensor by default.

    Returns:
        ``out``, shape and dtype of ``x``. All in fp32, one rounding at the end.

    Raises:
        RuntimeError: shapes, dtypes or devices do not agree; the text names the tensor.

    A row's result does not depend on other rows. Source: Kimi Linear, arXiv:2510.26692.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops.kimi_native.gated_rms_norm(_rows(x), _rows(gate), weight, eps, _rows(out))
    return out


def _rows(t: Tensor) -> Tensor:
    """As ``[tokens, heads, dim]``, without a copy."""
    if t.dim() == 3:
        return t
    if t.dim() < 3:
        return t.view(-1, 1, t.shape[-1])
    return t.view(-1, t.shape[-2], t.shape[-1])


@torch.library.register_fake("kimi_native::gated_rms_norm")
def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    return None
