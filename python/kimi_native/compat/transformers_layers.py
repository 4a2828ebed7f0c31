"""The modules of transformers' Kimi-Linear with our operators in their forward passes.

Each class is the library's own with another `forward` and nothing else: no parameter, buffer or attribute is added. So an instance is
turned into one, and back, by its `__class__` alone (compat/transformers.py), and `super().forward` is the library's code. What is
derived from weights (the float32 of a bias, say) is derived in every call, so that loading, casting and moving weights stay possible.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearAttention,
    KimiLinearDeltaAttention,
    KimiLinearMLP,
    KimiLinearMoE,
    KimiLinearRMSNorm,
    apply_mask_to_padding_states,
)

from kimi_native import ops
from kimi_native.compat.transformers_cache import LatentLayer, Step, kda_states
from kimi_native.model import DTYPES, FEW_ROWS

# Up to so many new tokens of a row attention behind a cache is absorbed: the keys and values of the context are not expanded.
# Beyond, expanding them once is less work than attending in the wider latent space for every token.
ABSORBED_TOKENS = 8

# Arguments that say where sequences lie within a row (for flash attention), which is not in the mask.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def hooked(*modules: nn.Module) -> bool:
    """Whether somebody wants to know of the calls of these modules."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def takes_library(module: nn.Module, x: Tensor, weight: Tensor, *read: nn.Module) -> bool:
    """Whether the library's own forward must run: a gradient is wanted, these dtypes are not those of our operators, or one of the
    children whose weights ours reads, without calling it, is hooked."""
    if hooked(*read):
        return True
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        return True
    kind = x.device.type
    return x.dtype != weight.dtype or x.dtype not in DTYPES.get(kind, ()) or torch.is_autocast_enabled(kind)


def has_few_rows(x: Tensor) -> bool:
    """Whether a dense projection of ``x`` takes our GEMM, which reads the weight faster (`FEW_ROWS`)."""
    return x.numel() <= FEW_ROWS.get(x.device.type, 0) * x.shape[-1]


class NativeLinear(nn.Linear):
    """A dense projection."""

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is not None or not has_few_rows(input) or takes_library(self, input, self.weight):
            return super().forward(input)
        return ops.batch_invariant_linear(input.contiguous(), self.weight)


def project(x: Tensor, *linears: nn.Linear) -> Tensor:
    """Several projections of ``x`` side by side, ``[..., the sum of their features]``, where no gradient is wanted.

    Few rows go straight to the operator: a call of a module costs as much as a small projection. Modules that somebody has
    hooked or that have a bias are called as modules.
    """
    if not has_few_rows(x) or hooked(*linears) or any(linear.bias is not None for linear in linears):
        return linears[0](x) if len(linears) == 1 else torch.cat([linear(x) for linear in linears], dim=-1)
    rows = x.reshape(-1, x.shape[-1])
    if len(linears) == 1:
        return ops.batch_invariant_linear(rows, linears[0].weight).view(*x.shape[:-1], -1)
    sizes = [linear.out_features for linear in linears]
    out = x.new_empty(rows.shape[0], sum(sizes))
    for linear, part in zip(linears, out.split(sizes, dim=-1)):
        ops.batch_invariant_linear(rows, linear.weight, out=part)
    return out.view(*x.shape[:-1], -1)


class NativeRMSNorm(KimiLinearRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if takes_library(self, hidden_states, self.weight):
            return super().forward(hidden_states)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return ops.rms_norm(rows if rows.stride(1) == 1 else rows.contiguous(), self.weight, self.variance_epsilon).view(
            hidden_states.shape
        )


class NativeDeltaAttention(KimiLinearDeltaAttention):
    """KDA: short convolutions on q, k, v; gated delta rule; per-head norm with an output gate."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        kimi_native_step: Step | None = None,
        **kwargs: Any,
    ) -> Tensor:
        layer = None if cache_params is None else cache_params.layers[self.layer_idx]
        own_layer = layer is None or (type(layer) is LinearAttentionLayer and not layer.record_past)
        read = (self.conv1d, self.forget_gate, self.o_norm)
        if not own_layer or any(name in kwargs for name in PACKING) or takes_library(self, hidden_states, self.conv1d.weight, *read):
            return super().forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
        x = apply_mask_to_padding_states(hidden_states, attention_mask)
        step = kimi_native_step or Step(x.shape[0], x.shape[1], x.device)
        gate, dim = self.forget_gate, self.head_dim
        projected = project(x, self.q_proj, self.k_proj, self.v_proj, gate.f_a_proj, self.g_a_proj, self.b_proj)
        qkv, forget_a, gate_a, beta = projected.split([self.conv_dim, dim, dim, self.num_heads], dim=-1)
        forget, output_gate = project(forget_a, gate.f_b_proj), project(gate_a, self.g_b_proj)
        out = self._delta_rule(qkv, forget, beta, output_gate, layer, step)
        return project(out.view(*x.shape[:2], self.qkv_dim), self.o_proj)

    def _delta_rule(
        self, qkv: Tensor, forget: Tensor, beta: Tensor, output_gate: Tensor, layer: LinearAttentionLayer | None, step: Step
    ) -> Tensor:
        """From the projections of all tokens (``[B, Q, ...]``, tokens evenly spaced) to what goes into the last one."""
        (batch_size, num_new, channels), heads, dim = qkv.shape, self.num_heads, self.head_dim
        if layer is None:
            conv = qkv.new_empty(batch_size, self.conv_kernel_size - 1, channels)
            state, had_past = qkv.new_empty(batch_size, heads, dim, dim, dtype=torch.float32), False
        else:
            conv, state, had_past = kda_states(layer, qkv, heads, dim, self.conv_kernel_size)
        weight, norm = self.conv1d.weight.squeeze(1), self.o_norm
        A_log, dt_bias = self.forget_gate.A_log.float().view(heads), self.forget_gate.dt_bias.float().view(heads, dim)
        if had_past and num_new == 1:
            forget, output_gate = (t.view(batch_size, 1, heads, dim) for t in (forget, output_gate))
            return ops.kda_decode_fused(
                qkv, weight, conv, forget, beta, state, step.slots, num_heads=heads, head_dim=dim, A_log=A_log, dt_bias=dt_bias,
                norm_gate=output_gate, norm_weight=norm.weight, norm_eps=norm.variance_epsilon,
            )  # fmt: skip
        slots, starts, has_state = step.slots, step.cu_seqlens, step.has_state(had_past)
        mixed = ops.short_conv(qkv.flatten(0, 1), weight, conv, slots, starts, has_initial_state=has_state)
        q, k, v = mixed.view(-1, 3, heads, dim).unbind(1)
        forget, output_gate = (t.view(-1, heads, dim) for t in (forget, output_gate))
        o = ops.kda_prefill(
            q, k, v, forget, beta.flatten(0, 1), state, slots, starts, A_log=A_log, dt_bias=dt_bias, has_initial_state=has_state,
            max_seqlen=num_new,
        )  # fmt: skip
        return ops.gated_rms_norm(o, output_gate, norm.weight, norm.variance_epsilon, out=o)


class NativeLatentAttention(KimiLinearAttention):
    """Latent attention without positions: expanded for many new tokens, absorbed for few behind a cache."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        kimi_native_step: Step | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        x, step = hidden_states, kimi_native_step
        cache, ours = None, step is not None and self._can_run(x, step, kwargs)
        if ours and past_key_values is not None:
            cache = LatentLayer.of(past_key_values, self.layer_idx)
            ours = cache is not None and not torch.compiler.is_compiling()
        if not ours:
            return super().forward(x, attention_mask, past_key_values=past_key_values, **kwargs)
        assert step is not None
        q = project(x, self.q_proj) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(-1, self.num_heads, self.qk_head_dim)
        kv = project(x, self.kv_a_proj_with_mqa).flatten(0, 1)
        past = 0
        if cache is not None:
            past = cache.num_tokens
            cache.append(kv, self.kv_a_layernorm.weight, self.kv_a_layernorm.variance_epsilon, step)
        if cache is None or past == 0:
            out = self._attend_to_new(q, kv, step)
        elif step.num_new <= ABSORBED_TOKENS:
            out = self._attend_absorbed(q, cache, step, past)
        else:
            out = self._attend_to_cache(q, cache, step, past)
        return project(out.reshape(*x.shape[:2], -1), self.o_proj), None

    def _can_run(self, x: Tensor, step: Step, kwargs: dict[str, Any]) -> bool:
        wants_weights = kwargs.get("output_attentions", self.config.output_attentions)
        other_attention = wants_weights or "is_causal" in kwargs or any(name in kwargs for name in PACKING)
        drops = self.training and self.attention_dropout > 0
        read = (self.kv_a_layernorm, self.kv_b_proj)
        return step.plain and not other_attention and not drops and not takes_library(self, x, self.kv_b_proj.weight, *read)

    def _expanded(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys without their shared part, and values, ``[N, H, ...]``, of latents ``[N, L]``."""
        expanded = self.kv_b_proj(latents).view(-1, self.num_heads, self.qk_nope_head_dim + self.v_head_dim)
        k_nope, v = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return k_nope, v

    def _attend_to_new(self, q: Tensor, kv: Tensor, step: Step) -> Tensor:
        """The new tokens among themselves; nothing is before them. A row's padding is a sequence of its own."""
        latents, k_rope = kv.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        k_nope, v = self._expanded(self.kv_a_layernorm(latents))
        starts = step.cu_seqlens if step.pads is None else _with_pads(step, 0)
        return ops.mla_prefill(q, k_nope, k_rope, v, starts, starts, self.scaling)

    def _attend_to_cache(self, q: Tensor, cache: LatentLayer, step: Step, past: int) -> Tensor:
        """Many new tokens, behind others: keys and values of the whole context are expanded. A row's padding sees nothing."""
        pads = step.pads or (0,) * step.batch_size
        longest = max(past + step.num_new - min(pads), 1)  # as cache rows are stored: visible tokens first
        assert cache.rows is not None
        rows = cache.rows[:, :longest].reshape(-1, cache.rows.shape[2])
        k_nope, v = self._expanded(rows[:, : self.kv_lora_rank])
        starts_q, starts_k = step.cu_seqlens, step.every(longest)
        begins = [max(past - count, 0) for count in pads]
        if step.pads is not None:
            starts_q = _with_pads(step, past)
            starts_k = step.made(("keys", longest), lambda: starts_k.repeat_interleave(2)[:-1].contiguous())
            begins = [value for begin in begins for value in (0, begin)]
        return ops.mla_prefill(
            q, k_nope, rows[:, self.kv_lora_rank :], v, starts_q, starts_k, self.scaling, q_begin=step.i32(*begins)
        )  # fmt: skip

    def _attend_absorbed(self, q: Tensor, cache: LatentLayer, step: Step, past: int) -> Tensor:
        """Few new tokens: each is a row of its own that sees the cache up to itself. W_UK goes to the query, W_UV to the result."""
        weight = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank)
        w_uk, w_uv = weight[:, : self.qk_nope_head_dim], weight[:, self.qk_nope_head_dim :]
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        absorbed = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
        pads = step.pads or (0,) * step.batch_size
        lengths = step.i32(*[max(past + i + 1 - count, 0) for count in pads for i in range(step.num_new)])
        key = ("table", cache.capacity)
        table = step.made(key, lambda: cache.block_table().repeat_interleave(step.num_new, dim=0))
        query = torch.cat([absorbed, q_rope], dim=-1)
        o = ops.mla_decode(query, cache.pages, table, lengths, self.scaling, latent_dim=self.kv_lora_rank)
        if o.shape[0] <= FEW_ROWS[o.device.type]:
            return ops.batch_invariant_linear(o, w_uv)
        return torch.bmm(o.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)


def _with_pads(step: Step, past: int) -> Tensor:
    """``[2 B + 1]`` int32: each row's new tokens as two sequences, its padding and the rest."""
    assert step.pads is not None
    ends = [0]
    for count in step.pads:
        ends += [ends[-1] + min(max(count - past, 0), step.num_new), len(ends) // 2 * step.num_new + step.num_new]
    return step.i32(*ends)


class NativeMLP(KimiLinearMLP):
    """A dense feed-forward layer, or a shared expert."""

    def forward(self, x: Tensor) -> Tensor:
        if not has_few_rows(x) or takes_library(self, x, self.gate_proj.weight):
            return super().forward(x)
        gate, up = project(x, self.gate_proj, self.up_proj).chunk(2, dim=-1)
        return project(F.silu(gate) * up, self.down_proj)


class NativeMoE(KimiLinearMoE):
    """Router and experts; the shared expert stays a module of its own, whose weights lie apart."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        experts, gate = self.experts, self.gate
        if takes_library(self, hidden_states, experts.gate_up_proj, experts):
            return super().forward(hidden_states)
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        if hooked(gate):  # the library's recorder of the router's logits is such a hook
            _, weights, ids = gate(x)
            weights, ids = weights.float().contiguous(), ids.to(torch.int32).contiguous()
        else:
            weights, ids = ops.moe_router(
                x, gate.weight, gate.e_score_correction_bias.float(),
                top_k=gate.top_k, scale=gate.routed_scaling_factor, renormalize=gate.norm_topk_prob,
            )  # fmt: skip
        out = ops.moe_experts(x, experts.gate_up_proj, experts.down_proj, weights, ids)
        return out.view(hidden_states.shape) + self.shared_experts(hidden_states)


# What becomes what. Exactly these classes: a subclass has a forward of its own.
NATIVE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: NativeLinear,
    KimiLinearRMSNorm: NativeRMSNorm,
    KimiLinearDeltaAttention: NativeDeltaAttention,
    KimiLinearAttention: NativeLatentAttention,
    KimiLinearMLP: NativeMLP,
    KimiLinearMoE: NativeMoE,
}
LIBRARY = {native: library for library, native in NATIVE.items()}
