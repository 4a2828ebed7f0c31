"""The C++ side of a source checkout: its tests at every instruction-set level, and the installed package."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / "build" / "bin"
TESTS = sorted((ROOT / "tests" / "cpp").glob("test_*.cpp"))

pytestmark = pytest.mark.skipif(not BIN.is_dir(), reason="no build/ (make build)")


def run(*command: object, **env: str) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
@pytest.mark.parametrize("source", TESTS, ids=lambda path: path.stem)
def test_of_an_operator(source, isa):
    assert " 0 failed" in run(BIN / source.stem, KIMI_CPU_ISA=isa)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_the_installed_package_serves_another_project(tmp_path):
    run("cmake", "--install", ROOT / "build", "--component", "cpp", "--prefix", tmp_path / "prefix")
    headers = {path.name for path in (ROOT / "csrc" / "include" / "kimi").glob("*.h")}
    assert headers == {path.name for path in (tmp_path / "prefix" / "include" / "kimi").iterdir()}
    run("cmake", "-S", ROOT / "examples" / "cpp", "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    run("cmake", "--build", tmp_path / "build")
    lines = run(tmp_path / "build" / "example").splitlines()
    assert [float(v) for v in lines[0].split()] == pytest.approx([0.3651, 0.7303, 1.0954, 2.9212], abs=1e-4)
    assert lines[2].startswith("refused: rms_norm: eps must not be negative, got -1")
