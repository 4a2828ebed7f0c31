"""The logic of scripts/kernel_coverage.py; `make emulated` runs it on a record of the emulator."""

import json
import subprocess

import kernel_coverage
import pytest
from kernel_coverage import LaunchingTest, check, choose, read_tests, short

TESTS = [
    LaunchingTest("test_a.py::test_spec[cuda-float32]", 0.1, {"f<float>", "g"}),
    LaunchingTest("test_a.py::test_spec[cuda-float16]", 0.1, {"f<half>", "g"}),
    LaunchingTest("test_a.py::test_spec[large-cuda-float32]", 5.0, {"f<float>", "g", "h"}),
    LaunchingTest("test_a.py::test_medium[cuda]", 1.0, {"h"}),
    LaunchingTest("test_a.py::test_padding[cuda]", 0.2, {"g"}),
    LaunchingTest("test_a.py::test_opcheck[cuda]", 0.01, {"f<float>", "f<half>", "g", "h"}),
    LaunchingTest("test_a.py::test_on_the_host", 0.01, {"f<float>", "f<half>", "g", "h"}),
]
KERNELS = {"f<float>", "f<half>", "g", "h"}


def test_choosing():
    assert [test.name for test in choose(TESTS, KERNELS)] == [
        "test_a.py::test_medium[cuda]",  # for h
        "test_a.py::test_padding[cuda]",  # a function of its own
        "test_a.py::test_spec[cuda-float16]",
        "test_a.py::test_spec[cuda-float32]",
    ]


@pytest.mark.parametrize(
    "kernels, listed, errors",
    [
        (KERNELS, [0, 1, 3], []),
        (KERNELS | {"i"}, [0, 1, 3], ["no test runs i"]),
        (KERNELS, [0, 3], ["no test of sanitized.txt runs f<half>"]),
        ({"g"}, [0], []),
    ],
)
def test_checking(kernels, listed, errors):
    assert check(TESTS, kernels, [TESTS[i].name for i in listed]) == errors
    gone = "test_a.py::test_gone[cuda]"
    assert check(TESTS, kernels, [gone, *(TESTS[i].name for i in listed)]) == sorted(
        [*errors, f"sanitized.txt: {gone} is no test that launches a kernel"], key=lambda e: "of sanitized" in e
    )


def test_known_gaps():
    names = ["# a comment", *(TESTS[i].name for i in [0, 1, 3])]
    assert check(TESTS, KERNELS | {"i"}, ["# not run: i", *names]) == []
    assert check(TESTS, KERNELS, ["# not run: i", *names]) == ["sanitized.txt: i is run, or is no kernel"]
    assert check(TESTS, KERNELS, ["# not run: h", *names]) == ["sanitized.txt: h is run, or is no kernel"]


def test_names_of_kernels():
    assert short("void kimi::cuda::(anonymous namespace)::f<__half, 4>(kimi::Params, int)") == "f<__half, 4>"
    assert short("void kimi::cuda::x::(anonymous namespace)::f<Shape<(int)4, g(int)> >(kimi::Params)") == "x::f<Shape<(int)4, g(int)> >"
    assert short("kimi::cuda::f(int)") == "f"


def test_reading_a_record(tmp_path, monkeypatch):
    nm = "0000000000001000 t void kimi::cuda::f<float>(kimi::Params)\n0000000000002000 W main\n                 U free\n"
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: subprocess.CompletedProcess(command, 0, nm))
    tests = {
        "tests/test_a.py::test_spec[3-cpu-cpux]": {"seconds": 0.5, "kernels": [0x1000]},
        "tests/test_a.py::test_no": {"seconds": 1, "kernels": []},
    }
    (tmp_path / "launches").write_text(json.dumps({"library": "lib.so", "tests": tests}))
    library, found = read_tests([tmp_path / "launches"])
    assert (str(library), found) == ("lib.so", [LaunchingTest("test_a.py::test_spec[3-cuda-cpux]", 0.5, {"f<float>"})])


def test_the_list_names_tests_once():
    names = [line for line in kernel_coverage.LIST.read_text().splitlines() if not line.startswith("#")]
    assert names and len(names) == len(set(names)) and all("cuda" in name and ".py::test_" in name for name in names)
