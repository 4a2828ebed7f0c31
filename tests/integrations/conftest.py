"""Tests inside the projects that kimi_native plugs into. They need those projects: `make test-integrations` installs them.

Each engine lives in this process where it can (vLLM's own is told to by an environment variable), so that a test can count and
replace the calls of operators.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # with tensor parallelism: its workers do not inherit this process
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GB
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # otherwise one worker a NUMA node
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

DIFFERENCES: dict[str, float] = {}


def pytest_configure(config: pytest.Config) -> None:
    # torch's, met by vLLM's wrapper of triton on import
    config.addinivalue_line("filterwarnings", "ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in float32 with wide random weights and the released model's range of forget gates."""
    from kimi_native.tiny import make_tiny

    directory = tmp_path_factory.mktemp("checkpoint")
    make_tiny(directory, preset="tiny", gates="real", seed=11)
    return directory


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Any:
    """transformers' model of the same files."""
    from vllm_kit import Reference

    return Reference(checkpoint)


@pytest.fixture
def difference(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A function that notes how far the log-probabilities of this test were from the reference, for the summary."""

    def note(value: float) -> None:
        DIFFERENCES[request.node.nodeid] = max(value, DIFFERENCES.get(request.node.nodeid, 0.0))

    yield note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if DIFFERENCES:
        terminalreporter.section("largest difference of a log-probability from the reference")
        for name, value in DIFFERENCES.items():
            terminalreporter.write_line(f"{value:.1e}  {name.removeprefix('tests/integrations/')}")
