"""Router and experts, split over ranks; and the dense MLP of the first layers.

Tensor parallel: every rank holds a part of the inner dimension of every expert. Expert parallel: every rank holds some experts whole; an
expert that lies elsewhere is id -1 to our operator, which skips it. Either way every rank sees all tokens, the shared expert is split by
its inner dimension, and one sum over the ranks ends the layer. No dimension is padded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_native import ops
from kimi_native.compat.vllm.shard import Shard, linear, parameter, sum_over_ranks
from kimi_native.config import KimiLinearConfig


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: KimiLinearConfig, shard: Shard):
        super().__init__()
        self.shard = shard
        inner = config.intermediate_size // shard.size
        self.gate_up = parameter(2 * inner, config.hidden_size)
        self.down = parameter(config.hidden_size, inner)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linear(x, self.gate_up).chunk(2, dim=-1)
        return sum_over_ranks(linear(F.silu(gate) * up, self.down), self.shard)


class MoE(nn.Module):
    """Routed experts and the shared expert."""

    def __init__(self, config: KimiLinearConfig, shard: Shard, expert_parallel: bool):
        super().__init__()
        c = config
        self.config, self.shard = config, shard
        self.expert_shard, self.inner_shard = (shard, Shard(0, 1)) if expert_parallel else (Shard(0, 1), shard)
        self.local_experts = self.expert_shard.part(c.num_experts)
        count, inner = self.expert_shard.count(c.num_experts), self.inner_shard.count(c.moe_intermediate_size)
        shared = shard.count(c.moe_intermediate_size * c.num_shared_experts)
        self.router = parameter(c.num_experts, c.hidden_size)
        self.router_bias = parameter(c.num_experts, dtype=torch.float32)
        self.w13 = parameter(count, 2 * inner, c.hidden_size)
        self.w2 = parameter(count, c.hidden_size, inner)
        self.shared_w13 = parameter(2 * shared, c.hidden_size) if shared else None
        self.shared_w2 = parameter(c.hidden_size, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        weights, ids = ops.moe_router(
            x, self.router, self.router_bias, top_k=c.num_experts_per_token, scale=c.routed_scaling_factor, renormalize=c.moe_renormalize
        )
        if self.expert_shard.size > 1:
            ids = ids - self.local_experts.start
            ids.masked_fill_((ids < 0) | (ids >= self.w13.shape[0]), -1)
        out = ops.moe_experts(x, self.w13, self.w2, weights, ids, shared_w13=self.shared_w13, shared_w2=self.shared_w2)
        return sum_over_ranks(out, self.shard)
