"""Normalises the latents of new tokens and writes them into the paged cache of multi-head latent attention."""

from __future__ import annotations

import torch
from torch import Tensor


def mla_cache_write(kv: Tensor, norm_weight: Tensor, eps: float, cache: Tensor, slot_mapping: Tensor) -> None:
    """``cache[slot_mapping[t]] = [RMSNorm(kv[t, :L]) * norm_weight, kv[t, L:]]``, in place.

    Args:
        kv: ``[T, L + R]``, float32, bfloat16 or (on a GPU) float16: latent and shared key part, as the down-projection gives them.
            Contiguous in the last dimension; tokens may lie apart (a view of a wider projection).
        norm_weight: ``[L]``, the dtype of ``kv``; its size is what says where the latent ends.
        eps: added to the mean square; dimensionless.
        cache: ``[pages, page_size, L + R]``, the dtype of ``kv``, updated in place. A page is contiguous; pages may lie apart.
            ``page_size`` is a multiple of 16 (64 in this library's own caches).
        slot_mapping: ``[T]`` int64, ``page * page_size + row`` of each token. -1 skips the token: nothing is written. Slots
            must be distinct and inside the cache; they are not checked.

    Raises:
        RuntimeError: shapes, dtypes or devices do not agree; the text names the tensor.

    Statistics and products are fp32, one rounding at the end, so the latent has the bits of :func:`rms_norm`.
    Source: DeepSeek-V2, arXiv:2405.04434.
    """
    torch.ops.kimi_native.mla_cache_write(kv, norm_weight, eps, cache, slot_mapping)


@torch.library.register_fake("kimi_native::mla_cache_write")
def _(kv: Tensor, norm_weight: Tensor, eps: float, cache: Tensor, slot_mapping: Tensor) -> None:
    return None
