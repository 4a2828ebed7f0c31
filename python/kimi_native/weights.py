"""Weights: the names of the hub's checkpoint, where each tensor goes, and streaming it there.

One table, `_rows`, says everything: a checkpoint tensor, its shape, and the slice of our (fused or stacked) parameter that it
fills. Loading walks the shards one at a time and copies each tensor to its slice, so that the host never holds more than the
model and one shard. No pickle is opened and no code of a checkpoint is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kimi_native.config import KimiLinearConfig


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the text names the file or the tensor."""


class TensorSpec(NamedTuple):
    """A tensor of the hub's checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    group: str

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


# ---- our parameters -------------------------------------------------------------------------------------------------------
# P = kda heads x head dim, R = rank of the two gates (the head dim), D = hidden size, L = kv_lora_rank


@dataclass
class KdaWeights:
    in_proj: Tensor  # [3P + 2R + heads, D]: q, k, v, f_a, g_a, b
    conv: Tensor  # [3P, 4]: q, k, v; tap 3 multiplies the current token
    gates_b: Tensor  # [2, P, R]: forget gate, output gate
    A_log: Tensor  # [heads] float32
    dt_bias: Tensor  # [heads, head_dim] float32
    o_norm: Tensor  # [head_dim]
    o_proj: Tensor  # [D, P]


@dataclass
class MlaWeights:
    in_proj: Tensor  # [heads * (nope + rope) + L + rope, D]: q, kv_a
    kv_a_norm: Tensor  # [L]
    kv_b: Tensor  # [heads, nope + v, L]: per head W_UK, then W_UV
    o_proj: Tensor  # [D, heads * v]


@dataclass
class MlpWeights:
    gate_up: Tensor  # [2I, D]
    down: Tensor  # [D, I]


@dataclass
class MoeWeights:
    router: Tensor  # [E, D]
    router_bias: Tensor  # [E] float32
    w13: Tensor  # [E, 2I, D]: gate rows, then up rows
    w2: Tensor  # [E, D, I]
    shared_w13: Tensor | None  # [2 Is, D]
    shared_w2: Tensor | None  # [D, Is]


@dataclass
class LayerWeights:
    attention_norm: Tensor  # [D]
    ffn_norm: Tensor  # [D]
    attention: KdaWeights | MlaWeights
    ffn: MlpWeights | MoeWeights


@dataclass
class Weights:
    embedding: Tensor  # [vocab, D]
    layers: list[LayerWeights]
    norm: Tensor  # [D]
    lm_head: Tensor  # [vocab, D]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in _tensors(self))


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, list):
        for item in part:
            yield from _tensors(item)
    elif part is not None:
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))


def allocate(config: KimiLinearConfig, device: torch.device | str, dtype: torch.dtype) -> Weights:
    """Uninitialised parameters. `device="meta"` gives the shapes alone."""
    c = config
    hidden, p, rank = c.hidden_size, c.kda_dim, c.kda_head_dim

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def attention(layer: int) -> KdaWeights | MlaWeights:
        if layer in c.full_attn_layers:
            return MlaWeights(
                in_proj=empty(c.num_attention_heads * c.qk_head_dim + c.latent_dim, hidden),
                kv_a_norm=empty(c.kv_lora_rank),
                kv_b=empty(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank),
                o_proj=empty(hidden, c.num_attention_heads * c.v_head_dim),
            )
        return KdaWeights(
            in_proj=empty(3 * p + 2 * rank + c.kda_num_heads, hidden),
            conv=empty(3 * p, c.short_conv_kernel_size),
            gates_b=empty(2, p, rank),
            A_log=empty(c.kda_num_heads, dtype=torch.float32),
            dt_bias=empty(c.kda_num_heads, c.kda_head_dim, dtype=torch.float32),
            o_norm=empty(c.kda_head_dim),
            o_proj=empty(hidden, p),
        )

    def ffn(layer: int) -> MlpWeights | MoeWeights:
        if not c.is_moe(layer):
            return MlpWeights(gate_up=empty(2 * c.intermediate_size, hidden), down=empty(hidden, c.intermediate_size))
        inner, shared = c.moe_intermediate_size, c.moe_intermediate_size * c.num_shared_experts
        return MoeWeights(
            router=empty(c.num_experts, hidden),
            router_bias=empty(c.num_experts, dtype=torch.float32),
            w13=empty(c.num_experts, 2 * inner, hidden),
            w2=empty(c.num_experts, hidden, inner),
            shared_w13=empty(2 * shared, hidden) if shared else None,
            shared_w2=empty(hidden, shared) if shared else None,
        )

    return Weights(
        embedding=empty(c.vocab_size, hidden),
        layers=[LayerWeights(empty(hidden), empty(hidden), attention(i), ffn(i)) for i in range(c.num_hidden_layers)],
        norm=empty(hidden),
        lm_head=empty(c.vocab_size, hidden),
    )


# ---- the table -------------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    name: str  # in the checkpoint
    shape: tuple[int, ...]  # in the checkpoint
    group: str
    part: Any  # one of the dataclasses above
    parameter: str  # its field
    index: Any = ...  # the slice of that field which the tensor fills (after reshaping to the slice's shape)
    float32: bool = False  # kept in float32 by the checkpoint


def _rows(w: Weights, config: KimiLinearConfig) -> Iterator[_Row]:
    c, hidden = config, config.hidden_size
    yield _Row("model.embed_tokens.weight", (c.vocab_size, hidden), "embedding", w, "embedding")
    for i, layer in enumerate(w.layers):
        prefix = f"model.layers.{i}."
        yield _Row(prefix + "input_layernorm.weight", (hidden,), "norms", layer, "attention_norm")
        yield _Row(prefix + "post_attention_layernorm.weight", (hidden,), "norms", layer, "ffn_norm")
        attention_rows = _kda_rows if isinstance(layer.attention, KdaWeights) else _mla_rows
        yield from attention_rows(layer.attention, prefix + "self_attn.", c)  # type: ignore[arg-type]
        if isinstance(layer.ffn, MlpWeights):
            yield from _mlp_rows(layer.ffn, prefix + "mlp.", c.intermediate_size, hidden, "dense MLP", "gate_up", "down")
        else:
            yield from _moe_rows(layer.ffn, prefix + "block_sparse_moe.", c)
    yield _Row("model.norm.weight", (hidden,), "norms", w, "norm")
    yield _Row("lm_head.weight", (c.vocab_size, hidden), "lm_head", w, "lm_head")


def _kda_rows(a: KdaWeights, prefix: str, c: KimiLinearConfig) -> Iterator[_Row]:
    hidden, p, rank, heads = c.hidden_size, c.kda_dim, c.kda_head_dim, c.kda_num_heads
    start = 0
    for name, rows in [("q_proj", p), ("k_proj", p), ("v_proj", p), ("f_a_proj", rank), ("g_a_proj", rank), ("b_proj", heads)]:
        yield _Row(f"{prefix}{name}.weight", (rows, hidden), "KDA", a, "in_proj", slice(start, start + rows))
        start += rows
    taps = c.short_conv_kernel_size
    for n, name in enumerate("qkv"):
        yield _Row(f"{prefix}{name}_conv1d.weight", (p, 1, taps), "KDA", a, "conv", slice(n * p, (n + 1) * p))
    yield _Row(prefix + "f_b_proj.weight", (p, rank), "KDA", a, "gates_b", 0)
    yield _Row(prefix + "g_b_proj.weight", (p, rank), "KDA", a, "gates_b", 1)
    yield _Row(prefix + "A_log", (1, 1, heads, 1), "KDA", a, "A_log", float32=True)
    yield _Row(prefix + "dt_bias", (p,), "KDA", a, "dt_bias", float32=True)
    yield _Row(prefix + "o_norm.weight", (c.kda_head_dim,), "KDA", a, "o_norm")
    yield _Row(prefix + "o_proj.weight", (hidden, p), "KDA", a, "o_proj")


def _mla_rows(a: MlaWeights, prefix: str, c: KimiLinearConfig) -> Iterator[_Row]:
    hidden, heads = c.hidden_size, c.num_attention_heads
    q_rows, kv_rows = heads * c.qk_head_dim, heads * (c.qk_nope_head_dim + c.v_head_dim)
    yield _Row(prefix + "q_proj.weight", (q_rows, hidden), "MLA", a, "in_proj", slice(0, q_rows))
    yield _Row(prefix + "kv_a_proj_with_mqa.weight", (c.latent_dim, hidden), "MLA", a, "in_proj", slice(q_rows, None))
    yield _Row(prefix + "kv_a_layernorm.weight", (c.kv_lora_rank,), "MLA", a, "kv_a_norm")
    yield _Row(prefix + "kv_b_proj.weight", (kv_rows, c.kv_lora_rank), "MLA", a, "kv_b")
    yield _Row(prefix + "o_proj.weight", (hidden, heads * c.v_head_dim), "MLA", a, "o_proj")


def _mlp_rows(part: Any, prefix: str, inner: int, hidden: int, group: str, gate_up: str, down: str) -> Iterator[_Row]:
    yield _Row(prefix + "gate_proj.weight", (inner, hidden), group, part, gate_up, slice(0, inner))
    yield _Row(prefix + "up_proj.weight", (inner, hidden), group, part, gate_up, slice(inner, 2 * inner))
    yield _Row(prefix + "down_proj.weight", (hidden, inner), group, part, down)


def _moe_rows(f: MoeWeights, prefix: str, c: KimiLinearConfig) -> Iterator[_Row]:
    hidden, inner = c.hidden_size, c.moe_intermediate_size
    yield _Row(prefix + "gate.weight", (c.num_experts, hidden), "router", f, "router")
    yield _Row(prefix + "gate.e_score_correction_bias", (c.num_experts,), "router", f, "router_bias")
    for e in range(c.num_experts):
        yield _Row(f"{prefix}experts.{e}.w1.weight", (inner, hidden), "routed experts", f, "w13", (e, slice(0, inner)))
        yield _Row(f"{prefix}experts.{e}.w3.weight", (inner, hidden), "routed experts", f, "w13", (e, slice(inner, None)))
        yield _Row(f"{prefix}experts.{e}.w2.weight", (hidden, inner), "routed experts", f, "w2", e)
    if c.num_shared_experts:
        shared = inner * c.num_shared_experts
        yield from _mlp_rows(f, prefix + "shared_experts.", shared, hidden, "shared experts", "shared_w13", "shared_w2")


def places(weights: Weights, config: KimiLinearConfig) -> Iterator[tuple[str, TensorSpec, Tensor]]:
    """Every tensor of this model's checkpoint: its hub name, what the checkpoint holds, and the slice of our parameter it fills."""
    dtype = getattr(torch, config.dtype)
    for r in _rows(weights, config):
        yield r.name, TensorSpec(r.shape, torch.float32 if r.float32 else dtype, r.group), getattr(r.part, r.parameter)[r.index]


def checkpoint_tensors(config: KimiLinearConfig) -> dict[str, TensorSpec]:
    """Every tensor of this model's checkpoint under its hub name, with shape, dtype and group (20,493 at full size)."""
    shapes = allocate(config, "meta", getattr(torch, config.dtype))
    return {name: spec for name, spec, _ in places(shapes, config)}


# ---- loading ---------------------------------------------------------------------------------------------------------------


def load_weights(
    directory: str | Path,
    config: KimiLinearConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Streams a checkpoint's safetensors to their places on `device`.

    Args:
        directory: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.
        dtype: of the parameters (default: the config's); `A_log`, `dt_bias` and the router's bias stay float32.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises CheckpointError that names the tensor (missing, unexpected, wrong shape, not floating point) or the file (truncated,
    outside the directory, pickle only).
    """
    directory = Path(directory)
    dtype = dtype or getattr(torch, config.dtype)
    shards = _shards(directory)
    weights = allocate(config, device, dtype)
    rows = {r.name: r for r in _rows(weights, config)}
    total, done = weights.num_bytes, 0
    missing = set(rows)
    for shard, listed in shards.items():
        with _open(shard) as file:
            names = list(file.keys())
            if listed is not None and (absent := sorted(listed - set(names))):
                raise CheckpointError(f"{shard.name} does not hold tensor {absent[0]!r}, which the index lists there")
            for name in names:
                row = rows.get(_hub_name(name, config))
                if row is None:
                    raise CheckpointError(f"unexpected tensor {name!r} in {shard.name}: this model has no such parameter")
                if row.name not in missing:
                    raise CheckpointError(f"tensor {name!r} appears twice, the second time in {shard.name}")
                done += _copy(file, name, row, shard)
                missing.discard(row.name)
                if progress:
                    progress(min(done, total), total)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"missing tensor {min(missing)!r}{more} in {directory}")
    return weights


def _copy(file: Any, name: str, row: _Row, shard: Path) -> int:
    """Copies one tensor to its slice; returns the bytes written."""
    try:
        tensor = file.get_tensor(name)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(f"cannot read tensor {name!r} from {shard.name}: {error}") from error
    if tuple(tensor.shape) != row.shape:
        raise CheckpointError(f"tensor {name!r} in {shard.name} has shape {list(tensor.shape)}; this model needs {list(row.shape)}")
    if not tensor.dtype.is_floating_point or tensor.element_size() < 2:
        raise CheckpointError(f"tensor {name!r} in {shard.name} is {tensor.dtype}: quantised checkpoints are not supported")
    place = getattr(row.part, row.parameter)[row.index]
    place.copy_(tensor.view(place.shape))
    return place.numel() * place.element_size()


def _hub_name(name: str, config: KimiLinearConfig) -> str:
    """The hub's name of a tensor: transformers writes the dense layers' MLP as `block_sparse_moe.{gate,up,down}_proj`."""
    parts = name.split(".")
    if name.startswith("model.layers.") and len(parts) == 6 and parts[3] == "block_sparse_moe" and parts[2].isdecimal():
        if parts[4] in ("gate_proj", "up_proj", "down_proj") and not config.is_moe(int(parts[2])):
            parts[3] = "mlp"
    return ".".join(parts)


def _shards(directory: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a checkpoint, each with the tensors that the index lists there (None without an index)."""
    index_path, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not index_path.is_file():
        if single.is_file():
            return {single: None}
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
        if pickles:
            raise CheckpointError(f"{directory} has only pickle files ({pickles[0]}), which are never opened; convert to safetensors")
        raise CheckpointError(f"no model.safetensors and no model.safetensors.index.json in {directory}")
    try:
        weight_map = json.loads(index_path.read_text())["weight_map"]
        entries = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_path.name} is not a safetensors index: {error!r}") from error
    shards: dict[Path, set[str] | None] = {}
    for name, file in entries:
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"index entry of {name!r} is {file!r}: shards must be .safetensors files beside the index")
        listed = shards.setdefault(directory / file, set())
        assert listed is not None
        listed.add(name)
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"shard {shard.name} is listed in the index and is not in {directory}")
    return shards


def _open(shard: Path) -> Any:
    try:
        return safe_open(str(shard), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {shard.name} (truncated or not a safetensors file): {error}") from error
