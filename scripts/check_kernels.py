"""Checks the machine code of the CUDA kernels in a build, without a GPU. Standard library only.

    check_kernels.py [--build-dir build] [--no-ptx] [--verbose]

For every kernel (`__global__` function) of csrc/cuda, in every instantiation:
  - no stack frame, no spilled registers, no local memory
  - what the source says of its machine code holds, and the other way round. Above a kernel stands, where it applies,

        // SASS: tensor cores, 16-byte loads

    tensor cores   every instantiation for a 16-bit type has matrix instructions (mma.sync, wgmma)
    16-byte loads  for every element type some instantiation loads 16 bytes at once from global memory (ld, cp.async, TMA)
    stack 24       a stack frame of up to 24 bytes is all right; the reason follows in parentheses

    A kernel that has such instructions without saying so is an error as well, so that nothing is lost unnoticed.
  - ptxas gave no warning when it was compiled, and did not serialise wgmma (C7508, C7510)
  - the PTX, of which the portable build consists, can be assembled for compute capability 8.0; what spills there is only noted

Needs cuobjdump: of the CUDA toolkit, or of the PyPI packages nvidia-cuda-cuobjdump or triton in this interpreter. Exit code 1:
something is wrong. 2: nothing to check (no CUDA build, no cuobjdump).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TENSOR_CORES, WIDE_LOADS, STACK = "tensor cores", "16-byte loads", "stack N"
MARKS = {TENSOR_CORES, WIDE_LOADS, STACK}


class NothingToCheck(Exception):
    """And why."""


@dataclass
class Code:
    """One instantiation of a kernel, as compiled for one architecture."""

    symbol: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    opcodes: list[str] = field(default_factory=list, repr=False)

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, opcode) is not None for opcode in self.opcodes)

    @property
    def tensor_cores(self) -> int:
        return self.count(r"[HQI]G?MMA\b|BMMA\b|DMMA\b")

    @property
    def wide_loads(self) -> int:
        return self.count(r"(LDG|LDGSTS|LD)\..*\b128\b|UTMALDG|UBLKCP")

    @property
    def local_accesses(self) -> int:
        return self.count(r"(LDL|STL)\b")

    @property
    def element_type(self) -> str:
        return "bf16" if "__nv_bfloat16" in self.symbol else "fp16" if "__half" in self.symbol else "other"


@dataclass
class Kernel:
    """A kernel in the source."""

    name: str
    place: str  # file:line
    marks: set[str]
    stack: int = 0  # bytes that are all right

    def owns(self, symbol: str) -> bool:
        return re.search(rf"{len(self.name)}{self.name}[IEv]", symbol) is not None


# ---- reading ----------------------------------------------------------------------------------------------------------------


def read_kernels(files: Iterable[Path], root: Path) -> list[Kernel]:
    """The kernels that these sources define, with their marks. ValueError for a mark that means nothing."""
    kernels = []
    for file in files:
        text = file.read_text()
        for begin in (found.start() for found in re.finditer(r"^[^/\n]*\b__global__\b", text, re.MULTILINE)):
            place = f"{file.relative_to(root)}:{text.count(chr(10), 0, begin) + 1}"
            name = re.match(r"[^/\n]*__global__\s+void\s+(?:__\w+__\s*\((?:[^()]|\([^()]*\))*\)\s*)*(\w+)\s*\(", text[begin:])
            if name is None:
                raise ValueError(f"{place}: a __global__ function that this script does not understand")
            marks: set[str] = set()
            stack = 0
            for line in reversed(text[:begin].splitlines()):  # up over the template header and the comment
                if re.search(r"^\s*$|[;{}]\s*$|^#", line):
                    break
                if found := re.match(r"\s*// SASS: ([^(]*)", line):
                    stack = max([stack, *(int(n) for n in re.findall(r"\bstack (\d+)", found[1]))])
                    marks |= {re.sub(r"^stack \d+$", STACK, term.strip(" .")) for term in found[1].split(",")}
            if unknown := marks - MARKS:
                raise ValueError(f"{place}: SASS: {', '.join(sorted(unknown))} means nothing; there are {', '.join(sorted(MARKS))}")
            kernels.append(Kernel(name[1], place, marks, stack))
    return kernels


def read_resources(text: str) -> dict[str, Code]:
    """Of `cuobjdump -res-usage`."""
    found = re.findall(r"Function (\w+):\s*\n\s*REG:(\d+) STACK:(\d+)", text)
    return {symbol: Code(symbol, int(registers), int(stack)) for symbol, registers, stack in found}


def read_sass(text: str) -> dict[str, list[str]]:
    """Opcodes of each function, of `cuobjdump -sass`."""
    functions: dict[str, list[str]] = {}
    opcodes: list[str] = []
    for line in text.splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            opcodes = functions.setdefault(found[1], [])
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            opcodes.append(found[1])
    return functions


def read_ptxas(text: str) -> dict[str, Code]:
    """Of `ptxas -v`."""
    codes = {}
    for symbol, block in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", text, re.DOTALL):
        stack, stores, loads = (int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", block)[:3])
        registers = re.search(r"Used (\d+) registers", block)
        codes[symbol] = Code(symbol, int(registers[1]) if registers else 0, stack, stores + loads)
    return codes


# ---- judging ----------------------------------------------------------------------------------------------------------------


def check_code(kernels: list[Kernel], codes: list[Code], *, instructions: bool, what: str = "") -> list[str]:
    """What is wrong with these instantiations. `instructions`: their opcodes are known."""
    errors = []
    for kernel in kernels:
        own = [code for code in codes if kernel.owns(code.symbol)]
        where = f"{kernel.place}: {kernel.name}{what}"
        if not own:
            errors.append(f"{where}: not in the build")
            continue
        for code in own:
            if code.stack > kernel.stack or not kernel.stack and (code.spills or code.local_accesses):
                found = f"{code.stack} bytes of stack, {code.spills} bytes spilled, {code.local_accesses} local accesses"
                errors.append(f"{where}: {found} in {code.symbol}")
        if not instructions:
            continue
        unsaid = "without saying so; write it above the kernel, so that they are not lost unnoticed: // SASS:"
        of_16_bits = [code for code in own if code.element_type != "other"]
        if TENSOR_CORES in kernel.marks:
            errors += [f"{where}: no tensor-core instruction in {c.symbol}" for c in of_16_bits or own if not c.tensor_cores]
        elif any(code.tensor_cores for code in own):
            errors.append(f"{where}: has tensor-core instructions {unsaid} {TENSOR_CORES}")
        types = {code.element_type for code in own}
        narrow = types - {code.element_type for code in own if code.wide_loads}
        if WIDE_LOADS in kernel.marks:
            errors += [f"{where}: no instantiation for {name} elements has 16-byte loads" for name in sorted(narrow)]
        elif not narrow:
            errors.append(f"{where}: has 16-byte loads {unsaid} {WIDE_LOADS}")
    return errors


def check_log(name: str, text: str) -> list[str]:
    """Warnings of ptxas, and what it says of serialised wgmma. (Spills are seen in the code, where kernels may be excused.)"""
    bad = [line.strip() for line in text.splitlines() if re.search(r"ptxas.*(warning|error)|C7508|C7510", line, re.IGNORECASE)]
    return [f"{name}: {line}" for line in bad if "Registers are spilled" not in line]


def report(kernels: list[Kernel], codes: list[Code]) -> str:
    """One line per kernel."""
    lines = [["kernel", "instantiations", "registers", "tensor-core", "16-byte loads", "instructions"]]
    for kernel in kernels:
        own = [code for code in codes if kernel.owns(code.symbol)]
        if own:
            spans = [[c.registers for c in own], [c.tensor_cores for c in own], [c.wide_loads for c in own], [len(c.opcodes) for c in own]]
            lines.append([kernel.name, str(len(own)), *(str(s[0]) if len(set(s)) == 1 else f"{min(s)}-{max(s)}" for s in spans)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


# ---- the build --------------------------------------------------------------------------------------------------------------


def toolkit(build: Path) -> Path | None:
    """The bin directory of the toolkit that the build was configured with."""
    for file in sorted(build.glob("CMakeFiles/*/CMakeCUDACompiler.cmake")):
        if found := re.search(r'set\(CMAKE_CUDA_COMPILER "([^"]+)"', file.read_text()):
            nvcc = Path(found[1])
            places = re.search(r'set\(CMAKE_CUDA_COMPILER_TOOLKIT_ROOT "([^"]+)"', file.read_text())
            return Path(places[1]) / "bin" if places else nvcc.parent
    return None


def find_program(name: str, build: Path) -> str | None:
    site = Path(sysconfig.get_path("purelib"))
    folders = [toolkit(build), site / "nvidia" / "cu13" / "bin", site / "triton" / "backends" / "nvidia" / "bin"]
    places = [os.environ.get(name.upper()), shutil.which(name), *(str(folder / name) for folder in folders if folder)]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def output_of(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{Path(str(command[0])).name} failed: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def codes_of_object(cuobjdump: str, file: Path) -> list[Code]:
    codes = read_resources(output_of(cuobjdump, "-res-usage", file))
    for symbol, opcodes in read_sass(output_of(cuobjdump, "-sass", file)).items():
        codes.setdefault(symbol, Code(symbol)).opcodes = opcodes
    return list(codes.values())


def codes_of_ptx(cuobjdump: str, ptxas: str, file: Path) -> tuple[list[Code], list[str]]:
    """The PTX in an object file, assembled for the oldest card it is for."""
    codes: list[Code] = []
    errors: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        output_of(cuobjdump, "-xptx", "all", file.resolve(), cwd=Path(place))
        for ptx in sorted(Path(place).glob("*.ptx")):
            target = re.search(r"^\.target (sm_\d+\w*)", ptx.read_text(), re.MULTILINE)
            assert target is not None
            text = output_of(ptxas, "-v", f"-arch={target[1]}", ptx, "-o", os.devnull)
            codes += read_ptxas(text).values()
            errors += check_log(f"{file.name}, PTX for {target[1]}", text)
    return codes, errors


def check(args: argparse.Namespace) -> int:
    objects = sorted((args.build_dir / "csrc" / "CMakeFiles" / "kimi_cuda.dir" / "cuda").rglob("*.cu.o"))
    if not objects:
        raise NothingToCheck(f"no CUDA kernels in {args.build_dir}")
    cuobjdump, ptxas = find_program("cuobjdump", args.build_dir), find_program("ptxas", args.build_dir)
    if cuobjdump is None:
        raise NothingToCheck("no cuobjdump; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    if ptxas is None and not args.no_ptx:
        raise NothingToCheck("no ptxas beside nvcc; --no-ptx does without")
    cuda = ROOT / "csrc" / "cuda"
    kernels = read_kernels(sorted([*cuda.rglob("*.cu"), *cuda.rglob("*.cuh"), *cuda.rglob("*.h")]), ROOT)

    errors = []
    for file in objects:
        log = Path(f"{file}.log")
        errors += check_log(file.name, log.read_text()) if log.is_file() else [f"{log} is missing: build anew"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        native = [code for codes in pool.map(lambda file: codes_of_object(cuobjdump, file), objects) for code in codes]
        errors += check_code(kernels, native, instructions=True)
        if ptxas is not None and not args.no_ptx:
            portable = list(pool.map(lambda file: codes_of_ptx(cuobjdump, ptxas, file), objects))
            errors += [error for _, found in portable for error in found]
            for note in check_code(kernels, [code for codes, _ in portable for code in codes], instructions=False, what=" (PTX)"):
                print(f"note: {note}")
    print(report(kernels, native))
    for error in errors:
        print(f"error: {error}")
    print(f"{len(kernels)} kernels, {len(native)} instantiations, {len(errors)} errors")
    return 1 if errors else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build", help="default build/")
    parser.add_argument("--no-ptx", action="store_true", help="leave out the PTX, whose assembly takes longest")
    try:
        return check(parser.parse_args())
    except NothingToCheck as error:
        print(f"check_kernels: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
