"""What of a vLLM configuration runs with our layers, in words; and the model's sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.logger import init_logger

from kimi_native.config import ConfigError, KimiLinearConfig
from kimi_native.model import check_device

logger = init_logger("vllm.plugins.kimi_native")

# The hub's keys, as attributes of vLLM's config object (or of transformers', which keeps them).
_KEYS = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mla_use_nope", "intermediate_size", "first_k_dense_replace",
    "moe_layer_freq", "num_experts", "num_experts_per_token", "num_shared_experts", "moe_intermediate_size",
    "moe_router_activation_func", "moe_renormalize", "routed_scaling_factor", "use_grouped_topk", "num_expert_group", "topk_group",
    "rms_norm_eps", "hidden_act", "tie_word_embeddings", "num_nextn_predict_layers", "attention_bias", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip

# Features of later models of the same class in vLLM; each must be absent.
_ABSENT = (
    "mla_use_output_gate", "attn_res_block_size", "latent_moe_use_norm", "activation_situ_beta", "activation_situ_linear_beta",
    "routed_expert_hidden_size",
)  # fmt: skip

_MAX_EXPERTS, _MAX_TOP_K = 512, 32  # of ops.moe_router


def sizes(vllm_config: Any) -> KimiLinearConfig:
    """The model's sizes. Raises ConfigError that names the key."""
    hf = vllm_config.model_config.hf_text_config
    for key in _ABSENT:
        if getattr(hf, key, None):
            raise ConfigError(f"config key {key!r} is {getattr(hf, key)!r}; supported: absent")
    values = {key: getattr(hf, key) for key in _KEYS if hasattr(hf, key)}
    values["linear_attn_config"] = {
        key: value for key, value in (getattr(hf, "linear_attn_config", None) or {}).items() if value is not None and value is not False
    }
    values["model_max_length"] = vllm_config.model_config.max_model_len
    values["dtype"] = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return KimiLinearConfig.from_dict(values)


def supported(vllm_config: Any) -> bool:
    """Whether this engine runs with our layers; says once why not."""
    reasons = list(reasons_against(vllm_config))
    if reasons:
        logger.warning_once(
            "kimi_native leaves this model to vLLM's own code: %s. docs/integrations.md lists what it supports.", "; ".join(reasons)
        )
    return not reasons


def reasons_against(vllm_config: Any) -> Iterator[str]:
    """Why this engine cannot run with our layers; nothing if it can."""
    try:
        config = sizes(vllm_config)
    except ConfigError as error:
        yield str(error)
        return
    yield from _device(vllm_config)
    yield from _features(vllm_config)
    yield from _caches(vllm_config)
    yield from _splits(vllm_config, config)


def _device(vllm_config: Any) -> Iterator[str]:
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        yield f"its kernels are for CPUs and NVIDIA GPUs, this is {current_platform.device_name}"
        return
    try:
        check_device(current_platform.device_type, vllm_config.model_config.dtype)
    except ValueError as error:
        yield str(error)


def _features(vllm_config: Any) -> Iterator[str]:
    import vllm.envs as envs

    parallel = vllm_config.parallel_config
    if vllm_config.model_config.quantization is not None or vllm_config.quant_config is not None:
        yield f"quantised weights ({vllm_config.model_config.quantization}) are not supported"
    if vllm_config.lora_config is not None:
        yield "LoRA is not supported"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding is not supported"
    if vllm_config.kv_transfer_config is not None:
        yield "KV transfer connectors are not supported"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism is not supported"
    if parallel.enable_eplb:
        yield "expert load balancing (EPLB) is not supported"
    if parallel.enable_expert_parallel and parallel.data_parallel_size > 1:
        yield "expert parallelism over data parallel ranks is not supported"
    if parallel.use_ubatching:
        yield "microbatches (dual batch overlap) are not supported"
    if envs.VLLM_BATCH_INVARIANT:
        yield "VLLM_BATCH_INVARIANT is not supported"


def _caches(vllm_config: Any) -> Iterator[str]:
    cache, dtype = vllm_config.cache_config, vllm_config.model_config.dtype
    names = {"auto": dtype, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16}
    if names.get(cache.cache_dtype) != dtype:
        yield f"kv_cache_dtype {cache.cache_dtype!r} is not supported, only the model's own ({dtype})"
    if names.get(cache.mamba_cache_dtype) != dtype:
        yield f"mamba_cache_dtype {cache.mamba_cache_dtype!r} is not supported, only the model's own ({dtype})"
    half = dtype in (torch.bfloat16, torch.float16)
    if cache.mamba_ssm_cache_dtype not in ("auto", "float32", *(["bfloat16"] if half else [])):
        takes = "'float32' or 'bfloat16'" if half else "'float32'"
        yield f"mamba_ssm_cache_dtype {cache.mamba_ssm_cache_dtype!r} is not supported with {dtype}, only {takes}"
    if cache.use_replayssm:
        yield "ReplaySSM is not supported"


def _splits(vllm_config: Any, c: KimiLinearConfig) -> Iterator[str]:
    if not (16 <= c.kda_head_dim <= 256 and c.kda_head_dim % 16 == 0):
        yield f"linear_attn_config.head_dim {c.kda_head_dim} is not supported, only multiples of 16 from 16 to 256"
    if c.num_experts > _MAX_EXPERTS or c.num_experts_per_token > _MAX_TOP_K:
        yield f"{c.num_experts} experts of which {c.num_experts_per_token} are taken: at most {_MAX_EXPERTS} and {_MAX_TOP_K} are supported"
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    split = {
        "linear_attn_config.num_heads": c.kda_num_heads,
        "num_attention_heads": c.num_attention_heads,
        "intermediate_size": c.intermediate_size,
    }
    if parallel.enable_expert_parallel and c.num_experts < ranks:
        yield f"{c.num_experts} experts cannot be spread over {ranks} ranks"
    if not parallel.enable_expert_parallel:
        split["moe_intermediate_size"] = c.moe_intermediate_size
    if c.num_shared_experts:
        split["moe_intermediate_size * num_shared_experts"] = c.moe_intermediate_size * c.num_shared_experts
    for name, length in split.items():
        if length % ranks:
            yield f"{name} ({length}) does not divide by {ranks} tensor parallel ranks"
