"""kda_decode and kda_decode_fused at the width of the model (32 heads of 128), against the same steps in plain torch.

On a GPU the states lie in a pool of 512 slots (1 GiB), in no order, and the peer is fla: `fused_recurrent_kda` on a pool of the
same kind, for the fused operator with its convolutions before and its gated norm after.
"""

from collections.abc import Callable, Iterator

import peers
import torch
import torch.nn.functional as F
from harness import Call, Case, Job, Peer, close, main, name_of
from kda_inputs import Inputs, inputs, log_decay, normalised
from shapes import DECODE_BATCHES, DIM, HEADS
from torch import Tensor

from kimi_native.ops import kda_decode, kda_decode_fused

CHANNELS = 3 * HEADS * DIM
POOL = 512
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2.5e-3}
MAX_ERROR_FUSED = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
MAX_PEER_ERROR = 2e-2
STATE_BYTES = 2 * 4 * HEADS * DIM * DIM  # of one sequence, read and written


def steps(x: Inputs, state: Tensor) -> Tensor:
    """Plain torch, [B, S, H, D] in the dtype of state [B, H, V, K], which is updated in place."""
    q, k, v, g, beta = (t.to(state.dtype) for t in (x.q, x.k, x.v, x.g, x.beta))
    q, k = normalised(q) * DIM**-0.5, normalised(k)
    decay, beta, out = log_decay(x, g, "softplus").exp(), beta.sigmoid(), torch.empty_like(v)
    for t in range(q.shape[1]):
        state.mul_(decay[:, t].unsqueeze(2))
        u = beta[:, t].unsqueeze(2) * (v[:, t] - (state @ k[:, t].unsqueeze(3)).squeeze(3))
        state.add_(u.unsqueeze(3) * k[:, t].unsqueeze(2))
        out[:, t] = (state @ q[:, t].unsqueeze(3)).squeeze(3)
    return out


def pool_and_slots(batch: int, device: str) -> tuple[Tensor, Tensor]:
    count = batch if device == "cpu" else POOL
    return torch.randn(count, HEADS, DIM, DIM, device=device), torch.randperm(count, device=device)[:batch].to(torch.int32)


def fla_recurrence(x: Inputs, pool: Tensor, slots: Tensor) -> Callable[..., Tensor] | None:
    """One token of each sequence, in place on a pool of states; the form that servers call."""
    fla = peers.fla("ops.kda.fused_recurrent")
    if fla is None:
        return None
    options = {"A_log": x.A_log, "dt_bias": x.dt_bias.flatten(), "state_v_first": True, "inplace_final_state": True}
    options |= {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    out = torch.empty_like(x.v)

    def run(q: Tensor = x.q, k: Tensor = x.k, v: Tensor = x.v) -> Tensor:
        return fla.fused_recurrent_kda_fwd(q, k, v, x.g, x.beta, initial_state=pool, ssm_state_indices=slots, out=out, **options)[0]

    return run


def plain(batch: int, tokens: int, dtype: torch.dtype, device: str) -> Job:
    x = inputs((batch, tokens), HEADS, dtype, device)
    state, slots = pool_and_slots(batch, device)
    out = torch.full_like(x.v, float("nan"))
    peer_state = state[slots.long()]

    def ours() -> None:
        kda_decode(x.q, x.k, x.v, x.g, x.beta, state, slots, A_log=x.A_log, dt_bias=x.dt_bias, out=out)

    def check() -> None:
        expected = state[slots.long()].double()
        ref = steps(x, expected)
        ours()
        close(out, ref, MAX_ERROR[dtype])
        close(state[slots.long()], expected, 1e-5, "state")

    others: dict[str, Call | Peer] = {"torch": lambda: steps(x, peer_state)}
    fla_pool = state.clone() if device == "cuda" and tokens == 1 else state
    fla = fla_recurrence(x, fla_pool, slots) if device == "cuda" and tokens == 1 else None
    if fla is not None:

        def fla_check() -> None:
            ref = steps(x, fla_pool[slots.long()].double())
            close(fla(), ref, MAX_PEER_ERROR)

        others["fla"] = Peer(fla, fla_check)
    return Job(
        run=ours,
        check=check,
        peers=others,
        flops=7 * batch * tokens * HEADS * DIM * DIM,
        bytes=batch * STATE_BYTES + 5 * batch * tokens * HEADS * DIM * x.q.element_size(),
    )


def fused(batch: int, dtype: torch.dtype, device: str) -> Job:
    x = inputs((batch, 1), HEADS, dtype, device)
    qkv, conv_weight = torch.randn(batch, 1, CHANNELS, dtype=dtype, device=device), torch.randn(CHANNELS, 4, dtype=dtype, device=device)
    norm_gate, norm_weight = torch.randn_like(x.v), torch.randn(DIM, dtype=dtype, device=device)
    state, slots = pool_and_slots(batch, device)
    conv_state = torch.randn(len(state), 3, CHANNELS, dtype=dtype, device=device)
    out = torch.full_like(x.v, float("nan"))
    rows = slots.long()
    peer_state, peer_conv_state = state[rows], conv_state[rows]

    def ours() -> None:
        kda_decode_fused(
            *(qkv, conv_weight, conv_state, x.g, x.beta, state, slots),
            num_heads=HEADS,
            head_dim=DIM,
            A_log=x.A_log,
            dt_bias=x.dt_bias,
            norm_gate=norm_gate,
            norm_weight=norm_weight,
            out=out,
        )

    def torch_way(state: Tensor, conv_state: Tensor) -> Tensor:
        window = torch.cat([conv_state, qkv.to(conv_state.dtype)], dim=1)
        conv_state.copy_(window[:, 1:])
        mixed = F.silu((window * conv_weight.t().to(window.dtype)).sum(1, keepdim=True))
        q, k, v = mixed.unflatten(2, (3 * HEADS, DIM)).split(HEADS, dim=2)
        o = steps(Inputs(q, k, v, x.g, x.beta, x.A_log, x.dt_bias), state)
        return F.rms_norm(o, (DIM,), norm_weight.to(o.dtype), 1e-5) * norm_gate.to(o.dtype).sigmoid()

    def check() -> None:
        expected, expected_conv = state[rows].double(), conv_state[rows].double()
        ref = torch_way(expected, expected_conv)
        ours()
        close(out, ref, MAX_ERROR_FUSED[dtype])
        close(state[rows], expected, 1e-5 if dtype == torch.float32 else 1e-3, "state")  # q, k, v are rounded on the way
        assert torch.equal(conv_state[rows].double(), expected_conv), "conv_state"

    others: dict[str, Call | Peer] = {"torch": lambda: torch_way(peer_state, peer_conv_state)}
    if device == "cuda":
        pool = state.clone()
        fla = fla_recurrence(x, pool, slots)
        conv, norm = peers.fla("modules.causal_conv1d.ops"), peers.fla("modules.norm.fused_norm_gate")
        if fla is not None and conv is not None and norm is not None:
            parts = [t.contiguous() for t in qkv.chunk(3, dim=2)]
            weights = [w.contiguous() for w in conv_weight.chunk(3)]
            caches = [F.pad(c.mT, (1, 0)).contiguous() for c in conv_state[rows].chunk(3, dim=2)]  # [B, H K, 4]

            def fla_way() -> Tensor:
                mixed = (
                    conv.causal_conv1d_update(p, c, weight=w, activation="silu")[0].unflatten(2, (HEADS, DIM))
                    for p, c, w in zip(parts, caches, weights, strict=True)
                )
                return norm.rms_norm_gated(fla(*mixed), norm_gate, norm_weight, None, activation="sigmoid", eps=1e-5)

            def fla_check() -> None:
                past = torch.cat([c[:, :, 1:].mT for c in caches], dim=2)
                close(fla_way(), torch_way(state_before, past.double()), MAX_PEER_ERROR)

            state_before = pool[rows].double()
            others["fla, 5 kernels"] = Peer(fla_way, fla_check)
    return Job(
        run=ours,
        check=check,
        peers=others,
        flops=7 * batch * HEADS * DIM * DIM,
        bytes=batch * (STATE_BYTES + 9 * CHANNELS * qkv.element_size()) + 4 * CHANNELS * qkv.element_size(),
    )


def cases(device: str) -> Iterator[Case]:
    def case(op: str, batch: int, tokens: int, dtype: torch.dtype) -> Case:
        name = f"B={batch} S={tokens} H={HEADS} {name_of(dtype)}"
        core = tokens == 1 and batch in (1, 64)
        if op == "kda_decode":
            return Case(op, name, lambda: plain(batch, tokens, dtype, device), core)
        return Case(op, name, lambda: fused(batch, dtype, device), core)

    if device == "cpu":
        yield case("kda_decode", 1, 1, torch.float32)
    batches = (1, 4, 32) if device == "cpu" else DECODE_BATCHES
    for batch in batches:
        yield case("kda_decode", batch, 1, torch.bfloat16)
    for batch in (4,) if device == "cpu" else (1, 16, 64):
        yield case("kda_decode", batch, 4, torch.bfloat16)
    for batch in batches:
        yield case("kda_decode_fused", batch, 1, torch.bfloat16)


if __name__ == "__main__":
    main(cases)
