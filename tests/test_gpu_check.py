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
from gpu_check import CannotCheck, Job, Result, count_files, find_files, judge, judge_sanitizer, judge_tests, make_jobs, run_jobs, table
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
    for name in ("cuda/rms_norm.cu", "cuda/kda/kda.cu", "cuda/common/launch.cu"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    (tmp_path / "tests").mkdir()
    for name, text in {"rms_norm": "needs_gpu", "kda": "DEVICES", "model": "for device in DEVICES", "text": "no_needs_gpu_here"}.items():
        (tmp_path / "tests" / f"test_{name}.py").write_text(text)
    return tmp_path


def test_files_with_tests_on_a_gpu(source):
    def names(*arguments, sanitized=False):
        return [path.stem for path in find_files(source, list(arguments), sanitized=sanitized)]

    assert names() == ["test_kda", "test_model", "test_rms_norm"]
    assert names(sanitized=True) == ["test_kda", "test_rms_norm"]
    assert names("rms_norm") == names("rms_norm", sanitized=True) == ["test_rms_norm"]
    with pytest.raises(CannotCheck, match="no CUDA sources of nothing; there are kda, rms_norm"):
        names("nothing")


def test_jobs(source, tmp_path):
    libraries = {"native": tmp_path / "lib", "portable": tmp_path / "ptx", "racecheck": tmp_path / "race"}
    more = dict(libraries=libraries, scratch=tmp_path, workers=3, sanitizer="CS")

    def jobs(*steps, **change):
        return [[job.name for job in group] for group in make_jobs(source, list(steps), [], **more | change)]

    assert jobs(*gpu_check.STEPS) == [["native"], ["portable"], ["memcheck", "racecheck", "initcheck", "synccheck"]]
    assert jobs("portable", "initcheck") == [["portable"], ["initcheck"]]
    assert jobs("native", sanitizer=None) == [["native"]]
    (source / "tests" / "test_kda_sm90.py").write_text("DEVICES")
    sanitized = [["memcheck", "initcheck"], ["memcheck sm90", "initcheck sm90"]]
    assert jobs("native", "memcheck", "initcheck") == [["native"], *sanitized]
    for job in (job for group in make_jobs(source, gpu_check.STEPS, [], **more) for job in group):
        suits_the_card = job.name == "native" or job.name.endswith("sm90")
        assert job.environment["KIMI_CUDA_PATH"] == ("" if suits_the_card else "portable")
        assert job.environment["KIMI_NATIVE_LIB_DIR"] == str(tmp_path / {"portable": "ptx", "racecheck sm90": "race"}.get(job.name, "lib"))
        sanitized = job.step in gpu_check.SANITIZERS
        assert job.environment.get("KIMI_SANITIZER") == (job.step if sanitized else None)
        assert sanitized == (job.command[:3] == ["CS", "--tool", job.step])
        assert (str(source / "tests" / "test_model.py") in job.command) != sanitized
        assert (str(source / "tests" / "test_kda.py") in job.command) != (sanitized and job.name.endswith("sm90"))
        assert str(source / "tests" / "test_kda_sm90.py") in job.command
        assert f"--junitxml={job.report}" in job.command and ("-n" in job.command) != sanitized


@pytest.mark.parametrize(
    "code, output, expected",
    [
        (0, "12 passed in 1.20s", (True, "12 ok")),
        (0, "====== 12 passed, 3 skipped, 1 deselected in 71.20s (0:01:11) ======", (True, "12 ok")),
        (1, "1 failed, 12 passed, 2 errors in 1.20s", (False, "3 FAILED")),
        (0, "3 skipped, 1 deselected in 0.1s", (False, "no test")),
        (5, "4 deselected in 0.1s", (False, "no test")),
        (-11, "Fatal Python error: Segmentation fault", (False, "exit -11")),
        (2, "1 error in 0.3s", (False, "1 FAILED")),
        (1, "a test prints: 3 passed in 2.0s\n1 failed, 2 passed in 0.1s", (False, "1 FAILED")),
        (1, "12 passed in 1.20s\ncrashed at exit", (False, "exit 1")),
        (0, "", (False, "no test")),
    ],
)
def test_judging_tests(code, output, expected):
    assert judge_tests(code, output) == expected


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
        ("synccheck", 1, "========= ERROR SUMMARY: 60 errors\n========= ERROR SUMMARY: 10 errors were not printed.\n", (False, "60 FOUND")),
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


def job(name: str, code: str, timeout: float = 60) -> Job:
    return Job(name, name.split()[0], [sys.executable, "-c", code], {"KIMI_TEST_WORD": name}, timeout, Path("/does/not/exist"))


def test_running_jobs(tmp_path):
    slow = "import subprocess; print('tests/x.py::test_f PASSED [ 3%]\\n..s.. [ 9%]', flush=True); subprocess.run(['sleep', '60'])"
    groups = [
        [job("native", "import os; print(os.environ['KIMI_TEST_WORD']); print('3 passed in 0.1s')")],
        [job("memcheck", slow, timeout=1), job("racecheck portable", "print('E   wrong'); print('1 failed in 0.1s'); raise SystemExit(1)")],
    ]
    start = time.monotonic()
    results = run_jobs(groups, start + 60, tmp_path)
    assert time.monotonic() - start < 30
    found = [(r.job.name, r.good, r.text) for r in results]
    assert found[0] == ("native", True, "3 ok") and found[2] == ("racecheck portable", False, "1 FAILED")
    assert found[1] == ("memcheck", False, "stopped after 1 s and 6 tests")
    log = (tmp_path / "native.log").read_text()
    assert log.startswith("KIMI_TEST_WORD=native ") and "\nnative\n3 passed in 0.1s\n\n3 ok, " in log
    assert "E   wrong" in (tmp_path / "racecheck-portable.log").read_text()
    text = gpu_check.failures(results)
    assert "--- racecheck portable: 1 FAILED\nE   wrong" in text and "native" not in text


def test_findings_come_first_in_the_summary():
    text = OURS + "a line\n" * 100
    found = gpu_check.failures([Result(job("memcheck", ""), False, "1 FOUND", 1.0, {}, "noise\n" * 100 + text)])
    assert found.splitlines()[1] == OURS.splitlines()[0] and "Host Frame" not in found and len(found.splitlines()) == 51


def test_after_the_deadline_nothing_starts(tmp_path):
    results = run_jobs([[job("native", "print('3 passed in 0.1s')")]], time.monotonic() - 1, tmp_path)
    assert [(r.good, r.text) for r in results] == [(False, "no time left")]


def test_a_job_that_ran_out_of_time_leaves_no_process(tmp_path):
    code = f"import os, subprocess; p = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); p.wait()"
    run_jobs([[job("native", code, timeout=2)]], time.monotonic() + 60, tmp_path)
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


def test_table(tmp_path):
    (tmp_path / "report.xml").write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.test_rms_norm" name="test_a[1]" time="1.5"/>
        <testcase classname="tests.test_rms_norm" name="test_a[2]" time="2.0"><skipped/></testcase>
        <testcase classname="tests.test_kda" name="test_b" time="1.0"><failure>text</failure></testcase>
        </testsuite></testsuites>"""
    )
    files = count_files(tmp_path / "report.xml")
    assert files == {"rms_norm": "1 ok 4s", "kda": "1 FAILED"} and count_files(tmp_path / "none.xml") == {}
    results = [
        Result(job("native", ""), False, "1 FAILED", 8.4, files),
        Result(job("memcheck", ""), True, "9 ok", 9.1, {"kda": "9 ok 7s"}),
    ]
    assert table(results).splitlines() == [
        "          native       memcheck",
        "kda       1 FAILED     9 ok 7s",
        "rms_norm  1 ok 4s",
        "all       1 FAILED 8s  9 ok 9s",
    ]
    assert judge(results[1].job, None, "", 12.0) == (False, "stopped after 12 s and 0 tests")


def test_build_that_is_not_there(tmp_path):
    with pytest.raises(CannotCheck, match="--no-build, but there is no"):
        gpu_check.build(tmp_path, allowed=False)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "_ops.so").touch()
    os.utime(tmp_path / "lib" / "_ops.so", (0, 0))  # older than the sources, but there is nothing to build it with
    assert gpu_check.build(tmp_path, allowed=False) == gpu_check.build(tmp_path, allowed=True) == tmp_path / "lib"
    with pytest.raises(CannotCheck, match="lib-racecheck/_ops.so, which target _ops_racecheck makes"):
        gpu_check.build(tmp_path, allowed=False, kind="-racecheck")


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
