"""examples/lm_eval: lm-eval's own HFLM around the accelerated model gives the log-likelihoods and the text of the model as it comes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from kimi_native import ops  # noqa: E402
from kimi_native.tiny import make_tiny  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lm_eval" / "evaluate.py"


@pytest.fixture(scope="module")
def evaluate() -> Callable[..., dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("evaluate_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.evaluate


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm_eval") / "model"
    make_tiny(path, gates="mild")
    return path


@pytest.fixture(scope="module")
def expected(evaluate: Callable[..., dict[str, Any]], directory: Path) -> tuple[list[float], list[str]]:
    return answers(evaluate(directory, accelerated=False))


def answers(results: dict[str, Any]) -> tuple[list[float], list[str]]:
    """Log-likelihoods of all choices of all questions, and the generated texts."""
    choices, texts = results["samples"]["kimi_native_capitals"], results["samples"]["kimi_native_counting"]
    assert len(choices) == len(texts) == 5
    by_question = sorted(choices, key=lambda s: s["doc_id"])
    likelihoods = [float(response[0][0]) for sample in by_question for response in sample["resps"]]
    return likelihoods, [sample["resps"][0][0] for sample in sorted(texts, key=lambda s: s["doc_id"])]


def largest_difference(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def test_log_likelihoods_and_text(evaluate: Callable[..., dict[str, Any]], directory: Path, expected, monkeypatch: pytest.MonkeyPatch):
    called = []
    for name in ("kda_prefill", "kda_decode_fused", "mla_decode", "mla_prefill", "moe_experts"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _name=name, _op=original, **k: (called.append(_name), _op(*a, **k))[1])
    likelihoods, texts = answers(evaluate(directory))
    assert set(called) == {"kda_prefill", "kda_decode_fused", "mla_decode", "mla_prefill", "moe_experts"}
    assert len(likelihoods) == 16 and len(set(texts)) > 1
    assert largest_difference(likelihoods, expected[0]) < 1e-3  # sums over the tokens of a choice
    assert texts == expected[1]


def test_a_wrong_operator_is_seen(evaluate: Callable[..., dict[str, Any]], directory: Path, expected, monkeypatch: pytest.MonkeyPatch):
    original = ops.moe_experts
    monkeypatch.setattr(ops, "moe_experts", lambda *args, **kwargs: original(*args, **kwargs) * 1.01)
    likelihoods, _ = answers(evaluate(directory))
    assert largest_difference(likelihoods, expected[0]) > 1e-2
