"""The benchmarks' own machinery: a wrong case is never timed, the records are flat, the reference is right, the page is current."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "scripts")]

import bench_report  # noqa: E402
import devices  # noqa: E402
import harness  # noqa: E402
import kda_accuracy  # noqa: E402
import kda_decode_graph  # noqa: E402
import kda_gates  # noqa: E402
import kda_inputs  # noqa: E402
import peers  # noqa: E402
import run  # noqa: E402
from devices import Effort  # noqa: E402
from harness import Case, Job, Peer  # noqa: E402
from kit import assert_close  # noqa: E402
from spec import kda_prefill as spec  # noqa: E402

MODULES = [importlib.import_module(f"bench_{name}") for name in run.MODULES]


class StubDevice:
    """Ceilings of one, and a clock that says what it is told."""

    results = "stub"

    def describe(self):
        return {"machine": "stub", "threads": 1, "isa": "none"}

    def ceilings(self):
        return devices.Ceilings(tflops=1.0, gemm="none", gbps=1000.0)

    def measure(self, functions, effort):
        for function in functions.values():
            function()
        return {name: devices.Samples([1e-6 if name == "" else 3e-6] * effort.repeats) for name in functions}

    def path_of(self, run):
        return {"path": "cpu"}

    def release(self):
        pass

    def broken(self):
        return False


def command(*arguments):
    """bench/run.py in a process of its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.run([sys.executable, ROOT / "bench" / "run.py", *arguments], capture_output=True, text=True, env=env)


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setitem(devices.DEVICES, "stub", StubDevice)
    return harness.Session.start("stub", Effort(repeats=4, budget_s=0.0))


def raises(text):
    def check():
        raise AssertionError(text)

    return check


def nothing():
    return None


def test_a_right_case_and_its_peers(session):
    job = Job(run=nothing, check=nothing, flops=1e6, bytes=5e2, peers={"other": nothing, "wrong": Peer(nothing, raises("off by one"))})
    assert session.run(Case("op", "T=1", lambda: job))
    case, other, wrong = session.records
    assert (case["us"], case["tflops"], case["gbps"], case["roof_pct"], case["bound"]) == (1.0, 1.0, 0.5, 100.0, "compute")
    assert (other["peer"], other["peer_us"], other["ratio"]) == ("other", 3.0, 3.0)
    assert wrong["error"] == "off by one" and "peer_us" not in wrong


def test_a_wrong_case_is_never_timed(session):
    calls = []
    job = Job(run=lambda: calls.append(1), check=raises("relative error 2"), flops=1, bytes=1)
    assert session.run(Case("op", "T=1", lambda: job))
    assert not calls and session.failed == 1
    assert session.records == [{"record": "failed", "op": "op", "case": "T=1", "error": "relative error 2"}]


def test_a_run_replaces_the_cases_it_ran_and_keeps_the_others(session, tmp_path):
    path = tmp_path / "results.json"
    for name in ("T=1", "T=2"):
        session.run(Case("op", name, lambda: Job(nothing, nothing, 1, 1, {"other": nothing})))
        session.write(path)
    again = harness.Session.start("stub", Effort(repeats=3, budget_s=0.0))
    again.run(Case("op", "T=2", lambda: Job(nothing, raises("broken since"), 1, 1)))
    again.write(path)
    records = json.loads(path.read_text())
    assert [r["run"] for r in records if r["record"] == "header"] == [1, 2]
    assert [(r["record"], r["case"], r["run"]) for r in records if r["record"] != "header"] == [
        ("case", "T=1", 1),
        ("peer", "T=1", 1),
        ("failed", "T=2", 2),
    ]


def test_the_commit_of_a_tree_without_git(session, monkeypatch):
    monkeypatch.setenv("KIMI_COMMIT", "abc123")
    assert harness.Session.start("stub", Effort(3, 0.0)).head["commit"] == "abc123"


def test_close_lets_no_nan_pass():
    good, bad = torch.ones(4, 4), torch.ones(4, 4)
    bad[2, 1] = torch.nan
    harness.close(good, good.double(), 1e-6)
    with pytest.raises(AssertionError):
        harness.close(bad, good.double(), 1e-6)


@pytest.mark.parametrize("gate", ["softplus", "bounded", "log_decay"])
@pytest.mark.parametrize("count", [1, 32, 67])
def test_the_chunked_reference_of_kda_is_the_recurrence(gate, count):
    x = kda_inputs.inputs((count + 5,), heads=2, dtype=torch.float32, device="cpu")
    if gate == "log_decay":
        x.g = -40 * x.g.abs()  # some decays below any float
    state = torch.randn(2, kda_inputs.DIM, kda_inputs.DIM, dtype=torch.float64)
    tokens = slice(3, 3 + count)
    out, final = kda_inputs.recurrence(x, state, gate, tokens)
    parts = (t[tokens] for t in (x.q, x.k, x.v, x.g, x.beta))
    ref, ref_final = spec.kda(*parts, state, gate=gate, A_log=x.A_log, dt_bias=x.dt_bias, lower_bound=kda_inputs.LOWER_BOUND)
    assert_close(out, ref, 1e-12)
    assert_close(final, ref_final, 1e-12)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cases_have_names_of_their_own(device):
    cases = [case for module in MODULES for case in module.cases(device)]
    assert len({str(case) for case in cases}) == len(cases) > 50
    assert {case.op for case in cases if case.core} == {case.op for case in cases} or device == "cpu"


def test_the_quick_cases_of_an_operator_run_here(tmp_path):
    path = tmp_path / "cpu.json"
    done = command("--device", "cpu", "--quick", "--filter", "^rms_norm T=1 ", "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(path.read_text())
    assert [r["record"] for r in records] == ["header"] + ["case", "peer"] * 4
    head = records[0]
    assert head["ceiling_tflops"] > 0 and head["ceiling_gbps"] > 0 and head["commit"] and head["versions"]["torch"] == torch.__version__


def test_what_does_not_exist_is_said():
    done = command("--device", "cpu", "--filter", "no such case")
    assert done.returncode == 1 and "no case matches" in done.stderr


RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_records_are_flat_and_complete(path):
    records = json.loads(path.read_text())
    runs = {r["run"] for r in records if r["record"] == "header"}
    cases = {(r["op"], r["case"]) for r in records if r["record"] in ("case", "failed")}
    for r in records:
        assert r["run"] in runs
        if r["record"] == "header":
            assert {"date", "commit", "command", "versions", "machine", "ceiling_tflops", "ceiling_gbps"} <= r.keys()
            continue
        assert not any(isinstance(value, (dict, list)) for value in r.values())
        if r["record"] == "case":
            assert {"path", "us", "us_min", "tflops", "gbps", "roof_pct", "timing"} <= r.keys() and 0 < r["us_min"] <= r["us"]
        elif r["record"] == "peer":
            assert ((r["op"], r["case"]) in cases or r["op"] == "model") and ("error" in r or {"peer_us", "ratio", "timing"} <= r.keys())


def test_the_page_says_what_the_records_say():
    bench_report.main(["--check"])


def test_every_faster_peer_has_its_reason():
    for path in RESULTS:
        if path.stem == "cpu":
            continue
        missing = set(bench_report.behind(json.loads(path.read_text()))) - set(bench_report.REASONS)
        assert not missing, f"{path.name}: no reason in scripts/bench_report.py for {sorted(missing)}"


def test_fla_is_measured_with_its_own_kernels(monkeypatch):
    """It hands its KDA to ours where both are installed (kimi_native.compat.fla)."""
    monkeypatch.setenv("FLA_KIMI_NATIVE", "1")
    peers.fla("ops.kda")
    assert os.environ["FLA_KIMI_NATIVE"] == "0"


@pytest.mark.parametrize("scale", [1.0, 1.005])
def test_errors_of_kda_prefill_are_judged(scale, tmp_path, monkeypatch, capsys):
    right = kda_accuracy.ours
    monkeypatch.setattr(kda_accuracy, "ours", lambda x, num_tokens: tuple(scale * t for t in right(x, num_tokens)))
    path = tmp_path / "errors.json"
    monkeypatch.setattr(sys, "argv", ["kda_accuracy.py", "--device", "cpu", "--lengths", "40", "20", "--json", str(path)])
    assert kda_accuracy.main() == (0 if scale == 1.0 else 1)
    records = [r for r in json.loads(path.read_text()) if r["record"] == "error"]
    assert len(records) == 2 * 2 * 8 and {r["tokens"] for r in records} == {20, 40}
    assert all(0 < r["state"] < 1e-5 if scale == 1.0 else r["state"] > 4e-3 for r in records)
    assert capsys.readouterr().out.count("ours") == len(records)


def test_gates_of_all_kinds_are_timed(monkeypatch, tmp_path, capsys):
    """Five per cent for a kind of gate are allowed, however long unusual values take; other gates are other inputs."""
    for slowest_gate, unusual, code in ((1.04, 1.0, 0), (1.04, 9.0, 0), (1.06, 1.0, 1)):
        ratios, gates, right = iter(2 * [1.0, 1.0, slowest_gate, 0.5, unusual, 1.0]), [], kda_gates.kda_prefill

        def measure(device, functions, effort, ratios=ratios):
            functions[""]()
            return {"": devices.Samples(seconds=[1e-4 * next(ratios)])}

        def prefill(q, k, v, g, *args, gates=gates, right=right, **options):
            gates.append((g.float(), v.float().abs().mean(dim=(1, 2))))
            return right(q, k, v, g, *args, **options)

        monkeypatch.setattr(devices.Cpu, "measure", measure)
        monkeypatch.setattr(kda_gates, "kda_prefill", prefill)
        path = tmp_path / "gates.json"
        monkeypatch.setattr(
            sys, "argv", ["kda_gates.py", "--device", "cpu", "--heads", "2", "--lengths", "70", "50x2", "--json", str(path)]
        )
        assert kda_gates.main() == code
        records = [r for r in json.loads(path.read_text()) if r["record"] == "time"]
        assert [r["lengths"] for r in records] == 6 * ["T=70"] + 6 * ["2x50"]
        assert [r["us"] for r in records[:6]] == [round(100 * r, 1) for r in (1.0, 1.0, slowest_gate, 0.5, unusual, 1.0)]
        usual, slow, fast, mixed = (g for g, _ in gates[:4])
        assert slow.max() < usual.min() < usual.max() < fast.min() and set(mixed.unique().tolist()) == {-8.0, 40.0}
        assert all(torch.equal(g, usual) for g, _ in gates[4:6]) and gates[4][1].max() < 1e-5 < 0.1 < gates[0][1].min()
    capsys.readouterr()


ERRORS = sorted((ROOT / "bench" / "results" / "accuracy").glob("*.json"))


@pytest.mark.parametrize("path", ERRORS, ids=lambda path: path.stem)
def test_recorded_errors_are_what_is_promised(path):
    head, *records = json.loads(path.read_text())
    assert {"date", "commit", "command", "versions", "machine"} <= head.keys()
    ours = [r for r in records if r["who"] == "ours"]
    assert {r["tokens"] for r in ours} == {512, 8192, 131072}
    for r in ours:
        assert r["output"] <= kda_accuracy.MAX_OUTPUT and r["state"] <= kda_accuracy.MAX_STATE


def test_calls_in_a_graph_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kda_decode_graph.py"])
    assert kda_decode_graph.main() == 2
    assert capsys.readouterr().err == "kda_decode_graph: no CUDA device\n"


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results" / "decode").glob("*.json")), ids=lambda path: path.stem)
def test_recorded_decode_steps_are_ahead_of_fla(path):
    """The whole of a step takes less than fla's recurrence alone where the state counts, and ours alone always does."""
    head, *records = json.loads(path.read_text())
    assert {"date", "commit", "command", "versions", "machine"} <= head.keys()
    us = {(r["op"], r["sequences"], r["tokens"]): r["us"] for r in records}
    for batch in (1, 4, 16, 64, 256):
        fla = us["fla, recurrence alone", batch, 1]
        assert us["kda_decode", batch, 1] < fla
        assert us["kda_decode_fused", batch, 1] < fla or batch == 1
        steps = [us["kda_decode_fused", batch, tokens] for tokens in (1, 2, 4, 8)]
        assert steps == sorted(steps)


TIMES = sorted((ROOT / "bench" / "results" / "gates").glob("*.json"))


@pytest.mark.parametrize("path", TIMES, ids=lambda path: path.stem)
def test_recorded_times_do_not_depend_on_gates(path):
    head, *records = json.loads(path.read_text())
    assert {"date", "commit", "command", "versions", "machine"} <= head.keys()
    for lengths in {r["lengths"] for r in records}:
        us = {r["inputs"]: r["us"] for r in records if r["lengths"] == lengths}
        assert max(us[kind] for kind in ("slow", "fast", "slow and fast")) <= kda_gates.MAX_RATIO * us[kda_gates.AS_INITIALISED]
