"""The one patch of vLLM, installed only where vLLM runs on a CPU.

`CpuPlatform.check_and_update_config` turns chunked prefill and prefix caching off for every model with latent attention, because
vLLM's own CPU kernels for it (outside of AMX machines) take whole prompts only; and it sets the block size to the one that those
kernels take, each time that a configuration is copied, also after workers and scheduler have agreed on a larger one (then a prompt would
be cut where no state is kept, and a cached prefix would be continued from a wrong one). Ours take any chunk with any prefix and any
multiple of 16, and no extension point lets a model say so. The wrapper runs vLLM's function and then, for a model that runs with our
layers, puts back what was there. It touches no other model.
"""

from __future__ import annotations

from typing import Any

_ORIGINAL = "_kimi_native_original"
_KEPT = [
    ("scheduler_config", "enable_chunked_prefill"), ("scheduler_config", "max_num_batched_tokens"),
    ("cache_config", "enable_prefix_caching"), ("cache_config", "block_size"),
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
        before = {(part, name): getattr(getattr(vllm_config, part), name) for part, name in _KEPT}
        original.__func__(cls, vllm_config)
        if vllm_config.model_config is not None and _is_ours(vllm_config):
            for (part, name), value in before.items():
                setattr(getattr(vllm_config, part), name, value)
            _logger().info_once("kimi_native: its CPU kernels take chunked prefill and prefix caching, which stay as they were asked for")

    setattr(CpuPlatform, _ORIGINAL, original)
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def restore() -> None:
    """Takes the wrapper away again."""
    from vllm.platforms.cpu import CpuPlatform

    if _ORIGINAL in vars(CpuPlatform):
        CpuPlatform.check_and_update_config = vars(CpuPlatform)[_ORIGINAL]
        delattr(CpuPlatform, _ORIGINAL)


def _is_ours(vllm_config: Any) -> bool:
    from kimi_native.compat.vllm import ARCHITECTURE
    from kimi_native.compat.vllm.support import supported

    return vllm_config.model_config.architecture == ARCHITECTURE and supported(vllm_config)


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.plugins.kimi_native")
