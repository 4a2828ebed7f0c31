"""`chunk_kda`, `fused_recurrent_kda` and `fused_recurrent_kda_fwd` with the arguments and results of fla-core 0.6.0, for inference.

Interface: flash-linear-attention, MIT, https://github.com/fla-org/flash-linear-attention. What these share, beside the text of each:

* q, k ``[B, T, H, K]``, v ``[B, T, HV, V]``, g ``[B, T, HV, K]``, beta ``[B, T, HV]``: float32, bfloat16, float16 (float64 is computed in
  float32, as fla does), any strides. K and V up to 256; multiples of 16 are taken as they are, others are padded with zeros.
* Output ``[B, T, HV, V]``. States are float32: ``[N, HV, K, V]``, or, without a copy, ``[N, HV, V, K]`` with ``state_v_first``.
* The log-decay is ``g`` itself (at most 0), or with ``use_gate_in_kernel`` ``-exp(A_log) softplus(g + dt_bias)``, or with ``lower_bound``
  ``lower_bound * sigmoid(exp(A_log) (g + dt_bias))``.
* An argument that contradicts another raises ValueError, one that is unknown TypeError, one that we do not offer NotImplementedError.
  The text names it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from kimi_native.compat.fla.call import KdaCall
from kimi_native.compat.fla.run import run
from kimi_native.ops.kda_prefill import KdaGate

Parameters = ParamSpec("Parameters")


def computes(read: Callable[Parameters, KdaCall]) -> Callable[Parameters, Any]:
    """The function of fla that computes the call which `read` makes of its arguments (and `inspect.unwrap` gives back)."""

    @functools.wraps(read)
    def function(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Any:
        call = read(*args, **kwargs)
        if (reason := call.unsupported()) is not None:
            raise NotImplementedError(f"{call.function}: {reason}")
        return run(call)

    function.__annotations__ = {**read.__annotations__, "return": tuple}
    return function


def _gate(use_gate_in_kernel: bool, lower_bound: float | None) -> KdaGate:
    if not use_gate_in_kernel:
        return "log_decay"
    return "softplus" if lower_bound is None else "bounded"


def _take_v_first(function: str, state_v_first: bool, others: dict[str, Any]) -> bool:
    """The layout, by its name or by that which it had in older releases."""
    if "transpose_state_layout" not in others:
        return state_v_first
    if state_v_first:
        raise ValueError(f"{function}: state_v_first and transpose_state_layout are the same argument; give the first alone")
    warnings.warn("transpose_state_layout is deprecated: it is called state_v_first now", DeprecationWarning, stacklevel=4)
    return bool(others.pop("transpose_state_layout"))


def _refuse_unknown(function: str, others: dict[str, Any]) -> None:
    if others:
        raise TypeError(f"{function}: unknown arguments {', '.join(others)}")


@computes
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> KdaCall:
    """KDA of whole sequences, by `kda_prefill`. Returns (output, final state or None), and the states at the start of each chunk with
    ``return_intermediate_states``.

    Args:
        q, k, v, g, beta: see the module.
        scale: factor on q; ``K ** -0.5`` by default.
        initial_state: ``[N, HV, K, V]`` float32; zero by default. Not changed.
        output_final_state: whether to return the final states.
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel: q and k, g, beta are raw.
        allow_neg_eigval: the step is ``2 * sigmoid(beta)``; requires ``use_beta_sigmoid_in_kernel``.
        safe_gate: promises log-decays of at least -5. Ours need no such promise; a ``lower_bound`` outside of [-5, 0) is refused, as by
            fla.
        lower_bound: of the bounded gate.
        disable_recompute: concerns the backward pass; ignored.
        return_intermediate_states: also return ``[B, chunks, HV, K, V]`` in the dtype of q. With ``chunk_size`` 64 alone. With
            ``cu_seqlens`` B is 1 and the lengths are read from ``cu_seqlens_cpu``, or from the device, which synchronises.
        state_v_first: states have shape ``[N, HV, V, K]``.
        cu_seqlens: ``[N + 1]``, B = 1: the tokens of N sequences one after another. Output rows outside of them are undefined.
        cu_seqlens_cpu: the same on the CPU. Without it ``return_intermediate_states`` synchronises, and other calls may be slower:
            nothing else is told the length of the longest sequence.
        cp_context: context parallelism is refused.
        use_graph, max_num_seqs: every call of ours can be captured; only the length of ``cu_seqlens`` is checked.
        kwargs: ``A_log`` with HV elements, ``dt_bias`` with HV * K, ``chunk_size`` 32 or 64 (ignored: the result does not depend on it),
            and ``transpose_state_layout``, the old name of ``state_v_first``.

    Raises:
        NotImplementedError: gradients are needed, or something else that we do not offer; ValueError, TypeError: see the module.
    """
    state_v_first = _take_v_first("chunk_kda", state_v_first, kwargs)
    A_log, dt_bias, chunk_size = kwargs.pop("A_log", None), kwargs.pop("dt_bias", None), kwargs.pop("chunk_size", 64)
    _refuse_unknown("chunk_kda", kwargs)
    if chunk_size not in (32, 64):
        raise ValueError(f"chunk_kda: `chunk_size` must be either 32 or 64, got {chunk_size}")
    if initial_state is not None and initial_state.dtype != torch.float32:
        raise ValueError(f"chunk_kda: initial_state must be float32, got {initial_state.dtype}")
    if safe_gate and use_gate_in_kernel and not (lower_bound is not None and -5 <= lower_bound < 0):
        raise ValueError(f"chunk_kda: safe_gate with use_gate_in_kernel requires lower_bound in [-5, 0), got {lower_bound}")
    if use_graph and max_num_seqs is not None and cu_seqlens is not None and len(cu_seqlens) != max_num_seqs + 1:
        raise ValueError(f"chunk_kda: use_graph with max_num_seqs={max_num_seqs} requires as many sequences, got {len(cu_seqlens) - 1}")
    refused = None
    if cp_context is not None:
        refused = "cp_context: context parallelism is not supported"
    elif return_intermediate_states and chunk_size != 64:
        refused = f"return_intermediate_states is supported with chunk_size=64 alone, got {chunk_size}"
    return KdaCall(
        function="chunk_kda",
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        gate=_gate(use_gate_in_kernel, lower_bound),
        A_log=A_log if use_gate_in_kernel else None,
        dt_bias=dt_bias if use_gate_in_kernel else None,
        lower_bound=-5.0 if lower_bound is None else lower_bound,
        use_qk_l2norm=use_qk_l2norm_in_kernel,
        use_beta_sigmoid=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
        return_intermediate_states=return_intermediate_states,
        result_dtype=q.dtype,
        differentiable=True,
        refused=refused,
    )


@computes
def fused_recurrent_kda_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = True,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    out: Tensor | None = None,
    **kwargs: Any,
) -> KdaCall:
    """KDA for serving: states in place, in a pool by index. Returns (output, final state or None). No gradients, as in fla.

    Up to 8 tokens a sequence, or states by index, go by `kda_decode`; the rest by `kda_prefill`.

    Args:
        q, k, v, g, beta, A_log, dt_bias, scale, output_final_state, state_v_first, cu_seqlens, use_..., allow_neg_eigval, lower_bound: as
            in `chunk_kda`. Output rows outside of all sequences are zero.
        initial_state: ``[N, HV, K, V]``, any floating dtype; with ``ssm_state_indices`` a pool ``[rows, HV, K, V]``.
        inplace_final_state: write the final states there, and return it.
        ssm_state_indices: ``[N, M]``, or ``[N]`` for one token a sequence: the row of the pool for the state after each token. Negative:
            nothing is computed or written. V-first pools of float32 with M = 1 are worked on directly, others copied row by row.
        num_accepted_tokens: ``[N]``: sequence n starts from row ``[n, num_accepted_tokens[n] - 1]``; from the first by default.
        out: where to write.

    Raises:
        NotImplementedError, ValueError, TypeError: see the module. On a CPU also ValueError if a sequence has more than M tokens; on a
            GPU, where looking would synchronise, those tokens' rows are zero.
    """
    state_v_first = _take_v_first("fused_recurrent_kda_fwd", state_v_first, kwargs)
    _refuse_unknown("fused_recurrent_kda_fwd", kwargs)
    return KdaCall(
        function="fused_recurrent_kda_fwd",
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        gate=_gate(use_gate_in_kernel, lower_bound),
        A_log=A_log if use_gate_in_kernel else None,
        dt_bias=dt_bias if use_gate_in_kernel else None,
        lower_bound=-5.0 if lower_bound is None else lower_bound,
        use_qk_l2norm=use_qk_l2norm_in_kernel,
        use_beta_sigmoid=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        result_dtype=v.dtype,
        differentiable=False,
        recurrent=True,
        in_place=inplace_final_state,
        state_indices=ssm_state_indices,
        num_accepted_tokens=num_accepted_tokens,
        out=out,
    )


read_chunk_kda = inspect.unwrap(chunk_kda)
read_fused_recurrent_kda_fwd = inspect.unwrap(fused_recurrent_kda_fwd)


@computes
def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> KdaCall:
    """KDA token by token: `fused_recurrent_kda_fwd` with states of its own. Returns (output, final state or None).

    Args:
        q, k, v, g, beta, scale, initial_state, output_final_state, state_v_first, use_..., allow_neg_eigval, lower_bound: as in
            `chunk_kda`.
        A_log, dt_bias: with HV and HV * K elements.
        cu_seqlens: ``[N + 1]``, B = 1: the tokens of N sequences one after another. Output rows outside of them are zero.
        kwargs: ``transpose_state_layout``, the old name of ``state_v_first``.

    No gradients, as in fla: the results do not require any. Sequences of more than 8 tokens, and those given by ``cu_seqlens``, go by
    `kda_prefill`, whose error on a GPU is that of fp16 operands (docs/kda.md).
    """
    state_v_first = _take_v_first("fused_recurrent_kda", state_v_first, kwargs)
    _refuse_unknown("fused_recurrent_kda", kwargs)
    return read_fused_recurrent_kda_fwd(
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        initial_state,
        scale,
        output_final_state,
        False,
        state_v_first,
        cu_seqlens,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound,
    )
