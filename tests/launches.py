"""Which test launches which kernels, told by the emulator: a pytest plugin for `KIMI_LAUNCHES=FILE pytest ...`, read by
scripts/kernel_coverage.py. With pytest-xdist each worker writes FILE.<worker>."""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path

import pytest

from kimi_native._loader import load_ops


class Launches:
    def __init__(self, path: str):
        worker = os.environ.get("PYTEST_XDIST_WORKER")
        self.path = Path(f"{path}.{worker}" if worker else path)
        self.tests: dict[str, dict] = {}
        self.operators = load_ops()
        self.read = ctypes.CDLL(str(self.operators)).kimi_emulator_launches
        self.offsets = (ctypes.c_uint64 * 1000)()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self.read(self.offsets, len(self.offsets))
        start = time.perf_counter()
        result = yield
        seconds = time.perf_counter() - start
        count = self.read(self.offsets, len(self.offsets))
        self.tests[item.nodeid] = {"seconds": round(seconds, 4), "kernels": sorted(self.offsets[:count])}
        return result

    def pytest_sessionfinish(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"library": str(self.operators), "tests": self.tests}))
