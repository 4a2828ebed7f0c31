"""The chosen experts of a mixture-of-experts layer, weighted and summed, with the shared expert."""

from __future__ import annotations

import torch
from torch import Tensor


def moe_experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    shared_w13: Tensor | None = None,
    shared_w2: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``out[t] = sum_s topk_weights[t, s] * E_s(x[t]) + Shared(x[t])`` with SwiGLU experts.

    ``E(x) = w2 @ (silu(w13[:I] @ x) * (w13[I:] @ x))`` for the expert ``topk_ids[t, s]``.

    Args:
        x: ``[T, D]``, float32 or bfloat16 (on a GPU also float16), contiguous in the last dimension.
        w13: ``[E, 2 * I, D]``, the dtype of ``x``, contiguous: the I gate rows of each expert, then its I up rows.
        w2: ``[E, D, I]``, the dtype of ``x``, contiguous.
        topk_weights: ``[T, k]`` float32, contiguous.
        topk_ids: ``[T, k]`` int32, contiguous, as from `moe_router`. A slot of -1 is skipped, whatever its weight.
        shared_w13: ``[2 * Is, D]``, the dtype of ``x``, contiguous: an expert that every token takes with weight 1.
        shared_w2: ``[D, Is]``; given together with ``shared_w13``.
        out: ``[T, D]``, the dtype of ``x``; may be ``x``. A new tensor by default.

    Returns:
        ``out``. A token whose slots are all -1 gets the shared expert alone, or zeros.

    Raises:
        RuntimeError: shapes, dtypes or devices do not agree; the text names the tensor.

    Everything between ``x`` and ``out`` is fp32, with one exception on a GPU: the gated activations are rounded to the dtype of
    ``x`` between the two products. The experts' results are not rounded before the weighted sum, which runs over the slots in
    their order and ends with the shared expert. A token's bits do not depend on the other tokens of the call. Scratch is
    ``4 * T * k * (I + D)`` bytes and a little. Source: ``KimiLinearExperts`` of transformers 5.23, which rounds in more places.
    """
    if out is None:
        out = torch.empty_like(x)
    torch.ops.kimi_native.moe_experts(x, w13, w2, topk_weights, topk_ids, shared_w13, shared_w2, out)
    return out


@torch.library.register_fake("kimi_native::moe_experts")
def _(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    out: Tensor,
) -> None:
    return None
