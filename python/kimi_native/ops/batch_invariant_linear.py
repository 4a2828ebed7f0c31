"""A dense projection whose result for a token does not depend on the other tokens of the call."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_invariant_linear(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T`` with one fixed order of operations per output element.

    Args:
        x: ``[..., K]``, float32 or bfloat16 (on a GPU also float16), contiguous in the last dimension; with a grouped weight ``[T, G, K]``.
        weight: ``[N, K]``, or ``[G, N, K]`` for one matrix per group (per head): ``out[t, g] = weight[g] @ x[t, g]``. The
            dtype of ``x``; rows contiguous, any stride between them.
        out: ``[..., N]`` or ``[T, G, N]``, in the dtype of ``x`` or in float32; must not overlap ``x``. A new tensor of the
            dtype of ``x`` by default.

    Returns:
        ``out``. Products and sums are fp32, one rounding at the end.

    Raises:
        RuntimeError: shapes, dtypes or devices do not agree; the text names the tensor.

    A row has the same bits alone and in a batch of any size (on a CPU, at any thread count too), which ``torch.nn.functional.linear`` does
    not promise (libraries choose another blocking, so another rounding, for another number of rows). One row streams the
    weight at memory speed; docs/moe.md says what the promise costs with many.
    """
    if weight.dim() == 3:
        if out is None:
            out = x.new_empty(x.shape[0], weight.shape[0], weight.shape[1])
        torch.ops.kimi_native.batch_invariant_linear(x, weight, out)
        return out
    if out is None:
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
    if x.dim() == 2:
        torch.ops.kimi_native.batch_invariant_linear(x, weight, out)
    else:
        torch.ops.kimi_native.batch_invariant_linear(x.reshape(-1, x.shape[-1]), weight, out.view(-1, out.shape[-1]))
    return out


@torch.library.register_fake("kimi_native::batch_invariant_linear")
def _(x: Tensor, weight: Tensor, out: Tensor) -> None:
    return None
