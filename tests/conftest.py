"""Makes `kit` and `spec` importable, turns 'not built' into one sentence instead of two hundred errors, shares the tiny checkpoints, and
sums up what was skipped."""

import itertools
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    import kimi_native  # noqa: F401
except ImportError as error:
    pytest.exit(str(error), returncode=1)


def pytest_configure(config: pytest.Config) -> None:
    # transformers says so of every config.json in the hub's format
    config.addinivalue_line("filterwarnings", "ignore:`rope_scaling` is deprecated:FutureWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import kit
    import torch

    if kit.EMULATED or not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    elif kit.SANITIZER:
        kept = _covering(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def _covering(items: list[pytest.Item]) -> set[pytest.Item]:
    """For compute-sanitizer, under which a test takes long: of each test function on the GPU, cases that hold every pair of its
    parameters' values, so that every kernel is still run with every dtype, layout and shape. opcheck shows nothing of a kernel, and
    tensors past 2^31 elements take too long."""
    functions: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("gpu") and not re.search("opcheck|2_to_the_31", item.name):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept: set[pytest.Item] = set()
    for cases in functions.values():
        pairs = [_pairs(case) for case in cases]
        missing = set().union(*pairs)
        while missing:
            best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))  # the first of the best
            kept.add(cases[best])
            missing -= pairs[best]
    return kept


def _pairs(case: pytest.Function) -> set[tuple[tuple[str, str], ...]]:
    values = sorted((name, repr(value)) for name, value in case.callspec.params.items()) if hasattr(case, "callspec") else []
    return set(itertools.combinations(values, min(2, len(values))))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory):
    """The tiny checkpoints of `model_kit.VARIANTS`, transformers' models of them and ours; made on first use, once for all workers."""
    from model_kit import Zoo  # imports transformers, which takes seconds

    root = tmp_path_factory.getbasetemp()
    return Zoo(root.parent if "PYTEST_XDIST_WORKER" in os.environ else root)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason and file, instead of one for each test function."""
    files: dict[str, Counter[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        path, _, reason = report.longrepr
        files.setdefault(reason.removeprefix("Skipped: "), Counter())[Path(path).stem] += 1
    for reason, counts in files.items():
        where = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        terminalreporter.write_line(f"skipped, {reason}: {sum(counts.values())} ({where})")
