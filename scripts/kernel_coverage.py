"""Which kernels the operators' tests run, from a run of them in the emulator (`make emulated` does both):

    KIMI_LAUNCHES=build-emulated/launches ... pytest ...
    kernel_coverage.py check build-emulated/launches*    every kernel, in every instantiation, is run by a test, and by one of
                                                         tests/sanitized.txt
    kernel_coverage.py choose build-emulated/launches*   prints a new tests/sanitized.txt

tests/sanitized.txt lists the tests that run under compute-sanitizer (KIMI_SANITIZER names its tool), where one takes a hundred times
as long: for every kernel one in which it runs, and every test function with a small case once. Kernels that no test runs in the
emulator, a gap that is known, stand there too, as comments: `# not run: NAME`. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from check_kernels import read_kernels

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "sanitized.txt"
HEAD = """# The operators' tests that run under compute-sanitizer: every kernel in every instantiation, and every test function
# that has a small case. Chosen by scripts/kernel_coverage.py, which also checks that no kernel is left out; one may add more.
"""
# They show compute-sanitizer nothing: opcheck runs on meta tensors, graphs and tensors of gigabytes do not work under it.
UNSUITABLE = r"opcheck|graph|2_to_the_31|bad_input|compile"
SMALL_SECONDS = 0.3  # in the emulator
NOT_RUN = "# not run: "


@dataclass
class LaunchingTest:
    name: str  # as on a GPU, without tests/
    seconds: float
    kernels: set[str]

    @property
    def function(self) -> str:
        return self.name.partition("[")[0]


def read_tests(files: list[Path]) -> tuple[Path, list[LaunchingTest]]:
    """The emulator's library, and the tests that launched kernels. Their names in the emulator say "cpu"."""
    tests, library = [], None
    for file in files:
        record = json.loads(file.read_text())
        library = Path(record["library"])
        symbols = read_symbols(library)
        for name, test in record["tests"].items():
            if test["kernels"]:
                on_gpu = re.sub(r"(?<=[\[-])cpu(?=[\]-])", "cuda", name).removeprefix("tests/")
                tests.append(LaunchingTest(on_gpu, test["seconds"], {short(symbols[offset]) for offset in test["kernels"]}))
    if library is None:
        sys.exit("no record of a run")
    return library, sorted(tests, key=lambda test: test.name)


def read_symbols(library: Path) -> dict[int, str]:
    """Functions by their offset."""
    lines = subprocess.run(["nm", "-C", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    found = (re.match(r"([0-9a-f]{16}) [tTwW] (.*)", line) for line in lines)
    return {int(line[1], 16): line[2] for line in found if line}


def short(symbol: str) -> str:
    """`product_kernel<float, 4>` of `void kimi::cuda::(anonymous namespace)::product_kernel<float, 4>(kimi::Params)`."""
    symbol = symbol.replace("(anonymous namespace)::", "").replace("kimi::cuda::", "").removeprefix("void ")
    depth = 0
    for i, character in enumerate(symbol):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return symbol[:i]
    return symbol


def all_kernels(library: Path) -> set[str]:
    """The kernels that the library has, every instantiation."""
    cuda = ROOT / "csrc" / "cuda"
    sources = sorted(path for suffix in ("cu", "cuh", "h") for path in cuda.rglob(f"*.{suffix}"))
    names = {kernel.name for kernel in read_kernels(sources, ROOT)}
    functions = {short(symbol) for symbol in read_symbols(library).values() if "kimi::cuda::" in symbol}
    return {function for function in functions if function.partition("<")[0].split("::")[-1] in names}


def choose(tests: list[LaunchingTest], kernels: set[str]) -> list[LaunchingTest]:
    """Cheap tests that together run all kernels, and every function that has a small case."""
    candidates = [test for test in tests if "cuda" in test.name and not re.search(UNSUITABLE, test.function)]
    goals = {id(t): (t.kernels & kernels) | ({t.function} if t.seconds <= SMALL_SECONDS else set()) for t in candidates}
    missing = set().union(*goals.values())
    chosen: list[LaunchingTest] = []
    while missing:
        best = max(candidates, key=lambda t: len(goals[id(t)] & missing) / (0.1 + t.seconds))
        chosen.append(best)
        missing -= goals[id(best)]
    for test in sorted(chosen, key=lambda t: -t.seconds):  # what later ones made needless
        others = set().union(*(goals[id(t)] for t in chosen if t is not test))
        if goals[id(test)] <= others:
            chosen.remove(test)
    return sorted(chosen, key=lambda test: test.name)


def check(tests: list[LaunchingTest], kernels: set[str], lines: list[str]) -> list[str]:
    """What is wrong with the tests, and with the lines of the list."""
    run = set().union(*(test.kernels for test in tests))
    by_name = {test.name: test for test in tests}
    known = {line.removeprefix(NOT_RUN) for line in lines if line.startswith(NOT_RUN)}
    listed = [line for line in lines if not line.startswith("#")]
    errors = [f"no test runs {kernel}" for kernel in sorted(kernels - run - known)]
    errors += [f"{LIST.name}: {kernel} is run, or is no kernel" for kernel in sorted(known - (kernels - run))]
    errors += [f"{LIST.name}: {name} is no test that launches a kernel" for name in listed if name not in by_name]
    sanitized = set().union(*(by_name[name].kernels for name in listed if name in by_name))
    errors += [f"no test of {LIST.name} runs {kernel}" for kernel in sorted((kernels & run) - sanitized)]
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "choose"])
    parser.add_argument("records", nargs="+", type=Path)
    args = parser.parse_args()
    library, tests = read_tests(args.records)
    kernels = all_kernels(library)
    if args.command == "choose":
        chosen = choose(tests, kernels)
        gaps = sorted(kernels - set().union(*(test.kernels for test in tests)))
        print(HEAD + "\n".join([*(NOT_RUN + kernel for kernel in gaps), *(test.name for test in chosen)]))
        files = {test.name.partition("::")[0] for test in chosen}
        for file in sorted(files):
            of_file = [test for test in chosen if test.name.startswith(file)]
            print(f"{file}: {len(of_file)} tests, {sum(t.seconds for t in of_file):.1f} s in the emulator", file=sys.stderr)
        return 0
    errors = check(tests, kernels, LIST.read_text().splitlines())
    for error in errors:
        print(f"error: {error}")
    print(f"{len(kernels)} instantiations of kernels, {len(tests)} tests that launch them, {len(errors)} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
