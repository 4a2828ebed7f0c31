"""The one patch of vLLM, installed only where vLLM runs on a CPU.

`CpuPlatform.check_and_update_config` turns chunked prefill and prefix caching off for every model with latent attention, because
vLLM's own CPU kernels for it (outside of AMX machines) take whole prompts only. Ours take any chunk with any prefix, and no extension
point lets a model say so. The wrapper runs vLLM's function and then, for a model that runs with our layers, puts back what was asked
for. It touches no other model.
"""

from __future__ import annotations

from typing import Any

_ORIGINAL = "_kimi_native_original"


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
        asked = _schedule(vllm_config)
        original.__func__(cls, vllm_config)
        if vllm_config.model_config is not None and _schedule(vllm_config) != asked and _is_ours(vllm_config):
            scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
            scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens = asked
            _logger().info_once("kimi_native: chunked prefill and prefix caching are as asked for; its CPU kernels take both")

    setattr(CpuPlatform, _ORIGINAL, original)
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def restore() -> None:
    """Takes the wrapper away again."""
    from vllm.platforms.cpu import CpuPlatform

    if _ORIGINAL in vars(CpuPlatform):
        CpuPlatform.check_and_update_config = vars(CpuPlatform)[_ORIGINAL]
        delattr(CpuPlatform, _ORIGINAL)


def _schedule(vllm_config: Any) -> tuple[bool, bool, int]:
    scheduler = vllm_config.scheduler_config
    return scheduler.enable_chunked_prefill, vllm_config.cache_config.enable_prefix_caching, scheduler.max_num_batched_tokens


def _is_ours(vllm_config: Any) -> bool:
    from kimi_native.compat.vllm import ARCHITECTURE
    from kimi_native.compat.vllm.support import supported

    return vllm_config.model_config.architecture == ARCHITECTURE and supported(vllm_config)


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.plugins.kimi_native")
