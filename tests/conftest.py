"""Makes `kit` and `spec` importable, turns 'not built' into one sentence instead of two hundred errors, shares the tiny checkpoints, and
sums up what was skipped."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    import kimi_native  # noqa: F401
except ImportError as error:
    pytest.exit(str(error), returncode=1)


def pytest_configure(config: pytest.Config) -> None:
    # transformers says so of every config.json in the hub's format
    config.addinivalue_line("filterwarnings", "ignore:`rope_scaling` is deprecated:FutureWarning")
    distributes = getattr(config.option, "numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ
    if (path := os.environ.get("KIMI_LAUNCHES")) and not distributes:
        from launches import Launches

        config.pluginmanager.register(Launches(path))


def pytest_make_parametrize_id(val: object) -> str | None:
    """bfloat16 instead of dtype1, so that a test has the same name on every device."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import kit

    if kit.SANITIZER:  # a selection by hand: tests take long under compute-sanitizer
        lines = (Path(__file__).resolve().parent / "sanitized.txt").read_text().splitlines()
        chosen = {f"tests/{line}" for line in lines if not line.startswith("#")}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]
    if kit.EMULATED or not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def ask_for_hopper_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the emulator, where they have to be asked for; on a GPU they are what runs."""
    import kit

    if kit.EMULATED:
        monkeypatch.setenv("KIMI_CUDA_PATH", "sm90")


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
