"""The one patch of vLLM, installed only where vLLM runs on a CPU.

`CpuPlatform.check_and_update_config` turns chunked prefill and prefix caching off for every model with latent attention, because
vLLM's own CPU kernels for it (outside of AMX machines) take whole prompts only; and it sets the block size to the one that those
kernels take, each time that a configuration is copied, also after workers and scheduler have agreed on a larger one (then a prompt would
be cut where no state is kept, and a cached prefix would be continued from a wrong one). Ours take any chunk with any prefix and any
multiple of 16, and no extension point lets a model say so. It also sets the dtype of recurrent states to float32 for models other than
those that its own kernels know; ours take bfloat16. The wrapper runs vLLM's function and then, for a model that runs with our
layers, puts back what was there. It touches no other model.
"""

from __future__ import annotations

from typing import Any

from kimi_native.compat.vllm import ARCHITECTURE

_ORIGINAL = "_kimi_native_original"
_STATE_DTYPE = ("cache_config", "mamba_ssm_cache_dtype")
_KEPT = [
    ("scheduler_config", "enable_chunked_prefill"), ("scheduler_config", "max_num_batched_tokens"),
    ("cache_config", "enable_prefix_caching"), ("cache_config", "block_size"), _STATE_DTYPE,
]  # fmt: skip


def keep_chunked_prefill() -> None:
    """Installs the wrapper; does nothing on other platforms or the second time."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.platforms.cpu import CpuPlatform

    if _ORIGINAL in vars(CpuPlatform):
        return
    original = vars(CpuPlatform)["check_and_update_config"]

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        asked = _values(vllm_config)
        original.__func__(cls, vllm_config)
        if vllm_config.model_config is None or vllm_config.model_config.architecture != ARCHITECTURE:
            return
        decided = _values(vllm_config)
        from kimi_native.compat.vllm.support import reasons_against, supported

        # A dtype of states that we do not take either is as vLLM's function left it.
        for values in (asked, asked | {_STATE_DTYPE: decided[_STATE_DTYPE]}):
            _set(vllm_config, values)
            if not list(reasons_against(vllm_config)):
                _logger().info_once("kimi_native: its CPU kernels take chunked prefill and prefix caching; both stay as asked for")
                return
        _set(vllm_config, decided)
        supported(vllm_config)  # says why not, before vLLM goes on with its own code

    setattr(CpuPlatform, _ORIGINAL, original)
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def restore() -> None:
    """Takes the wrapper away again."""
    from vllm.platforms.cpu import CpuPlatform

    if _ORIGINAL in vars(CpuPlatform):
        CpuPlatform.check_and_update_config = vars(CpuPlatform)[_ORIGINAL]
        delattr(CpuPlatform, _ORIGINAL)


def _values(vllm_config: Any) -> dict[tuple[str, str], Any]:
    return {(part, name): getattr(getattr(vllm_config, part), name) for part, name in _KEPT}


def _set(vllm_config: Any, values: dict[tuple[str, str], Any]) -> None:
    for (part, name), value in values.items():
        setattr(getattr(vllm_config, part), name, value)


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.plugins.kimi_native")
