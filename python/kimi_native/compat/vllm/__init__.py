"""A vLLM plugin: `vllm serve` and `vllm.LLM` run Kimi-Linear checkpoints with our operators, over vLLM's own scheduler and caches.

Installed beside vLLM, this package is found by its entry point (`vllm.general_plugins`); nothing has to be imported. `register` then
names our model class for the architecture `KimiLinearForCausalLM`. What the engine keeps: scheduling, chunked prefill, prefix caching,
the block pool, tensor and pipeline parallel groups, sampling, the server. What is ours: the layers.

    model.py     decoder layers, the model class, what vLLM asks of it; leaves what we do not support to vLLM's own class
    kda.py       Kimi Delta Attention over state slots of vLLM's pool, in place: layer, backend, metadata
    mla.py       multi-head latent attention over vLLM's pages: layer, backend, metadata
    step.py      which sequences of a step decode and which prefill
    pieces.py    the keys of prefilling sequences, in pieces of bounded size
    moe.py       router and experts, split over tensor parallel or expert parallel ranks; dense MLP
    shard.py     which part of a weight a rank holds, and dense projections
    names.py     names of checkpoint tensors: transformers' into the hub's
    loading.py   the slices that they fill, strict loading
    support.py   what is supported, in words; the model's sizes from vLLM's config
    platform.py  the one patch: vLLM's CPU platform would turn chunked prefill off for every MLA model
    versions.py  vLLM versions, and the names of vLLM that we rely on

`KIMI_NATIVE_VLLM=0` turns it off: nothing is registered or patched, and vLLM runs its own code. The same happens, with one
warning, when the version of vLLM is not among those named in versions.py; and for one model, with one warning that says why, when
its configuration asks for something that is not supported here (support.py). docs/integrations.md has the table.
"""

from __future__ import annotations

import os

ARCHITECTURE = "KimiLinearForCausalLM"
MODEL_CLASS = "kimi_native.compat.vllm.model:KimiLinearForCausalLM"
SWITCH = "KIMI_NATIVE_VLLM"


def enabled() -> bool:
    """False when the environment variable KIMI_NATIVE_VLLM is 0, false, off or no."""
    return os.environ.get(SWITCH, "1").strip().lower() not in ("0", "false", "off", "no")


def register() -> None:
    """The entry point: called by vLLM in each of its processes, possibly more than once. Never raises."""
    from vllm.logger import init_logger

    from kimi_native.compat.vllm import versions

    logger = init_logger("vllm.plugins.kimi_native")
    if not enabled():
        logger.debug("kimi_native is turned off by %s; vLLM runs its own code", SWITCH)
        return
    installed = versions.installed()
    if not versions.supported(installed):
        logger.warning_once(
            "kimi_native knows vLLM %s, this is %s: vLLM runs its own code. Install one of these versions to run Kimi-Linear with "
            "kimi_native's operators.",
            " and ".join(versions.SUPPORTED),
            installed,
        )
        return
    try:
        from vllm.model_executor.models import ModelRegistry

        from kimi_native.compat.vllm.platform import keep_chunked_prefill

        keep_chunked_prefill()
        ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)  # by name: imported when such a model is loaded
    except (ImportError, AttributeError, TypeError) as error:  # a build of a known version that differs from the released one
        logger.warning("kimi_native could not register with vLLM %s, which runs its own code: %r", installed, error)
        return
    logger.debug("kimi_native registered %s for %s", MODEL_CLASS, ARCHITECTURE)
