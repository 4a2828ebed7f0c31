"""`kimi_native.accelerate`: what it refuses, in which words, and that a refused model is as it was."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import assert_same_bits
from model_kit import SMALL, Variant, Zoo, build_reference, hub_config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kimi_native import KimiLinear, accelerate, restore

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model(zoo: Zoo) -> nn.Module:
    return copy.deepcopy(zoo.reference(SMALL).model)


def assert_refused(model: Any, message: str, error: type[Exception] = ValueError) -> None:
    """The error, and that nothing in the model has changed."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [(type(m), dict(vars(m)), len(m._forward_pre_hooks)) for m in modules]
    with pytest.raises(error, match=message):
        accelerate(model)
    assert [(type(m), dict(vars(m)), len(m._forward_pre_hooks)) for m in modules] == before


# ------------------------------------------------------------------------------------------------ classes


def of_module(name: str) -> Any:
    """An instance of a class KimiLinearForCausalLM that lives in another package."""
    return type("KimiLinearForCausalLM", (nn.Module,), {"__module__": name})()


def another_model() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=8))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda _: nn.Linear(2, 2), r"got torch\.nn\.modules\.linear\.Linear"),
        (lambda _: "moonshotai/Kimi-Linear-48B-A3B-Instruct", "got builtins.str: only Kimi-Linear of transformers is supported"),
        (lambda _: another_model(), "got .*LlamaForCausalLM"),
        (lambda _: of_module("transformers_modules.moonshotai.Kimi.modeling_kimi"), "hub's own modelling code .* trust_remote_code=False"),
        (lambda _: of_module("vllm.models.kimi_k3.nvidia.model"), "vLLM's class"),
        (lambda _: of_module("peft.peft_model"), "merge_and_unload"),
        (torch.compile, "before it is compiled"),
        (nn.DataParallel, "before it is compiled, wrapped or distributed"),
    ],
    ids=["a module", "a name", "another model", "remote code", "vllm", "peft", "compiled", "wrapped"],
)  # fmt: skip
def test_another_class(model: nn.Module, make: Callable[[nn.Module], Any], message: str):
    assert_refused(make(model), message, TypeError)
    with pytest.raises(TypeError, match=message):
        restore(make(model))


def test_our_own_model(zoo: Zoo):
    ours: KimiLinear = zoo.model(SMALL)
    assert_refused(ours, "runs our operators already", TypeError)


# ------------------------------------------------------------------------------------------------ weights


class Quantised(nn.Linear):
    """As quantisers do it: another class in the place of the linear layers."""


class Sharded(torch.Tensor):
    """A subclass of Tensor, as quantised and sharded weights are."""


def quantise_one(model: nn.Module) -> None:
    model.model.layers[3].self_attn.kv_b_proj.__class__ = Quantised


def replace_one(model: nn.Module) -> None:
    model.model.layers[0].self_attn.q_proj = nn.Sequential(nn.Linear(64, 64))


def offload_one(model: nn.Module) -> None:
    model.model.layers[1]._hf_hook = object()


def move_one_to_meta(model: nn.Module) -> None:
    model.model.layers[2].mlp.experts.to("meta")


def shard_one(model: nn.Module) -> None:
    experts = model.model.layers[2].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().as_subclass(Sharded), requires_grad=False)


def patch_one(model: nn.Module) -> None:
    norm = model.model.layers[2].input_layernorm
    norm.forward = lambda x: x


CHANGES = {
    "quantiser": (lambda m: setattr(m, "hf_quantizer", object()), "the model is quantised"),
    "quantised config": (lambda m: setattr(m.config, "quantization_config", {"quant_method": "fp8"}), "the model is quantised"),
    "quantised layer": (quantise_one, "model.layers.3.self_attn.kv_b_proj is a Quantised, not the library's own"),
    "replaced layer": (replace_one, "model.layers.0.self_attn.q_proj is a Sequential, not a Linear"),
    "offloaded": (offload_one, "model.layers.1 has a hook of accelerate .* load it on one device"),
    "meta": (move_one_to_meta, "model.layers.2.mlp.experts.gate_up_proj is on the meta device"),
    "tensor subclass": (shard_one, "model.layers.2.mlp.experts.down_proj is a .*: quantised and sharded weights are not supported"),
    "patched": (patch_one, "model.layers.2.input_layernorm.forward has been replaced already"),
    "experts of one process": (lambda m: setattr(m.model.layers[1].mlp.experts, "_is_expert_parallel", True), "expert parallelism"),
    "tensor parallel": (lambda m: setattr(m, "_tp_size", 2), "sharded over several processes"),
    "two dtypes": (lambda m: m.model.layers[0].to(torch.bfloat16), "one device and one dtype, got cpu and torch.bfloat16, torch.float32"),
    "float16 on a CPU": (lambda m: m.half(), "dtype must be float32 or bfloat16 on device 'cpu'"),
    "float64": (lambda m: m.double(), "dtype must be float32 or bfloat16 on device 'cpu'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_are_not_supported(model: nn.Module, name: str):
    change, message = CHANGES[name]
    change(model)
    assert_refused(model, message)


# ------------------------------------------------------------------------------------------------ sizes


def with_kernel(config: dict[str, Any], taps: int) -> dict[str, Any]:
    return config | {"linear_attn_config": config["linear_attn_config"] | {"short_conv_kernel_size": taps}}


@pytest.mark.parametrize(
    "config, message",
    [
        (hub_config(hidden_act="gelu"), "config.hidden_act must be 'silu', got 'gelu'"),
        (with_kernel(hub_config(), 3), "config.linear_conv_kernel_dim must be 4, got 3"),
        (hub_config(num_expert_group=4, topk_group=2), "n_group is 4, config.topk_group 2"),
        (hub_config(head_dim=24), "the operators do not take this model, .*key_dim.*24"),
    ],
    ids=["activation", "kernel", "groups", "head"],
)
def test_configs_that_are_not_supported(config: dict[str, Any], message: str):
    assert_refused(build_reference(Variant("refused", config)), message)


def test_an_operator_that_refuses_leaves_the_model_as_it_was():
    """The last check runs the operators: after it has failed the model is the library's again, to the bit."""
    model, ids = build_reference(Variant("refused", hub_config(head_dim=24))), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(ValueError, match="left as it was"):
            accelerate(model)
        assert_same_bits(model(ids).logits, before)
    assert not any(type(m).__module__.startswith("kimi_native") for m in model.modules())
    assert not model.model._forward_pre_hooks


def test_a_device_without_kernels(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    """What a model on a GPU gets of a build without CUDA kernels."""
    from kimi_native.compat import transformers as compat

    check = compat.check_device
    monkeypatch.setattr(compat, "check_device", lambda device, dtype: check("cuda", dtype))
    monkeypatch.setattr(torch.ops.kimi_native, "cuda_build", lambda: "none", raising=False)
    assert_refused(model, "this build of kimi_native has no CUDA kernels")


# ------------------------------------------------------------------------------------------------ imports


def python(code: str) -> str:
    paths = [str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_kimi_native_does_not_import_transformers():
    assert python("import sys, kimi_native; kimi_native.accelerate, kimi_native.restore; print('transformers' in sys.modules)") == "False\n"


@pytest.mark.parametrize("missing", ["transformers", "transformers.models.kimi_linear"])
def test_without_transformers_or_its_kimi_linear(missing: str):
    code = f"""
import sys
sys.modules[{missing!r}] = None
import kimi_native
try:
    kimi_native.accelerate(object())
except ImportError as error:
    print(error)
"""
    assert "kimi_native.accelerate needs transformers with the classes of Kimi-Linear (versions" in python(code)


def test_wrong_arguments_are_the_library_s(model: nn.Module):
    accelerate(model)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
