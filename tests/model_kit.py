"""Small random checkpoints in the hub's format, and transformers' own Kimi-Linear as the reference for them.

Weights are drawn wide: with the usual 0.02 every logit is near zero and any mistake passes. `test_model.py` shows that mistakes are
seen here: each tensor, nudged by one hundredth, moves the logits by more than the tolerance.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import KimiLinearConfig as ReferenceConfig
from transformers import KimiLinearForCausalLM
from transformers.models.kimi_linear import modeling_kimi_linear as reference_module
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

# transformers' own torch code, also where fla-core is installed, which it would prefer and which needs a GPU.
for _name in ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", "causal_conv1d_fn", "causal_conv1d_update"):
    _function = getattr(reference_module, _name)
    setattr(reference_module, _name, getattr(_function, "__wrapped__", _function))

LOGIT_TOLERANCE = 2e-4  # absolute, fp32, at a logit standard deviation near 1
EOS = 128
INDEX = "model.safetensors.index.json"

T = TypeVar("T")


def hub_config(**changes: Any) -> dict[str, Any]:
    """A `config.json` with the keys of the released one and tiny sizes. `kda_layers`, `full_attn_layers` (1-based), `num_heads`
    and `head_dim` go into `linear_attn_config`."""
    linear = {"kda_layers": [1, 2, 3], "full_attn_layers": [4, 5], "num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4}
    linear |= {key: changes.pop(key) for key in list(changes) if key in linear}
    config = {
        "architectures": ["KimiLinearForCausalLM"],
        "bos_token_id": 126,
        "dtype": "float32",
        "eos_token_id": EOS,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "kv_lora_rank": 32,
        "linear_attn_config": linear,
        "mla_use_nope": True,
        "model_max_length": 4096,
        "model_type": "kimi_linear",
        "moe_intermediate_size": 32,
        "moe_layer_freq": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_attention_heads": 4,
        "num_expert_group": 1,
        "num_experts": 16,
        "num_experts_per_token": 4,
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "pad_token_id": 130,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.446,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "transformers_version": "4.57.0",
        "use_cache": True,
        "use_grouped_topk": True,
        "v_head_dim": 16,
        "vocab_size": 131,
    }
    unknown = set(changes) - set(config)
    assert not unknown, f"not keys of the hub's config: {unknown}"
    return config | changes


@dataclass(frozen=True)
class Variant:
    """One kind of checkpoint. `gates`: "moderate", or "real" for the range measured on the released weights.
    `naming`: "hub", or "transformers" for the files exactly as `save_pretrained` leaves them."""

    name: str
    config: dict[str, Any] = field(default_factory=hub_config, hash=False)
    gates: str = "moderate"
    naming: str = "hub"
    stored: torch.dtype = torch.float32
    shards: int = 3
    tokenizer: bool = False
    seed: int = 0


REAL_PATTERN = [4, 8, 12, 16, 20, 24, 27]

SMALL = Variant("small")
REAL_GATES = Variant(
    "real_gates", hub_config(num_heads=3, head_dim=32, hidden_size=72, num_experts=12, qk_nope_head_dim=24), gates="real", seed=3
)
REAL_LAYERS = Variant(
    "real_layers",
    hub_config(
        num_hidden_layers=27,
        full_attn_layers=REAL_PATTERN,
        kda_layers=[i for i in range(1, 28) if i not in REAL_PATTERN],
        num_heads=2,
        hidden_size=48,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_token=2,
        moe_intermediate_size=24,
        intermediate_size=96,
    ),
    shards=5,
    seed=2,
)
AS_TRANSFORMERS_SAVES = Variant("as_transformers_saves", naming="transformers", seed=3)
STORED_BF16 = Variant("stored_bf16", hub_config(dtype="bfloat16"), stored=torch.bfloat16, seed=4)
ONE_FILE = Variant("one_file", shards=1, seed=5)
# Every expert is taken, so that a rounding in bf16 cannot change which ones are.
ALL_EXPERTS_BF16 = Variant(
    "all_experts_bf16", hub_config(dtype="bfloat16", num_experts=4, moe_intermediate_size=96), stored=torch.bfloat16, seed=6
)
# With a tokenizer: 256 bytes, 72 longer tokens, 256 special ones.
WITH_TEXT = Variant("with_text", hub_config(vocab_size=584, bos_token_id=328, eos_token_id=330, pad_token_id=583), tokenizer=True, seed=7)
CROSS_CHECKED = [SMALL, REAL_GATES, REAL_LAYERS]
VARIANTS = [*CROSS_CHECKED, AS_TRANSFORMERS_SAVES, STORED_BF16, ONE_FILE, WITH_TEXT]


# ------------------------------------------------------------------------------------------------ weights


def draw_weights(model: KimiLinearForCausalLM, variant: Variant) -> None:
    """Fills every parameter and buffer in place, from the variant's seed alone."""
    generator = torch.Generator().manual_seed(variant.seed)

    def normal(like: Tensor, scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    real = variant.gates == "real"
    values = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    with torch.no_grad():
        for name, value in sorted(values.items()):
            if name.endswith("A_log"):
                heads = value.numel()
                if real:  # from 0.5 to 200, one step a head
                    value.copy_(torch.linspace(math.log(0.5), math.log(200.0), heads).view_as(value))
                else:
                    value.copy_(uniform(value, math.log(1.0), math.log(16.0)))
            elif name.endswith("dt_bias"):
                if real:  # a third of the channels of each head remembers, a third forgets, the rest does either by token
                    kind = torch.arange(value.numel()) % 3
                    value.copy_(torch.tensor([-6.0, 11.0, 0.0])[kind] + normal(value, 0.5))
                else:
                    value.copy_(uniform(value, -6.0, -1.0))
            elif name.endswith("f_b_proj.weight") and real:
                value.copy_(normal(value, 1.0 / math.sqrt(value.shape[-1])))
                value[2::3] *= 3.0
            elif name.endswith("e_score_correction_bias"):
                value.copy_(normal(value, 0.05))
            elif name.endswith("norm.weight"):
                value.copy_(1.0 + normal(value, 0.2))
            elif name.endswith("conv1d.weight"):
                value.copy_(normal(value, 0.6))
            elif name.endswith("embed_tokens.weight"):
                value.copy_(normal(value, 1.0))
            else:
                value.copy_(normal(value, 0.96 / math.sqrt(value.shape[-1])))
            if name.endswith("kv_a_proj_with_mqa.weight"):
                # A latent so small before its norm that the epsilon of that norm shows (1e-6, not rms_norm_eps).
                value[: variant.config["kv_lora_rank"]] *= 0.03
            if variant.stored is not torch.float32 and not name.endswith(("A_log", "dt_bias")):
                value.copy_(value.to(variant.stored))


def build_reference(variant: Variant) -> KimiLinearForCausalLM:
    """transformers' model with the variant's weights, fp32, plain attention."""
    model = KimiLinearForCausalLM(ReferenceConfig(**variant.config, attn_implementation="eager", experts_implementation="eager"))
    model = model.float().eval().requires_grad_(False)
    draw_weights(model, variant)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None
    return model


# ------------------------------------------------------------------------------------------------ files


def read_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def write_tensors(directory: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """The hub's layout: `model-0000i-of-0000n.safetensors` with an index, or a single `model.safetensors`."""
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    per_shard = math.ceil(len(names) / shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[i * per_shard : (i + 1) * per_shard]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))


def hub_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `save_pretrained` wrote, under the names of the hub: it calls the dense MLP of the first layers a MoE."""
    dense = re.compile(r"\.block_sparse_moe\.(gate_proj|up_proj|down_proj)\.weight$")
    return {dense.sub(r".mlp.\1.weight", name): t for name, t in tensors.items()}


def write_tokenizer(directory: Path) -> None:
    """A `tiktoken.model` of the hub's kind: all single bytes, then pieces of one to three characters, some with several bytes each."""
    letters = [a + b for a in "etaoin" for b in "shrdlu"] + ["the", " a", " and", "ing", "é", "ü", "中", "文", "😀", "\n\n", "12", " the"]
    letters += [f" {a}{b}" for a in "bcdf" for b in "aeiouy"]
    pieces = [bytes([i]) for i in range(256)] + [piece.encode() for piece in letters]
    assert len(pieces) == 328 == len(set(pieces))
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)]
    (directory / "tiktoken.model").write_bytes(b"".join(lines))


def write_checkpoint(variant: Variant, directory: Path) -> None:
    model = build_reference(variant)
    if variant.naming == "transformers":
        model.save_pretrained(directory, max_shard_size="200KB")
        return
    raw = directory / "raw"
    model.save_pretrained(raw)
    tensors = {name: t if name.endswith(("A_log", "dt_bias")) else t.to(variant.stored) for name, t in hub_names(read_tensors(raw)).items()}
    for file in raw.iterdir():
        file.unlink()
    raw.rmdir()
    write_tensors(directory, tensors, variant.shards)
    (directory / "config.json").write_text(json.dumps(variant.config, indent=2))
    if variant.tokenizer:
        write_tokenizer(directory)


def once(root: Path, name: str, make: Callable[[Path], None]) -> Path:
    """`root/name`, filled by `make` in whichever process comes first."""
    path = root / name
    with FileLock(f"{path}.lock"):
        if not (root / f"{name}.done").exists():
            make(path)
            (root / f"{name}.done").touch()
    return path


# ------------------------------------------------------------------------------------------------ reference


def tokens(n: int, seed: int = 0, vocab_size: int = EOS) -> list[int]:
    return torch.randint(0, vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


class _DoubleTorch:
    """The torch module with float32 meaning float64, for the casts inside transformers' modelling code."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _gate_in_double(self: Any, hidden_states: Tensor) -> Tensor:
    """KimiLinearForgetGate.forward without its casts to float32."""
    f = self.f_b_proj(self.f_a_proj(hidden_states)) + self.dt_bias
    return -self.A_log.exp() * torch.nn.functional.softplus(f.view(*f.shape[:2], -1, self.head_dim), threshold=40.0)


@contextlib.contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Inside, `owner.name` is `value` for each (owner, name, value)."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class Reference:
    """transformers' KimiLinearForCausalLM on the CPU, read from a checkpoint's files; computes in float32 unless told otherwise."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32):
        self.model = KimiLinearForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
        self.model.eval().requires_grad_(False)
        if dtype != torch.float32:  # from_pretrained rounds these with the rest; the files and every server keep them
            stored = read_tensors(directory)
            for i, layer in enumerate(self.model.model.layers):
                if gate := getattr(layer.self_attn, "forget_gate", None):
                    gate.A_log.data = stored[f"model.layers.{i}.self_attn.A_log"]
                    gate.dt_bias.data = stored[f"model.layers.{i}.self_attn.dt_bias"]
        self.model.generation_config.eos_token_id = None

    def logits(self, ids: list[int]) -> Tensor:
        """[T, vocab] of one forward pass as it comes."""
        return self.model(torch.tensor([ids]), use_cache=False).logits[0]

    def recurrent_logits(self, ids: list[int]) -> Tensor:
        """The same with KDA computed by transformers' own token-by-token form. Its chunked form keeps a running sum of the log decay,
        which reaches 6e4 with real gates; differences of it are then good to 4e-3 only, and logits to 5e-4."""
        with replaced((reference_module, "chunk_kimi_delta_attention", reference_module.recurrent_kimi_delta_attention)):
            return self.logits(ids)

    def exact_logits(self, ids: list[int]) -> Tensor:
        """The same in fp64 throughout."""
        self.model.double()
        try:
            with replaced(
                (reference_module, "torch", _DoubleTorch()),
                (reference_module, "chunk_kimi_delta_attention", reference_module.recurrent_kimi_delta_attention),
                (reference_module.KimiLinearForgetGate, "forward", _gate_in_double),
            ):
                return self.logits(ids)
        finally:
            self.model.float()

    def generate(self, ids: list[int], count: int) -> list[int]:
        """`count` greedy tokens from transformers' own `generate`."""
        out = self.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        return out[0, len(ids) :].tolist()


# ------------------------------------------------------------------------------------------------ all of it, made once


class Zoo:
    """Checkpoints, references and loaded models, each made when first asked for. Files are shared by the workers of a test run."""

    def __init__(self, root: Path, device: str = "cpu"):
        self.root, self.device = root, device
        self._references: dict[str, Reference] = {}
        self._models: dict[tuple[str, str, bool, torch.dtype], Any] = {}

    def on(self, device: str) -> Zoo:
        """The same zoo, with our models on `device`; the references stay on the CPU."""
        zoo = Zoo(self.root, device)
        zoo._references, zoo._models = self._references, self._models
        return zoo

    def checkpoint(self, variant: Variant) -> Path:
        return once(self.root, variant.name, lambda path: write_checkpoint(variant, path))

    def reference(self, variant: Variant) -> Reference:
        if variant.name not in self._references:
            self._references[variant.name] = Reference(self.checkpoint(variant))
        return self._references[variant.name]

    def model(self, variant: Variant, *, batch_invariant: bool = False, dtype: torch.dtype = torch.float32) -> Any:
        """Our KimiLinear."""
        from kimi_native import KimiLinear

        key = (variant.name, self.device, batch_invariant, dtype)
        if key not in self._models:
            options: dict[str, Any] = {"device": self.device, "dtype": dtype, "batch_invariant": batch_invariant}
            self._models[key] = KimiLinear.from_pretrained(self.checkpoint(variant), **options)
        return self._models[key]

    def greedy(self, variant: Variant, prompt: list[int], count: int) -> list[int]:
        """`count` tokens from transformers' own greedy `generate`; computed by one worker, read by the others."""
        name = f"{variant.name}-greedy-{len(prompt)}-{sum(prompt)}-{count}.json"
        path = once(self.root, name, lambda path: path.write_text(json.dumps(self.reference(variant).generate(prompt, count))) and None)
        return json.loads(path.read_text())
