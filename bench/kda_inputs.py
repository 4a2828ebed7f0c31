"""Inputs of the KDA benchmarks, and the fp64 form of KDA that judges them: the recurrence in chunks of tokens, in plain torch.

Gates are drawn as a KDA layer is initialised: rates exp(A_log) from 1 to 16 and time steps from 0.001 to 0.1, so that some
channels of a head forget within a token and others remember thousands.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from shapes import DIM
from torch import Tensor

from kimi_native.ops.kda_prefill import KdaGate

LOWER_BOUND = -5.0
CHUNK = 32  # tokens
GROUP = 512  # tokens whose pairs of tokens are in memory at once


@dataclass
class Inputs:
    q: Tensor  # [T, H, K]; with a batch [B, S, H, K], here and below
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor  # [T, H]
    A_log: Tensor  # [H]
    dt_bias: Tensor  # [H, K]


def inputs(tokens: tuple[int, ...], heads: int, dtype: torch.dtype, device: str) -> Inputs:
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*tokens, *shape, dtype=dtype, device=device)

    dt = torch.empty(heads, DIM, device=device).uniform_(-6.9, -2.3).exp()
    q, k, v, g, beta = normal(heads, DIM), normal(heads, DIM), normal(heads, DIM), normal(heads, DIM), normal(heads)
    return Inputs(
        *(q, k, v, g, beta),
        A_log=torch.empty(heads, device=device).uniform_(1, 16).log(),
        dt_bias=dt + torch.log(-torch.expm1(-dt)),  # softplus of it is dt
    )


def log_decay(x: Inputs, g: Tensor, gate: KdaGate) -> Tensor:
    """In fp64 for fp64 gates."""
    if gate == "log_decay":
        return g
    raw, rate = g + x.dt_bias.to(g.dtype), x.A_log.to(g.dtype).exp()[:, None]
    return -rate * F.softplus(raw) if gate == "softplus" else LOWER_BOUND * torch.sigmoid(rate * raw)


def normalised(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def recurrence(x: Inputs, state: Tensor, gate: KdaGate, tokens: slice) -> tuple[Tensor, Tensor]:
    """One sequence [T, H, ...] from `state` [H, V, K], both fp64. Returns its outputs [T, H, V] and its last state.

    In a chunk, with G the cumulative log-decay and S the state before it, the deltas u solve (I + A) u = beta (v - k e^G S^T)
    with A[i, j] = beta_i sum_c k_ic k_jc e^(G_ic - G_jc) for j < i. Only differences G_i - G_j of later minus earlier tokens
    are exponentiated, so nothing overflows whatever the gates are.
    """
    out, begin, end = [], tokens.start, tokens.stop
    for first in range(begin, end, GROUP):
        part = slice(first, min(first + GROUP, end))
        pad = -(part.stop - part.start) % CHUNK

        def chunks(t: Tensor, pad: int = pad) -> Tensor:  # [T, H, D] -> [chunks, H, CHUNK, D]
            return F.pad(t, (0, 0, 0, 0, 0, pad)).unflatten(0, (-1, CHUNK)).transpose(1, 2)

        q, k, v = chunks(normalised(x.q[part].double()) * DIM**-0.5), chunks(normalised(x.k[part].double())), chunks(x.v[part].double())
        G = chunks(log_decay(x, x.g[part].double(), gate)).cumsum(2)
        beta = chunks(x.beta[part].double().sigmoid()[..., None])
        later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
        pairs = (G[:, :, :, None] - G[:, :, None]).masked_fill_(~later[..., None], -torch.inf).exp_().mul_(k[:, :, None])
        attention = torch.einsum("nhic,nhijc->nhij", q, pairs)
        coupling = (beta * torch.einsum("nhic,nhijc->nhij", k, pairs)).tril(-1)
        eye = torch.eye(CHUNK, dtype=torch.float64, device=q.device)
        inverse = torch.linalg.solve_triangular(coupling + eye, eye.expand_as(coupling), upper=False, unitriangular=True)
        q_decayed, k_decayed, k_left = q * G.exp(), k * G.exp(), k * (G[:, :, -1:] - G).exp()
        for c in range(len(q)):
            u = inverse[c] @ (beta[c] * (v[c] - k_decayed[c] @ state.mT))
            out.append((q_decayed[c] @ state.mT + attention[c] @ u).transpose(0, 1))
            state = state * G[c, :, -1:].exp() + u.mT @ k_left[c]
        if pad:
            out[-1] = out[-1][:-pad]
    return torch.cat(out), state
