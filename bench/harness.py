"""How every benchmark of this house is run: check the output once, then time, and print one line a case.

    from harness import Case, Job, main

    def cases(device: str) -> Iterator[Case]: ...

    if __name__ == "__main__":
        main(cases)

A `Case` is a name and a function that makes its `Job` (tensors, calls, check), so that only one job holds memory at a time.
The harness measures the ceilings of the machine first (copy bandwidth, matrix product), then runs each job's `check`, times
`run` and the peers in turns, so that a disturbance of the machine hits all of them, and frees everything. A case whose output
is wrong is FAILED and never timed; a peer whose output is wrong is named and not timed either.

How a call is timed on each kind of device: devices.py.

Columns: `op case us(median) us(min) TFLOP/s GB/s %roof peers`, and tokens/s where a case says how many tokens it works on.
%roof is the time that the ceilings allow, max(flops / GEMM, bytes / copy), over the median; a peer's `x` is its median over
ours (above 1: we are faster).

Results are flat records, one per line of a JSON array: `header` (one a run), `case`, `peer`, and `failed` (docs/benchmarks.md
is made of them by scripts/bench_report.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from devices import DEVICES, Call, Ceilings, Device, Effort, Record, digits
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Peer:
    """Another way to get the same result, and the proof that it is the same."""

    run: Call
    check: Call | None = None  # runs it and raises when its output is wrong


@dataclass(frozen=True)
class Job:
    """What one case calls. `flops` and `bytes` are of the problem, not of the implementation."""

    run: Call
    check: Call  # runs it and raises when the output is wrong
    flops: float
    bytes: float  # that must cross the memory bus: every input once, every output once
    peers: Mapping[str, Call | Peer] = field(default_factory=dict)
    tokens: int = 0  # of the model, that a call works on: adds tokens/s


@dataclass(frozen=True)
class Case:
    """One benchmark: a tested case of one operator."""

    op: str
    name: str  # shape and dtype, e.g. "T=512 D=2304 bf16"
    make: Callable[[], Job]
    core: bool = False  # of the few that are run first, and alone with --quick on a GPU

    def __str__(self) -> str:
        return f"{self.op} {self.name}"


def close(out: Tensor, ref: Tensor, max_r: float, name: str = "output") -> None:
    """Finite, and |out - ref| / |ref| <= max_r; raises AssertionError otherwise. In fp64, in pieces, on the device of `out`."""
    assert out.shape == ref.shape, f"{name}: shape {tuple(out.shape)} instead of {tuple(ref.shape)}"
    difference = torch.zeros((), dtype=torch.float64, device=out.device)
    scale = torch.zeros_like(difference)
    for o, r in zip(out.split(1 << 14), ref.split(1 << 14), strict=True):
        o, r = o.double(), r.to(out.device).double()
        difference += (o - r).square().sum()
        scale += r.square().sum()
    error = (difference.sqrt() / scale.sqrt()).item()
    assert error <= max_r, f"{name}: relative error {error:.2e}, allowed {max_r:.1e}"  # NaN fails


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


@dataclass
class Session:
    """Cases run one after another on one device, and their records."""

    device: Device
    ceilings: Ceilings
    head: Record
    effort: Effort
    records: list[Record] = field(default_factory=list)
    failed: int = 0
    kept: list[Record] | None = None  # what the file held before this run

    @classmethod
    def start(cls, kind: str, effort: Effort, peer_libs: Path | None = None) -> Session:
        device = DEVICES[kind]()
        ceilings = device.ceilings()
        session = cls(device, ceilings, header(device, ceilings, peer_libs), effort)
        session._print_head()
        return session

    def _print_head(self) -> None:
        head, ceilings = self.head, self.ceilings
        what = f"{head['threads']} threads, {head['isa']}" if "threads" in head else f"driver {head['driver']}, CUDA {head['cuda']}"
        print(f"# {head['machine']}, {what}; torch {torch.__version__}, commit {head['commit']}")
        empty = f"; an empty kernel takes {head['us_empty_kernel']} us" if "us_empty_kernel" in head else ""
        print(f"# ceilings: GEMM {ceilings.gemm} {digits(ceilings.tflops)} TFLOP/s, copy {ceilings.gbps:.1f} GB/s{empty}")
        if head.get("load", 0) > 1.5 * head.get("threads", 1):  # more than a benchmark run just before this one leaves
            print(f"# the machine was busy before this run (load {head['load']}): the timings may mean little")
        print(TITLE, flush=True)

    def run(self, case: Case) -> bool:
        """Returns whether more cases can run."""
        try:
            records = self._measure(case)
        except Exception as error:
            self.failed += 1
            traceback.print_exc()
            print(f"{case.op:<20} {case.name:<36} FAILED", flush=True)
            self.records.append({"record": "failed", "op": case.op, "case": case.name, "error": _first_line(error)})
            if self.device.broken():
                print("the device answers no more: the run ends here", flush=True)
                return False
            del error
            gc.collect()
        else:
            self.records += records
            print(line_of(records), flush=True)
        self.device.release()
        return True

    def _measure(self, case: Case) -> list[Record]:
        """Checks and times one case; its record, then one for each peer."""
        with torch.inference_mode():
            job = case.make()
            job.check()
            functions, problems = {"": job.run}, {}
            for name, peer in job.peers.items():
                peer = peer if isinstance(peer, Peer) else Peer(peer)
                try:
                    if peer.check is not None:
                        peer.check()
                    else:
                        peer.run()
                    functions[name] = peer.run
                except Exception as error:
                    if self.device.broken():
                        raise
                    problems[name] = _first_line(error)
            path = self.device.path_of(job.run)
            samples = self.device.measure(functions, self.effort)
        ours = samples.pop("")
        seconds = ours.median_us / 1e6
        compute_s, memory_s = job.flops / self.ceilings.tflops / 1e12, job.bytes / self.ceilings.gbps / 1e9
        record: Record = {
            "record": "case",
            "op": case.op,
            "case": case.name,
            **path,
            "us": digits(ours.median_us),
            "us_min": digits(ours.min_us),
            "samples": len(ours.seconds),
            "timing": ours.timing,
            "flops": job.flops,
            "bytes": job.bytes,
            "tflops": digits(job.flops / seconds / 1e12),
            "gbps": digits(job.bytes / seconds / 1e9),
            "roof_pct": round(100 * max(compute_s, memory_s) / seconds, 1),
            "bound": "compute" if compute_s > memory_s else "memory",
        }
        if ours.eager_us is not None:
            record["us_eager"] = ours.eager_us
        if job.tokens:
            record["tokens_per_s"] = digits(job.tokens / seconds)
        peers = []
        for name in job.peers:
            peer_record: Record = {"record": "peer", "op": case.op, "case": case.name, "peer": name}
            if name in problems:
                peer_record["error"] = problems[name]
            else:
                s = samples[name]
                peer_record |= {
                    "peer_us": digits(s.median_us),
                    "peer_us_min": digits(s.min_us),
                    "timing": s.timing,
                    "ratio": round(s.median_us / ours.median_us, 2),
                }
                if s.eager_us is not None:
                    peer_record["peer_us_eager"] = s.eager_us
            peers.append(peer_record)
        return [record, *peers]

    def write(self, path: Path) -> None:
        """Everything so far, into a file of results; may be called after every case."""
        if self.kept is None:
            self.kept = json.loads(path.read_text()) if path.exists() else []
        after = getattr(self.device, "after", None)
        state = after() if after is not None and not self.device.broken() else {}
        write_json(path, self.kept, self.head | state, self.records)

    def results_file(self) -> Path:
        return RESULTS / f"{self.device.results}.json"


def line_of(records: list[Record]) -> str:
    record, notes = records[0], []
    if "tokens_per_s" in record:
        notes.append(f"{record['tokens_per_s']:.1f} tokens/s")
    for peer in records[1:]:
        known = "peer_us" in peer
        notes.append(f"{peer['peer']} {peer['peer_us']:.1f}us {peer['ratio']:.2f}x" if known else f"{peer['peer']}: {peer['error'][:90]}")
    return (
        f"{record['op']:<20} {record['case']:<36} {record['us']:>10.1f} {record['us_min']:>10.1f} {record['tflops']:>8.3f} "
        f"{record['gbps']:>7.1f} {record['roof_pct']:>6.1f}  {'  '.join(notes)}"
    ).rstrip()


TITLE = f"{'op':<20} {'case':<36} {'us(median)':>10} {'us(min)':>10} {'TFLOP/s':>8} {'GB/s':>7} {'%roof':>6}  peer us x-peer"


def header(device: Device, ceilings: Ceilings, peer_libs: Path | None = None) -> Record:
    """What a reader needs to judge or repeat the run."""
    return origin(device, peer_libs) | {
        "ceiling_tflops": digits(ceilings.tflops),
        "ceiling_gemm": ceilings.gemm,
        "ceiling_gbps": digits(ceilings.gbps),
    }


def origin(device: Device, peer_libs: Path | None = None) -> Record:
    """When, with what, and on what something was found."""
    import kimi_native

    versions = {"kimi_native": kimi_native.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("triton", "fla-core", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if peer_libs is not None:
        note = peer_libs / "VERSION"
        versions["peer libraries"] = note.read_text().strip() if note.exists() else "unknown"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": shlex.join([Path(sys.executable).name, os.path.relpath(sys.argv[0]), *map(_without_folder, sys.argv[1:])]),
        "commit": _commit(),
        "versions": versions,
        **device.describe(),
    }


def write_json(path: Path, kept: list[Record], head: Record, records: Iterable[Record]) -> None:
    """Writes what a file of results held and a run: one record per line of a JSON array.

    The records of a case (its own and those of its peers, or its failure) are replaced by the new ones of the same op and case.
    Every record names the header of its run by `run`; headers that no record names any more are dropped.
    """
    run = max((r["run"] for r in kept), default=0) + 1
    fresh = [{"record": r["record"], "run": run, **r} for r in records]
    replaced = {(r["op"], r["case"]) for r in fresh}
    results = [r for r in kept if r["record"] != "header" and (r["op"], r["case"]) not in replaced] + fresh
    used = {r["run"] for r in results}
    headers = [r for r in kept if r["record"] == "header" and r["run"] in used]
    if fresh:
        headers.append({"record": "header", "run": run, **head})
    results.sort(key=lambda r: (r["op"], r["run"]))  # stable: peers stay behind their case
    _write_list(path, headers + results)


def write_found(asked: Path, name: str, device: Device, records: list[Record]) -> None:
    """What a program of its own found, behind one header: to `asked`, or if that is no file, to `name`'s for the device."""
    path = asked if asked.name else RESULTS / f"{name}_{device.results}.json"
    _write_list(path, [{"record": "header", **origin(device)}, *records])


def _write_list(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=sorted(DEVICES), help="default: cuda where there is a GPU and a build for it")
    parser.add_argument("--filter", default="", help="only cases whose 'op case' contains this regular expression")
    parser.add_argument("--json", nargs="?", type=Path, const=Path(), help="add the results to this file (bench/results/<device>.json)")
    parser.add_argument("--quick", action="store_true", help="few repeats (does it run, not how fast); on a GPU the core cases only")
    parser.add_argument("--list", action="store_true", help="only print the cases")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, help="timed calls of a case at most (default 50; 30 on a GPU)")
    parser.add_argument("--seconds", type=float, help="time for a case, peers included (default 3; 0.6 on a GPU)")
    parser.add_argument("--budget-s", type=float, help="wall clock of the whole run: stops between two cases when it is over")
    parser.add_argument("--peer-libs", type=Path, help="folder with _flashkda_C*.so and _flashmla_C*.so (bench/peers.py)")
    return parser


def effort_of(args: argparse.Namespace, kind: str) -> Effort:
    repeats, budget_s = (50, 3.0) if kind == "cpu" else (30, 0.6)
    if args.quick:
        return Effort(3, 0.5 if kind == "cpu" else 0.1)
    return Effort(args.repeats or repeats, args.seconds or budget_s)


def default_device() -> str:
    import kimi_native  # noqa: F401  loads the operators

    return "cuda" if torch.ops.kimi_native.cuda_build() not in ("", "emulated") and torch.cuda.is_available() else "cpu"


def run_cases(cases_of: Iterable[Callable[[str], Iterable[Case]]], args: argparse.Namespace) -> Session | None:
    """Runs what the arguments ask for, the core cases first; None when only the names were asked for or nothing matched."""
    import peers

    began = time.monotonic()
    kind = args.device or default_device()
    if kind == "cuda" and not args.list and not torch.cuda.is_available():
        sys.exit("no CUDA device: --device cpu runs the CPU backend")
    if args.threads:
        torch.set_num_threads(args.threads)
    wanted = re.compile(args.filter)
    cases = [case for of_device in cases_of for case in of_device(kind) if wanted.search(str(case))]
    if args.quick and kind != "cpu":
        cases = [case for case in cases if case.core]
    if args.list:
        for case in cases:
            print(case)
        return None
    if not cases:
        sys.exit(f"no case matches {args.filter!r}")
    peers.use(args.peer_libs)
    session = Session.start(kind, effort_of(args, kind), args.peer_libs)
    for i, case in enumerate(sorted(cases, key=lambda c: kind != "cpu" and not c.core)):
        if args.budget_s and time.monotonic() - began > args.budget_s:
            print(f"--budget-s is over: {len(cases) - i} cases were not run", flush=True)
            break
        goes_on = session.run(case)
        if args.json is not None:
            session.write(session.results_file() if args.json == Path() else args.json)
        if not goes_on:
            break
    print(f"# {len(cases)} cases, {time.monotonic() - began:.0f} s", flush=True)
    return session


def main(cases: Callable[[str], Iterable[Case]]) -> None:
    """The command line of every bench_<op>.py. `cases` gets the kind of device, "cpu" or "cuda"."""
    finish(run_cases([cases], arguments((sys.modules["__main__"].__doc__ or "").strip() or None).parse_args()))


def finish(session: Session | None) -> None:
    if session is not None and session.failed:
        sys.exit(f"{session.failed} case{'s' if session.failed > 1 else ''} failed")


def _without_folder(argument: str) -> str:
    """An absolute path means nothing to who reads the record elsewhere."""
    return Path(argument).name if argument.startswith("/") else argument


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _commit() -> str:
    """Commit of the checkout, with a + when files were changed since; $KIMI_COMMIT in a tree without git."""
    if commit := os.environ.get("KIMI_COMMIT"):
        return commit

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") or "unknown"
    except OSError:
        return "unknown"
