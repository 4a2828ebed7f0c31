"""Checkpoint names, the slices that they fill on this rank, and strict loading.

One table says everything, as in kimi_native/weights.py: a tensor under its hub name, its shape, the part of it that this rank holds, and
the slice of our parameter that this part fills. Names as transformers has them are turned into hub names first (names.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kimi_native.compat.vllm.kda import KimiDeltaAttention
from kimi_native.compat.vllm.mla import MultiHeadLatentAttention
from kimi_native.compat.vllm.moe import Mlp, MoE
from kimi_native.compat.vllm.names import hub_tensors
from kimi_native.compat.vllm.shard import Shard
from kimi_native.config import KimiLinearConfig
from kimi_native.weights import CheckpointError

WHOLE = slice(None)


class Place(NamedTuple):
    """Where a tensor of the checkpoint goes. `module` None: to another rank."""

    shape: tuple[int, ...]  # in the checkpoint
    module: nn.Module | None
    parameter: str = ""
    index: Any = ...  # the slice of the parameter
    source: Any = WHOLE  # the part of the checkpoint's tensor


def attention_places(a: nn.Module, prefix: str, c: KimiLinearConfig) -> Iterator[tuple[str, Place]]:
    """Of one attention layer."""
    if isinstance(a, KimiDeltaAttention):
        yield from _kda_places(a, prefix, c)
    else:
        assert isinstance(a, MultiHeadLatentAttention)
        yield from _mla_places(a, prefix, c)


def _kda_places(a: KimiDeltaAttention, prefix: str, c: KimiLinearConfig) -> Iterator[tuple[str, Place]]:
    hidden, rank, heads, taps = c.hidden_size, c.kda_head_dim, c.kda_num_heads, c.short_conv_kernel_size
    mine = a.shard.part(c.kda_dim)  # of channels; heads are not cut
    start = 0
    for name, rows, part in [
        ("q_proj", c.kda_dim, mine), ("k_proj", c.kda_dim, mine), ("v_proj", c.kda_dim, mine),
        ("f_a_proj", rank, WHOLE), ("g_a_proj", rank, WHOLE), ("b_proj", heads, a.shard.part(heads)),
    ]:  # fmt: skip
        held = len(range(*part.indices(rows)))
        yield f"{prefix}{name}.weight", Place((rows, hidden), a, "in_proj", slice(start, start + held), part)
        start += held
    for n, name in enumerate("qkv"):
        channels = slice(n * a.width, (n + 1) * a.width)
        yield f"{prefix}{name}_conv1d.weight", Place((c.kda_dim, 1, taps), a, "conv", channels, mine)
    yield prefix + "f_b_proj.weight", Place((c.kda_dim, rank), a, "gates_b", 0, mine)
    yield prefix + "g_b_proj.weight", Place((c.kda_dim, rank), a, "gates_b", 1, mine)
    yield prefix + "A_log", Place((1, 1, heads, 1), a, "A_log", ..., (0, 0, a.shard.part(heads)))
    yield prefix + "dt_bias", Place((c.kda_dim,), a, "dt_bias", ..., mine)
    yield prefix + "o_norm.weight", Place((c.kda_head_dim,), a, "o_norm")
    yield prefix + "o_proj.weight", Place((hidden, c.kda_dim), a, "o_proj", ..., (WHOLE, mine))


def _mla_places(a: MultiHeadLatentAttention, prefix: str, c: KimiLinearConfig) -> Iterator[tuple[str, Place]]:
    hidden, heads = c.hidden_size, c.num_attention_heads
    kv_dim = c.qk_nope_head_dim + c.v_head_dim
    q_rows = a.heads * c.qk_head_dim

    def mine(dim: int) -> slice:
        part = a.shard.part(heads)
        return slice(part.start * dim, part.stop * dim)

    yield prefix + "q_proj.weight", Place((heads * c.qk_head_dim, hidden), a, "in_proj", slice(0, q_rows), mine(c.qk_head_dim))
    yield prefix + "kv_a_proj_with_mqa.weight", Place((c.latent_dim, hidden), a, "in_proj", slice(q_rows, None))
    yield prefix + "kv_a_layernorm.weight", Place((c.kv_lora_rank,), a, "kv_a_norm")
    yield prefix + "kv_b_proj.weight", Place((heads * kv_dim, c.kv_lora_rank), a, "kv_b", ..., mine(kv_dim))
    yield prefix + "o_proj.weight", Place((hidden, heads * c.v_head_dim), a, "o_proj", ..., (WHOLE, mine(c.v_head_dim)))


def ffn_places(f: nn.Module, prefix: str, c: KimiLinearConfig) -> Iterator[tuple[str, Place]]:
    """Of one layer's MLP or experts; `prefix` is the layer's."""
    if isinstance(f, Mlp):
        yield from _swiglu_places(f, prefix + "mlp.", c.intermediate_size, c.hidden_size, f.shard, "gate_up", "down")
        return
    assert isinstance(f, MoE)
    prefix += "block_sparse_moe."
    inner, hidden = c.moe_intermediate_size, c.hidden_size
    yield prefix + "gate.weight", Place((c.num_experts, hidden), f, "router")
    yield prefix + "gate.e_score_correction_bias", Place((c.num_experts,), f, "router_bias")
    part, held = f.inner_shard.part(inner), f.inner_shard.count(inner)
    for e in range(c.num_experts):
        here = f if f.local_experts.start <= e < f.local_experts.stop else None
        at = e - f.local_experts.start
        yield f"{prefix}experts.{e}.w1.weight", Place((inner, hidden), here, "w13", (at, slice(0, held)), part)
        yield f"{prefix}experts.{e}.w3.weight", Place((inner, hidden), here, "w13", (at, slice(held, None)), part)
        yield f"{prefix}experts.{e}.w2.weight", Place((hidden, inner), here, "w2", at, (WHOLE, part))
    if c.num_shared_experts:
        shared = inner * c.num_shared_experts
        yield from _swiglu_places(f, prefix + "shared_experts.", shared, hidden, f.shard, "shared_w13", "shared_w2")


def _swiglu_places(
    f: nn.Module, prefix: str, inner: int, hidden: int, shard: Shard, gate_up: str, down: str
) -> Iterator[tuple[str, Place]]:
    part, held = shard.part(inner), shard.count(inner)
    yield prefix + "gate_proj.weight", Place((inner, hidden), f, gate_up, slice(0, held), part)
    yield prefix + "up_proj.weight", Place((inner, hidden), f, gate_up, slice(held, None), part)
    yield prefix + "down_proj.weight", Place((hidden, inner), f, down, ..., (WHOLE, part))


# ---- loading ----------------------------------------------------------------------------------------------------------------


def load(
    weights: Iterable[tuple[str, Tensor]], places: dict[str, Place], config: KimiLinearConfig, done: set[str], skip: frozenset[str]
) -> None:
    """Copies every tensor to its place and adds its hub name to `done`. `skip`: prefixes of names that other pipeline ranks hold.

    Raises CheckpointError that names the tensor: unexpected, wrongly shaped, or not a plain floating point tensor.
    """
    for name, tensor in weights:
        for hub_name, part in hub_tensors(name, tensor, config):
            place = places.get(hub_name)
            if place is not None:
                _copy(name, part, place)
                done.add(hub_name)
            elif not hub_name.startswith(tuple(skip)):
                raise CheckpointError(f"unexpected tensor {name!r}: this model has no such parameter")


def _copy(name: str, tensor: Tensor, place: Place) -> None:
    if math.prod(tensor.shape) != math.prod(place.shape) or [n for n in tensor.shape if n > 1] != [n for n in place.shape if n > 1]:
        raise CheckpointError(f"tensor {name!r} has shape {list(tensor.shape)}; this model needs {list(place.shape)}")
    if not tensor.dtype.is_floating_point or tensor.element_size() < 2:
        raise CheckpointError(f"tensor {name!r} is {tensor.dtype}: quantised checkpoints are not supported")
    if place.module is None:
        return
    parameter = getattr(place.module, place.parameter)
    with torch.no_grad():
        target = parameter.data[place.index]
        target.copy_(tensor.view(place.shape)[place.source].reshape(target.shape))
