"""Names of a checkpoint's tensors: transformers' into the hub's."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from kimi_native.config import KimiLinearConfig


def hub_tensors(name: str, tensor: Tensor, config: KimiLinearConfig) -> Iterator[tuple[str, Tensor]]:
    """A tensor of a checkpoint as the hub's tensors: renamed, and cut where transformers stacks (experts) or joins (convolutions)."""
    parts = name.split(".")
    if not name.startswith("model.layers.") or len(parts) < 4 or not parts[2].isdecimal():
        yield name, tensor
        return
    if parts[3] in ("mlp", "block_sparse_moe"):
        parts[3] = "block_sparse_moe" if config.is_moe(int(parts[2])) else "mlp"
    prefix, rest = ".".join(parts[:4]) + ".", ".".join(parts[4:])
    if rest.startswith("forget_gate."):
        yield prefix + rest.removeprefix("forget_gate."), tensor
    elif rest == "conv1d.weight" and tensor.shape[0] == 3 * config.kda_dim:
        yield from ((f"{prefix}{n}_{rest}", part) for n, part in zip("qkv", tensor.chunk(3)))
    elif rest in ("experts.gate_up_proj", "experts.gate_up_proj.weight") and tensor.dim() == 3:
        for e, both in enumerate(tensor):
            yield from ((f"{prefix}experts.{e}.{n}.weight", part) for n, part in zip(("w1", "w3"), both.chunk(2)))
    elif rest in ("experts.down_proj", "experts.down_proj.weight") and tensor.dim() == 3:
        yield from ((f"{prefix}experts.{e}.w2.weight", part) for e, part in enumerate(tensor))
    else:
        yield prefix + rest if rest else name, tensor
