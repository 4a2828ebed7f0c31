"""The programs in examples/ run, and say that their results are right. (examples/cpp: test_cpp.py; examples/lm_eval: integrations.)"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kit import skip_if_emulated

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(*command: str) -> str:
    paths = [str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_readme_and_is_listed():
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    listed = set(re.findall(r"^\| \[(\w+)\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert folders == listed
    for name in folders:
        text = (EXAMPLES / name / "README.md").read_text()
        assert f"examples/{name}" in text


def test_transformers():
    skip_if_emulated("the CPU backend runs it")
    out = run("examples/transformers/generate.py")
    rows = re.findall(r"^(transformers|accelerated|restored) +[\d.]+ tokens/s   first row: (\[.*\])", out, re.MULTILINE)
    assert [name for name, _ in rows] == ["transformers", "accelerated", "restored"]
    assert len({tokens for _, tokens in rows}) == 1
    assert "accelerated tokens are the same: True\nrestored tokens are the same: True\n" in out


def test_hybrid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """In this process, so that a mistake can be made in it: the example must see it."""
    skip_if_emulated("the CPU backend runs it")
    hybrid = imported(EXAMPLES / "hybrid" / "hybrid.py")
    assert hybrid.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: model)
    right = hybrid.ops.kda_prefill
    monkeypatch.setattr(hybrid.ops, "kda_prefill", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    assert hybrid.main() == 1
