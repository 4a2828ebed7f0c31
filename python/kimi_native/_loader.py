"""Finds and loads the compiled libraries: `_ops` (torch operators) and `_C` (tensor-free bindings)."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).resolve().parent


def _directories() -> list[Path]:
    """Where the libraries may lie: KIMI_NATIVE_LIB_DIR, the package itself (a wheel), build/lib of a source checkout."""
    named = os.environ.get("KIMI_NATIVE_LIB_DIR")
    places = [Path(named)] if named else []
    places += [_PACKAGE, _PACKAGE.parent.parent / "build" / "lib"]
    places += [Path(p) for p in sys.modules["kimi_native"].__path__]
    return places


def load_ops() -> Path:
    """Registers `torch.ops.kimi_native.*`. Raises ImportError that says how to build when the library is not there."""
    for directory in _directories():
        library = directory / "_ops.so"
        if library.is_file():
            torch.ops.load_library(str(library))
            return library
    looked = ", ".join(str(d) for d in _directories())
    raise ImportError(f"kimi_native is not built: no _ops.so in {looked}. In a source checkout run `make build`; otherwise `pip install .`")


def load_bindings(directory: Path) -> ModuleType | None:
    """The pybind11 module `_C` beside the operators, of the same build; None in an ops-only build: the operators do not need it."""
    for library in sorted(directory.glob("_C.*so")):
        spec = importlib.util.spec_from_file_location("kimi_native._C", library)
        if spec is None or spec.loader is None:
            continue
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError:  # built for another Python
            continue
        sys.modules["kimi_native._C"] = module
        return module
    return None
