"""The C++ microbenchmarks: what they say of themselves, that they check and time, and their exit codes."""

import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / "build" / "bin"
# A small case of every operator, by family.
QUICK = {
    "bench_kda": ["kda_prefill softplus B=1 T=64", "kda_prefill bounded 8x64", "kda_decode B=4 S=4", "kda_decode_fused B=1"],
    "bench_linear": ["T=4 N=4096", "T=16 G=32"],
    "bench_mla": ["mla_prefill T=64 prefix", "mla_decode B=1 L=512", "mla_cache_write T=64", "mla_merge T=64"],
    "bench_moe": ["moe_router T=16", "moe_experts T=1 "],
    "bench_norm_conv": ["short_conv 8x64", "short_conv_update B=16", "rms_norm T=64", "gated_rms_norm T=1 "],
}

pytestmark = pytest.mark.skipif(not BIN.is_dir(), reason="no build/ (make build)")


def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([BIN / name, *arguments], capture_output=True, text=True)


def test_every_program_is_listed_here():
    assert sorted(QUICK) == sorted(path.stem for path in (ROOT / "bench" / "cpp").glob("bench_*.cpp"))


@pytest.mark.parametrize("name", QUICK)
def test_help_and_what_is_refused(name):
    asked = run(name, "--help")
    assert asked.returncode == 0 and "usage" in asked.stdout and "--device" in asked.stdout
    for bad in (["--nonsense"], ["--device", "tpu"], ["--filter"]):
        refused = run(name, *bad)
        assert refused.returncode == 2 and bad[0] in refused.stderr and not refused.stdout


@pytest.mark.parametrize("name, case", [(name, case) for name, cases in QUICK.items() for case in cases])
def test_a_case_is_checked_and_timed(name, case):
    done = run(name, "--device", "cpu", "--quick", "--filter", case)
    assert done.returncode == 0, done.stdout + done.stderr
    ceilings, title, *lines = done.stdout.splitlines()
    assert "ceilings" in ceilings and title.split() == ["op", "case", "us(median)", "us(min)", "TFLOP/s", "GB/s", "%roof"]
    assert lines and all(case in " ".join(line.split()) and float(line.split()[-5]) > 0 for line in lines)


def test_no_case_is_a_failure():
    done = run("bench_linear", "--device", "cpu", "--quick", "--filter", "no such case")
    assert done.returncode == 1 and "no case contains" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", QUICK)
def test_without_a_gpu_it_says_so(name):
    done = run(name, "--device", "cuda", "--quick")
    assert done.returncode == 2 and "--device cpu" in done.stderr
