"""A hybrid of KDA and softmax attention (3 : 1) on our operators, under torch.compile. README.md beside this file says more.

Single letters in shapes: B sequences of T tokens, H heads of K channels, D the width of the model.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_native import ops

B, T, D, H, K, VOCAB, LAYERS = 2, 150, 128, 4, 32, 512, 4


class KdaLayer(nn.Module):
    """Kimi Delta Attention: q, k, v through a short convolution, the gated delta rule, a norm with an output gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.qkv, self.out = nn.Linear(D, 3 * H * K, bias=False), nn.Linear(H * K, D, bias=False)
        self.conv = nn.Parameter(0.5 * torch.randn(3 * H * K, 4))
        self.forget, self.beta, self.gate = (nn.Linear(D, n, bias=False) for n in (H * K, H, H * K))
        self.A_log, self.dt_bias = nn.Parameter(torch.rand(H)), nn.Parameter(torch.rand(H, K) * 4 - 6)
        self.out_norm = nn.Parameter(torch.ones(K))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out = self.delta_rule(self.qkv(y), self.forget(y), self.beta(y), self.gate(y))
        return x + self.out(out)

    def delta_rule(self, qkv: Tensor, forget: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
        """All ``[B, T, ...]``; the operators want the sequences one behind the other, and say by `cu_seqlens` where each begins."""
        batch, length, channels = qkv.shape
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=qkv.device) * length
        slots = torch.arange(batch, dtype=torch.int32, device=qkv.device)
        fresh = torch.zeros(batch, dtype=torch.bool, device=qkv.device)  # no initial state: whatever the pools hold is not read
        conv_state, state = qkv.new_empty(batch, 3, channels), qkv.new_empty(batch, H, K, K, dtype=torch.float32)
        mixed = ops.short_conv(qkv.view(-1, channels), self.conv, conv_state, slots, cu_seqlens, has_initial_state=fresh)
        q, k, v = mixed.view(-1, 3, H, K).unbind(1)
        o = ops.kda_prefill(
            q, k, v, forget.view(-1, H, K), beta.view(-1, H), state, slots, cu_seqlens,
            A_log=self.A_log, dt_bias=self.dt_bias, has_initial_state=fresh, max_seqlen=length,
        )  # fmt: skip
        return ops.gated_rms_norm(o, gate.view(-1, H, K), self.out_norm).view(batch, length, H * K)


class TorchKdaLayer(KdaLayer):
    """The same layer in plain torch, token by token."""

    def delta_rule(self, qkv: Tensor, forget: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
        batch, length, channels = qkv.shape
        mixed = F.silu(F.conv1d(F.pad(qkv.transpose(1, 2), (3, 0)), self.conv[:, None], groups=channels)).transpose(1, 2)
        q, k, v = mixed.view(batch, length, 3, H, K).unbind(2)
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        decay = (-self.A_log.exp()[:, None] * F.softplus(forget.view(batch, length, H, K) + self.dt_bias)).exp()
        step, state, rows = beta.sigmoid(), qkv.new_zeros(batch, H, K, K), []  # state: [B, H, key, value]
        for t in range(length):
            state = state * decay[:, t, :, :, None]
            error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], error * step[:, t, :, None])
            rows.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * K**-0.5)
        o = torch.stack(rows, dim=1)
        o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.out_norm * gate.view(o.shape).sigmoid()
        return o.flatten(2)


class SoftmaxLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.qkv, self.out = nn.Linear(D, 3 * H * K, bias=False), nn.Linear(H * K, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, H, K).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.gate_up, self.down = nn.Linear(D, 6 * D, bias=False), nn.Linear(3 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Hybrid(nn.Module):
    """Every fourth layer attends with a softmax, the others are KDA."""

    def __init__(self, kda: type[KdaLayer]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB, bias=False)
        mixers = [SoftmaxLayer() if i % 4 == 3 else kda() for i in range(LAYERS)]
        self.layers = nn.Sequential(*[layer for mixer in mixers for layer in (mixer, FeedForward())])
        self.norm = nn.RMSNorm(D, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embedding(tokens))))


@torch.inference_mode()
def main() -> int:
    torch.manual_seed(0)
    ours, plain = Hybrid(KdaLayer).eval(), Hybrid(TorchKdaLayer).eval()
    plain.load_state_dict(ours.state_dict())
    tokens = torch.randint(0, VOCAB, (B, T))

    eager, compiled = ours(tokens), torch.compile(ours, fullgraph=True)(tokens)
    failed = 0
    for name, found, expected in (("compiled and eager", compiled, eager), ("ours and plain torch", eager, plain(tokens))):
        worst = (found - expected).abs().max().item()
        print(f"{name}: largest difference of a logit {worst:.1e}, of logits with standard deviation {expected.std():.2f}")
        failed += not worst < 1e-4
    return failed


if __name__ == "__main__":
    sys.exit(main())
