"""Causal multi-head latent attention in its expanded form, over packed sequences with an optional prefix of earlier keys."""

from __future__ import annotations

import torch
from torch import Tensor


def mla_prefill(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    *,
    q_begin: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """``softmax(scale * [q_nope . k_nope^T + q_rope . k_rope^T]) . v``, causal within each sequence.

    Query ``i`` of sequence ``n`` sees key ``j`` of the same sequence iff ``j <= q_begin[n] + i``.

    Args:
        q: ``[Tq, H, Dn + Dr]``, float32, bfloat16 or (on a GPU) float16, packed over sequences. Contiguous in the last
            dimension, like all others.
        k_nope: ``[Tk, H, Dn]``, the dtype of ``q``; may be a view of a wider tensor (of the one that holds ``v`` too).
        k_rope: ``[Tk, Dr]``, the dtype of ``q``; the key part that all heads share. ``Dr`` may be 0.
        v: ``[Tk, H, Dv]``, the dtype of ``q``; may be a view.
        cu_seqlens_q: ``[N + 1]`` int32, first query of each sequence, then their total. Empty sequences are legal. Rows of
            ``out`` past the total are not written.
        cu_seqlens_k: ``[N + 1]`` int32, the same for the keys.
        scale: factor of the logits, ``(Dn + Dr) ** -0.5`` in the model.
        q_begin: ``[N]`` int32, position of each sequence's first query among its keys. By default ``len_k - len_q``: the first
            ``len_k - len_q`` keys are a prefix. Negative: the first rows see nothing (``out`` 0, ``lse`` -inf). At least
            ``len_k``: every row sees every key.
        out: ``[Tq, H, Dv]``, the dtype of ``q`` or float32 (for pieces that are to be merged). A new tensor by default.
        lse: ``[Tq, H]`` float32, contiguous; filled with the natural logarithm of the sum of exponentials when given.

    Returns:
        ``out``. Logits, softmax and sums are fp32; rounded at the end, and on tensor cores the probabilities before that.

    Raises:
        RuntimeError: shapes, dtypes or devices do not agree; the text names the tensor.

    A query's bits depend on its own sequence's visible keys alone: they are the same in one call over all queries or in several
    calls, alone or in a pack. Source: DeepSeek-V2, arXiv:2405.04434; FlashAttention-2, arXiv:2307.08691.
    """
    if out is None:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
    torch.ops.kimi_native.mla_prefill(q, k_nope, k_rope, v, cu_seqlens_q, cu_seqlens_k, scale, q_begin, out, lse)
    return out


@torch.library.register_fake("kimi_native::mla_prefill")
def _(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    q_begin: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    return None
