"""What every test of an operator uses: one way to compare, inputs that are not tame, and surroundings that show a stray write.

The comparison speaks one dialect: r = |out - ref| / |ref| over the whole tensor, against the fp64 spec.
"""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from torch import Tensor

import kimi_native  # noqa: F401  (loads torch.ops.kimi_native)

FLOAT_DTYPES = [torch.float32, torch.bfloat16]
CUDA_DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# In a build for the emulator (tests/emulator) operators on CPU tensors run the CUDA kernels, so the tests of device "cpu" test those.
EMULATED = torch.ops.kimi_native.cuda_build() == "emulated"

# Which tool of compute-sanitizer the tests run under, if any (scripts/gpu_check.py): fewer cases, no graphs.
SANITIZER = os.environ.get("KIMI_SANITIZER", "")

needs_gpu = pytest.mark.gpu  # tests/conftest.py skips it where there is none
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
# Every (device, dtype) that the operators take.
DEVICE_DTYPES = [("cpu", dtype) for dtype in (CUDA_DTYPES if EMULATED else FLOAT_DTYPES)] + [
    pytest.param("cuda", dtype, marks=needs_gpu) for dtype in CUDA_DTYPES
]
# Whether the kernels for Hopper run: there by default, in the emulator if KIMI_CUDA_PATH is "sm90".
HOPPER_KERNELS = EMULATED or (
    torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and os.environ.get("KIMI_CUDA_PATH") != "portable"
)

# Of a module: its tests run the kernels for Hopper (conftest.py: ask_for_hopper_kernels).
hopper_kernels = [
    pytest.mark.skipif(not HOPPER_KERNELS, reason="no Hopper kernels on this device, or KIMI_CUDA_PATH=portable"),
    pytest.mark.usefixtures("ask_for_hopper_kernels"),
]

needs_cpu_backend = pytest.mark.skipif(EMULATED, reason="the CPU backend's own promise")


def cuda_backend(device: str) -> bool:
    """Whether operators on this device run the CUDA kernels."""
    return device == "cuda" or EMULATED


def skip_if_emulated(reason: str) -> None:
    """For what takes minutes in the emulator or under compute-sanitizer; the same code must be tested by a smaller case."""
    if EMULATED or SANITIZER:
        pytest.skip(f"{'emulator' if EMULATED else 'sanitizer'}: {reason}")


def graph_replays(run, outputs: list[Tensor], replays: int = 3) -> None:
    """Captures `run` in a CUDA graph on a stream of its own, and checks that every replay writes `outputs` as the eager call did.

    `run` must leave its inputs as they are, or restore them itself.
    """
    if SANITIZER:
        pytest.skip("sanitizer: a capture needs torch's caching allocator")
    run()
    torch.cuda.synchronize()
    eager = [out.clone() for out in outputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(replays):
        for out in outputs:
            out.view(torch.uint8).fill_(0xFF) if out.is_contiguous() else out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for out, expected in zip(outputs, eager, strict=True):
            assert_same_bits(out, expected, "a replayed output")


SENTINEL = 12352.0  # representable in bfloat16


def relative_error(out: Tensor, ref: Tensor) -> float:
    """|out - ref| / |ref| in fp64 (the plain norm of the difference where ref is all zero)."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    scale = ref.norm()
    return ((out - ref).norm() / (scale if scale > 0 else 1.0)).item()


def assert_close(out: Tensor, ref: Tensor, max_r: float, name: str = "output") -> None:
    """Finite where the reference is finite (infinities equal in place), then r <= max_r. Never warns instead of failing."""
    assert out.shape == ref.shape, f"{name}: shape {tuple(out.shape)} instead of {tuple(ref.shape)}"
    o, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    assert not torch.isnan(ref).any(), f"{name}: the reference has NaN"
    finite = torch.isfinite(ref)
    assert torch.equal(o[~finite], ref[~finite]), f"{name}: infinities differ"
    assert torch.isfinite(o[finite]).all(), f"{name}: {int((~torch.isfinite(o[finite])).sum())} values are not finite"
    if finite.any():
        r = relative_error(o[finite], ref[finite])
        worst = (o[finite] - ref[finite]).abs().max().item()
        assert r <= max_r, f"{name}: r = {r:.3e} > {max_r:.1e} (largest difference {worst:.3e})"


def assert_same_bits(a: Tensor, b: Tensor, name: str = "output") -> None:
    """Equal bit for bit (NaN equals the same NaN, 0 differs from -0)."""
    assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.dtype}{tuple(a.shape)} and {b.dtype}{tuple(b.shape)}"
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differ = (a.contiguous().view(ints) != b.contiguous().view(ints)).reshape(-1)
    if differ.any():
        at = int(differ.nonzero()[0])
        x, y = a.reshape(-1)[at].item(), b.reshape(-1)[at].item()
        raise AssertionError(f"{name}: {int(differ.sum())} of {differ.numel()} differ, first at flat index {at}: {x} and {y}")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator(seed)) * scale).to(dtype).to(device)


def strided(t: Tensor) -> Tensor:
    """The same values with gaps of NaN between rows (only the last dimension stays contiguous)."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 8), float("nan"), dtype=t.dtype, device=t.device)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


class Guarded:
    """A tensor in the middle of a larger allocation filled with a sentinel; `check` says whether anything wrote outside."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: str = "cpu", fill: float | int = float("nan")):
        self.margin = 64
        count = 1
        for size in shape:
            count *= size
        self.whole = torch.full((count + 2 * self.margin,), SENTINEL if dtype.is_floating_point else 12352, dtype=dtype, device=device)
        self.sentinel = self.whole[0].clone()
        self.tensor = self.whole[self.margin : self.margin + count].view(*shape)
        self.tensor.fill_(fill if dtype.is_floating_point else int(fill) if fill == fill else 0)

    def check(self) -> None:
        outside = torch.cat([self.whole[: self.margin], self.whole[-self.margin :]])
        assert (outside == self.sentinel).all(), "memory outside the output was written"


@contextlib.contextmanager
def threads(n: int):
    """Runs the body with n CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def opcheck(op, args: tuple, kwargs: dict | None = None) -> None:
    """torch.library.opcheck with all of its tests for an inference operator: schema, fake kernel, autograd registration, AOT dispatch."""
    torch.library.opcheck(op, args, kwargs or {})
