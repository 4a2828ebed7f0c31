"""What a call of `kda_decode_fused` takes among others in a CUDA graph, as the layers of a decode step have it: no launch to wait for.

    python bench/kda_decode_graph.py [--batches 1 16 64 256] [--json]

Needs a GPU. bfloat16 inputs, raw softplus gates, 32 heads of 128 x 128, float32 states in a pool of 2 GiB. A graph has 100 calls up to
batch 4, else 20, each on the next slots of the pool, so that states come from memory; its time over the number of calls, the median of
9 replays. Rows: the fused operator with 1, 2, 4 and 8 tokens; `kda_decode`, the recurrence with its gate and norms; fla's kernel for
that, if it is installed. What they compute is checked by bench_kda_decode.py and the tests. Exit code 2 without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench_kda_decode import CHANNELS, fla_recurrence
from harness import DEVICES, write_found
from kda_inputs import inputs
from shapes import DIM, HEADS
from torch import Tensor

from kimi_native.ops import kda_decode, kda_decode_fused

SLOTS = 1024  # of 2 MiB
REPLAYS = 9
Slots = Callable[[Tensor], object]  # one call on these slots


class Inputs:
    """Of all calls with so many sequences and tokens."""

    def __init__(self, batch: int, tokens: int, pool: Tensor) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.bfloat16, device=pool.device)

        self.x, self.pool = inputs((batch, tokens), HEADS, torch.bfloat16, pool.device.type), pool
        self.qkv, self.norm_gate = normal(batch, tokens, CHANNELS), normal(batch, tokens, HEADS, DIM)
        self.conv_state, self.conv_weight, self.norm_weight = normal(SLOTS, 3, CHANNELS), normal(CHANNELS, 4), normal(DIM)
        self.out = torch.empty_like(self.x.v)

    def fused(self, slots: Tensor) -> None:
        kda_decode_fused(
            *(self.qkv, self.conv_weight, self.conv_state, self.x.g, self.x.beta, self.pool, slots),
            num_heads=HEADS,
            head_dim=DIM,
            A_log=self.x.A_log,
            dt_bias=self.x.dt_bias,
            norm_gate=self.norm_gate,
            norm_weight=self.norm_weight,
            out=self.out,
        )

    def recurrence(self, slots: Tensor) -> None:
        x = self.x
        kda_decode(x.q, x.k, x.v, x.g, x.beta, self.pool, slots, A_log=x.A_log, dt_bias=x.dt_bias, out=self.out)

    def flas(self, slots: Tensor) -> None:
        run = fla_recurrence(self.x, self.pool, slots)
        if run is not None:
            run()


def ways(batch: int, pool: Tensor) -> Iterator[tuple[str, int, Slots]]:
    """The name of each way, its tokens a sequence, and the call."""
    for tokens in (1, 2, 4, 8):
        yield "kda_decode_fused", tokens, Inputs(batch, tokens, pool).fused
    one = Inputs(batch, 1, pool)
    yield "kda_decode", 1, one.recurrence
    if fla_recurrence(one.x, pool, torch.zeros(batch, dtype=torch.int32)) is not None:
        yield "fla, recurrence alone", 1, one.flas


def us_in_a_graph(call: Slots, batch: int, pool: Tensor) -> float:
    calls = 100 if batch <= 4 else 20
    order = torch.randperm(SLOTS, device=pool.device, dtype=torch.int32)
    slots = [order.roll(-batch * i)[:batch].contiguous() for i in range(calls)]
    for some in slots[:3]:  # compiles
        call(some)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for some in slots:
            call(some)
    seconds = []
    for _ in range(REPLAYS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds[1:]) / calls * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--json", nargs="?", type=Path, const=Path(), help="write bench/results/decode/kda_decode_<device>.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("kda_decode_graph: no CUDA device", file=sys.stderr)
        return 2
    device, records = DEVICES["cuda"](), []
    pool = torch.randn(SLOTS, HEADS, DIM, DIM, device="cuda")
    with torch.inference_mode():
        for batch in args.batches:
            for name, tokens, call in ways(batch, pool):
                us = us_in_a_graph(call, batch, pool)
                records.append({"record": "time", "op": name, "sequences": batch, "tokens": tokens, "us": round(us, 2)})
                print(f"{name:24} {batch:4} x {tokens} {us:9.2f} us", flush=True)
    if args.json is not None:
        write_found(args.json, "decode/kda_decode", device, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
