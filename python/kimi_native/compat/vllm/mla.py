"""Multi-head latent attention without positions, over vLLM's pages: the layer, its attention backend, and the metadata of a step.

A page holds rows of ``[latent, shared key]`` in the model's dtype. Each step first writes its new rows; decoding sequences then attend in
the latent space (absorbed form), prefilling ones to keys and values that are expanded from the rows, those of earlier chunks included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from kimi_native import ops
from kimi_native.compat.vllm.pieces import Piece, plan_pieces
from kimi_native.compat.vllm.shard import Shard, grouped_linear, linear, parameter, sum_over_ranks
from kimi_native.compat.vllm.step import Step
from kimi_native.config import KimiLinearConfig
from kimi_native.model import PREFIX_PIECE_TOKENS


@dataclass
class MlaMetadata:
    """What MLA layers need to know of a step; see Step for the order of its sequences."""

    step: Step
    slot_mapping: Tensor  # [T] int64: row of each new token in the flattened pages; -1: none
    block_table: Tensor  # [D, M] int32
    lengths: Tensor  # [D] int32: keys that each decoding row sees, itself included
    pieces: list[Piece]


class MlaMetadataBuilder(AttentionMetadataBuilder[MlaMetadata]):
    """Makes the metadata of the MLA layers, which share page numbers."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> MlaMetadata:
        m = common_attn_metadata
        step = Step.of(m)
        return MlaMetadata(
            step=step,
            slot_mapping=m.slot_mapping[: step.num_tokens],
            block_table=m.block_table_tensor[: step.num_decodes],
            lengths=m.seq_lens[: step.num_decodes].to(torch.int32),
            pieces=plan_pieces(step, m.block_table_tensor[step.num_decodes :], self.kv_cache_spec.block_size),
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> MlaMetadata:
        return self.build(0, common_attn_metadata.replace(is_prefilling=None))


class MlaBackend(AttentionBackend):
    """Names the metadata builder and the page sizes to vLLM; the layer itself calls the operators."""

    supported_dtypes = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes = ["auto", "float32", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        return "KIMI_NATIVE_MLA"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("kimi_native: MLA layers call their operators themselves")

    @staticmethod
    def get_builder_cls() -> type[MlaMetadataBuilder]:
        return MlaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def is_mla(cls) -> bool:
        return True


class MultiHeadLatentAttention(nn.Module, AttentionLayerBase):
    """One MLA layer."""

    supports_dcp = False

    def __init__(self, config: KimiLinearConfig, vllm_config: Any, shard: Shard, prefix: str):
        super().__init__()
        c = config
        self.config, self.shard, self.prefix = config, shard, prefix
        self._dtype = vllm_config.model_config.dtype
        self._cache_dtype = vllm_config.cache_config.cache_dtype
        self.heads = c.num_attention_heads // shard.size
        self.scale = c.qk_head_dim**-0.5
        self.in_proj = parameter(self.heads * c.qk_head_dim + c.latent_dim, c.hidden_size)  # q of this rank's heads, kv_a whole
        self.kv_a_norm = parameter(c.kv_lora_rank)
        self.kv_b = parameter(self.heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)  # per head W_UK, then W_UV
        self.o_proj = parameter(c.hidden_size, self.heads * c.v_head_dim)
        self.absorb: Tensor | None = None  # [heads, L, nope]: W_UK as rows to project on
        self.kv_cache = torch.tensor([])
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"duplicate layer name: {prefix}")
        layers[prefix] = self

    # ---- what vLLM asks of an attention layer ----

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache.squeeze(1)  # [pages, 1, rows, L + R]

    def get_attn_backend(self) -> type[AttentionBackend]:
        return MlaBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> MLAAttentionSpec:
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            max_tp_shards=1,
            head_size=self.config.latent_dim,
            dtype=self._dtype,
            cache_dtype_str=self._cache_dtype,
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.absorb = self.kv_b[:, : self.config.qk_nope_head_dim].transpose(1, 2).contiguous()

    # ---- forward ----

    def forward(self, x: Tensor) -> Tensor:
        """x ``[T, hidden]``; returns the same shape, summed over ranks."""
        c = self.config
        q, kv = linear(x, self.in_proj).split([self.heads * c.qk_head_dim, c.latent_dim], dim=-1)
        out = x.new_empty(x.shape[0], self.heads, c.v_head_dim)
        self._attend(q.unflatten(-1, (self.heads, c.qk_head_dim)), kv, out)
        return sum_over_ranks(linear(out.view(x.shape[0], -1), self.o_proj), self.shard)

    @eager_break_during_capture
    def _attend(self, q: Tensor, kv: Tensor, out: Tensor) -> None:
        """Everything that depends on which token is whose; fills `out`."""
        all_metadata = get_forward_context().attn_metadata
        if all_metadata is None:  # vLLM measures memory: take what the expanded keys of a piece and their merging take
            self._expand(kv.new_empty(PREFIX_PIECE_TOKENS, kv.shape[1]))
            out.new_empty((2, *out.shape), dtype=torch.float32)
            out.zero_()
            return
        m: MlaMetadata = all_metadata[self.prefix]
        split, end = m.step.num_decodes, m.step.num_tokens
        ops.mla_cache_write(kv[:end], self.kv_a_norm, self.config.kv_a_norm_eps, self.kv_cache, m.slot_mapping)
        if split:
            out[:split] = self._decode(q[:split], m)
        if end > split:
            self._prefill(q[split:end], m.pieces, out[split:end])
        if end < out.shape[0]:
            out[end:].zero_()

    def _decode(self, q: Tensor, m: MlaMetadata) -> Tensor:
        c = self.config
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        assert self.absorb is not None, "process_weights_after_loading was not called"
        absorbed = torch.cat([grouped_linear(q_nope, self.absorb), q_rope], dim=-1)
        o = ops.mla_decode(absorbed, self.kv_cache, m.block_table, m.lengths, self.scale, latent_dim=c.kv_lora_rank)
        return grouped_linear(o, self.kv_b[:, c.qk_nope_head_dim :])

    def _prefill(self, q: Tensor, pieces: list[Piece], out: Tensor) -> None:
        """A sequence of one piece writes its output; the pieces of a longer one are merged in float32."""
        for piece in pieces:
            mine, into = q[piece.queries], out[piece.queries]
            if piece.first and piece.last:
                self._piece(mine, piece, into, None)
                continue
            part = torch.empty(into.shape, dtype=torch.float32, device=into.device)
            part_lse = torch.empty(into.shape[:2], dtype=torch.float32, device=into.device)
            self._piece(mine, piece, part, part_lse)
            if piece.first:
                merged, merged_lse = part, part_lse
            else:
                ops.mla_merge(merged, merged_lse, part, part_lse)
            if piece.last:
                into.copy_(merged)

    def _piece(self, q: Tensor, piece: Piece, out: Tensor, lse: Tensor | None) -> None:
        latents = self.kv_cache[piece.pages, piece.rows]
        k_nope, v = self._expand(latents)
        ops.mla_prefill(
            q, k_nope, latents[:, self.config.kv_lora_rank :], v, piece.cu_seqlens_q, piece.cu_seqlens_k, self.scale,
            q_begin=piece.q_begin, out=out, lse=lse,
        )  # fmt: skip

    def _expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``[keys, heads, nope]`` and values ``[keys, heads, v]`` of rows ``[keys, L + R]``."""
        c = self.config
        expanded = linear(latents[:, : c.kv_lora_rank], self.kv_b.flatten(0, 1)).unflatten(-1, (self.heads, -1))
        k_nope, v = expanded.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        return k_nope, v
