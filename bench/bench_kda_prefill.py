"""kda_prefill at the width of the model (32 heads of 128), raw gates and beta logits in, state pool in place.

Peers do the same work, with the gate, l2norm and sigmoid that ours has inside, from an initial to a final state. On a CPU:
plain torch token by token, and what a KimiLinear of transformers runs there. On a GPU: fla's `chunk_kda`, and FlashKDA, which
is for bounded gates alone and keeps its state in bf16.
"""

from collections.abc import Callable, Iterator

import peers
import torch
from harness import Call, Case, Job, Peer, close, main, name_of
from kda_inputs import LOWER_BOUND, Inputs, inputs, log_decay, normalised, recurrence
from shapes import DIM, HEADS, RAGGED, name_of_lengths, packed
from torch import Tensor

from kimi_native.ops import kda_prefill
from kimi_native.ops.kda_prefill import KdaGate

MAX_ERROR = {("cpu", torch.float32): 1e-5, ("cpu", torch.bfloat16): 2.5e-3, ("cuda", torch.bfloat16): 5e-3}
MAX_PEER_ERROR = 2e-2  # the same function, whatever is rounded in between


def transformers_chunked() -> Callable[..., object] | None:
    try:
        from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
    except ImportError:
        return None
    return chunk_kimi_delta_attention


def torch_recurrence(x: Inputs, state: Tensor, gate: KdaGate) -> Tensor:
    """Plain torch in fp32, token by token; state [H, V, K] is not changed."""
    q, k, v = normalised(x.q.float()) * DIM**-0.5, normalised(x.k.float()), x.v.float()
    decay, beta, out = log_decay(x, x.g.float(), gate).exp(), x.beta.float().sigmoid(), torch.empty_like(v)
    for t in range(len(q)):
        state = state * decay[t].unsqueeze(1)
        u = beta[t].unsqueeze(1) * (v[t] - (state @ k[t].unsqueeze(2)).squeeze(2))
        state = state + u.unsqueeze(2) * k[t].unsqueeze(1)
        out[t] = (state @ q[t].unsqueeze(2)).squeeze(2)
    return out


def fla_peer(
    x: Inputs, initial: Tensor, lengths: tuple[int, ...], gate: KdaGate, packs: bool
) -> Callable[[], tuple[Tensor, Tensor]] | None:
    fla = peers.fla("ops.kda")
    if fla is None:
        return None
    shape = (1, sum(lengths)) if packs or len(lengths) == 1 else (len(lengths), lengths[0])
    q, k, v, g, beta = (t.view(*shape, *t.shape[1:]) for t in (x.q, x.k, x.v, x.g, x.beta))
    options = {"A_log": x.A_log, "dt_bias": x.dt_bias.flatten(), "state_v_first": True, "output_final_state": True}
    options |= {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    if gate == "bounded":
        options |= {"safe_gate": True, "lower_bound": LOWER_BOUND}
    if packs and len(lengths) > 1:
        options |= {"cu_seqlens": packed(lengths, "cuda").long()}

    def run() -> tuple[Tensor, Tensor]:
        out, final = fla.chunk_kda(q, k, v, g, beta, initial_state=initial, **options)
        return out.view(x.v.shape), final

    return run


def job(
    lengths: tuple[int, ...], heads: int, gate: KdaGate, dtype: torch.dtype, device: str, *, with_peers: bool, packs: bool = True
) -> Job:
    num_tokens, num_sequences = sum(lengths), len(lengths)
    x = inputs((num_tokens,), heads, dtype, device)
    if gate == "log_decay":
        x.g = -x.g.float().abs()
    initial = torch.randn(num_sequences, heads, DIM, DIM, device=device)
    state, out = initial.clone(), torch.full_like(x.v, float("nan"))
    slots, cu_seqlens = torch.arange(num_sequences, dtype=torch.int32, device=device), packed(lengths, device)
    options = {"gate": gate, "A_log": x.A_log, "dt_bias": x.dt_bias, "lower_bound": LOWER_BOUND, "max_seqlen": max(lengths)}

    def ours() -> None:
        kda_prefill(x.q, x.k, x.v, x.g, x.beta, state, slots, cu_seqlens, out=out, **options)  # type: ignore[arg-type]

    references: list[tuple[Tensor, Tensor]] = []

    def check_against_fp64(found: Tensor, final: Tensor, max_error: float) -> None:
        if not references:
            begins = cu_seqlens.tolist()
            for n in range(num_sequences):
                references.append(recurrence(x, initial[n].double(), gate, slice(begins[n], begins[n + 1])))
        close(found, torch.cat([o for o, _ in references]), max_error)
        close(final, torch.stack([s for _, s in references]), max_error, "state")

    def check() -> None:
        state.copy_(initial)
        ours()
        check_against_fp64(out, state, MAX_ERROR[device, dtype])

    def checked(way: Callable[[], tuple[Tensor, Tensor]]) -> Peer:
        return Peer(way, lambda: check_against_fp64(*way(), MAX_PEER_ERROR))

    others: dict[str, Call | Peer] = {}
    if with_peers and device == "cpu" and num_sequences == 1:
        others["torch recurrent"] = lambda: torch_recurrence(x, state[0], gate)
        chunked = transformers_chunked()
        if chunked is not None:

            def transformers_way() -> None:
                given = (x.q, x.k, x.v, log_decay(x, x.g.float(), gate), x.beta.float().sigmoid())
                chunked(*(t.unsqueeze(0) for t in given), output_final_state=True, use_qk_l2norm_in_kernel=True)

            others["transformers"] = transformers_way
    if with_peers and device == "cuda":
        if (fla := fla_peer(x, initial, lengths, gate, packs)) is not None:
            others["fla"] = checked(fla)
        if gate == "bounded":
            flash = peers.flash_kda(x.q, x.k, x.v, x.g, x.beta, x.A_log, x.dt_bias, LOWER_BOUND, initial, cu_seqlens)
            if flash is not None:
                others["FlashKDA"] = checked(flash)
    return Job(
        run=ours,
        check=check,
        peers=others,
        flops=7 * num_tokens * heads * DIM * DIM,  # decay, two reductions, one outer product
        bytes=num_tokens * heads * (4 * DIM * x.q.element_size() + (DIM + 1) * x.g.element_size()) + 8 * num_sequences * heads * DIM * DIM,
    )


def cases(device: str) -> Iterator[Case]:
    def case(
        lengths: tuple[int, ...], gate: KdaGate, dtype: torch.dtype, *, heads: int = HEADS, with_peers: bool = True, packs: bool = True
    ) -> Case:
        shape = name_of_lengths(lengths) if packs and len(lengths) > 1 else f"B={len(lengths)} T={lengths[0]}"
        return Case(
            "kda_prefill",
            f"{gate} {shape} H={heads} {name_of(dtype)}",
            lambda: job(lengths, heads, gate, dtype, device, with_peers=with_peers, packs=packs),
            core=lengths in ((8192,), (2048,), (8192,) * 4, (1024,) * 8) and (gate == "softplus" or lengths == (8192,)),
        )

    if device == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            yield case((64,), "softplus", dtype)
            yield case((256,), "softplus", dtype)
        yield case((256,), "bounded", torch.bfloat16, with_peers=False)
        yield case((256,), "log_decay", torch.bfloat16, with_peers=False)
        yield case((2048,), "softplus", torch.bfloat16, with_peers=False)
        yield case((64,) * 8, "softplus", torch.bfloat16, with_peers=False)
        return
    for gate in ("softplus", "bounded"):
        for num_tokens in (8192, 512, 2048, 32768, 131072):  # fla tunes its kernels on the first
            yield case((num_tokens,), gate, torch.bfloat16)
        yield case((8192,) * 4, gate, torch.bfloat16, packs=False)
        for lengths in ((1024,) * 8, (256,) * 32, RAGGED):
            yield case(lengths, gate, torch.bfloat16)
        yield case((65536,), gate, torch.bfloat16, heads=8)


if __name__ == "__main__":
    main(cases)
