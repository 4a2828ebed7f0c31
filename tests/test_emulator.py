"""C++ tests that belong to the build in use: the common layer of the CUDA kernels against plain code, on the GPU or in the
emulator, and the emulator's own, in which wrong kernels must be found."""

import subprocess

import pytest
from kit import EMULATED, needs_gpu

from kimi_native._loader import load_ops

BIN = load_ops().parent.parent / "bin"


def run(name: str) -> str:
    done = subprocess.run([str(BIN / name)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_gpu
@pytest.mark.skipif(not (BIN / "test_cuda_common").is_file(), reason="no test_cuda_common beside this build of the operators")
def test_common_layer_on_the_gpu():
    assert " 0 failed" in run("test_cuda_common")


@pytest.mark.skipif(not EMULATED, reason="no build for the emulator")
@pytest.mark.parametrize("name", ["test_cuda_common", "test_emulator"])
def test_in_the_emulator(name):
    assert " 0 failed" in run(name)
