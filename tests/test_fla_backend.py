"""Our backend for fla-core in a stand-in for fla: found in any order of imports, and no harm where it cannot be. fla itself is not
needed; tests/integrations/test_fla_core.py is for where it is installed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

BACKENDS = """
    registered = {}
    class BaseBackend: pass
    def register(entry_point):
        def decorator(backend):
            registered[getattr(entry_point, "__name__", entry_point)] = backend()
            return backend
        return decorator
"""
CHUNK = "def chunk_kda(): ..."
FIRST = {
    "kimi_native": "import logging, kimi_native; logging.basicConfig(level='INFO'); import fla.ops.kda",
    "fla": "import fla.ops.kda, kimi_native",
}


def in_a_process(tmp_path, files, program):
    """(stdout, stderr) of a program beside a package `fla` of these files."""
    for name, text in {"fla/__init__.py": "", "fla/ops/__init__.py": "", "fla/ops/kda/__init__.py": "", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    start = f"import sys; sys.path[:0] = {[str(tmp_path), *sys.path]!r}\n"
    result = subprocess.run([sys.executable, "-c", start + textwrap.dedent(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


@pytest.mark.parametrize("first", FIRST)
def test_fla_finds_the_backend(first, tmp_path):
    program = FIRST[first] + textwrap.dedent("""
        import torch, fla.backends
        from kimi_native.compat.fla import chunk_kda
        backend = fla.backends.registered["chunk_kda"]
        assert fla.backends.registered["kda"].backend_type == "kimi_native"
        assert not any(type(finder).__module__.startswith("kimi_native") for finder in sys.meta_path)
        q = torch.ones(1, 4, 1, 16)
        print(backend.chunk_kda_verifier(q, q, q, g=-q, beta=q[..., 0]))
        print(backend.chunk_kda_verifier(q, q, q, g=-q, beta=q[..., 0], cp_context=1))
        print(backend.chunk_kda_verifier(q.clone().requires_grad_(), q, q, g=-q, beta=q[..., 0]))
        print(backend.fused_recurrent_kda_fwd_verifier(q=q, k=q, v=q, g=-q, beta=q, inplace_final_state=False))
        print(torch.equal(backend.chunk_kda(q, q, q, -q, q[..., 0])[0], chunk_kda(q, q, q, -q, q[..., 0])[0]))
        print(backend.fused_recurrent_kda_fwd(q, q, q, -q, q[..., 0], inplace_final_state=False)[1])
    """)
    out, log = in_a_process(tmp_path, {"fla/backends.py": BACKENDS, "fla/ops/kda/chunk.py": CHUNK}, program)
    assert out.splitlines() == [
        "(True, None)",
        "(False, 'kimi_native: cp_context: context parallelism is not supported')",
        "(False, 'kimi_native: gradients are not computed: call it under torch.no_grad() or torch.inference_mode()')",
        "(False, 'kimi_native: beta for each value channel ([B, T, HV, V]) is not supported')",
        "True",
        "None",
    ]
    assert ("FLA_KIMI_NATIVE=0 turns it off" in log) == (first == "kimi_native"), "information, where logging is set up"


@pytest.mark.parametrize("first", FIRST)
def test_an_fla_without_the_hook_stays_as_it_is(first, tmp_path):
    out, log = in_a_process(tmp_path, {}, FIRST[first] + "\nprint('imported')")
    assert out == "imported\n"
    assert log.count("\n") == 1 and "kimi_native is not used by fla: fla-core 0.6 or newer" in log


def test_registration_by_hand_says_what_is_missing(tmp_path):
    program = """
        import kimi_native.compat.fla
        try:
            kimi_native.compat.fla.register()
        except ImportError as error:
            print(error)
    """
    assert in_a_process(tmp_path, {}, program)[0].startswith("fla-core 0.6 or newer, with its fla.backends, is needed")


def test_without_fla_nothing_happens(tmp_path):
    program = """
        import kimi_native, importlib.util
        sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__.startswith("kimi_native")] + [
            f for f in sys.meta_path if not type(f).__module__.startswith("kimi_native")]
        try:
            import fla.ops.kda
        except ImportError as error:
            print(error.name)
        print(any(type(finder).__module__.startswith("kimi_native") for finder in sys.meta_path))
    """
    files = {"fla/ops/__init__.py": "import sys; sys.path.clear(); __path__ = []"}  # as if kda were not there
    assert in_a_process(tmp_path, files, program)[0].splitlines() == ["fla.ops.kda", "True"]


@pytest.mark.parametrize("given", ["{} -- -k varlen", "{} --through backend -- -k varlen", "--through backend {} -- --maxfail 3", "{}"])
def test_the_runner_of_flas_tests_takes_arguments_of_pytest_in_any_order(given, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "fla_tests.py", *given.format(tmp_path / "nowhere").split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere/tests/ops/test_kda.py is not there" in done.stdout, done.stderr
