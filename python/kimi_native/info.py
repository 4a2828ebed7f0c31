"""What this machine and this build are, and what of the machine the build can use: `kimi-native info`."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

CUDA_BUILDS = {"none": "no kernels in this build (built without nvcc)", "emulated": "kernels emulated on the CPU, for tests"}


def collect_info() -> dict[str, Any]:
    """Build facts, versions, devices and what of them this build can use."""
    import torch

    import kimi_native
    from kimi_native import ops
    from kimi_native._loader import load_ops

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    library = load_ops()
    cuda = torch.ops.kimi_native.cuda_build()
    module = kimi_native._C
    build = dict(module.build_facts()) if module else None
    cpu = f"{module.cpu_isa()}, {module.cpu_threads()} threads" if module else f"{torch.get_num_threads()} threads"
    devices: list[dict[str, Any]] = [{"device": "cpu", "name": cpu, "usable": True, "dtypes": ["float32", "bfloat16"]}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append({"device": f"cuda:{index}", **_gpu(properties, cuda, build["cuda_architectures"] if build else "")})
    return {
        "version": kimi_native.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "build": build,
        "cuda_build": cuda,
        "ops_library": str(library),
        "torch": {"version": torch.__version__, "threads": torch.get_num_threads()},
        "packages": {name: version(name) for name in ("safetensors", "tiktoken", "huggingface_hub", "numpy")},
        "devices": devices,
        "operators": sorted(ops.__all__),
    }


def _gpu(properties: Any, cuda_build: str, architectures: str) -> dict[str, Any]:
    """What a GPU is, and whether and with which kernels this build runs on it (csrc/cuda/common/launch.h decides the same)."""
    major, minor = properties.major, properties.minor
    name = f"{properties.name}, compute capability {major}.{minor}, {properties.total_memory // 2**20} MiB"
    facts: dict[str, Any] = {"name": name, "compute_capability": f"{major}.{minor}"}
    if cuda_build in CUDA_BUILDS:
        return {**facts, "usable": False, "reason": "this build has no CUDA kernels"}
    if major < 8:
        return {**facts, "usable": False, "reason": "the kernels need compute capability 8.0"}
    if architectures and not any(_runs_on(architecture, major, minor) for architecture in architectures.split()):
        return {**facts, "usable": False, "reason": f"this build is for {architectures} (KIMI_CUDA_ARCHITECTURES)"}
    built = not architectures or any(architecture.startswith("90a") for architecture in architectures.split())
    hopper = (major, minor) == (9, 0) and built and os.environ.get("KIMI_CUDA_PATH") != "portable"
    return {**facts, "usable": True, "dtypes": ["float32", "bfloat16", "float16"], "kernels": "sm90" if hopper else "portable"}


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code for a CMake architecture (90a-real, 80-virtual, 80) runs on a GPU: PTX on newer ones too, machine code within its
    major version, code for an exact architecture (90a) there alone."""
    number, _, kind = architecture.partition("-")
    built, here = int(number.rstrip("af")), 10 * major + minor
    if number.endswith("a"):
        return built == here
    return built <= here and (kind != "real" or built // 10 == major)
