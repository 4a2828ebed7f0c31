"""Kimi Delta Attention over vLLM's pool of state blocks: the layer, its attention backend, and the metadata of a step.

A block of the pool is one sequence's state in one layer: the last 3 inputs of the short convolution, then the recurrent state, in
float32 unless `mamba_ssm_cache_dtype` says bfloat16. vLLM gives blocks, copies them where a cached prefix is continued, and pads them
to the size of an attention page; our operators read and write them in place, by block number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, mamba_get_block_table_tensor

from kimi_native import ops
from kimi_native.compat.vllm.shard import Shard, grouped_linear, linear, parameter, sum_over_ranks
from kimi_native.compat.vllm.step import Step
from kimi_native.config import KimiLinearConfig
from kimi_native.model import to_device

NOBODY = -1  # the slot of a padding row, for our operators


def state_shapes(config: KimiLinearConfig, ranks: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Of one rank's block: convolution ``[3, channels]`` and recurrent state ``[heads, V, K]``."""
    heads, dim = config.kda_num_heads // ranks, config.kda_head_dim
    return (config.short_conv_kernel_size - 1, 3 * heads * dim), (heads, dim, dim)


def state_dtypes(vllm_config: Any) -> tuple[torch.dtype, torch.dtype]:
    """Of the convolution's and of the recurrent state."""
    recurrent = torch.bfloat16 if vllm_config.cache_config.mamba_ssm_cache_dtype == "bfloat16" else torch.float32
    return vllm_config.model_config.dtype, recurrent


@dataclass
class KdaMetadata:
    """The sequences of a step: D decoding ones with one token each, then N prefilling ones, packed."""

    step: Step
    decode_slots: Tensor  # [D] int32, -1 for padding
    prefill_slots: Tensor  # [N] int32
    prefill_cu_seqlens: Tensor  # [N + 1] int32, from 0
    prefill_max_seqlen: int  # tokens of the longest of these in this step
    prefill_has_state: Tensor  # [N] bool


class KdaMetadataBuilder(AttentionMetadataBuilder[KdaMetadata]):
    """Makes the metadata of one group of KDA layers, which share block numbers."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int = 1  # decoding sequences come first in a batch

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        rows = max(vllm_config.scheduler_config.max_num_seqs, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        self._decode_slots = torch.full((rows,), NOBODY, dtype=torch.int32, device=device)  # a CUDA graph reads it at replay

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> KdaMetadata:
        m = common_attn_metadata
        step = Step.of(m)
        blocks = mamba_get_block_table_tensor(
            m.block_table_tensor, m.seq_lens, self.kv_cache_spec, self.vllm_config.cache_config.mamba_cache_mode
        )[:, 0]
        slots = blocks.masked_fill(blocks == NULL_BLOCK_ID, NOBODY).to(torch.int32)
        decode = slots[: step.num_decodes]
        if not step.num_prefills and decode.shape[0] <= self._decode_slots.shape[0]:
            decode = self._decode_slots[: step.num_decodes].copy_(decode)
        if step.fresh_decodes:
            self._clear(slots[to_device(torch.tensor(step.fresh_decodes), slots.device)])
        prefills = slice(step.num_decodes, step.num_decodes + step.num_prefills)
        return KdaMetadata(
            step=step,
            decode_slots=decode,
            prefill_slots=slots[prefills].contiguous(),
            prefill_cu_seqlens=step.prefill_cu_seqlens(m),
            prefill_max_seqlen=max(step.prefill_lengths.tolist(), default=0),
            prefill_has_state=to_device(step.prefill_contexts > 0, slots.device),
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> KdaMetadata:
        return self.build(0, common_attn_metadata.replace(is_prefilling=None))

    def _clear(self, slots: Tensor) -> None:
        """A prompt of one token in a step of decoding sequences takes the decode kernel, which continues from what the slot holds."""
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in self.layer_names:
            for states in layers[name].kv_cache:
                states[slots.long()] = 0


class KdaBackend(AttentionBackend):
    """Names the metadata builder to vLLM; the layer itself calls the operators."""

    @staticmethod
    def get_name() -> str:
        return "KIMI_NATIVE_KDA"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("kimi_native: KDA layers call their operators themselves")

    @staticmethod
    def get_builder_cls() -> type[KdaMetadataBuilder]:
        return KdaMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class KimiDeltaAttention(nn.Module, MambaBase):
    """One KDA layer: projections, short convolution, gated delta rule, gated norm, output projection."""

    def __init__(self, config: KimiLinearConfig, vllm_config: Any, shard: Shard, prefix: str):
        super().__init__()
        self.config, self.shard, self.prefix = config, shard, prefix
        self._dtypes = state_dtypes(vllm_config)
        self._shapes = state_shapes(config, shard.size)
        heads, dim, hidden = config.kda_num_heads // shard.size, config.kda_head_dim, config.hidden_size
        self.heads, self.dim, self.width = heads, dim, heads * dim
        self.in_proj = parameter(3 * self.width + 2 * dim + heads, hidden)  # q, k, v, f_a, g_a, b
        self.conv = parameter(3 * self.width, config.short_conv_kernel_size)
        self.gates_b = parameter(2, self.width, dim)  # forget gate, output gate
        self.A_log = parameter(heads, dtype=torch.float32)
        self.dt_bias = parameter(heads, dim, dtype=torch.float32)
        self.o_norm = parameter(dim)
        self.o_proj = parameter(hidden, self.width)
        self.kv_cache = (torch.tensor([]), torch.tensor([]))
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"duplicate layer name: {prefix}")
        layers[prefix] = self

    # ---- what vLLM asks of a layer with state ----

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self._shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self._dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_attn_backend(self) -> type[AttentionBackend]:
        return KdaBackend

    # ---- forward ----

    def forward(self, x: Tensor) -> Tensor:
        """x ``[T, hidden]``; returns the same shape, summed over ranks."""
        dim, width = self.dim, self.width
        qkv, gates_a, beta = linear(x, self.in_proj).split([3 * width, 2 * dim, self.heads], dim=-1)
        gates = grouped_linear(gates_a.unflatten(-1, (2, dim)), self.gates_b).unflatten(-1, (self.heads, dim))
        forget, gate = gates.unbind(1)
        out = x.new_empty(x.shape[0], self.heads, dim)
        self._attend(qkv, forget, gate, beta, out)
        return sum_over_ranks(linear(out.view(-1, width), self.o_proj), self.shard)

    @eager_break_during_capture
    def _attend(self, qkv: Tensor, forget: Tensor, gate: Tensor, beta: Tensor, out: Tensor) -> None:
        """Everything that depends on which token is whose; fills `out`."""
        all_metadata = get_forward_context().attn_metadata
        if all_metadata is None:  # vLLM measures memory
            out.zero_()
            return
        m: KdaMetadata = all_metadata[self.prefix]
        conv_states, states = self.kv_cache
        split, end, eps = m.step.num_decodes, m.step.num_tokens, self.config.rms_norm_eps
        if split:
            ops.kda_decode_fused(
                qkv[:split, None], self.conv, conv_states, forget[:split, None], beta[:split, None], states, m.decode_slots,
                num_heads=self.heads, head_dim=self.dim, gate="softplus", A_log=self.A_log, dt_bias=self.dt_bias,
                norm_gate=gate[:split, None], norm_weight=self.o_norm, norm_eps=eps, out=out[:split, None],
            )  # fmt: skip
        if end > split:
            mixed = ops.short_conv(
                qkv[split:end], self.conv, conv_states, m.prefill_slots, m.prefill_cu_seqlens, has_initial_state=m.prefill_has_state
            )
            q, k, v = mixed.view(-1, 3, self.heads, self.dim).unbind(1)
            o = ops.kda_prefill(
                q, k, v, forget[split:end], beta[split:end], states, m.prefill_slots, m.prefill_cu_seqlens,
                gate="softplus", A_log=self.A_log, dt_bias=self.dt_bias, has_initial_state=m.prefill_has_state,
                max_seqlen=m.prefill_max_seqlen,
            )  # fmt: skip
            ops.gated_rms_norm(o, gate[split:end], self.o_norm, eps, out=out[split:end])
        if end < out.shape[0]:
            out[end:].zero_()
