"""`accelerate` and `restore` for transformers' Kimi-Linear: what is checked, and what is put in place of what.

Three changes make a model accelerated: the classes of its modules (transformers_layers.py), and a hook before the forward of its
`KimiLinearModel` that tells its layers what the attention mask means (`Step`).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kimi_native.model import check_device

CHECKED_VERSIONS = "5.17 to 5.23"

try:
    from transformers.cache_utils import DynamicCache
    from transformers.models.kimi_linear import modeling_kimi_linear as library

    from kimi_native.compat.transformers_cache import Step
    from kimi_native.compat.transformers_layers import LIBRARY, NATIVE
except ImportError as error:
    raise ImportError(
        f"kimi_native.accelerate needs transformers with the classes of Kimi-Linear (versions {CHECKED_VERSIONS} are checked): {error}"
    ) from error

Model = TypeVar("Model")

HOOK = "_kimi_native_hook"
FORWARD_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")

# Modules that run as they are, or whose weights the replaced ones read.
KEPT = (
    library.KimiLinearRMSNormGated,
    library.KimiLinearForgetGate,
    library.KimiLinearTopkRouter,
    library.KimiLinearExperts,
    nn.Conv1d,
)


def accelerate(model: Model) -> Model:
    """See `kimi_native.accelerate`."""
    base = _base_model(model)
    if hasattr(base, HOOK):
        return model
    assert isinstance(model, nn.Module)
    _check_config(base.config)
    _check_modules(model)
    _check_weights(model)
    for module in model.modules():
        module.__class__ = NATIVE.get(type(module), type(module))
    setattr(base, HOOK, base.register_forward_pre_hook(_add_step, with_kwargs=True))
    try:
        _try_out(base)
    except RuntimeError as error:
        restore(model)
        raise ValueError(f"the operators do not take this model, which is left as it was: {error}") from error
    return model


def restore(model: Model) -> Model:
    """See `kimi_native.restore`."""
    base = _base_model(model)
    if hasattr(base, HOOK):
        assert isinstance(model, nn.Module)
        getattr(base, HOOK).remove()
        delattr(base, HOOK)
        for module in model.modules():
            module.__class__ = LIBRARY.get(type(module), type(module))
    return model


def _add_step(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before `KimiLinearModel.forward`: its layers pass the argument on to their attention."""
    inputs = dict(zip(FORWARD_ARGUMENTS, args)) | kwargs
    if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
        return args, kwargs  # the library says what is wrong
    return args, kwargs | {"kimi_native_step": Step.of_forward(inputs)}


def _try_out(base: Any) -> None:
    """Two tokens and one more: every operator sees the model's sizes. Raises the RuntimeError of one that does not take them."""
    device, training = base.embed_tokens.weight.device, base.training
    tokens, cache = torch.zeros(1, 2, dtype=torch.int64, device=device), DynamicCache(config=base.config)
    base.eval()
    try:
        with torch.no_grad():
            base(input_ids=tokens, past_key_values=cache, use_cache=True)
            base(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
    finally:
        base.train(training)


# ---- checks: before anything is touched --------------------------------------------------------------------------------------


def _base_model(model: Any) -> nn.Module:
    """The KimiLinearModel of a model of transformers' own classes; raises TypeError that says what else it is."""
    if isinstance(model, library.KimiLinearModel):
        return model
    if isinstance(model, library.KimiLinearPreTrainedModel):
        return model.model
    kind, package = type(model), type(model).__module__.split(".")[0]
    name = f"{kind.__module__}.{kind.__qualname__}"
    if package == "transformers_modules":
        why = "the hub's own modelling code is not supported: load it with trust_remote_code=False, which takes transformers' classes"
    elif package == "vllm":
        why = "this is vLLM's class, which docs/integrations.md has a section on"
    elif package == "peft":
        why = "adapters are not supported: merge_and_unload() gives a plain model"
    elif package == "torch":
        why = "accelerate the model itself, before it is compiled, wrapped or distributed"
    elif package == "kimi_native":
        why = "this model runs our operators already"
    else:
        why = "only Kimi-Linear of transformers is supported"
    raise TypeError(f"KimiLinearForCausalLM or KimiLinearModel of transformers expected, got {name}: {why}")


def _check_config(config: Any) -> None:
    """Raises ValueError, by key, for what the operators do not compute."""
    wanted = {"hidden_act": "silu", "linear_conv_kernel_dim": 4, "num_key_value_heads": config.num_attention_heads}
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise ValueError(f"config.{key} must be {value!r}, got {getattr(config, key)!r}")
    if config.n_group != config.topk_group:
        raise ValueError(f"routing by groups is not supported: config.n_group is {config.n_group}, config.topk_group {config.topk_group}")


def _check_modules(model: nn.Module) -> None:
    """Raises ValueError when a module that is to be replaced or read is not the library's own."""
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model is quantised; the operators take float32, bfloat16 and (on a GPU) float16 weights")
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError("the model is sharded over several processes (tp_plan): load it on one device")
    ours = (*NATIVE, *KEPT)
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise ValueError(f"{name or 'the model'} has a hook of accelerate (offloading, or several devices): load it on one device")
        if isinstance(module, ours) and "forward" in vars(module):
            raise ValueError(f"{name}.forward has been replaced already")
        if isinstance(module, ours) and type(module) not in ours:
            raise ValueError(f"{name} is a {type(module).__qualname__}, not the library's own (quantised, or patched already)")
        if getattr(module, "_is_expert_parallel", False):
            raise ValueError(f"{name} holds the experts of one of several processes: expert parallelism is not supported")
    expected = {"q_proj": nn.Linear, "kv_b_proj": nn.Linear, "conv1d": nn.Conv1d, "gate": library.KimiLinearTopkRouter}
    for name, module in model.named_modules():
        wanted = expected.get(name.rpartition(".")[2])
        if wanted is not None and not isinstance(module, wanted):
            raise ValueError(f"{name} is a {type(module).__qualname__}, not a {wanted.__qualname__} (quantised, or patched already)")


def _check_weights(model: nn.Module) -> None:
    """Raises ValueError unless all weights are plain tensors, of one dtype that the operators take, on one device of this build."""
    devices, dtypes = set(), set()
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if type(weight) not in (Tensor, nn.Parameter, nn.Buffer) or type(weight.data) is not Tensor:
            raise ValueError(f"{name} is a {type(weight).__qualname__}: quantised and sharded weights are not supported")
        if weight.is_meta:
            raise ValueError(f"{name} is on the meta device: load the weights first")
        devices.add(weight.device)
        if not name.endswith(("A_log", "dt_bias", "e_score_correction_bias")):  # these may stay float32 in any model
            dtypes.add(weight.dtype)
    if len(devices) != 1 or len(dtypes) != 1:
        found = sorted(map(str, devices)), sorted(str(dtype) for dtype in dtypes)
        raise ValueError(f"the weights must have one device and one dtype, got {' and '.join(', '.join(f) for f in found)}")
    check_device(devices.pop(), dtypes.pop())
