"""Carries out a `KdaCall` by `kda_prefill` and `kda_decode`.

What differs between fla's functions and our operators is bridged here, exactly: other head sizes by channels of zeros, other dtypes in
fp32, the K-first layout of states by one transposed copy each way, `allow_neg_eigval` by making the step before the call.
Nothing reads device memory from the host, with the one exception that `intermediate_states` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_native.compat.fla.call import KdaCall
from kimi_native.ops.kda_decode import kda_decode
from kimi_native.ops.kda_prefill import kda_prefill

SNAPSHOT_TOKENS = 64  # kda_prefill's grid of snapshots, and fla's chunk
MAX_DECODE_TOKENS = 8

PerToken: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, g, beta


def run(call: KdaCall) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """What fla's function returns: the output, the final state (or None), and the intermediate states where they were asked for."""
    with torch.no_grad():
        if call.state_indices is not None:
            return _run_indexed(call)
        return _run_sequences(call)


@dataclass(frozen=True)
class Operands:
    """The tensors of a call as the operators take them: one dtype, head sizes padded, tokens still ``[B, T, ...]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    key_dim: int  # padded
    value_dim: int

    @staticmethod
    def of(call: KdaCall) -> Operands:
        dtype = _working_dtype(call)
        tensor_cores = call.q.is_cuda and dtype != torch.float32
        key_dim, value_dim = call.q.shape[3], call.v.shape[3]
        padded_key, padded_value = padded_sizes(key_dim, value_dim, tensor_cores)
        more_key = padded_key - key_dim
        beta, dt_bias = _side_input(call.beta, dtype), call.dt_bias
        if call.allow_neg_eigval:
            beta = 2 * beta.float().sigmoid()
        if dt_bias is not None:
            dt_bias = F.pad(dt_bias.float().reshape(-1, key_dim), (0, more_key)).contiguous()
        return Operands(
            q=_padded(call.q.to(dtype), more_key),
            k=_padded(call.k.to(dtype), more_key),
            v=_padded(call.v.to(dtype), padded_value - value_dim),
            g=_padded(_side_input(call.g, dtype), more_key),
            beta=beta,
            A_log=None if call.A_log is None else call.A_log.float().reshape(-1).contiguous(),
            dt_bias=dt_bias,
            key_dim=padded_key,
            value_dim=padded_value,
        )

    def tokens(self) -> PerToken:
        """q, k, v, g, beta as ``[B * T, ...]``: views where the strides allow it."""
        return (self.q.flatten(0, 1), self.k.flatten(0, 1), self.v.flatten(0, 1), self.g.flatten(0, 1), self.beta.flatten(0, 1))

    def batches(self) -> PerToken:
        """q, k, v, g, beta as ``[B, T, ...]`` with evenly spaced tokens, as kda_decode wants them."""
        return (_even(self.q), _even(self.k), _even(self.v), _even(self.g), _even(self.beta))


def _even(tensor: Tensor) -> Tensor:
    is_even = tensor.shape[1] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    return tensor if is_even else tensor.contiguous()


def _options(call: KdaCall, x: Operands) -> dict[str, Any]:
    return {
        "gate": call.gate,
        "A_log": x.A_log,
        "dt_bias": x.dt_bias,
        "lower_bound": call.lower_bound,
        "scale": call.q.shape[3] ** -0.5 if call.scale is None else call.scale,
        "use_qk_l2norm": call.use_qk_l2norm,
        "use_beta_sigmoid": call.use_beta_sigmoid and not call.allow_neg_eigval,
    }


def _working_dtype(call: KdaCall) -> torch.dtype:
    """That of q, k and v if the operators have it on this device, else float32, as which fla's kernels compute everything."""
    dtype = call.q.dtype
    native = (torch.float32, torch.bfloat16, torch.float16) if call.q.is_cuda else (torch.float32, torch.bfloat16)
    return dtype if dtype in native and call.k.dtype == dtype and call.v.dtype == dtype else torch.float32


def _side_input(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """g and beta may be float32 or like q."""
    return tensor if tensor.dtype in (dtype, torch.float32) else tensor.float()


def _padded(tensor: Tensor, channels: int) -> Tensor:
    if channels:
        return F.pad(tensor, (0, channels))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def padded_sizes(key_dim: int, value_dim: int, tensor_cores: bool) -> tuple[int, int]:
    """(key_dim, value_dim) that the operators take. Channels of zeros change nothing: they add 0 to every sum, and 0 to the state.

    Multiples of 16 stay as they are. Others are copied in any case; then, in 16 bits on a GPU, up to a size that kda_prefill has
    tensor cores for.
    """
    if key_dim % 16 == 0 and value_dim % 16 == 0:
        return key_dim, value_dim
    if tensor_cores and max(key_dim, value_dim) <= 128:
        size = 64 if max(key_dim, value_dim) <= 64 else 128
        return size, size
    return -(-key_dim // 16) * 16, -(-value_dim // 16) * 16


# ---- states -----------------------------------------------------------------------------------------------------------------


def _is_our_layout(call: KdaCall, x: Operands, state: Tensor) -> bool:
    """Whether the operators can work on `state` as it is: V-first, float32, each row contiguous, nothing to pad."""
    inner = (call.v.shape[2], x.value_dim, x.key_dim)
    fits = call.state_v_first and state.dtype == torch.float32 and tuple(state.shape[1:]) == inner
    return fits and (len(state) == 0 or state[0].is_contiguous())


def _to_our_layout(call: KdaCall, x: Operands, state: Tensor, rows: int) -> Tensor:
    """``[rows, HV, V, K]`` float32 that begins with a copy of states in the caller's layout."""
    shape = (rows, call.v.shape[2], x.value_dim, x.key_dim)
    value_dim, key_dim = call.v.shape[3], call.q.shape[3]
    padded = (value_dim, key_dim) != shape[2:]
    ours = (torch.zeros if padded else torch.empty)(shape, dtype=torch.float32, device=call.q.device)
    ours[: len(state), :, :value_dim, :key_dim].copy_(state if call.state_v_first else state.transpose(-1, -2))
    return ours


def _to_callers_layout(call: KdaCall, ours: Tensor) -> Tensor:
    """States in the caller's layout, contiguous; a view where that is ours."""
    state = ours[..., : call.v.shape[3], : call.q.shape[3]]
    return (state if call.state_v_first else state.transpose(-1, -2)).contiguous()


# ---- outputs ----------------------------------------------------------------------------------------------------------------


def _output_buffer(call: KdaCall, x: Operands) -> Tensor:
    """``[B, T, HV, V]`` for the operators to write; the caller's own where it fits."""
    shape = (*call.v.shape[:3], x.value_dim)
    if call.out is not None and call.out.dtype == x.v.dtype and call.out.shape == shape and call.out.is_contiguous():
        return call.out
    rows_outside = call.recurrent and call.cu_seqlens is not None
    return (torch.zeros if rows_outside else torch.empty)(shape, dtype=x.v.dtype, device=x.v.device)


def _output(call: KdaCall, buffer: Tensor) -> Tensor:
    if buffer is call.out:
        return buffer
    out = buffer[..., : call.v.shape[3]].to(call.result_dtype)
    return out.contiguous() if call.out is None else call.out.copy_(out)


# ---- sequences with a state each -----------------------------------------------------------------------------------------------


def _run_sequences(call: KdaCall) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    x, num_sequences, device = Operands.of(call), call.num_sequences, call.q.device
    batch, tokens = call.q.shape[:2]
    snapshots = Snapshots.of(call) if call.return_intermediate_states else None
    pool, known = _starting_pool(call, x, num_sequences + (0 if snapshots is None else snapshots.count))
    first_states = pool[:num_sequences].to(call.q.dtype, copy=True) if snapshots is not None else None
    slots = torch.arange(num_sequences, dtype=torch.int32, device=device)
    buffer = _output_buffer(call, x)
    if call.recurrent and call.cu_seqlens is None and 1 <= tokens <= MAX_DECODE_TOKENS:
        kda_decode(*x.batches(), state=pool, slots=slots, out=buffer, **_options(call, x))
    else:
        kda_prefill(
            *x.tokens(),
            state=pool,
            slots=slots,
            cu_seqlens=_boundaries(call),
            has_initial_state=None if known else torch.zeros(num_sequences, dtype=torch.bool, device=device),
            snapshot_slots=None if snapshots is None else snapshots.slots(num_sequences, device),
            out=buffer.flatten(0, 1),
            max_seqlen=_max_seqlen(call) if snapshots is None else snapshots.max_seqlen,
            **_options(call, x),
        )
    final = None
    if call.in_place:
        final = call.initial_state
        if final is not None and pool is not final:
            final.copy_(_to_callers_layout(call, pool))
    elif call.output_final_state:
        final = _to_callers_layout(call, pool[:num_sequences])
    if snapshots is None or first_states is None:
        return _output(call, buffer), final
    return _output(call, buffer), final, snapshots.gather(call, first_states, pool)


def _boundaries(call: KdaCall) -> Tensor:
    """``cu_seqlens`` of the flattened tokens, int32."""
    if call.cu_seqlens is not None:
        return call.cu_seqlens.to(device=call.q.device, dtype=torch.int32).contiguous()
    batch, tokens = call.q.shape[:2]
    return torch.arange(batch + 1, dtype=torch.int32, device=call.q.device) * tokens


def _bounds(call: KdaCall) -> Tensor | None:
    """``cu_seqlens``, on the CPU if the caller gave it there."""
    return call.cu_seqlens if call.cu_seqlens is None or call.cu_seqlens_cpu is None else call.cu_seqlens_cpu


def _lengths(bounds: Tensor) -> list[int]:
    values = bounds.tolist()
    return [end - begin for begin, end in zip(values, values[1:])]


def _max_seqlen(call: KdaCall) -> int:
    """The length of the longest sequence; 0, not known, where looking would synchronise or break a trace."""
    bounds = _bounds(call)
    if bounds is None:
        return call.q.shape[1]
    if bounds.device.type != "cpu" or torch.compiler.is_compiling():
        return 0
    return max([0, *_lengths(bounds)])


def _starting_pool(call: KdaCall, x: Operands, rows: int) -> tuple[Tensor, bool]:
    """(pool of `rows` states of which the first hold the initial ones, whether they do: else the operator takes them as zero)."""
    if call.initial_state is not None:
        if call.in_place and _is_our_layout(call, x, call.initial_state):
            return call.initial_state, True
        return _to_our_layout(call, x, call.initial_state, rows), True
    tokens = call.q.shape[1]
    shape = (rows, call.v.shape[2], x.value_dim, x.key_dim)
    may_be_empty = call.cu_seqlens is not None or tokens == 0  # an empty sequence leaves its row alone
    by_decode = call.recurrent and tokens <= MAX_DECODE_TOKENS  # which knows no fresh rows
    if call.return_intermediate_states or by_decode or (call.output_final_state and may_be_empty):
        return torch.zeros(shape, dtype=torch.float32, device=call.q.device), True
    return torch.empty(shape, dtype=torch.float32, device=call.q.device), False


@dataclass(frozen=True)
class Snapshots:
    """Intermediate states of ``return_intermediate_states``: that at the start of each chunk of 64 tokens.

    The first chunk of a sequence starts with its initial state; the others are kda_prefill's snapshots, in rows of the pool behind
    those of the sequences.
    """

    chunks: list[int]  # of each sequence
    max_seqlen: int  # tokens of the longest one

    @staticmethod
    def of(call: KdaCall) -> Snapshots:
        """The result's size depends on the lengths, so they are read here: a synchronisation if they are on a GPU alone."""
        bounds = _bounds(call)
        lengths = [call.q.shape[1]] * call.q.shape[0] if bounds is None else _lengths(bounds)
        return Snapshots([-(-length // SNAPSHOT_TOKENS) for length in lengths], max([0, *lengths]))

    @property
    def count(self) -> int:
        return sum(max(chunks - 1, 0) for chunks in self.chunks)

    def slots(self, num_sequences: int, device: torch.device) -> Tensor:
        """``[N, M]`` for kda_prefill; its snapshot m is taken after (m + 1) * 64 tokens."""
        width, first = max([chunks - 1 for chunks in self.chunks if chunks] or [0]), num_sequences
        rows = []
        for chunks in self.chunks:
            own = max(chunks - 1, 0)
            rows.append([*range(first, first + own), *[-1] * (width - own)])
            first += own
        return torch.tensor(rows, dtype=torch.int32).reshape(num_sequences, width).to(device, non_blocking=True)

    def gather(self, call: KdaCall, first_states: Tensor, pool: Tensor) -> Tensor:
        """``[B, chunks, HV, K, V]`` in the caller's layout and the dtype of q; B = 1 with ``cu_seqlens``."""
        num_sequences = len(self.chunks)
        later = pool[num_sequences:].to(call.q.dtype)
        parts, taken = [later[:0]], 0
        for n, chunks in enumerate(self.chunks):
            if chunks:
                parts += [first_states[n : n + 1], later[taken : taken + chunks - 1]]
                taken += chunks - 1
        states = _to_callers_layout(call, torch.cat(parts))
        return states.unflatten(0, (call.q.shape[0], -1)) if call.q.shape[0] and len(states) else states[None]


# ---- states in a pool, by index ----------------------------------------------------------------------------------------------


def _run_indexed(call: KdaCall) -> tuple[Tensor, Tensor]:
    """Each new token's state goes to its own row of the pool, as speculative decoding wants it; so the tokens are steps."""
    assert call.initial_state is not None and call.state_indices is not None
    x, pool = Operands.of(call), call.initial_state
    indices = call.state_indices.to(device=call.q.device, dtype=torch.int64).reshape(call.num_sequences, -1)
    begins, lengths, steps = _steps(call, indices)
    values = x.tokens()
    result = _output_buffer(call, x)
    flat = result.flatten(0, 1)
    if call.num_accepted_tokens is None:
        first = indices[:, 0]
    else:
        first = indices.gather(1, (call.num_accepted_tokens.to(indices)[:, None] - 1).clamp(min=0))[:, 0]
    direct = indices.shape[1] == 1 and _is_our_layout(call, x, pool)
    states = pool if direct else _to_our_layout(call, x, pool.index_select(0, first.clamp(min=0)), len(first))
    order = torch.arange(len(indices), device=indices.device)
    for step in range(steps):
        live = (lengths > step) & (indices[:, step] >= 0)
        rows = (begins + step).clamp(max=len(flat) - 1)
        slots = torch.where(live, indices[:, step] if direct else order, -1).to(torch.int32)
        q, k, v, g, beta = (value.index_select(0, rows)[:, None] for value in values)
        out = kda_decode(q, k, v, g, beta, state=states, slots=slots, **_options(call, x))
        _write_rows(flat, rows, out[:, 0], live)
        if not direct:
            _write_rows(pool, indices[:, step].clamp(min=0), _to_callers_layout(call, states).to(pool.dtype), live)
    return _output(call, result), pool


def _steps(call: KdaCall, indices: Tensor) -> tuple[Tensor, Tensor, int]:
    """(first token of each sequence, number of its tokens, the most that any can have)."""
    batch, tokens = call.q.shape[:2]
    if call.cu_seqlens is None:
        begins = torch.arange(batch, device=indices.device) * tokens
        return begins, torch.full_like(begins, tokens), tokens if batch else 0
    bounds = call.cu_seqlens.to(device=indices.device, dtype=torch.int64)
    lengths = bounds[1:] - bounds[:-1]
    if not lengths.is_cuda and (lengths > indices.shape[1]).any():  # where looking costs no synchronisation
        raise ValueError(f"{call.function}: ssm_state_indices has {indices.shape[1]} rows a sequence, one has {lengths.max()} tokens")
    return bounds[:-1], lengths, min(tokens, indices.shape[1]) if len(lengths) else 0


def _write_rows(target: Tensor, rows: Tensor, values: Tensor, live: Tensor) -> None:
    """``target[rows[i]] = values[i]`` where `live[i]`, without reading `live` from the host.

    The others write again what the first live one writes, or, if there is none, what is there.
    """
    source = torch.where(live, torch.arange(len(live), device=live.device), live.int().argmax())
    rows = rows.index_select(0, source)
    values = torch.where(live.any(), values.index_select(0, source), target.index_select(0, rows))
    target.index_copy_(0, rows, values)
