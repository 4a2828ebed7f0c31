"""Kimi Delta Attention over one or a few new tokens of each sequence, alone or fused with what surrounds it in a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_native.ops.kda_prefill import KdaGate, gate_number


def kda_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    *,
    gate: KdaGate = "softplus",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    use_beta_sigmoid: bool = True,
    num_commit: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Kimi Delta Attention (the recurrence of :func:`kda_prefill`) of S = 1 to 8 new tokens of each of B sequences.

    Args:
        q, k: ``[B, S, H, K]``, float32, bfloat16 or (on a GPU) float16; any strides between tokens and heads, contiguous in the last
            dimension. With S > 1 the tokens must be evenly spaced (``stride(0) == S * stride(1)``), here and below.
        v: ``[B, S, HV, V]``, the dtype of ``q``. HV is a multiple of H; K and V are multiples of 16 from 16 to 256.
        g: ``[B, S, HV, K]``, raw gate, the dtype of ``q`` or float32.
        beta: ``[B, S, HV]``, the dtype of ``q`` or float32: a logit, or the step itself without ``use_beta_sigmoid``.
        state: ``[slots, HV, V, K]`` float32, or bfloat16 with inputs of 16 bits; each slot contiguous. Updated in place: in bfloat16
            rounded once a call, which costs what docs/kda.md measures.
        slots: ``[B]`` int32, the slot of each sequence. -1: the sequence's output rows are zeroed, nothing else happens.
            Two sequences must not share a slot.
        gate, A_log, dt_bias, lower_bound, scale, use_qk_l2norm, use_beta_sigmoid: as in :func:`kda_prefill`.
        num_commit: ``[B]`` int32, how many leading tokens of this call (0 to S) enter the state; outputs are computed
            for all S. All of them by default. For verifying drafts: run with 0, then again with the accepted number.
        out: where to write. A new tensor by default.

    Returns:
        ``out``, ``[B, S, HV, V]`` in the dtype of ``q``; fp32 inside, one rounding at the end.

    Raises:
        RuntimeError: shapes, dtypes, devices or options do not agree or are not supported; the text names the culprit.
        ValueError: an unknown ``gate``.

    A sequence's result does not depend on its neighbours, to the bit. Source: Kimi Linear, arXiv:2510.26692.
    """
    if out is None:
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    torch.ops.kimi_native.kda_decode(
        q,
        k,
        v,
        g,
        beta,
        state,
        slots,
        A_log,
        dt_bias,
        num_commit,
        gate_number(gate),
        lower_bound,
        k.shape[-1] ** -0.5 if scale is None else scale,
        use_qk_l2norm,
        use_beta_sigmoid,
        out,
    )
    return out


def kda_decode_fused(
    qkv: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    head_dim: int,
    gate: KdaGate = "softplus",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    use_beta_sigmoid: bool = True,
    num_commit: Tensor | None = None,
    norm_gate: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    out: Tensor | None = None,
) -> Tensor:
    """The middle of a KDA layer for new tokens: ``short_conv`` of q, k, v, then :func:`kda_decode`, then ``gated_rms_norm``.

    Args:
        qkv: ``[B, S, C]``, float32, bfloat16 or (on a GPU) float16, the projections before the convolution: H q heads of K channels, H k
            heads of K, HV v heads of V, so ``C = 2 H K + HV V``. S = 1 to 8; tokens evenly spaced.
        conv_weight: ``[C, 4]``, the dtype of ``qkv``; column 3 multiplies the current token.
        conv_state: ``[slots, 3, C]``, the dtype of ``qkv``; row 0 is the oldest input. Updated in place.
        g: ``[B, S, HV, K]``, raw gate, the dtype of ``qkv`` or float32.
        beta: ``[B, S, HV]``, the dtype of ``qkv`` or float32.
        state: ``[slots, HV, V, K]`` float32, or bfloat16 with inputs of 16 bits. Updated in place; HV and V are taken from here.
        slots: ``[B]`` int32, for both pools. -1: the sequence's output rows are zeroed, nothing else happens.
        num_heads: H, the number of q and of k heads.
        head_dim: K.
        gate, A_log, dt_bias, lower_bound, scale, use_qk_l2norm, use_beta_sigmoid: as in :func:`kda_prefill`.
        num_commit: ``[B]`` int32, how many leading tokens enter ``state`` and ``conv_state``; all by default.
        norm_gate: ``[B, S, HV, V]``, the dtype of ``qkv``: gate of the output norm before its sigmoid; None: no norm.
        norm_weight: ``[V]``, the dtype of ``qkv``; required with ``norm_gate``.
        norm_eps: added to the mean square of the norm.
        out: where to write. A new tensor by default.

    Returns:
        ``out``, ``[B, S, HV, V]`` in the dtype of ``qkv``. On a CPU the bits of the three operators one after another;
            on a GPU nothing is rounded between them.

    Raises:
        RuntimeError: shapes, dtypes, devices or options do not agree or are not supported; the text names the culprit.
        ValueError: an unknown ``gate``, or ``head_dim`` is not that of ``state``.
    """
    if state.dim() == 4 and state.shape[3] != head_dim:
        raise ValueError(f"kda_decode_fused: head_dim is {head_dim}, state has shape {list(state.shape)}")
    if out is None:
        out = torch.empty((*qkv.shape[:2], *state.shape[1:3]), dtype=qkv.dtype, device=qkv.device)
    torch.ops.kimi_native.kda_decode_fused(
        qkv,
        conv_weight,
        conv_state,
        g,
        beta,
        state,
        slots,
        A_log,
        dt_bias,
        num_commit,
        norm_gate,
        norm_weight,
        num_heads,
        gate_number(gate),
        lower_bound,
        head_dim**-0.5 if scale is None else scale,
        use_qk_l2norm,
        use_beta_sigmoid,
        norm_eps,
        out,
    )
    return out


@torch.library.register_fake("kimi_native::kda_decode")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    num_commit: Tensor | None,
    gate: int,
    lower_bound: float,
    scale: float,
    use_qk_l2norm: bool,
    use_beta_sigmoid: bool,
    out: Tensor,
) -> None:
    return None


@torch.library.register_fake("kimi_native::kda_decode_fused")
def _(
    qkv: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    num_commit: Tensor | None,
    norm_gate: Tensor | None,
    norm_weight: Tensor | None,
    num_heads: int,
    gate: int,
    lower_bound: float,
    scale: float,
    use_qk_l2norm: bool,
    use_beta_sigmoid: bool,
    norm_eps: float,
    out: Tensor,
) -> None:
    return None
