"""Which experts each token takes, and with what weight."""

from __future__ import annotations

import torch
from torch import Tensor


def moe_router(
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor,
    *,
    top_k: int,
    scale: float = 1.0,
    renormalize: bool = True,
    logits: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sigmoid router with a bias that decides the choice and is no part of the weights.

    ``score = sigmoid(x @ weight.T)``; the experts are the ``top_k`` largest of ``score + bias``; their weights are
    ``score / (sum of the chosen scores + 1e-20) * scale``.

    Args:
        x: ``[T, D]``, float32 or bfloat16 (on a GPU also float16), contiguous in the last dimension. None when ``logits`` are given.
        weight: ``[E, D]``, the dtype of ``x``; E up to 512. None when ``logits`` are given.
        bias: ``[E]`` float32, contiguous.
        top_k: experts per token, up to 32 and at most E.
        scale: factor on every weight.
        renormalize: divide by the sum of the chosen scores; the scale is applied either way.
        logits: ``[T, E]`` float32, instead of ``x`` and ``weight``.
        out: ``(weights, ids)`` to write to, contiguous. New tensors by default.

    Returns:
        ``(weights, ids)``: ``[T, top_k]`` float32 and int32, in descending order of ``score + bias``. Of equal experts the
        lowest id comes first. A NaN logit counts as the lowest of all: such an expert is chosen only when nothing else is
        left, and then its weight is NaN.

    Raises:
        RuntimeError: shapes, dtypes or devices do not agree, or a size is not supported; the text names the tensor.

    Logits are fp32 sums of exact products (bfloat16 is converted first) in a fixed order, so a token's choice does not depend
    on other tokens. Source: DeepSeek-V3, arXiv:2412.19437, and ``KimiLinearTopkRouter`` of
    transformers 5.23.
    """
    if out is None:
        rows = x if logits is None else logits
        num_tokens = 0 if rows is None else rows.shape[0]  # the operator says what is missing
        out = bias.new_empty(num_tokens, top_k), bias.new_empty(num_tokens, top_k, dtype=torch.int32)
    weights, ids = out
    torch.ops.kimi_native.moe_router(x, weight, bias, logits, top_k, scale, renormalize, weights, ids)
    return weights, ids


@torch.library.register_fake("kimi_native::moe_router")
def _(
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor,
    logits: Tensor | None,
    top_k: int,
    scale: float,
    renormalize: bool,
    weights: Tensor,
    ids: Tensor,
) -> None:
    return None
