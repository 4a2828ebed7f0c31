"""How many bytes a model needs, exactly: weights by group, states and latent pages, and what fits in a given memory.

Counts what is stored for as long as a model runs: the checkpoint's tensors and the two caches. Activations and workspace of a
step come on top; leave room for them with `reserve`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from kimi_native.cache import PAGE_TOKENS
from kimi_native.config import KimiLinearConfig
from kimi_native.weights import checkpoint_tensors

DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32", "fp16": "float16", "float16": "float16"}
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Plan:
    """Bytes of one model at a context length, a number of sequences and a dtype; all sizes are exact.

    context: tokens of every sequence. memory, reserve: bytes, or None and 0.
    """

    config: KimiLinearConfig
    context: int
    batch: int = 1
    memory: int | None = None
    reserve: int = 0

    def __post_init__(self) -> None:
        if self.config.dtype not in _ITEM_BYTES:
            raise ValueError(f"dtype must be bfloat16, float16 or float32, got {self.config.dtype!r}")
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.context > self.config.model_max_length:
            raise ValueError(f"context is {self.context}; the model's limit is {self.config.model_max_length}")
        if (self.memory is not None and self.memory < 0) or self.reserve < 0:
            raise ValueError("memory and reserve must not be negative")

    # ---- weights ----------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """(parameters, bytes) of each group of tensors, largest first."""
        return dict(_weights_by_group(self.config))

    @property
    def num_parameters(self) -> int:
        return sum(parameters for parameters, _ in self.weights.values())

    @property
    def weight_bytes(self) -> int:
        return sum(size for _, size in self.weights.values())

    # ---- caches -----------------------------------------------------------------------------------------------------

    @property
    def recurrent_bytes(self) -> int:
        """float32 KDA states of one sequence."""
        return len(self.config.kda_layers) * self.config.kda_dim * self.config.kda_head_dim * 4

    @property
    def conv_bytes(self) -> int:
        """The last inputs of the short convolutions over q, k and v, of one sequence."""
        taps = self.config.short_conv_kernel_size - 1
        return len(self.config.kda_layers) * taps * 3 * self.config.kda_dim * _ITEM_BYTES[self.config.dtype]

    @property
    def state_bytes(self) -> int:
        """What a sequence takes at any length."""
        return self.recurrent_bytes + self.conv_bytes

    @property
    def latent_bytes_per_token(self) -> int:
        return len(self.config.full_attn_layers) * self._latent_row_bytes

    @property
    def pages(self) -> int:
        """Latent pages of one sequence."""
        return -(-self.context // PAGE_TOKENS)

    @property
    def page_bytes(self) -> int:
        return PAGE_TOKENS * self.latent_bytes_per_token

    @property
    def sequence_bytes(self) -> int:
        """Cache of one sequence: its states and its whole pages."""
        return self.state_bytes + self.pages * self.page_bytes

    @property
    def cache_bytes(self) -> int:
        return self.batch * self.sequence_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    @property
    def _latent_row_bytes(self) -> int:
        return self.config.latent_dim * _ITEM_BYTES[self.config.dtype]

    # ---- the same model with MLA in every layer -----------------------------------------------------------------------

    @property
    def all_mla_bytes_per_token(self) -> int:
        return self.config.num_hidden_layers * self._latent_row_bytes

    @property
    def all_mla_cache_bytes(self) -> int:
        return self.batch * self.pages * PAGE_TOKENS * self.all_mla_bytes_per_token

    @property
    def smaller_from(self) -> int | None:
        """The context from which a sequence takes fewer bytes than with MLA in every layer (None: never)."""
        saved = self.all_mla_bytes_per_token - self.latent_bytes_per_token
        return self.state_bytes // saved + 1 if saved else None

    # ---- what fits --------------------------------------------------------------------------------------------------

    @property
    def free_bytes(self) -> int | None:
        """Memory left for caches, negative when the weights alone do not fit. None without `memory`."""
        return None if self.memory is None else self.memory - self.reserve - self.weight_bytes

    @property
    def max_batch(self) -> int | None:
        """The most sequences of this context that fit."""
        return None if self.free_bytes is None else max(0, self.free_bytes // self.sequence_bytes)

    @property
    def max_context(self) -> int | None:
        """The longest context, in whole pages and within the model's limit, that this many sequences can have."""
        if self.free_bytes is None:
            return None
        for_latents = self.free_bytes // self.batch - self.state_bytes
        if for_latents < 0:
            return 0
        if self.page_bytes == 0:  # no MLA layer: the context costs nothing
            return self.config.model_max_length
        return min(self.config.model_max_length, for_latents // self.page_bytes * PAGE_TOKENS)

    # ---- output -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, for a machine to read."""
        numbers = {
            name: getattr(self, name)
            for name in (
                "context", "batch", "num_parameters", "weight_bytes", "recurrent_bytes", "conv_bytes", "state_bytes",
                "latent_bytes_per_token", "pages", "page_bytes", "sequence_bytes", "cache_bytes", "total_bytes",
                "all_mla_bytes_per_token", "all_mla_cache_bytes", "smaller_from", "memory", "reserve", "free_bytes", "max_batch",
                "max_context",
            )
        }  # fmt: skip
        groups = {group: {"parameters": parameters, "bytes": size} for group, (parameters, size) in self.weights.items()}
        return {"dtype": self.config.dtype, "weights": groups, **numbers}

    def render(self) -> str:
        """The same for people."""
        c = self.config
        rows: list[tuple[str, str, str]] = []

        def row(label: str, size: int, note: str = "") -> None:
            rows.append((label, f"{size:,} B", note))

        rows.append((f"Weights, {c.dtype}", "", f"{self.num_parameters:,} parameters"))
        for group, (parameters, size) in self.weights.items():
            row(f"  {group}", size, f"{parameters:,} parameters")
        row("  total", self.weight_bytes, human_bytes(self.weight_bytes))
        rows.append(("One sequence", "", f"{self.context:,} tokens"))
        row("  recurrent states", self.recurrent_bytes, f"{len(c.kda_layers)} KDA layers, float32")
        row("  convolution states", self.conv_bytes)
        row("  states", self.state_bytes, "at any length")
        row("  latents of a token", self.latent_bytes_per_token, f"{len(c.full_attn_layers)} MLA layers")
        row("  latent pages", self.pages * self.page_bytes, f"{self.pages:,} pages of {PAGE_TOKENS} tokens")
        row("  total", self.sequence_bytes, human_bytes(self.sequence_bytes))
        rows.append(("With MLA in every layer", "", f"{self.all_mla_bytes_per_token:,} B a token"))
        row("  one sequence", self.all_mla_cache_bytes // self.batch, self._saving())
        rows.append(
            (f"Caches of {self.batch:,} sequence{'s' * (self.batch != 1)}", f"{self.cache_bytes:,} B", human_bytes(self.cache_bytes))
        )
        rows.append(("Weights and caches", f"{self.total_bytes:,} B", human_bytes(self.total_bytes)))
        widths = [max(len(r[column]) for r in rows) for column in (0, 1)]
        lines = [f"{label:<{widths[0]}}  {size:>{widths[1]}}  {note}".rstrip() for label, size, note in rows]
        if self.memory is not None:
            lines += ["", *self._fits()]
        return "\n".join(lines)

    def _saving(self) -> str:
        if self.smaller_from is None:
            return "the same model"
        saved = 1 - self.cache_bytes / self.all_mla_cache_bytes
        change = f"KDA saves {saved:.1%}" if saved >= 0 else f"KDA costs {-saved:.1%} more"
        return f"{change}; it saves from {self.smaller_from:,} tokens on"

    def _fits(self) -> list[str]:
        assert self.memory is not None and self.free_bytes is not None
        memory = f"{human_bytes(self.memory)}" + (f" less {human_bytes(self.reserve)} in reserve" if self.reserve else "")
        if self.free_bytes < 0:
            return [f"{memory}: the weights alone do not fit, {human_bytes(-self.free_bytes)} are missing"]
        limit = " (the model's limit)" if self.max_context == self.config.model_max_length else ""
        lines = [
            f"{memory} leave {human_bytes(self.free_bytes)} for caches:",
            f"  at {self.context:,} tokens, {self.max_batch:,} sequences",
            f"  at {self.batch:,} sequence{'s' * (self.batch != 1)}, {self.max_context:,} tokens each{limit}",
        ]
        return lines if self.reserve else [*lines, "  (activations and workspace not counted: see --reserve)"]


@lru_cache(maxsize=8)
def _weights_by_group(config: KimiLinearConfig) -> tuple[tuple[str, tuple[int, int]], ...]:
    groups: dict[str, tuple[int, int]] = {}
    for spec in checkpoint_tensors(config).values():
        parameters, size = groups.get(spec.group, (0, 0))
        groups[spec.group] = (parameters + spec.num_bytes // spec.dtype.itemsize, size + spec.num_bytes)
    return tuple(sorted(groups.items(), key=lambda item: -item[1][1]))


def make_plan(
    config: KimiLinearConfig, *, context: int, batch: int = 1, dtype: str | None = None, memory: int | None = None, reserve: int = 0
) -> Plan:
    """The plan of a model; `dtype` ("bf16", "fp32") replaces the config's. Raises ValueError on values out of range."""
    if dtype is not None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        config = replace(config, dtype=DTYPES[dtype])
    return Plan(config, context, batch, memory, reserve)


_UNITS: dict[str, int] = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)}


def parse_bytes(text: str) -> int:
    """Bytes of "141GB" (powers of 1000), "80GiB" (powers of 1024) or a plain number. Raises ValueError on anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not an amount of memory; write for example 141GB, 80GiB or 512MiB")
    return round(float(match[1]) * unit)


def human_bytes(size: int) -> str:
    """Three significant digits in powers of 1000: 98.2 GB."""
    value, unit = float(size), "B"
    for next_unit in ("kB", "MB", "GB", "TB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, next_unit
    digits = 0 if unit == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"
