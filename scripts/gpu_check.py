"""Runs on a GPU all that cannot be checked without one. Standard library only; needs torch and pytest, no network, no git.

    gpu_check.py                                       everything (at most ten minutes on an H200 with 16 cores)
    gpu_check.py --steps memcheck,racecheck --op rms_norm
    gpu_check.py --no-build --logs out/logs            with build-gpu/lib as another machine built it

Steps:
  native     the tests marked `gpu`, on the machine code that was built and whichever kernels suit this card
  portable   the same with KIMI_CUDA_PATH=portable, on a copy of the libraries that has only PTX (scripts/ptx_only.py), which the
             driver compiles: what any card from compute capability 8.0 on runs
  memcheck, racecheck, initcheck, synccheck
             compute-sanitizer over the operators' tests, as many of them as tests/conftest.py leaves under KIMI_SANITIZER=1; with
             both kinds of kernels where an operator has Hopper kernels of its own

Each step runs once per test file, several at a time, each under its own time limit. Exit code 0: all well. 1: something failed or
could not be run. 2: nothing can be checked here (no GPU, no build).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ptx_only import ptx_only

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ["memcheck", "racecheck", "initcheck", "synccheck"]
STEPS = ["native", "portable", *SANITIZERS]
# How much longer a step takes than `native`, roughly: long ones start first.
WEIGHT = {"native": 1, "portable": 2, "memcheck": 3, "racecheck": 5, "initcheck": 4, "synccheck": 2}

# Only our kernels are checked: "kimi" is in their mangled names. Not by initcheck, which must see who else wrote to memory.
# torch probes the driver with calls that may fail, so failed calls are not errors; our own throw.
SANITIZER_OPTIONS = [
    "--target-processes",
    "application-only",
    "--launch-timeout",
    "120",
    "--require-cuda-init",
    "no",
    "--print-limit",
    "50",
]
TOOL_OPTIONS = {
    "memcheck": ["--kernel-name", "kns=kimi", "--report-api-errors", "no"],
    "racecheck": ["--kernel-name", "kns=kimi"],
    "initcheck": [],
    "synccheck": ["--kernel-name", "kns=kimi"],
}


class CannotCheck(Exception):
    """Nothing can be checked on this machine, for the reason given."""


@dataclass
class Target:
    """A test file; `operator` is set where csrc/cuda has kernels of that name, `hopper` where some are for Hopper alone."""

    name: str
    file: Path
    operator: bool
    hopper: bool


@dataclass
class Job:
    step: str
    row: str
    command: list[str]
    environment: dict[str, str]
    timeout: float
    must_run: bool
    weight: float = 0.0


@dataclass
class Result:
    job: Job
    good: bool
    text: str
    seconds: float
    output: str = field(default="", repr=False)


# ---- what there is to run ---------------------------------------------------------------------------------------------------


def find_targets(root: Path, operators: list[str]) -> list[Target]:
    """The test files that can have a GPU test in them. `operators` restricts them to these operators' own."""
    cuda = root / "csrc" / "cuda"
    sources = {path.stem: path for path in sorted(cuda.glob("*.cu"))}
    sources |= {path.name: path for path in sorted(cuda.iterdir()) if path.is_dir() and any(path.glob("*.cu"))}
    sources.pop("common", None)
    if unknown := set(operators) - set(sources):
        raise CannotCheck(f"no CUDA sources of {', '.join(sorted(unknown))}; there are {', '.join(sorted(sources))}")
    targets = []
    for file in sorted((root / "tests").glob("test_*.py")):
        name = file.stem.removeprefix("test_")
        if name in (operators or sources):
            place = sources[name]
            hopper = any("sm90" in path.name for path in (place.iterdir() if place.is_dir() else [place]))
            targets.append(Target(name, file, True, hopper))
        elif not operators and re.search(r"\b(DEVICES|DEVICE_DTYPES|needs_gpu)\b|mark\.gpu\b", file.read_text()):
            targets.append(Target(name, file, False, False))
    return targets


def make_jobs(
    targets: list[Target],
    steps: list[str],
    *,
    libraries: dict[str, Path],
    scratch: Path,
    timeout: float,
    threads: int,
    sanitizer: str | None,
) -> list[Job]:
    """`libraries`: where _ops.so lies for the steps `native` and `portable`. `sanitizer`: the program, if a step needs it."""
    base = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads),
        "CUDA_CACHE_PATH": str(scratch / "jit"),  # PTX is compiled once for all processes, and anew for every check
    }
    native = {**base, "KIMI_NATIVE_LIB_DIR": str(libraries["native"]), "KIMI_CUDA_PATH": ""}
    jobs = []
    for step in steps:
        for target in targets:
            variants = [(target.name, native)]
            if step == "portable":
                variants = [(target.name, {**base, "KIMI_NATIVE_LIB_DIR": str(libraries["portable"]), "KIMI_CUDA_PATH": "portable"})]
            elif step in SANITIZERS:
                if not target.operator:
                    continue
                if target.hopper:
                    variants.append((f"{target.name}, portable", {**native, "KIMI_CUDA_PATH": "portable"}))
            for row, environment in variants:
                place = scratch / f"{step}.{row.replace(', ', '.')}"
                command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=25", "-m", "gpu"]
                command += [f"--basetemp={place}", str(target.file)]
                if step in SANITIZERS:
                    assert sanitizer is not None
                    command = [sanitizer, "--tool", step, *SANITIZER_OPTIONS, *TOOL_OPTIONS[step], *command]
                    # Every tensor is an allocation of its own, so that an access past its end is seen.
                    environment = {**environment, "KIMI_SANITIZER": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                weight = WEIGHT[step] * target.file.stat().st_size
                jobs.append(Job(step, row, command, environment, timeout, target.operator, weight))
    return sorted(jobs, key=lambda job: -job.weight)


def find_sanitizer() -> str | None:
    places = [os.environ.get("COMPUTE_SANITIZER"), shutil.which("compute-sanitizer")]
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places += [str(Path(toolkit) / "bin" / "compute-sanitizer") for toolkit in toolkits if toolkit]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


# ---- what a finished run means ----------------------------------------------------------------------------------------------


def judge_tests(code: int, output: str, *, must_run: bool) -> tuple[bool, str]:
    """Of pytest's exit code and output: whether all is well, and the text for the table. `must_run`: no test is a failure."""
    counts = re.findall(r"^(?:=+ )?((?:\d+ \w+(?:, )?)+)(?: in [\d.]+s.*)$", output, re.MULTILINE)
    numbers = {word.rstrip("s"): int(n) for n, word in re.findall(r"(\d+) (\w+)", counts[-1])} if counts else {}
    passed, failed = numbers.get("passed", 0), numbers.get("failed", 0) + numbers.get("error", 0)
    if code == 0 and passed:
        return True, f"{passed} ok"
    if code in (0, 5) and not failed:
        return (False, "no test") if must_run else (True, "-")
    return False, f"{failed} FAILED" if failed else f"exit {code}"


def judge_sanitizer(tool: str, code: int, output: str) -> tuple[bool, str]:
    """The same for a run of pytest under compute-sanitizer. Findings count only where one of our kernels is named."""
    good, text = judge_tests(code, output, must_run=True)
    summary = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", output, re.MULTILINE)
    if not summary:
        return False, "no report" if good else text
    findings = int(summary[-1])
    if tool == "initcheck":  # sees torch's kernels too, which read what tests leave uninitialised on purpose
        blocks = re.split(r"^========= (?=Uninitialized )", output, flags=re.MULTILINE)[1:]
        ours = sum(re.search(r"^=+ +at [^\n]*kimi", block, re.MULTILINE) is not None for block in blocks)
        more = findings > len(blocks)  # not all were printed
        findings = ours or (findings if more else 0)
    if findings:
        return False, f"{findings} FOUND"
    return good, text


def judge(job: Job, code: int | None, output: str) -> tuple[bool, str]:
    if code is None:
        return False, f"> {job.timeout:.0f} s"
    if job.step in SANITIZERS:
        return judge_sanitizer(job.step, code, output)
    return judge_tests(code, output, must_run=job.must_run)


def table(results: list[Result], steps: list[str]) -> str:
    """One line per test file, one column per step, with seconds."""
    cells = {(r.job.row, r.job.step): f"{r.text} {r.seconds:.0f}s" for r in results}
    rows = sorted({r.job.row for r in results})
    lines = [["", *steps], *([row, *(cells.get((row, step), "") for step in steps)] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(steps) + 1)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


# ---- running it ---------------------------------------------------------------------------------------------------------------


def run_job(job: Job, deadline: float) -> Result:
    start = time.monotonic()
    timeout = min(job.timeout, deadline - start)
    if timeout <= 0:
        return Result(job, False, "no time left", 0.0)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            job.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | job.environment,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    good, text = judge(job, code, output)
    return Result(job, good, text, time.monotonic() - start, output)


def run_jobs(jobs: list[Job], workers: int, deadline: float, logs: Path) -> list[Result]:
    """Runs them, the first of the list first; appends what each printed to `logs`/<step>.log when it has ended."""
    results = []

    def run(job: Job) -> None:
        result = run_job(job, deadline)
        results.append(result)  # (atomic)
        settings = " ".join(f"{k}={shlex.quote(v)}" for k, v in job.environment.items())
        with open(logs / f"{job.step}.log", "a") as log:
            log.write(f"##### {job.row}: {result.text}, {result.seconds:.1f} s\n{settings} {shlex.join(job.command)}\n{result.output}\n")
        print(f"{'ok  ' if result.good else 'FAIL'} {job.step:<10} {job.row:<28} {result.text:<12} {result.seconds:6.1f} s", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, jobs))
    return results


def failures(results: Iterable[Result], lines: int = 40) -> str:
    """The end of what the failed ones printed."""
    parts = []
    for result in results:
        if not result.good:
            interesting = [line for line in result.output.splitlines() if line.strip()]
            found = [
                i for i, line in enumerate(interesting) if re.match(r"=+ (Invalid|Error|Warning|Uninitialized|Barrier|Potential)", line)
            ]
            begin = found[0] if found else max(0, len(interesting) - lines)
            parts.append("\n".join([f"--- {result.job.step} {result.job.row}: {result.text}", *interesting[begin : begin + lines]]))
    return "\n".join(parts)


# ---- this machine -----------------------------------------------------------------------------------------------------------

PROBE = """
import json, sys
try:
    import torch
except ImportError as error:
    sys.exit(f"no torch: {error}")
if not torch.cuda.is_available():
    sys.exit("no CUDA device (torch " + torch.__version__ + ")")
major, minor = torch.cuda.get_device_capability()
if major < 8:
    sys.exit(f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; the kernels need 8.0")
build = "unknown"
if len(sys.argv) > 1:
    torch.ops.load_library(sys.argv[1])
    build = torch.ops.kimi_native.cuda_build()
    if build in ("none", "emulated"):
        sys.exit(f"{sys.argv[1]} has no CUDA kernels (cuda_build: {build})")
print(json.dumps([torch.cuda.get_device_name(), f"{major}.{minor}", torch.__version__, build]))
"""


def probe(library: Path | None = None) -> list[str]:
    """Name and compute capability of the GPU, torch's version and the CUDA version of the build."""
    arguments = [] if library is None else [str(library)]
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise CannotCheck(lines[-1] if lines else f"python -c ... ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def newest(root: Path) -> float:
    files = [root / "CMakeLists.txt", *(p for p in (root / "csrc").rglob("*") if p.is_file())]
    return max(path.stat().st_mtime for path in files)


def build(directory: Path, *, allowed: bool) -> Path:
    """The directory with the libraries, built if that is needed and allowed."""
    library = directory / "lib" / "_ops.so"
    if not allowed:
        if not library.is_file():
            raise CannotCheck(f"--no-build, but there is no {library}")
        return library.parent
    carried = not (directory / "build.ninja").is_file()  # built elsewhere
    if library.is_file() and (carried or library.stat().st_mtime >= newest(ROOT)):
        return library.parent
    commands = [
        ["cmake", "--preset", "gpu", "-B", str(directory), f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(directory)],
    ]
    for command in commands:
        print("+", shlex.join(command), flush=True)
        if subprocess.run(command, cwd=ROOT).returncode:
            raise CannotCheck("the build failed")
    return library.parent


def choice(text: str, allowed: list[str]) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in allowed]:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; there are {', '.join(allowed)}")
    return [name for name in allowed if name in names]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=lambda text: choice(text, STEPS), default=STEPS, help=f"of {','.join(STEPS)}")
    parser.add_argument("--op", action="append", default=[], metavar="NAME", help="only the tests of this operator (may be repeated)")
    parser.add_argument("--jobs", type=int, default=max(1, min(8, cores // 2)), help="processes at a time (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one test file in one step (default %(default)s)")
    parser.add_argument("--deadline", type=float, default=590, help="seconds for all of it without the build (default %(default)s)")
    parser.add_argument("--logs", type=Path, help="folder for what was printed (default build-gpu/check)")
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build-gpu", help="where the build is or goes (default build-gpu)")
    parser.add_argument("--no-build", action="store_true", help="take the libraries of --build-dir as they are")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> int:
    probe()  # before a build that would be for nothing
    directory = Path(os.path.abspath(args.build_dir))
    libraries = {"native": build(directory, allowed=not args.no_build)}
    device, capability, torch, cuda = probe(libraries["native"] / "_ops.so")
    targets = find_targets(ROOT, args.op)
    sanitizer = find_sanitizer()
    if sanitizer is None and set(args.steps) & set(SANITIZERS):
        raise CannotCheck("no compute-sanitizer (in PATH, $CUDA_HOME/bin or $COMPUTE_SANITIZER); --steps native,portable does without")
    logs = Path(os.path.abspath(args.logs or directory / "check"))
    logs.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        (logs / f"{step}.log").unlink(missing_ok=True)

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kimi-gpu-check-") as temporary:
        scratch = Path(temporary)
        if "portable" in args.steps:
            libraries["portable"] = scratch / "lib"
            libraries["portable"].mkdir()
            for path in libraries["native"].glob("*.so"):
                (libraries["portable"] / path.name).write_bytes(ptx_only(path.read_bytes())[0])
        jobs = make_jobs(
            targets,
            args.steps,
            libraries=libraries,
            scratch=scratch,
            timeout=args.timeout,
            threads=max(1, (os.cpu_count() or 1) // args.jobs),
            sanitizer=sanitizer,
        )
        head = f"{device} ({capability}), torch {torch}, kernels built by CUDA {cuda}: {len(jobs)} runs, {args.jobs} at a time"
        print(head, flush=True)
        results = run_jobs(jobs, args.jobs, start + args.deadline, logs)
    bad = [result for result in results if not result.good]
    end = f"{len(results) - len(bad)} of {len(results)} runs are well, {time.monotonic() - start:.0f} s; logs in {logs}"
    summary = "\n".join(filter(None, [head, failures(bad), table(results, args.steps), end]))
    (logs / "summary.txt").write_text(summary + "\n")
    print("\n" + summary.removeprefix(head + "\n"))
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        return check(args)
    except CannotCheck as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
