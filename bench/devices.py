"""The devices that benchmarks run on: what they are, what they could do at best, and how a call is timed on them.

The last-level cache is flushed before every timed call: weights and states come from memory, as they do between the layers
of a model. On a GPU a sample is the time between two events around the replay of a CUDA graph that holds the one call
("graph" in the record), or around the call itself where it cannot be captured ("events": launch gaps count then).
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

Record = dict[str, Any]
Call = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    tflops: float  # matrix product
    gemm: str  # which one
    gbps: float  # copy: bytes read plus bytes written, per second, in 1e9


@dataclass
class Samples:
    """Seconds of every timed call of one function."""

    seconds: list[float] = field(default_factory=list)
    timing: str = "clock"  # or "graph", "events": see above
    eager_us: float | None = None  # a call in a loop of calls from Python: the host's part counts, the cache is warm

    @property
    def median_us(self) -> float:
        return statistics.median(self.seconds) * 1e6

    @property
    def min_us(self) -> float:
        return min(self.seconds) * 1e6


@dataclass(frozen=True)
class Effort:
    repeats: int  # samples of a function at most; at least 3
    budget_s: float  # for a case, peers included


class Device(Protocol):
    """What the harness needs to know of a kind of device."""

    results: str  # stem of the file in bench/results

    def describe(self) -> Record: ...

    def ceilings(self) -> Ceilings: ...

    def measure(self, functions: Mapping[str, Call], effort: Effort) -> dict[str, Samples]:
        """Times the functions in turns, each call behind a flush of the last-level cache."""
        ...

    def path_of(self, run: Call) -> Record:
        """Which kernels `run` takes: `path`, and what else is known of them."""
        ...

    def release(self) -> None:
        """Between two cases."""
        ...

    def broken(self) -> bool:
        """Whether nothing more can run, after a failure."""
        ...


class Cpu:
    results = "cpu"

    def __init__(self) -> None:
        size = min(max(2 * _last_level_cache_bytes(), 64 << 20), 1 << 30)
        self._scratch = torch.zeros(size // 4)
        self._load = round(os.getloadavg()[0], 2)  # of the last minute, before our own work

    def describe(self) -> Record:
        return {
            "machine": _cpu_name(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "last_level_cache_bytes": _last_level_cache_bytes(),
            "isa": _isa(),
            "load": self._load,
        }

    def ceilings(self) -> Ceilings:
        a = torch.randn(1536, 1536)
        b, c = torch.randn_like(a), torch.empty_like(a)
        source = torch.ones(64 << 20)  # 256 MiB
        target = torch.empty_like(source)
        gemm = min(self._seconds(lambda: torch.mm(a, b, out=c)) for _ in range(8))
        copy = min(self._seconds(lambda: target.copy_(source)) for _ in range(8))
        return Ceilings(2 * 1536**3 / gemm / 1e12, "fp32 1536^3", 2 * source.numel() * 4 / copy / 1e9)

    def measure(self, functions: Mapping[str, Call], effort: Effort) -> dict[str, Samples]:
        samples = {name: Samples() for name in functions}
        for function in functions.values():  # first calls: page faults, lazy set-up
            function()
        deadline = time.perf_counter() + effort.budget_s
        for i in range(max(effort.repeats, 3)):
            if i >= 3 and time.perf_counter() > deadline:
                break
            for name, function in functions.items():
                self._scratch.add_(1.0)
                samples[name].seconds.append(self._seconds(function))
        return samples

    def path_of(self, run: Call) -> Record:
        return {"path": "cpu"}

    def release(self) -> None:
        pass

    def broken(self) -> bool:
        return False

    @staticmethod
    def _seconds(run: Call) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class Cuda:
    """The current CUDA device. Reads the card's settings and never changes one."""

    MAX_CAPTURED_S = 0.02  # a longer call has no launch gaps worth a graph
    EAGER_CALLS = 20

    def __init__(self) -> None:
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = max(4 * self._properties.L2_cache_size, 256 << 20)
        # First written, then another read: nothing of the inputs stays in the cache, nor anything that would have to be
        # written back during the timed call. Together they take longer than the host needs to enqueue what follows.
        self._written = torch.zeros(size // 4, device="cuda")
        self._read = torch.zeros(size // 4, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self.results = re.sub(r"[^a-z0-9]+", "-", self._properties.name.lower().replace("nvidia", "")).strip("-")
        self._before = _nvidia_smi()

    def describe(self) -> Record:
        empty = torch.zeros(1, device="cuda")
        nothing = self.measure({"": lambda: empty.zero_()}, Effort(repeats=30, budget_s=1.0))[""]
        return {
            "machine": self._properties.name,
            "compute_capability": f"{self._properties.major}.{self._properties.minor}",
            "multiprocessors": self._properties.multi_processor_count,
            "memory_bytes": self._properties.total_memory,
            "l2_bytes": self._properties.L2_cache_size,
            "flush_bytes": self._written.numel() * 4,
            "driver": self._before.get("driver_version", "unknown"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "us_empty_kernel": round(nothing.median_us, 2),  # in every figure of this run
            **{f"before_{name}": value for name, value in self._before.items() if name != "driver_version"},
        }

    def after(self) -> Record:
        """State of the card at the end of a run."""
        return {f"after_{name}": value for name, value in _nvidia_smi().items() if name != "driver_version"}

    def ceilings(self) -> Ceilings:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        c = torch.empty_like(a)
        source = torch.ones(1 << 30, device="cuda")  # 4 GiB
        target = torch.empty_like(source)
        gemm = self.measure({"": lambda: torch.mm(a, b, out=c)}, Effort(repeats=20, budget_s=0.5))[""].min_us / 1e6
        # Both ways that a copy may take: the copy that the driver chooses, and a kernel.
        copies = {"copy": lambda: target.copy_(source), "kernel": lambda: torch.neg(source, out=target)}
        copy = min(s.min_us for s in self.measure(copies, Effort(repeats=20, budget_s=1.0)).values()) / 1e6
        return Ceilings(2 * 8192**3 / gemm / 1e12, "bf16 8192^3", 2 * source.numel() * 4 / copy / 1e9)

    def measure(self, functions: Mapping[str, Call], effort: Effort) -> dict[str, Samples]:
        launches: dict[str, Call] = {}
        samples: dict[str, Samples] = {}
        for name, function in functions.items():
            launches[name], samples[name] = self._prepare(function)
        self._sample(launches, samples, 1)  # the first replay of a graph uploads it
        for s in samples.values():
            s.seconds.clear()
        deadline = time.perf_counter() + effort.budget_s
        while len(next(iter(samples.values())).seconds) < max(effort.repeats, 3):
            done = len(next(iter(samples.values())).seconds)
            if done >= 3 and time.perf_counter() > deadline:
                break
            self._sample(launches, samples, 3)
        return samples

    def path_of(self, run: Call) -> Record:
        """By the names of the kernels that run: those of the Hopper path have sm90 in theirs."""
        names = self._activities(run)
        kernels = [name for name in names if not name.startswith(("Memset", "Memcpy"))]
        if not kernels:
            return {"path": "portable" if os.environ.get("KIMI_CUDA_PATH") == "portable" else "unknown"}
        return {"path": "sm90" if any("sm90" in name for name in kernels) else "portable", "kernels": len(kernels)}

    @staticmethod
    def _activities(run: Call) -> list[str]:
        """Names of the kernels, copies and fills of one call; empty without a profiler on this machine."""
        from torch.profiler import ProfilerActivity, profile

        try:
            with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
                run()
                torch.cuda.synchronize()
            return [event.name for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        except RuntimeError:
            return []

    def release(self) -> None:
        if torch.cuda.memory_reserved() > self._properties.total_memory // 3:
            torch.cuda.empty_cache()

    def broken(self) -> bool:
        try:
            torch.cuda.synchronize()
        except Exception:
            return True
        return False

    def _prepare(self, function: Call) -> tuple[Call, Samples]:
        """Warms up; returns what launches the call, and where its samples go."""
        function()  # compiles, tunes
        estimate = self._wall(function, 1)
        samples = Samples(timing="events")
        if estimate > self.MAX_CAPTURED_S:
            return function, samples
        estimate = self._wall(function, 2)
        samples.eager_us = digits(self._wall(function, max(2, min(self.EAGER_CALLS, int(0.02 / estimate)))) * 1e6)
        try:
            graph = self._captured(function)
        except Exception:  # it synchronises, say
            torch.cuda.synchronize()
            return function, samples
        if any(name.startswith("Memcpy") for name in self._activities(function)):
            # In a graph a copy takes another engine than outside, which may be slower: the better of the two counts.
            both: dict[str, Call] = {"graph": graph.replay, "events": function}
            tried = {name: Samples() for name in both}
            self._sample(both, tried, 5)
            if tried["events"].median_us < tried["graph"].median_us:
                return function, samples
        samples.timing = "graph"
        return graph.replay, samples

    @staticmethod
    def _captured(function: Call) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                function()
            finally:
                graph.capture_end()
        return graph

    @staticmethod
    def _wall(function: Call, calls: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    def _sample(self, launches: Mapping[str, Call], samples: Mapping[str, Samples], count: int) -> None:
        events = {}
        for name, launch in launches.items():
            events[name] = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
            for start, end in events[name]:
                self._written.fill_(1.0)
                torch.sum(self._read, dim=0, out=self._sum)
                start.record()
                launch()
                end.record()
            torch.cuda.synchronize()
        for name, pairs in events.items():
            samples[name].seconds += [start.elapsed_time(end) / 1e3 for start, end in pairs]


DEVICES: dict[str, Callable[[], Device]] = {"cpu": Cpu, "cuda": Cuda}


def digits(x: float, digits: int = 4) -> float:
    return float(f"{x:.{digits}g}")


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.machine()


def _last_level_cache_bytes() -> int:
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found.group(1)) << (10 if found.group(2) == "K" else 20))
    return max(sizes[1:] or sizes)


def _isa() -> str:
    import kimi_native

    return kimi_native._C.cpu_isa() if kimi_native._C is not None else "unknown"


def _nvidia_smi() -> Record:
    """Driver, power and clocks, only read; empty where nvidia-smi is missing."""
    fields = "driver_version,power.draw,power.limit,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,clocks_event_reasons.active"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id={torch.cuda.current_device()}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    names = ["driver_version", "power_w", "power_limit_w", "sm_mhz", "memory_mhz", "max_sm_mhz", "temperature_c", "throttle_reasons"]
    return dict(zip(names, values, strict=True)) if done.returncode == 0 and len(values) == len(names) else {}
