"""Kimi Delta Attention over packed sequences, with the recurrent state in a pool of slots."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KdaGate = Literal["softplus", "bounded", "log_decay"]

_GATES: dict[str, int] = {"softplus": 0, "bounded": 1, "log_decay": 2}


def gate_number(gate: str) -> int:
    """The operator's number of a gate form; ValueError names the possible ones."""
    if gate not in _GATES:
        raise ValueError(f"gate must be one of {', '.join(_GATES)}, got {gate!r}")
    return _GATES[gate]


def kda_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    *,
    gate: KdaGate = "softplus",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    use_beta_sigmoid: bool = True,
    has_initial_state: Tensor | None = None,
    snapshot_slots: Tensor | None = None,
    out: Tensor | None = None,
    max_seqlen: int = 0,
) -> Tensor:
    """Kimi Delta Attention of T packed tokens of N sequences; each continues from, and leaves its state in, its slot.

    Per value head, with the state ``S`` of shape ``[V, K]`` in fp32 and ``decay = exp(log_decay)`` per key channel::

        S = S * decay                 # first the decay
        u = beta * (v - S k)          # delta against the decayed state
        S = S + outer(u, k)
        o = S q                       # output from the updated state

    Value head ``hv`` uses q/k head ``hv // (HV // H)``.

    Args:
        q, k: ``[T, H, K]``, float32, bfloat16 or (on a GPU) float16; any strides between tokens and heads, contiguous in the
            last dimension.
        v: ``[T, HV, V]``, the dtype of ``q``. HV is a multiple of H; K and V are multiples of 16 from 16 to 256.
        g: ``[T, HV, K]``, raw gate, the dtype of ``q`` or float32; see ``gate``.
        beta: ``[T, HV]``, the dtype of ``q`` or float32: a logit, or the step itself without ``use_beta_sigmoid``.
        state: ``[S, HV, V, K]`` float32, or bfloat16 with inputs of 16 bits (docs/kda.md: what that costs); each slot
            contiguous. Updated in place.
        slots: ``[N]`` int32, the slot of each sequence. -1: the sequence's output rows are zeroed, nothing else happens.
            Two sequences must not share a slot.
        cu_seqlens: ``[N + 1]`` int32, where sequences begin and end among the tokens. Empty sequences are legal and
            leave their slot alone; tokens outside of all sequences are neither read nor written.
        gate: form of the log-decay (natural logarithm, at most 0). ``"softplus"``: ``-exp(A_log) softplus(g + dt_bias)``,
            unbounded (the released Kimi-Linear). ``"bounded"``: ``lower_bound * sigmoid(exp(A_log) (g + dt_bias))``.
            ``"log_decay"``: ``g`` itself.
        A_log: ``[HV]`` float32; required by ``"softplus"``, taken as 0 when None with ``"bounded"``.
        dt_bias: ``[HV, K]`` float32; None is 0.
        lower_bound: of the bounded gate, negative.
        scale: factor on q; ``K ** -0.5`` by default.
        use_qk_l2norm: divide q and k by ``sqrt(sum(x^2) + 1e-6)`` per head.
        use_beta_sigmoid: ``beta`` holds logits.
        has_initial_state: ``[N]`` bool; false takes the state as zero, whatever the slot holds. All true by default.
        snapshot_slots: ``[N, M]`` int32; ``[n, m]`` is the slot that gets a copy of sequence n's state after its first
            ``(m + 1) * 64`` tokens of this call, if it has that many. -1: none.
        out: where to write. A new tensor by default.
        max_seqlen: length of the longest sequence of this call in tokens, for callers that know it on the host; 0: not known.
            A hint, on which only speed may depend: the result has the same bits whatever it says, right or wrong.

    Returns:
        ``out``, ``[T, HV, V]`` in the dtype of ``q``; fp32 inside, one rounding at the end. On a GPU 16-bit inputs with
        K = V = 64 or 128 take tensor cores with operands of fp16: relative error of the output 4e-4 to 8e-4 before its own
        rounding, of the state up to 7e-4 (docs/kda.md).

    Raises:
        RuntimeError: shapes, dtypes, devices or options do not agree or are not supported, or ``max_seqlen`` is negative; the text
            names the culprit.
        ValueError: an unknown ``gate``.

    A sequence's result is the same bits whatever its neighbours. On a CPU also for any number of threads and any way to
    cut it into calls, down to one-token calls of :func:`kda_decode`; on a GPU for every cut after a multiple of 64 tokens.
    Source: Kimi Linear, arXiv:2510.26692.
    """
    if out is None:
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    torch.ops.kimi_native.kda_prefill(
        q,
        k,
        v,
        g,
        beta,
        state,
        slots,
        cu_seqlens,
        A_log,
        dt_bias,
        has_initial_state,
        snapshot_slots,
        gate_number(gate),
        lower_bound,
        k.shape[-1] ** -0.5 if scale is None else scale,
        use_qk_l2norm,
        use_beta_sigmoid,
        out,
        max_seqlen,
    )
    return out


@torch.library.register_fake("kimi_native::kda_prefill")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    has_initial_state: Tensor | None,
    snapshot_slots: Tensor | None,
    gate: int,
    lower_bound: float,
    scale: float,
    use_qk_l2norm: bool,
    use_beta_sigmoid: bool,
    out: Tensor,
    max_seqlen: int = 0,
) -> None:
    return None
