"""Small random checkpoints in the hub's own format, for tests, demos and benches.

Weights are drawn wide, so that no output is near zero and a wrong kernel cannot hide: logits come out with a standard deviation
near 1, every gate, expert and head matters, and the forget gates span the range that was measured in the released model, from
channels that remember for thousands of tokens to channels that forget at once, within one head.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kimi_native.config import KimiLinearConfig
from kimi_native.text import NUM_SPECIAL_SLOTS, default_special_tokens
from kimi_native.weights import TensorSpec, Weights, allocate, checkpoint_tensors, places


@dataclass(frozen=True)
class Preset:
    """A named size. `layers` has one letter a layer: K for KDA, M for MLA."""

    about: str
    layers: str
    sizes: dict[str, Any] = field(default_factory=dict)


_TINY: dict[str, Any] = {
    "vocab_size": 768, "hidden_size": 64, "kda_num_heads": 4, "kda_head_dim": 16,
    "num_attention_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "intermediate_size": 128, "num_experts": 16, "num_experts_per_token": 4, "moe_intermediate_size": 32,
    "model_max_length": 65536,
}  # fmt: skip

PRESETS: dict[str, Preset] = {
    "tiny": Preset("one group of three KDA layers and one MLA layer, 64 wide (2 MB)", "KKKM", _TINY),
    "tiny27": Preset("the released model's pattern of 27 layers, 64 wide (14 MB)", "KKKM" * 6 + "KKM", _TINY),
    "demo": Preset(
        "two groups, 256 wide, 16 experts (52 MB)",
        "KKKM" * 2,
        {
            "vocab_size": 2048, "hidden_size": 256, "kda_num_heads": 4, "kda_head_dim": 64,
            "num_attention_heads": 4, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
            "intermediate_size": 768, "num_experts": 16, "num_experts_per_token": 4, "moe_intermediate_size": 96,
            "model_max_length": 131072,
        },
    ),
    "mid": Preset(
        "two groups, 512 wide, heads of 128, 64 experts of which 8 are used (0.8 GB)",
        "KKKM" * 2,
        {
            "vocab_size": 4096, "hidden_size": 512, "kda_num_heads": 8, "kda_head_dim": 128,
            "num_attention_heads": 8, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "intermediate_size": 2048, "num_experts": 64, "num_experts_per_token": 8, "moe_intermediate_size": 256,
            "model_max_length": 131072,
        },
    ),
}  # fmt: skip

GATES = ("real", "mild")


def tiny_config(
    preset: str = "tiny", *, layers: str | None = None, num_layers: int | None = None, dtype: str = "float32", **overrides: Any
) -> KimiLinearConfig:
    """The configuration that `make_tiny` writes; same arguments."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    if layers is None:
        layers = PRESETS[preset].layers if num_layers is None else _pattern(num_layers)
    elif num_layers is not None and num_layers != len(layers):
        raise ValueError(f"num_layers is {num_layers}, but layers has {len(layers)} letters")
    if not layers or set(layers) - set("KM"):
        raise ValueError(f"layers must be letters K (KDA) and M (MLA), got {layers!r}")
    unknown = sorted(set(overrides) - {f.name for f in fields(KimiLinearConfig)})
    if unknown:
        raise ValueError(f"KimiLinearConfig has no field {unknown[0]!r}")
    sizes = {**PRESETS[preset].sizes, **overrides}
    num_ranks = sizes["vocab_size"] - NUM_SPECIAL_SLOTS
    sizes.setdefault("bos_token_id", num_ranks if num_ranks >= 0 else None)
    sizes.setdefault("eos_token_ids", (num_ranks + 2,) if num_ranks >= 0 else ())
    sizes.setdefault("pad_token_id", num_ranks + 255 if num_ranks >= 0 else None)
    config = replace(
        KimiLinearConfig(),
        num_hidden_layers=len(layers),
        full_attn_layers=tuple(i for i, kind in enumerate(layers) if kind == "M"),
        dtype=dtype,
        **sizes,
    )
    KimiLinearConfig.from_dict(config.to_dict())  # refuses, by key, what could not be loaded again
    return config


def make_tiny(
    directory: str | Path,
    *,
    preset: str = "tiny",
    seed: int = 0,
    shards: int = 2,
    dtype: str = "float32",
    layers: str | None = None,
    num_layers: int | None = None,
    gates: str = "real",
    tokenizer: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **overrides: Any,
) -> KimiLinearConfig:
    """Writes a random checkpoint: safetensors under the hub's names, config.json, generation_config.json, and a tokenizer.

    Args:
        directory: made when it does not exist; must be empty unless `overwrite`.
        preset: "tiny", "tiny27", "demo" or "mid", see `PRESETS`.
        seed: a tensor's values depend on the seed and its name alone, so neither shards nor dtype change them (bfloat16 is the
            float32 value rounded).
        shards: safetensors files; 1 gives a single `model.safetensors` without an index.
        dtype: "float32" or "bfloat16". `A_log` and `dt_bias` are always float32, as on the hub.
        layers: one letter a layer, K for KDA and M for MLA, instead of the preset's; `num_layers` gives the released pattern
            (every fourth layer and the last are MLA) at another length.
        gates: "real" has exp(A_log) from 0.1 to 200 and up to |g| of about 3000 for one token; "mild" is an ordinary
            initialisation, exp(A_log) from 1 to 16.
        tokenizer: also write `tiktoken.model` and `tokenizer_config.json`; needs `vocab_size` of 512 or more.
        progress: called with (bytes done, bytes in all) after each tensor.
        overrides: fields of `KimiLinearConfig`, such as `num_experts=32`.

    Only one shard is held in memory at a time. Returns the configuration. Raises ValueError on arguments that make no sense and
    FileExistsError when the directory has something in it.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    if shards < 1:
        raise ValueError(f"shards must be positive, got {shards}")
    if gates not in GATES:
        raise ValueError(f"gates must be {' or '.join(map(repr, GATES))}, got {gates!r}")
    config = tiny_config(preset, layers=layers, num_layers=num_layers, dtype=dtype, **overrides)
    tokens = make_tokens(config.vocab_size - NUM_SPECIAL_SLOTS) if tokenizer else None

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()) and not overwrite:
        raise FileExistsError(f"{directory} is not empty")
    for old in [*directory.glob("model*.safetensors*"), directory / "tiktoken.model", directory / "config.json"]:
        old.unlink(missing_ok=True)

    _write_weights(directory, config, seed, shards, gates, progress)
    if tokens is not None:
        _write_tokenizer(directory, tokens)
    ids = {key: value for key, value in config.to_dict().items() if key.endswith("_token_id")}
    _write_json(directory / "generation_config.json", ids)
    _write_json(directory / "config.json", config.to_dict())  # last: its presence says that the checkpoint is complete
    return config


def _pattern(num_layers: int) -> str:
    return "".join("M" if i % 4 == 3 or i == num_layers - 1 else "K" for i in range(num_layers))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# ---- weights --------------------------------------------------------------------------------------------------------------


def _write_weights(
    directory: Path, config: KimiLinearConfig, seed: int, shards: int, gates: str, progress: Callable[[int, int], None] | None
) -> None:
    specs = checkpoint_tensors(config)
    total = sum(spec.num_bytes for spec in specs.values())
    groups = list(_in_shards(specs, total, shards))
    done = 0
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name, spec in group.items():
            tensors[name] = draw(name, spec, seed, gates)
            weight_map[name] = file
            done += spec.num_bytes
            if progress:
                progress(done, total)
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(directory / "model.safetensors.index.json", index)


def _in_shards(specs: dict[str, TensorSpec], total: int, shards: int) -> Iterator[dict[str, TensorSpec]]:
    """Consecutive tensors in at most `shards` groups of about equal bytes."""
    group: dict[str, TensorSpec] = {}
    done, current = 0, 0
    for name, spec in specs.items():
        wanted = min(shards - 1, done * shards // total)
        if wanted != current and group:
            yield group
            group, current = {}, wanted
        group[name] = spec
        done += spec.num_bytes
    yield group


def random_weights(
    config: KimiLinearConfig, device: torch.device | str, dtype: torch.dtype, *, seed: int = 0, gates: str = "real"
) -> Weights:
    """Parameters with the values of `make_tiny`, drawn on `device` one tensor at a time. On another device than the CPU the values
    differ (its generator does), their distribution does not."""
    if gates not in GATES:
        raise ValueError(f"gates must be {' or '.join(map(repr, GATES))}, got {gates!r}")
    weights = allocate(config, device, dtype)
    for name, spec, place in places(weights, config):
        place.copy_(draw(name, spec, seed, gates, device).view(place.shape))
    return weights


def draw(name: str, spec: TensorSpec, seed: int, gates: str = "real", device: torch.device | str = "cpu") -> Tensor:
    """The values of one tensor of a checkpoint, by its hub name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))

    def normal() -> Tensor:
        return torch.randn(spec.shape, generator=generator, device=device)

    def uniform(count: int) -> Tensor:
        return torch.rand(count, generator=generator, device=device)

    def spread() -> Tensor:
        """Uniform on (0, 1), stratified and shuffled: even a short tensor has values near both ends."""
        count = math.prod(spec.shape)
        ends = torch.arange(count, device=device) + uniform(count)
        return (ends / count)[torch.randperm(count, generator=generator, device=device)].view(spec.shape)

    if name.endswith(".A_log"):
        low, high = (0.1, 200.0) if gates == "real" else (1.0, 16.0)
        values = math.log(low) + (math.log(high) - math.log(low)) * spread()
    elif name.endswith(".dt_bias"):
        if gates == "real":
            values = 23.0 * spread() ** 3 - 9.0  # softplus from 1e-4 to 14, most of it small
        else:
            step = torch.exp(math.log(1e-3) + math.log(100.0) * spread())
            values = step + torch.log(-torch.expm1(-step))  # softplus(values) = step, 1e-3 to 0.1
    elif name.endswith(".e_score_correction_bias"):
        values = 0.05 * normal()
    elif "_conv1d." in name:
        values = normal() * (0.5 + 0.3 * uniform(1))
    elif name.endswith("norm.weight"):
        values = 1.0 + 0.1 * normal()
    elif name == "model.embed_tokens.weight":
        values = normal()
    else:
        values = normal() * (0.96 / math.sqrt(spec.shape[-1]))
    return values.to(spec.dtype).contiguous()


# ---- tokenizer ------------------------------------------------------------------------------------------------------------

# Also the prompt of `kimi-native demo`.
SAMPLE_TEXT = """\
Most of the layers of this model carry a state of fixed size from token to token. Each channel of the state has its own rate of
forgetting, and what is written to it is the difference between the new value and the value that the state already holds for that
key. A few layers attend to everything that came before; they keep one short row for each token, and all the heads share that row.
The order of the words is known from the states alone. After every attention layer a router sends each token to a small number of
experts, and one more expert sees them all. So the time of a step hardly grows with the length of the text, and the memory grows
slowly. Long ago people wrote down what they wanted to remember, because the mind lets go of most things within a day, and because
a page can be read again by someone who was not there. A library is a kind of memory which everyone may use. The river runs past
the old town, under three bridges, and the children throw stones into the water when the evening is warm. Tell me about the history
of a city, a recipe with apples and honey, a question of numbers, or a story in which nothing happens until the very last line.
"""


def make_tokens(num_ranks: int) -> list[bytes]:
    """Byte-pair tokens in the order of their ranks: the 256 bytes, then merges learned from a short built-in text, then
    numbers, two-byte characters and Han characters. Each merge joins two tokens of lower rank."""
    if num_ranks < 256:
        raise ValueError(f"vocab_size must be at least 512 (256 bytes and 256 special tokens) to have a tokenizer, got {num_ranks + 256}")
    tokens = [bytes([b]) for b in range(256)]
    seen = set(tokens)
    for token in _candidates(min(num_ranks - 256, 600)):
        if len(tokens) == num_ranks:
            return tokens
        if token not in seen:
            seen.add(token)
            tokens.append(token)
    if len(tokens) < num_ranks:
        raise ValueError(f"vocab_size is at most {len(tokens) + NUM_SPECIAL_SLOTS} with the built-in tokenizer; pass tokenizer=False")
    return tokens


def _candidates(num_learned: int) -> Iterator[bytes]:
    yield from _learned_merges(num_learned)
    for digits in (2, 3):
        for number in range(10**digits):
            yield b"%0*d" % (digits, number)
    for code in range(0xA1, 0x800):
        yield chr(code).encode()
    for code in range(0x4E00, 0xA000):
        character = chr(code).encode()
        yield character[:2]
        yield character


def _learned_merges(count: int) -> Iterator[bytes]:
    """Byte-pair merges by frequency among the words of the built-in text, ties by the pair itself."""
    words = Counter(tuple(bytes([b]) for b in b" " + word.encode()) for word in re.findall(r"[A-Za-z]+", SAMPLE_TEXT))
    for _ in range(count):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        if not pairs:
            return
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        yield best[0] + best[1]
        words = Counter({_merge(word, best): times for word, times in words.items()})


def _merge(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    out: list[bytes] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] = out[-1] + token
        else:
            out.append(token)
    return tuple(out)


def _write_tokenizer(directory: Path, tokens: list[bytes]) -> None:
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (directory / "tiktoken.model").write_bytes(b"".join(lines))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    named = {t: i for t, i in default_special_tokens(len(tokens)).items() if not t.startswith("<|reserved_token_")}
    config = {
        "added_tokens_decoder": {str(token_id): {"content": text, **flags} for text, token_id in named.items()},
        "bos_token": "[BOS]",
        "eos_token": "<|im_end|>",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
    }
    _write_json(directory / "tokenizer_config.json", config)
