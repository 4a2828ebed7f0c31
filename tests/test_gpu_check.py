"""The logic of scripts/gpu_check.py and scripts/ptx_only.py; what they do on a GPU shows there."""

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
from gpu_check import CannotCheck, Job, Result, find_targets, judge_sanitizer, judge_tests, make_jobs, run_jobs, table
from ptx_only import ptx_only

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.py"


def check(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | env, timeout=120)


def test_without_a_gpu_it_says_so():
    done = check()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpu_check: no CUDA device (torch ") and done.stderr.count("\n") == 1


def test_wrong_usage():
    done = check("--steps", "native,nonsense")
    assert done.returncode == 2 and "there is no nonsense; there are native, portable, memcheck" in done.stderr


@pytest.fixture
def source(tmp_path):
    for name in ("cuda/rms_norm.cu", "cuda/kda/kda.cu", "cuda/kda/kda_sm90.cuh", "cuda/common/launch.cu"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    (tmp_path / "tests").mkdir()
    for name, text in {"rms_norm": "needs_gpu", "kda": "DEVICES", "model": "for device in DEVICES", "text": "no_needs_gpu_here"}.items():
        (tmp_path / "tests" / f"test_{name}.py").write_text(text)
    return tmp_path


def test_targets_are_the_files_with_tests_on_a_gpu(source):
    assert [(t.name, t.operator, t.hopper) for t in find_targets(source, [])] == [
        ("kda", True, True),
        ("model", False, False),
        ("rms_norm", True, False),
    ]
    assert [t.name for t in find_targets(source, ["rms_norm"])] == ["rms_norm"]
    with pytest.raises(CannotCheck, match="no CUDA sources of nothing; there are kda, rms_norm"):
        find_targets(source, ["nothing"])


def test_jobs(source, tmp_path):
    libraries = {"native": tmp_path / "lib", "portable": tmp_path / "ptx"}
    targets = find_targets(source, [])
    jobs = make_jobs(
        targets, ["native", "portable", "racecheck"], libraries=libraries, scratch=tmp_path, timeout=9, threads=2, sanitizer="CS"
    )
    by_name = {(job.step, job.row): job for job in jobs}
    assert len(by_name) == len(jobs) == 3 + 3 + 3
    assert {row for step, row in by_name if step == "racecheck"} == {"kda", "kda, portable", "rms_norm"}
    for (step, row), job in by_name.items():
        portable = step == "portable" or row.endswith("portable")
        assert (job.environment["KIMI_CUDA_PATH"] == "portable") == portable
        assert job.environment["KIMI_NATIVE_LIB_DIR"] == str(libraries["portable" if step == "portable" else "native"])
        assert ("KIMI_SANITIZER" in job.environment) == (step == "racecheck") == (job.command[:3] == ["CS", "--tool", "racecheck"])
        assert job.must_run == (not row.startswith("model")) and job.command[-1].endswith(".py")
    assert len({argument for job in jobs for argument in job.command if argument.startswith("--basetemp")}) == len(jobs)


@pytest.mark.parametrize(
    "code, output, must_run, expected",
    [
        (0, "12 passed in 1.20s", True, (True, "12 ok")),
        (0, "====== 12 passed, 3 skipped, 1 deselected in 71.20s (0:01:11) ======", True, (True, "12 ok")),
        (1, "1 failed, 12 passed, 2 errors in 1.20s", True, (False, "3 FAILED")),
        (0, "3 skipped, 1 deselected in 0.1s", True, (False, "no test")),
        (0, "3 skipped, 1 deselected in 0.1s", False, (True, "-")),
        (5, "4 deselected in 0.1s", True, (False, "no test")),
        (5, "4 deselected in 0.1s", False, (True, "-")),
        (-11, "Fatal Python error: Segmentation fault", True, (False, "exit -11")),
        (2, "1 error in 0.3s", False, (False, "1 FAILED")),
        (1, "a test prints: 3 passed in 2.0s\n1 failed, 2 passed in 0.1s", False, (False, "1 FAILED")),
        (1, "12 passed in 1.20s\ncrashed at exit", True, (False, "exit 1")),
        (0, "", True, (False, "no test")),
    ],
)
def test_judging_tests(code, output, must_run, expected):
    assert judge_tests(code, output, must_run=must_run) == expected


OURS = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void kimi::cuda::rms_norm_kernel<float, (int)1>(kimi::RmsNormParams)+0x70
=========     by thread (3,0,0) in block (0,0,0)
=========     Access to 0x7f2e23a00000 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: kimi in _ops.so
"""
TORCHS = OURS.replace("kimi::cuda::rms_norm_kernel<float, (int)1>(kimi::RmsNormParams)", "at::native::elementwise_kernel<(int)4>(T3)")


@pytest.mark.parametrize(
    "tool, code, output, expected",
    [
        ("memcheck", 0, "3 passed in 1.0s\n========= ERROR SUMMARY: 0 errors\n", (True, "3 ok")),
        ("memcheck", 0, "3 passed in 1.0s\n========= ERROR SUMMARY: 1 error\n", (False, "1 FOUND")),
        ("racecheck", 0, "3 passed in 1.0s\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", (True, "3 ok")),
        ("racecheck", 0, "3 passed in 1.0s\n========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", (False, "2 FOUND")),
        ("synccheck", 1, "1 failed in 1.0s\n========= ERROR SUMMARY: 0 errors\n", (False, "1 FAILED")),
        ("memcheck", 0, "3 passed in 1.0s\n", (False, "no report")),
        ("memcheck", 9, "========= Error: Device not supported\n", (False, "exit 9")),
        ("memcheck", 0, "3 skipped in 1.0s\n========= ERROR SUMMARY: 0 errors\n", (False, "no test")),
        ("initcheck", 0, f"{OURS}3 passed in 1.0s\n========= ERROR SUMMARY: 1 error\n", (False, "1 FOUND")),
        ("initcheck", 0, f"{TORCHS}3 passed in 1.0s\n========= ERROR SUMMARY: 1 error\n", (True, "3 ok")),
        ("initcheck", 0, f"{TORCHS}{OURS}{TORCHS}3 passed in 1.0s\n========= ERROR SUMMARY: 3 errors\n", (False, "1 FOUND")),
        ("initcheck", 0, f"{TORCHS}3 passed in 1.0s\n========= ERROR SUMMARY: 90 errors\n", (False, "90 FOUND")),
    ],
)
def test_judging_sanitizers(tool, code, output, expected):
    assert judge_sanitizer(tool, code, output) == expected


def job(step: str, row: str, code: str, timeout: float = 60) -> Job:
    return Job(step, row, [sys.executable, "-c", code], {"KIMI_TEST_WORD": row}, timeout, must_run=True)


def test_running_jobs(tmp_path):
    slow = "import subprocess, sys, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    jobs = [
        job("native", "good", "import os; print(os.environ['KIMI_TEST_WORD']); print('3 passed in 0.1s')"),
        job("native", "bad", "print('E   wrong'); print('1 failed in 0.1s'); raise SystemExit(1)"),
        job("memcheck", "slow", slow, timeout=1),
    ]
    start = time.monotonic()
    results = run_jobs(jobs, 2, start + 60, tmp_path)
    assert time.monotonic() - start < 30
    found = {r.job.row: (r.good, r.text) for r in results}
    assert found == {"good": (True, "3 ok"), "bad": (False, "1 FAILED"), "slow": (False, "> 1 s")}
    log = (tmp_path / "native.log").read_text()
    assert "##### good: 3 ok" in log and "KIMI_TEST_WORD=good" in log and "E   wrong" in log
    assert "begun" in (tmp_path / "memcheck.log").read_text()
    text = gpu_check.failures(results)
    assert "--- native bad: 1 FAILED" in text and "E   wrong" in text and "good" not in text


def test_after_the_deadline_nothing_starts(tmp_path):
    results = run_jobs([job("native", "late", "print('3 passed in 0.1s')")], 1, time.monotonic() - 1, tmp_path)
    assert [(r.good, r.text) for r in results] == [(False, "no time left")]


def test_a_job_that_ran_out_of_time_leaves_no_process(tmp_path):
    code = f"import os, subprocess; p = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); p.wait()"
    run_jobs([job("native", "slow", code, timeout=2)], 1, time.monotonic() + 60, tmp_path)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):  # until it is reaped
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child still runs")


def test_table():
    results = [Result(job("native", "rms_norm", ""), True, "12 ok", 3.4), Result(job("memcheck", "kda", ""), False, "> 9 s", 9.1)]
    assert table(results, ["native", "memcheck"]).splitlines() == [
        "          native    memcheck",
        "kda                 > 9 s 9s",
        "rms_norm  12 ok 3s",
    ]


def test_build_that_is_not_there(tmp_path):
    with pytest.raises(CannotCheck, match="--no-build, but there is no"):
        gpu_check.build(tmp_path, allowed=False)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "_ops.so").touch()
    os.utime(tmp_path / "lib" / "_ops.so", (0, 0))  # older than the sources, but there is nothing to build it with
    assert gpu_check.build(tmp_path, allowed=False) == gpu_check.build(tmp_path, allowed=True) == tmp_path / "lib"


def fat_binary(*entries: tuple[int, bytes]) -> bytes:
    body = b"".join(struct.pack("<HHIQ", kind, 0x101, 64, len(data)).ljust(64, b"h") + data for kind, data in entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_ptx_only():
    code, ptx = (2, b"c" * 40), (1, b"p" * 24)
    by_chance = struct.pack("<I", 0xBA55ED50) + b"\xff" * 20
    library = b"head" + fat_binary(code, ptx) + by_chance + fat_binary(ptx) + b"tail"
    out, count = ptx_only(library)
    kept = fat_binary(ptx)
    expected = b"head" + kept.ljust(len(fat_binary(code, ptx)), b"\0") + by_chance + kept + b"tail"
    assert (out, count) == (expected, 2)
    assert ptx_only(b"no kernels") == (b"no kernels", 0)
    with pytest.raises(ValueError, match="has no PTX"):
        ptx_only(fat_binary(code))
    with pytest.raises(ValueError, match="unknown kind 7"):
        ptx_only(fat_binary((7, b"")))
