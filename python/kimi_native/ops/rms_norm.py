"""Root-mean-square normalisation, with an optional residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension; with ``residual``, of ``residual + x``.

    Args:
        x: ``[..., dim]``, float32, bfloat16 or (on a GPU) float16, contiguous in the last dimension.
        weight: ``[dim]``, the dtype of ``x``.
        eps: added to the mean square; dimensionless.
        residual: shape and dtype of ``x``. Updated in place to ``residual + x`` (rounded to its dtype), which is what is
            then normalised.
        out: where to write; may be ``x``. A new tensor by default.

    Returns:
        ``out``, shape and dtype of ``x``. Statistics and products are fp32, one rounding at the end.

    Raises:
        RuntimeError: shapes, dtypes or devices do not agree; the text names the tensor.

    A row's result does not depend on other rows. Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if out is None:
        out = torch.empty_like(x)
    dim = x.shape[-1]
    torch.ops.kimi_native.rms_norm(
        x.view(-1, dim), weight, None if residual is None else residual.view(-1, residual.shape[-1]), eps, out.view(-1, out.shape[-1])
    )
    return out


@torch.library.register_fake("kimi_native::rms_norm")
def _(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, out: Tensor) -> None:
    return None
