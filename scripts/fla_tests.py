"""Runs flash-linear-attention's own tests of KDA, unmodified, on our operators.

    fla_tests.py CHECKOUT                              our drop-in in place of fla's functions
    fla_tests.py CHECKOUT --through backend            fla's functions, which offer each call to our backend (needs a GPU)
    fla_tests.py CHECKOUT -- -k varlen --maxfail 3     what follows -- is for pytest

CHECKOUT is a clone of https://github.com/fla-org/flash-linear-attention, or a folder with tests/conftest.py and tests/ops/test_kda.py of
it. Needs fla-core (0.6.0 was tried), triton, einops and pytest; no network. Works on what device there is: without a GPU fla's kernels
cannot run but ours do, so tests that are skipped there run all the same, and what asks for "cuda" gets the CPU. Tests that call none of
our functions are left out.

We are for inference. Tests that also compare gradients run with gradients of zero for what is ours and without those comparisons (the
column "forward"): their outputs and final states are compared as ever. With `--through backend` nothing of this is needed, for fla
itself takes the calls that want gradients.

Exit code 0: nothing failed. 1: something did. 2: the tests cannot be run here.
"""

from __future__ import annotations

import argparse
import functools
import importlib.machinery
import inspect
import os
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

FUNCTIONS = ("chunk_kda", "fused_recurrent_kda", "fused_recurrent_kda_fwd")
STATUSES = ("passed", "forward", "declined", "skipped", "failed")
EXPLANATION = (
    "passed: as it stands; forward: but for comparisons of gradients; declined: asks for what we do not offer;\n"
    "calls: those that we computed"
)


@dataclass
class Result:
    """Of one case of one test."""

    status: str = "passed"
    reason: str = ""
    calls: int = 0  # that we computed
    gradients: int = 0  # comparisons left out
    errors: list[str] = field(default_factory=list)  # what we declined


class ForwardOnly(torch.autograd.Function):
    """Our output and state with gradients of zero, so that a test can go on to its backward pass."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], tuple], *inputs: Any) -> tuple:
        ctx.shapes = [(t.shape, t.dtype, t.device) if isinstance(t, torch.Tensor) and t.requires_grad else None for t in inputs]
        with torch.no_grad():
            return compute()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return (None, *(s and torch.zeros(s[0], dtype=s[1], device=s[2]) for s in ctx.shapes))


class CudaIsCpu(TorchFunctionMode):
    """For tests that name the device "cuda" where there is none."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class OnOurOperators:
    """The pytest plugin: puts our functions where fla's were, counts, and sorts the results."""

    def __init__(self, through: str) -> None:
        self.through = through
        self.results: dict[str, Result] = {}
        self.current = Result()

    # ---- before the tests are imported

    def install(self) -> None:
        import fla.ops.kda
        import fla.ops.kda.fused_recurrent
        import fla.utils

        import kimi_native.compat.fla as ours
        from kimi_native.compat.fla import backend

        if not torch.cuda.is_available():
            fla.utils.device, fla.utils.device_torch_lib = "cpu", torch.cpu
        if self.through == "backend":
            backend.register()
            backend.chunk_kda = self.counted(ours.chunk_kda)
            backend.fused_recurrent_kda_fwd = self.counted(ours.fused_recurrent_kda_fwd)
            return
        fla.ops.kda.chunk_kda = self.counted(self.without_gradients(ours.chunk_kda))
        fla.ops.kda.fused_recurrent_kda = self.counted(ours.fused_recurrent_kda)
        fla.ops.kda.fused_recurrent.fused_recurrent_kda_fwd = self.counted(ours.fused_recurrent_kda_fwd)
        # The tests of fla's FlashKDA backend go through chunk_kda too, if that package is found.
        sys.modules.setdefault("flash_kda", types.ModuleType("flash_kda"))
        sys.modules["flash_kda"].__spec__ = importlib.machinery.ModuleSpec("flash_kda", None)

    def counted(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def counting(*args: Any, **kwargs: Any) -> Any:
            try:
                result = function(*args, **kwargs)
            except NotImplementedError as error:
                self.current.errors.append(str(error))
                raise
            self.current.calls += 1
            return result

        return counting

    @staticmethod
    def without_gradients(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = list(signature.bind(*args, **kwargs).arguments.values())
            inputs += inputs.pop().values() if isinstance(inputs[-1], dict) else []  # A_log and dt_bias
            if not torch.is_grad_enabled() or not any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs):
                return function(*args, **kwargs)
            return ForwardOnly.apply(lambda: function(*args, **kwargs), *inputs)

        return forward

    # ---- pytest's hooks

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keeps the tests that call one of our functions, and takes comparisons of gradients out of their modules."""
        chosen = [item for item in items if isinstance(item, pytest.Function) and calls_ours(item.function)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
        if not torch.cuda.is_available():  # fla's kernels need a GPU, ours do not
            for item in chosen:
                item.own_markers[:] = [m for m in item.own_markers if not needs_a_gpu(m)]
        if self.through == "drop-in":
            for module in {id(item.module): item.module for item in chosen}.values():
                module.assert_close = self.forward_comparisons(module.assert_close)

    def forward_comparisons(self, assert_close: Callable) -> Callable:
        @functools.wraps(assert_close)
        def compare(name: str, *args: Any, **kwargs: Any) -> None:
            if name.startswith("d"):  # dq, dk, ..., dA, dh0
                self.current.gradients += 1
            else:
                assert_close(name, *args, **kwargs)

        return compare

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.current = self.results[item.nodeid] = Result()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        if torch.cuda.is_available():
            return (yield)
        with CudaIsCpu():
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        result = self.results[report.nodeid]
        if report.skipped:
            result.status, result.reason = "skipped", str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif report.failed and result.errors and "NotImplementedError" in report.longreprtext:
            result.status, result.reason = "declined", result.errors[-1]
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            result.status, result.reason = "failed", crash.message.splitlines()[0] if crash else report.longreprtext.splitlines()[-1]
        elif report.when == "call" and result.gradients:
            result.status = "forward"


def needs_a_gpu(mark: pytest.Mark) -> bool:
    return mark.name == "skipif" and any(word in mark.kwargs.get("reason", "") for word in ("CUDA", "GPU"))


def calls_ours(function: Callable, depth: int = 2) -> bool:
    """Whether a test, or a helper of its module that it uses, names one of our functions."""
    function = inspect.unwrap(function)
    names = set(function.__code__.co_names)
    if names & set(FUNCTIONS):
        return True
    helpers = [function.__globals__.get(name) for name in names]
    return depth > 1 and any(isinstance(h, types.FunctionType) and calls_ours(h, depth - 1) for h in helpers)


def report(results: dict[str, Result]) -> str:
    """A table with a line for each test, and the reasons of what did not pass."""
    tests: dict[str, list[Result]] = {}
    for name, result in results.items():
        tests.setdefault(name.split("::")[-1].split("[")[0], []).append(result)
    width = max(map(len, tests), default=4)
    lines = [f"{'test':<{width}} {'cases':>6}" + "".join(f"{status:>9}" for status in STATUSES) + f"{'calls':>7}"]
    for name, cases in tests.items():
        counts = Counter(case.status for case in cases)
        columns = "".join(f"{counts[status] or '-':>9}" for status in STATUSES)
        lines.append(f"{name:<{width}} {len(cases):>6}{columns}{sum(case.calls for case in cases):>7}")
    counts = Counter(result.status for result in results.values())
    columns = "".join(f"{counts[status] or '-':>9}" for status in STATUSES)
    lines += [f"{'all':<{width}} {len(results):>6}{columns}{sum(r.calls for r in results.values()):>7}", "", EXPLANATION]
    reasons = Counter((r.status, name.split("::")[-1].split("[")[0], r.reason) for name, r in results.items() if r.reason)
    lines += [f"{status}: {name} x {count}: {reason}" for (status, name, reason), count in sorted(reasons.items())]
    return "\n".join(lines)


def main() -> int:
    usage = "%(prog)s [-h] [--through {drop-in,backend}] checkout [-- further arguments of pytest]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--through", choices=["drop-in", "backend"], default="drop-in")
    ours, pytest_args = sys.argv[1:], []
    if "--" in ours:  # anywhere: argparse takes it only right behind CHECKOUT
        ours, pytest_args = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    args = parser.parse_args(ours)
    tests = args.checkout / "tests" / "ops" / "test_kda.py"
    if not tests.is_file():
        print(f"{tests} is not there: the first argument is a clone of flash-linear-attention")
        return 2
    if args.through == "backend" and not torch.cuda.is_available():
        print("--through backend needs a GPU: what our backend does not take goes to fla's kernels")
        return 2
    plugin = OnOurOperators(args.through)
    try:
        plugin.install()
    except ImportError as error:
        print(f"fla-core with what it needs (triton, einops) and kimi_native must be importable: {error}")
        return 2
    options = ["-q", "-c", os.devnull, "--rootdir", str(args.checkout), "-p", "no:cacheprovider", "-p", "no:xdist", "--disable-warnings"]
    code = pytest.main([*options, str(tests), *pytest_args], plugins=[plugin])
    import fla

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\nfla-core {fla.__version__}, torch {torch.__version__}, {device}, through the {args.through}\n\n{report(plugin.results)}")
    if not plugin.results:
        return 2
    return int(code not in (0, 1) or any(result.status == "failed" for result in plugin.results.values()))


if __name__ == "__main__":
    sys.exit(main())
