"""Whether the time of `kda_prefill` depends on what its inputs are: kinds of gates, and values that fp16 does not hold.

    python bench/kda_gates.py [--device cuda] [--lengths 8192 1024x8] [--json]

bfloat16 inputs, 32 heads of 128 x 128, raw softplus gates: slow ones (log-decay about -1e-5), fast ones (-40 to -640 a token),
both mixed at random, and gates as a layer is initialised. A length `1024x8` stands for 8 packed sequences of 1,024 tokens. Exit
code 1 when a kind of gate takes more than 5 % longer than the gates of the initialisation. The last two rows have the latter
gates, and values that kernels with 16-bit operands do in other units: of 1e-6 in every chunk, and in one chunk of a hundred. They
have no limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import DEVICES, Call, Effort, default_device, write_found
from kda_inputs import Inputs, inputs
from shapes import DIM, HEADS, name_of_lengths, packed

from kimi_native.ops import kda_prefill

MAX_RATIO = 1.05
AS_INITIALISED = "as initialised"
CHUNK = 64  # tokens


def lengths_of(text: str) -> tuple[int, ...]:
    length, _, count = text.partition("x")
    return (int(length),) * int(count or 1)


def kinds(x: Inputs) -> Iterator[tuple[str, bool, Inputs]]:
    """What the inputs are called, whether the time has a limit, and they."""
    slow, fast = torch.full_like(x.g, -8.0), torch.full_like(x.g, 40.0)
    mixed = torch.where(torch.rand_like(x.g, dtype=torch.float) < 0.5, slow, fast)
    yield AS_INITIALISED, True, x
    for name, g in ("slow", slow), ("fast", fast), ("slow and fast", mixed):
        yield name, True, Inputs(x.q, x.k, x.v, g, x.beta, x.A_log, x.dt_bias)
    chunk = torch.arange(len(x.v), device=x.v.device) // CHUNK
    for name, small in ("values of 1e-6", chunk >= 0), ("values of 1e-6 in one chunk of 100", chunk % 100 == 50):
        v = torch.where(small[:, None, None], 1e-6 * x.v, x.v)
        yield name, False, Inputs(x.q, x.k, v, x.g, x.beta, x.A_log, x.dt_bias)


def prefill_of(x: Inputs, lengths: tuple[int, ...]) -> Call:
    """All sequences from a state of zeros."""
    heads, device = x.q.shape[1], x.q.device.type
    state, out = torch.empty(len(lengths), heads, DIM, DIM, device=device), torch.empty_like(x.v)
    slots, cu_seqlens = torch.arange(len(lengths), dtype=torch.int32, device=device), packed(lengths, device)
    fresh = torch.zeros(len(lengths), dtype=torch.bool, device=device)

    def run() -> None:
        kda_prefill(
            *(x.q, x.k, x.v, x.g, x.beta, state, slots, cu_seqlens),
            A_log=x.A_log,
            dt_bias=x.dt_bias,
            has_initial_state=fresh,
            out=out,
            max_seqlen=max(lengths),
        )

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(DEVICES), default=default_device())
    parser.add_argument("--lengths", nargs="+", default=["8192", "1024x8"])
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--json", nargs="?", type=Path, const=Path(), help="write bench/results/gates/kda_prefill_<device>.json")
    args = parser.parse_args()
    device = DEVICES[args.device]()

    records, even = [], True
    for lengths in map(lengths_of, args.lengths):
        usual = 0.0
        for name, limited, x in kinds(inputs((sum(lengths),), args.heads, torch.bfloat16, args.device)):
            us = device.measure({"": prefill_of(x, lengths)}, Effort(repeats=30, budget_s=2.0))[""].median_us
            if name == AS_INITIALISED:
                usual = us
            even &= not limited or us <= MAX_RATIO * usual
            records.append({"record": "time", "lengths": name_of_lengths(lengths), "inputs": name, "us": round(us, 1)})
            print(f"{name_of_lengths(lengths):12} {name:36} {us:10.1f} us {us / usual:6.2f}", flush=True)
    if args.json is not None:
        write_found(args.json, "gates/kda_prefill", device, records)
    return 0 if even else 1


if __name__ == "__main__":
    sys.exit(main())
