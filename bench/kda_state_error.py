"""What a bfloat16 state costs `kda_decode`: its error, and that of a float32 state, against float64 over many steps.

    python bench/kda_state_error.py [--steps 100000] [--device cpu]

Heads of 128 x 128, one kind of decay each, one token a call, so that the state is rounded at every token. Printed for each: the
error r = |out - ref| / |ref| of the outputs of the last 256 tokens before a mark and of the state there, where both get the
same bfloat16 inputs. docs/kda.md has the table.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from kimi_native.ops import kda_decode

DIM, WINDOW = 128, 256


def decays(generator: torch.Generator) -> dict[str, Tensor]:
    """Log-decay per token and channel, [DIM] each (constant in time), and of the released model's kind."""
    rates = torch.empty(DIM).uniform_(1, 16, generator=generator)
    steps = torch.exp(torch.empty(DIM).uniform_(-6.9, -2.3, generator=generator))
    return {
        "none": torch.zeros(DIM),
        "1e-5": torch.full((DIM,), -1e-5),
        "1e-3": torch.full((DIM,), -1e-3),
        "0.1": torch.full((DIM,), -0.1),
        "1": torch.full((DIM,), -1.0),
        "1e-5 to 1e3": -torch.logspace(-5, 3, DIM),
        "as initialised": -rates * steps,
    }


def relative_error(x: Tensor, ref: Tensor) -> float:
    return ((x.double() - ref).norm() / ref.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    kinds = decays(generator)
    heads, device = len(kinds), args.device
    g = torch.stack(list(kinds.values())).to(device)[None, None]
    decay = g[0, 0].double().exp()[:, None, :]
    states = {dtype: torch.zeros(1, heads, DIM, DIM, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32)}
    truth = torch.zeros(heads, DIM, DIM, dtype=torch.float64, device=device)
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    marks = sorted({min(args.steps, mark) for mark in (1_000, 10_000, args.steps)})
    late: dict[torch.dtype, list[Tensor]] = {dtype: [] for dtype in states}
    late_truth: list[Tensor] = []

    print("output / state error r after each number of steps")
    for step in range(1, args.steps + 1):
        q, k, v = (torch.randn(1, 1, heads, DIM, generator=generator).to(device, torch.bfloat16) for _ in range(3))
        beta = torch.randn(1, 1, heads, generator=generator).to(device)
        keep = any(mark - WINDOW < step <= mark for mark in marks)
        for dtype, state in states.items():
            out = kda_decode(q, k, v, g, beta, state, slots, gate="log_decay")
            if keep:
                late[dtype].append(out[0, 0].clone())
        unit_q, unit_k = (x[0, 0].double() / x[0, 0].double().square().sum(-1, keepdim=True).add(1e-6).sqrt() for x in (q, k))
        truth *= decay
        u = beta[0, 0].double().sigmoid()[:, None] * (v[0, 0].double() - (truth @ unit_k[:, :, None])[..., 0])
        truth += u[:, :, None] * unit_k[:, None, :]
        if keep:
            late_truth.append((truth @ unit_q[:, :, None])[..., 0] * DIM**-0.5)
        if step in marks:
            for i, kind in enumerate(kinds):
                ref = torch.stack(late_truth)[:, i]
                errors = [
                    f"{str(dtype)[6:]} {relative_error(torch.stack(late[dtype])[:, i], ref):.1e} / "
                    f"{relative_error(state[0, i], truth[i]):.1e}"
                    for dtype, state in states.items()
                ]
                print(f"{step:8,} steps, |log-decay| {kind:15} {'   '.join(errors)}", flush=True)
            late, late_truth = {dtype: [] for dtype in states}, []


if __name__ == "__main__":
    main()
