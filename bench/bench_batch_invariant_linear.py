"""batch_invariant_linear against torch.nn.functional.linear: the projections of a KDA and an MLA layer, and the head."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, Job, close, main, name_of
from shapes import DECODE_BATCHES, DIM, HEADS, HIDDEN, LATENT, NOPE, VOCABULARY

from kimi_native.ops import batch_invariant_linear

MAX_R = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}
CHECKED_ROWS = 64


def some_rows(rows: int, device: str) -> torch.Tensor:
    first = torch.arange(min(CHECKED_ROWS, rows), device=device)
    return torch.cat([first, rows - 1 - first]).unique()


def dense(rows: int, n: int, k: int, dtype: torch.dtype, device: str) -> Job:
    x, weight = torch.randn(rows, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device) * k**-0.5
    out = torch.full((rows, n), float("nan"), dtype=dtype, device=device)

    def ours() -> None:
        batch_invariant_linear(x, weight, out=out)

    def check() -> None:
        ours()
        some = some_rows(rows, device)
        close(out[some], x[some].double() @ weight.double().T, MAX_R[dtype])
        assert out.isfinite().all()

    return Job(
        run=ours,
        check=check,
        peers={"torch": lambda: F.linear(x, weight)},
        flops=2 * rows * n * k,
        bytes=(rows * k + n * k + rows * n) * x.element_size(),
    )


def grouped(rows: int, groups: int, n: int, k: int, dtype: torch.dtype, device: str) -> Job:
    x = torch.randn(rows, groups, k, dtype=dtype, device=device)
    weight = torch.randn(groups, n, k, dtype=dtype, device=device) * k**-0.5
    out = torch.full((rows, groups, n), float("nan"), dtype=dtype, device=device)

    def ours() -> None:
        batch_invariant_linear(x, weight, out=out)

    def check() -> None:
        ours()
        close(out, torch.einsum("tgk,gnk->tgn", x.double(), weight.double()), MAX_R[dtype])

    return Job(
        run=ours,
        check=check,
        peers={"torch": lambda: torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)},
        flops=2 * rows * groups * n * k,
        bytes=groups * (rows * k + n * k + rows * n) * x.element_size(),
    )


def cases(device: str) -> Iterator[Case]:
    def dense_case(rows: int, n: int, k: int, dtype: torch.dtype) -> Case:
        core = (rows, k) in ((1, HIDDEN), (64, HIDDEN), (8192, HIDDEN))
        return Case("batch_invariant_linear", f"T={rows} N={n} K={k} {name_of(dtype)}", lambda: dense(rows, n, k, dtype, device), core)

    def grouped_case(rows: int, n: int, k: int, dtype: torch.dtype) -> Case:
        name = f"T={rows} G={HEADS} N={n} K={k} {name_of(dtype)}"
        return Case("batch_invariant_linear", name, lambda: grouped(rows, HEADS, n, k, dtype, device))

    width = HEADS * DIM
    if device == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, 4, 16, 64, 512):
                yield dense_case(rows, width, HIDDEN, dtype)
            for rows in (1, 512):
                yield dense_case(rows, HIDDEN, width, dtype)
            yield dense_case(1, 16384, HIDDEN, dtype)  # a tenth of the head
            for rows in (1, 16):
                yield grouped_case(rows, LATENT, NOPE, dtype)
        return
    dtype = torch.bfloat16
    for rows in (*DECODE_BATCHES, 2048, 8192):
        yield dense_case(rows, 3 * width + DIM + HEADS + DIM, HIDDEN, dtype)  # into a KDA layer: q, k, v, both gates, beta
    for rows in (1, 64, 256, 8192):
        yield dense_case(rows, HIDDEN, width, dtype)  # out of a layer
        yield dense_case(rows, width, DIM, dtype)  # second half of a gate
    for rows in (1, 16, 64, 256):
        yield dense_case(rows, VOCABULARY, HIDDEN, dtype)  # the head
    for rows in (1, 16, 64, 256):
        yield grouped_case(rows, LATENT, NOPE, dtype)  # folds W_UK into the query
        yield grouped_case(rows, DIM, LATENT, dtype)  # W_UV on the result


if __name__ == "__main__":
    main(cases)
