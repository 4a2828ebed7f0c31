"""Which versions of vLLM this plugin knows, and what it takes from them.

`RELIED_ON` is what the other modules here import or override, as data: a test compares it with the installed vLLM, or with the sources
of another one, so that a new version shows what moved before a model is ever loaded.
"""

from __future__ import annotations

SUPPORTED = ("0.32", "0.33")

# module -> name -> parameters (of a function, or of a class's method "Class.method") that must exist; None: the name alone.
RELIED_ON: dict[str, dict[str, tuple[str, ...] | None]] = {
    "vllm.logger": {"init_logger": ("name",)},
    "vllm.model_executor.models.registry": {"_ModelRegistry.register_model": ("model_arch", "model_cls")},
    "vllm.model_executor.models.interfaces": {
        "HasInnerState": None,
        "IsHybrid.get_mamba_state_shape_from_config": ("vllm_config",),
        "IsHybrid.get_mamba_state_copy_func": (),
        "SupportsPP": None,
        "SupportsReplaySSM": None,
    },
    "vllm.model_executor.models.utils": {"make_layers": ("num_hidden_layers", "layer_fn", "prefix"), "PPMissingLayer": None},
    "vllm.model_executor.layers.attention_layer_base": {
        "AttentionLayerBase.bind_kv_cache": ("kv_cache",),
        "AttentionLayerBase.get_attn_backend": (),
        "AttentionLayerBase.get_kv_cache_spec": ("vllm_config",),
    },
    "vllm.model_executor.layers.mamba.abstract": {
        "MambaBase.bind_kv_cache": ("kv_cache",),
        "MambaBase.get_state_shape": (),
        "MambaBase.get_state_dtype": (),
        "MambaBase.mamba_type": None,
        "MambaBase.get_kv_cache_spec": ("vllm_config",),
    },
    "vllm.model_executor.layers.mamba.mamba_utils": {
        "get_temporal_copy_spec": ("state", "block_ids", "cur_block_idx", "num_accepted_tokens")
    },
    "vllm.model_executor.layers.logits_processor": {"LogitsProcessor.__init__": ("vocab_size",)},
    "vllm.model_executor.layers.vocab_parallel_embedding": {
        "VocabParallelEmbedding.__init__": ("num_embeddings", "embedding_dim", "prefix"),
        "ParallelLMHead.__init__": ("num_embeddings", "embedding_dim", "prefix"),
    },
    "vllm.v1.attention.backend": {
        "AttentionBackend.get_name": (),
        "AttentionBackend.get_builder_cls": (),
        "AttentionBackend.get_supported_kernel_block_sizes": (),
        "AttentionBackend.is_mla": (),
        "AttentionBackend.is_ssm": (),
        "AttentionMetadataBuilder.__init__": ("kv_cache_spec", "layer_names", "vllm_config", "device"),
        "AttentionMetadataBuilder.build": ("common_prefix_len", "common_attn_metadata", "fast_build"),
        "AttentionMetadataBuilder.build_for_cudagraph_capture": ("common_attn_metadata",),
        "AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE": None,
        "CommonAttentionMetadata.query_start_loc": None,
        "CommonAttentionMetadata.query_start_loc_cpu": None,
        "CommonAttentionMetadata.seq_lens": None,
        "CommonAttentionMetadata.seq_lens_cpu_upper_bound": None,
        "CommonAttentionMetadata.is_prefilling": None,
        "CommonAttentionMetadata.num_reqs": None,
        "CommonAttentionMetadata.num_actual_tokens": None,
        "CommonAttentionMetadata.max_query_len": None,
        "CommonAttentionMetadata.block_table_tensor": None,
        "CommonAttentionMetadata.slot_mapping": None,
        "CommonAttentionMetadata.replace": None,
        "MultipleOf": None,
    },
    "vllm.v1.attention.backends.registry": {"MambaAttentionBackendEnum": None},
    "vllm.v1.attention.backends.utils": {
        "mamba_get_block_table_tensor": ("block_table", "seq_lens", "kv_cache_spec", "mamba_cache_mode"),
        "NULL_BLOCK_ID": None,
    },
    "vllm.v1.kv_cache_interface": {"MLAAttentionSpec": None, "MambaSpec": None},
    "vllm.compilation.breakable_cudagraph": {"eager_break_during_capture": ("fn",)},
    "vllm.forward_context": {"get_forward_context": ()},
    "vllm.sequence": {"IntermediateTensors": None},
    "vllm.config.vllm": {
        f"VllmConfig.{name}": None
        for name in (
            "model_config", "cache_config", "parallel_config", "scheduler_config", "compilation_config", "quant_config", "lora_config",
            "speculative_config", "kv_transfer_config",
        )
    },
    "vllm.config.parallel": {
        f"ParallelConfig.{name}": None
        for name in (
            "tensor_parallel_size", "data_parallel_size", "enable_expert_parallel", "decode_context_parallel_size",
            "prefill_context_parallel_size", "enable_eplb", "use_ubatching",
        )
    },
    "vllm.config.cache": {
        f"CacheConfig.{name}": None
        for name in (
            "block_size", "cache_dtype", "enable_prefix_caching", "mamba_cache_dtype", "mamba_ssm_cache_dtype", "mamba_cache_mode",
            "use_replayssm",
        )
    },
    "vllm.config.scheduler": {
        f"SchedulerConfig.{name}": None for name in ("enable_chunked_prefill", "max_num_batched_tokens", "max_num_seqs")
    },
    "vllm.config.compilation": {f"CompilationConfig.{name}": None for name in ("static_forward_context", "max_cudagraph_capture_size")},
    "vllm.platforms.cpu": {"CpuPlatform.check_and_update_config": ("vllm_config",)},
}  # fmt: skip


def installed() -> str:
    """The version of the imported vLLM."""
    import vllm

    return str(vllm.__version__)


def supported(version: str) -> bool:
    """Whether `version` ("0.32.0", "0.33.1+cpu") is a release of a version named in SUPPORTED."""
    return ".".join(version.split("+")[0].split(".")[:2]) in SUPPORTED
