"""Absorbed multi-head latent attention of one new token per sequence over a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    latent_dim: int,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """``softmax(scale * q . rows^T) . rows[:, :latent_dim]`` for each head, over the cached rows of its sequence.

    Args:
        q: ``[B, H, L + R]``, float32, bfloat16 or (on a GPU) float16: per head the query folded with W_UK (``L`` columns) and
            its part for the shared key (``R`` columns). Contiguous in the last dimension.
        cache: ``[pages, page_size, L + R]``, the dtype of ``q``, as :func:`mla_cache_write` fills it. A page is contiguous;
            pages may lie apart. ``page_size`` is a multiple of 16.
        block_table: ``[B, M]`` int32, the page of each ``page_size`` tokens of a sequence. Entries past the length are never
            read as pages, whatever they hold; neither are rows past the length.
        lengths: ``[B]`` int32, rows that each sequence sees, at most ``M * page_size``. 0 is legal: ``out`` 0, ``lse`` -inf.
        scale: factor of the logits, that of the unfolded form: ``(nope_dim + rope_dim) ** -0.5``, not ``(L + R) ** -0.5``.
        latent_dim: ``L``, how many leading columns of a row are its value.
        out: ``[B, H, L]``, the dtype of ``q``. A new tensor by default.
        lse: ``[B, H]`` float32, contiguous; filled with the natural logarithm of the sum of exponentials when given.

    Returns:
        ``out``; W_UV is still to be applied. Logits, softmax and sums are fp32; rounded at the end, and on tensor cores the
        probabilities before that.

    Raises:
        RuntimeError: shapes, dtypes or devices do not agree; the text names the tensor.

    A sequence's bits depend on nothing but its own query and rows. Source: DeepSeek-V2, arXiv:2405.04434.
    """
    if out is None:
        out = q.new_empty(*q.shape[:-1], latent_dim)
    elif out.shape[-1] != latent_dim:
        raise RuntimeError(f"mla_decode: out must have latent_dim = {latent_dim} columns, got {out.shape[-1]}")
    torch.ops.kimi_native.mla_decode(q, cache, block_table, lengths, scale, out, lse)
    return out


@torch.library.register_fake("kimi_native::mla_decode")
def _(q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float, out: Tensor, lse: Tensor | None) -> None:
    return None
