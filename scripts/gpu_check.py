"""Runs on a GPU all that cannot be checked without one. Standard library only; needs torch and pytest, no network, no git.

    gpu_check.py                                       everything (about eight minutes on an H200 with 16 cores, and the builds)
    gpu_check.py --steps native,portable               the tests alone
    gpu_check.py --steps memcheck,racecheck --op rms_norm
    gpu_check.py --no-build --logs out/logs            with build-gpu/lib as another machine built it

Steps, in this order; each is one run of pytest under a time limit of its own:
  native     all tests marked `gpu`, on the machine code that was built and whichever kernels suit this card (on Hopper, its own)
  portable   the same with KIMI_CUDA_PATH=portable, on a copy of the libraries that has only PTX (scripts/ptx_only.py), which the
             driver compiles: what any card from compute capability 8.0 on runs
  memcheck, racecheck, initcheck, synccheck
             compute-sanitizer over the tests in tests/sanitized.txt, the four side by side, with KIMI_CUDA_PATH=portable; then, without,
             over those of the kernels for Hopper alone (tests/test_<op>_sm90.py), racecheck with a library of its own, whose barriers
             it follows (target _ops_racecheck, csrc/cuda/common/ptx.h)

Exit code 0: all well. 1: something failed or could not be run. 2: nothing can be checked here (no GPU, no build).
"""

from __future__ import annotations

import argparse
import importlib.util
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
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ptx_only import ptx_only

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ["memcheck", "racecheck", "initcheck", "synccheck"]
STEPS = ["native", "portable", *SANITIZERS]
TIMEOUTS = {"native": 180, "portable": 240, **dict.fromkeys(SANITIZERS, 240)}

# Only our kernels are checked: "kimi" is in their mangled names. Not by initcheck, which must see who else wrote to memory.
# torch probes the driver with calls that may fail, so failed calls are not errors; our own throw. A kernel with an error ends, the
# tests after it go on.
SANITIZER_OPTIONS = "--target-processes application-only --launch-timeout 120 --require-cuda-init no --print-limit 1000".split()
TOOL_OPTIONS = {
    "memcheck": "--kernel-name kns=kimi --report-api-errors no --destroy-on-device-error kernel".split(),
    "racecheck": "--kernel-name kns=kimi".split(),
    "initcheck": [],
    "synccheck": "--kernel-name kns=kimi".split(),
}


class CannotCheck(Exception):
    """Nothing can be checked on this machine, for the reason given."""


@dataclass
class Job:
    """One run of pytest. `name` is the step, with the kind of kernels where it is not the native one."""

    name: str
    step: str
    command: list[str]
    environment: dict[str, str]
    timeout: float
    report: Path  # JUnit's XML, written by pytest at the end


@dataclass
class Result:
    job: Job
    good: bool
    text: str
    seconds: float
    files: dict[str, str] = field(default_factory=dict)  # for each test file what the table says of it
    output: str = field(default="", repr=False)


# ---- what there is to run ---------------------------------------------------------------------------------------------------


def operators(root: Path) -> list[str]:
    """Those that have CUDA kernels."""
    cuda = root / "csrc" / "cuda"
    folders = {path.parent.name for path in cuda.glob("*/*.cu")} - {"common"}
    return sorted(folders | {path.stem for path in cuda.glob("*.cu")})


def find_files(root: Path, only: list[str], *, sanitized: bool, hopper: bool = False) -> list[Path]:
    """The test files that can have a GPU test in them. `only` restricts them to these operators' own; `sanitized` to operators', and
    beside it `hopper` to those of the kernels for Hopper alone."""
    known = operators(root)
    if unknown := set(only) - set(known):
        raise CannotCheck(f"no CUDA sources of {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    files = []
    for file in sorted((root / "tests").glob("test_*.py")):
        name = file.stem.removeprefix("test_").removesuffix("_sm90")
        wanted = name in (only or known) if only or sanitized else re.search(r"\b(DEVICES|DEVICE_DTYPES|needs_gpu)\b", file.read_text())
        if wanted and not (sanitized and hopper and not file.stem.endswith("_sm90")):
            files.append(file)
    return files


def make_jobs(
    root: Path,
    steps: list[str],
    only: list[str],
    *,
    libraries: dict[str, Path],
    scratch: Path,
    workers: int,
    sanitizer: str | None,
) -> list[list[Job]]:
    """Groups of jobs; the jobs of a group run side by side. `libraries`: where _ops.so lies for the steps `native`, `portable` and, on
    Hopper, `racecheck`.
    `sanitizer`: the program, if a step needs it."""
    base = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "CUDA_CACHE_PATH": str(scratch / "jit"),  # PTX is compiled anew for every check
        "KIMI_NATIVE_LIB_DIR": str(libraries["native"]),
        "KIMI_CUDA_PATH": "",
    }
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "--maxfail=25", "--durations=5", "-m", "gpu"]
    distributed = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []

    def job(name: str, step: str, environment: dict[str, str], front: list[str], arguments: list[str]) -> Job:
        place, report = scratch / name.replace(" ", "-"), scratch / f"{name.replace(' ', '-')}.xml"
        files = [str(file) for file in find_files(root, only, sanitized=step in SANITIZERS, hopper=name.endswith("sm90"))]
        command = [*front, *pytest, f"--basetemp={place}", f"--junitxml={report}", *arguments, *files]
        return Job(name, step, command, base | environment, TIMEOUTS[step], report)

    groups = []
    if "native" in steps:
        groups.append([job("native", "native", {}, [], ["-q", *distributed])])
    if "portable" in steps:
        environment = {"KIMI_NATIVE_LIB_DIR": str(libraries["portable"]), "KIMI_CUDA_PATH": "portable"}
        groups.append([job("portable", "portable", environment, [], ["-q", *distributed])])
    for kind in ["", "sm90"] if find_files(root, only, sanitized=True, hopper=True) else [""]:
        group = []
        for tool in [step for step in steps if step in SANITIZERS]:
            assert sanitizer is not None
            front = [sanitizer, "--tool", tool, *SANITIZER_OPTIONS, *TOOL_OPTIONS[tool]]
            # Every tensor is an allocation of its own, so that an access past its end is seen; and the same kernels as in the emulator,
            # with which tests/sanitized.txt was chosen.
            environment = {"KIMI_SANITIZER": tool, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "KIMI_CUDA_MULTIPROCESSORS": "3"}
            environment["KIMI_CUDA_PATH"] = "" if kind else "portable"
            if kind and tool == "racecheck":
                environment["KIMI_NATIVE_LIB_DIR"] = str(libraries["racecheck"])
            group.append(job(f"{tool} {kind}".strip(), tool, environment, front, ["-v"]))
        groups.append(group)
    return [group for group in groups if group]


def find_sanitizer() -> str | None:
    places = [os.environ.get("COMPUTE_SANITIZER"), shutil.which("compute-sanitizer")]
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places += [str(Path(toolkit) / "bin" / "compute-sanitizer") for toolkit in toolkits if toolkit]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


# ---- what a finished run means ----------------------------------------------------------------------------------------------


def judge_tests(code: int, output: str) -> tuple[bool, str]:
    """Of pytest's exit code and output: whether all is well, and in a few words how it went. No test is a failure."""
    counts = re.findall(r"^(?:=+ )?((?:\d+ \w+(?:, )?)+)(?: in [\d.]+s.*)$", output, re.MULTILINE)
    numbers = {word.rstrip("s"): int(n) for n, word in re.findall(r"(\d+) (\w+)", counts[-1])} if counts else {}
    passed, failed = numbers.get("passed", 0), numbers.get("failed", 0) + numbers.get("error", 0)
    if code == 0 and passed:
        return True, f"{passed} ok"
    if code in (0, 5) and not failed:
        return False, "no test"
    return False, f"{failed} FAILED" if failed else f"exit {code}"


def judge_sanitizer(tool: str, code: int, output: str) -> tuple[bool, str]:
    """The same for a run of pytest under compute-sanitizer. Findings count only where one of our kernels is named."""
    good, text = judge_tests(code, output)
    summary = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)\b(?! were not)", output, re.MULTILINE)
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


def judge(job: Job, code: int | None, output: str, seconds: float) -> tuple[bool, str]:
    if code is None:
        dots = "".join(re.findall(r"^([.sFE]+)(?: +\[ *\d+%\])?$", output, re.MULTILINE))
        done = len(dots) + len(re.findall(r"^\S+::\S.* (?:PASSED|FAILED|SKIPPED)", output, re.MULTILINE))
        return False, f"stopped after {seconds:.0f} s and {done} tests"
    return judge_sanitizer(job.step, code, output) if job.step in SANITIZERS else judge_tests(code, output)


def count_files(report: Path) -> dict[str, str]:
    """For each test file: how many tests passed, or failed, and the seconds they took."""
    if not report.is_file():
        return {}
    counts: dict[str, list[float]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname", "").split(".")[-1].removeprefix("test_")
        outcomes = {child.tag for child in case}
        count = counts.setdefault(name, [0, 0, 0.0])
        count[0] += not outcomes & {"failure", "error", "skipped"}
        count[1] += bool(outcomes & {"failure", "error"})
        count[2] += float(case.get("time", 0))
    return {name: f"{failed} FAILED" if failed else f"{passed} ok {seconds:.0f}s" for name, (passed, failed, seconds) in counts.items()}


def table(results: list[Result]) -> str:
    """A column for each run, a row for each test file; in the last row the whole."""
    rows = sorted({name for result in results for name in result.files})
    lines = [["", *(result.job.name for result in results)]]
    lines += [[row, *(result.files.get(row, "") for result in results)] for row in rows]
    lines += [["all", *(f"{result.text} {result.seconds:.0f}s" for result in results)]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(results) + 1)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


# ---- running it ---------------------------------------------------------------------------------------------------------------


def run_job(job: Job, deadline: float) -> Result:
    start = time.monotonic()
    timeout = min(job.timeout, deadline - start)
    if timeout <= 0:
        return Result(job, False, "no time left", 0.0)
    with tempfile.TemporaryFile() as log:
        environment = os.environ | job.environment
        process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
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
    seconds = time.monotonic() - start
    return Result(job, *judge(job, code, output, seconds), seconds, count_files(job.report), output)


def run_jobs(groups: list[list[Job]], deadline: float, logs: Path) -> list[Result]:
    """Runs one group after the other; writes what each job printed to `logs`/<name>.log when it has ended."""
    results: list[Result] = []

    def run(job: Job) -> Result:
        result = run_job(job, deadline)
        settings = " ".join(f"{k}={shlex.quote(v)}" for k, v in job.environment.items())
        text = f"{settings} {shlex.join(job.command)}\n{result.output}\n{result.text}, {result.seconds:.1f} s\n"
        (logs / f"{job.name.replace(' ', '-')}.log").write_text(text)
        print(f"{'ok  ' if result.good else 'FAIL'} {job.name:<20} {result.text:<12} {result.seconds:6.1f} s", flush=True)
        return result

    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            results += pool.map(run, group)
    return results


def failures(results: list[Result], lines: int = 50) -> str:
    """Of the runs that failed, the findings or the end of what they printed."""
    parts = []
    for result in results:
        if not result.good and result.output:
            text = [line for line in result.output.splitlines() if line.strip() and "Host Frame" not in line]
            found = [i for i, line in enumerate(text) if re.match(r"=+ (Invalid|Error|Warning|Uninitialized|Barrier|Potential)", line)]
            begin = found[0] if found else max(0, len(text) - lines)
            parts.append("\n".join([f"--- {result.job.name}: {result.text}", *text[begin : begin + lines]]))
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


def build(directory: Path, *, allowed: bool, kind: str = "") -> Path:
    """The directory with the libraries, built if that is needed and allowed. `kind`: "-racecheck", for those of that tool."""
    library, target = directory / f"lib{kind}" / "_ops.so", f"_ops{kind}".replace("-", "_")
    if not allowed:
        if not library.is_file():
            raise CannotCheck(f"--no-build, but there is no {library}, which target {target} makes")
        return library.parent
    carried = not (directory / "build.ninja").is_file()  # built elsewhere
    if library.is_file() and (carried or library.stat().st_mtime >= newest(ROOT)):
        return library.parent
    commands = [
        ["cmake", "--preset", "gpu", "-B", str(directory), f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(directory), *(["--target", target] if kind else [])],
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
    parser.add_argument("--jobs", type=int, default=max(1, min(12, cores * 3 // 4)), help="processes of native and portable (%(default)s)")
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
    if "racecheck" in args.steps and find_files(ROOT, args.op, sanitized=True, hopper=True):
        libraries["racecheck"] = build(directory, allowed=not args.no_build, kind="-racecheck")
    sanitizer = find_sanitizer()
    if sanitizer is None and set(args.steps) & set(SANITIZERS):
        raise CannotCheck("no compute-sanitizer (in PATH, $CUDA_HOME/bin or $COMPUTE_SANITIZER); --steps native,portable does without")
    logs = Path(os.path.abspath(args.logs or directory / "check"))
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("*.log"):
        old.unlink()

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kimi-gpu-check-") as temporary:
        scratch = Path(temporary)
        if "portable" in args.steps:
            libraries["portable"] = scratch / "lib"
            libraries["portable"].mkdir()
            for path in libraries["native"].glob("*.so"):
                (libraries["portable"] / path.name).write_bytes(ptx_only(path.read_bytes())[0])
        more = {"libraries": libraries, "scratch": scratch, "workers": args.jobs, "sanitizer": sanitizer}
        groups = make_jobs(ROOT, args.steps, args.op, **more)
        head = f"{device} ({capability}), torch {torch}, kernels built by CUDA {cuda}"
        print(head, flush=True)
        results = run_jobs(groups, start + args.deadline, logs)
    bad = [result for result in results if not result.good]
    end = f"{len(results) - len(bad)} of {len(results)} runs are well, {time.monotonic() - start:.0f} s; logs in {logs}"
    summary = "\n".join(filter(None, [head, failures(bad), table(results), end]))
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
