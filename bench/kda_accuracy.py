"""How far `kda_prefill`, and fla's `chunk_kda` where it is installed, are from float64, by kind of decay and length.

    python bench/kda_accuracy.py [--device cuda] [--lengths 512 8192 131072] [--json]

A head of 128 x 128 for each kind of decay with random keys and with correlated ones (each the same direction plus half as much
noise), bfloat16 q, k, v and beta logits, float32 log-decays; both get the same tensors. Printed for each length: the error
r = |out - ref| / |ref| of the output and of the last state, ours and fla's. Exit code 1 when one of ours is not finite or above
2.5e-3 (output) or 1e-3 (state).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from harness import DEVICES, default_device, write_found
from kda_inputs import Inputs, recurrence
from shapes import DIM
from torch import Tensor

from kimi_native.ops import kda_prefill

MAX_OUTPUT, MAX_STATE = 2.5e-3, 1e-3
Way = Callable[[Inputs, int], tuple[Tensor, Tensor]]  # the first so many tokens -> output [T, H, V], last state [H, V, K]


def decays(num_tokens: int, device: str) -> dict[str, Tensor]:
    """Log-decays [T, K] by what they are called."""

    def log_uniform(least: float, most: float) -> Tensor:
        return -(10 ** torch.empty(num_tokens, DIM, device=device).uniform_(least, most))

    rates = torch.empty(DIM, device=device).uniform_(1, 16)
    steps = torch.empty(DIM, device=device).uniform_(-6.9, -2.3).exp()
    raw = torch.randn(num_tokens, DIM, device=device) + steps + torch.log(-torch.expm1(-steps))
    by_channel = torch.cat([torch.zeros(8, device=device), torch.logspace(-5, 3.5, DIM - 8, device=device)])
    slow = log_uniform(-3.5, -2.5)
    return {
        "0": torch.zeros(num_tokens, DIM, device=device),
        "1e-5": log_uniform(-5.5, -4.5),
        "1e-3": slow,
        "1": log_uniform(-0.5, 0.5),
        "up to 3000": log_uniform(0, 3.5),
        "0 to 3000 by channel": -by_channel.expand(num_tokens, -1),
        "1e-3, rare 1000": torch.where(torch.rand(num_tokens, DIM, device=device) < 1e-3, -1000.0, slow),
        "as initialised": -rates * torch.nn.functional.softplus(raw),
    }


def inputs(kinds: dict[str, Tensor], num_tokens: int, device: str) -> Inputs:
    """Heads 2i and 2i + 1: the i-th kind with random and with correlated keys."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(num_tokens, 2 * len(kinds), *shape, device=device)

    k = normal(DIM)
    k[:, 1::2] = k[:, 1::2] / 2 + torch.randn(len(kinds), DIM, device=device)
    q, v, beta = (x.bfloat16() for x in (normal(DIM), normal(DIM), normal()))
    g = torch.stack(list(kinds.values()), 1).repeat_interleave(2, dim=1)
    unused = torch.empty(0, device=device)
    return Inputs(q, k.bfloat16(), v, g, beta, A_log=unused, dt_bias=unused)


def ours(x: Inputs, num_tokens: int) -> tuple[Tensor, Tensor]:
    state = torch.zeros(1, x.q.shape[1], DIM, DIM, device=x.q.device)
    slots = torch.zeros(1, dtype=torch.int32, device=x.q.device)
    cu_seqlens = torch.tensor([0, num_tokens], dtype=torch.int32, device=x.q.device)
    q, k, v, g, beta = (t[:num_tokens] for t in (x.q, x.k, x.v, x.g, x.beta))
    return kda_prefill(q, k, v, g, beta, state, slots, cu_seqlens, gate="log_decay", max_seqlen=num_tokens), state[0]


def fla_way() -> Way | None:
    fla = peers.fla("ops.kda") if torch.cuda.is_available() else None
    if fla is None:
        return None

    def way(x: Inputs, num_tokens: int) -> tuple[Tensor, Tensor]:
        given = (t[None, :num_tokens] for t in (x.q, x.k, x.v, x.g, x.beta.float().sigmoid()))
        out, state = fla.chunk_kda(*given, use_qk_l2norm_in_kernel=True, output_final_state=True, state_v_first=True)
        return out[0], state[0]

    return way


def relative_errors(found: Tensor, truth: Tensor, dim: tuple[int, ...]) -> Tensor:
    return (found.double() - truth).square().sum(dim).sqrt() / truth.square().sum(dim).sqrt()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(DEVICES), default=default_device())
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 8192, 131072])
    parser.add_argument("--json", nargs="?", type=Path, const=Path(), help="write bench/results/accuracy/kda_prefill_<device>.json")
    args = parser.parse_args()
    device, lengths = args.device, sorted(args.lengths)
    torch.manual_seed(0)
    kinds = decays(lengths[-1], device)
    x = inputs(kinds, lengths[-1], device)
    ways: dict[str, Way] = {"ours": ours}
    if device == "cuda" and (fla := fla_way()) is not None:
        ways["fla"] = fla

    records, right, begin = [], True, 0
    truths, state = [], torch.zeros(x.q.shape[1], DIM, DIM, dtype=torch.float64, device=device)
    print("output / state error r")
    for length in lengths:
        truth, state = recurrence(x, state, "log_decay", slice(begin, length))
        truths.append(truth)
        begin = length
        for name, way in ways.items():
            out, last = way(x, length)
            output_errors = relative_errors(out, torch.cat(truths), (0, 2)).tolist()
            state_errors = relative_errors(last, state, (1, 2)).tolist()
            for head, (output, of_state) in enumerate(zip(output_errors, state_errors, strict=True)):
                kind, keys = list(kinds)[head // 2], ("random", "correlated")[head % 2]
                case = {"log_decay": kind, "keys": keys, "tokens": length, "who": name}
                records.append({"record": "error", **case, "output": output, "state": of_state})
                right &= name != "ours" or (output <= MAX_OUTPUT and of_state <= MAX_STATE)  # NaN fails
                print(f"{length:8,} tokens, |log-decay| {kind:22} {keys:12} {name:6} {output:.2e} / {of_state:.2e}", flush=True)
    if args.json is not None:
        write_found(args.json, "accuracy/kda_prefill", DEVICES[device](), records)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
