"""Our backend in fla-core itself: found, asked, chosen or not, and turned off. Needs fla-core 0.6 or newer with triton and einops; no GPU:
what fla would compute itself is then only counted, by a stand-in for its kernels."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import DEVICES, assert_same_bits, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kimi_native.compat.fla as ours

for package in ("triton", "einops", "fla.backends"):
    pytest.importorskip(package)
fla_kda = pytest.importorskip("fla.ops.kda")
import fla.backends  # noqa: E402
import fla.ops.kda.fused_recurrent  # noqa: E402

THEIRS = {
    "chunk_kda": fla_kda.chunk_kda,
    "fused_recurrent_kda": fla_kda.fused_recurrent_kda,
    "fused_recurrent_kda_fwd": fla.ops.kda.fused_recurrent.fused_recurrent_kda_fwd,
}
REGISTRIES = {  # where fla keeps the backends of a function
    "chunk_kda": fla.backends._function_registries[inspect.unwrap(fla_kda.chunk_kda)],
    "fused_recurrent_kda_fwd": fla.backends._operation_registries["kda"],
}


class Calls(TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "kimi_native":
            self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls() -> Iterator[Counter[str]]:
    with Calls() as mode:
        yield mode.counts


def problem(tokens: int, device: str, **more: Any) -> dict[str, Any]:
    q, k, v, g = (randn(1, tokens, 2, 64, dtype=torch.bfloat16, seed=i).to(device) for i in range(4))
    return {"q": q, "k": k, "v": v, "g": -g.abs().float(), "beta": randn(1, tokens, 2, seed=5).sigmoid().to(device), **more}


def with_stand_in(name: str) -> Callable[..., Any]:
    """fla's dispatch of a function, with something that says so in place of fla's own kernels."""

    def stand_in(*args: Any, **kwargs: Any) -> str:
        return "computed by fla"

    stand_in.__name__ = name
    return REGISTRIES[name].dispatch(stand_in)


@pytest.mark.parametrize("name", THEIRS)
def test_signatures_are_those_of_fla(name):
    def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(getattr(ours, name)) == parameters(THEIRS[name])


@pytest.mark.parametrize("device", DEVICES)
def test_fla_calls_our_operators(device, calls):
    with torch.inference_mode():
        args = problem(70, device, output_final_state=True, use_qk_l2norm_in_kernel=True)
        results = [(fla_kda.chunk_kda(**args), ours.chunk_kda(**args))]
        assert calls == {"kda_prefill": 2}
        results += [(fla_kda.fused_recurrent_kda(**args), ours.fused_recurrent_kda(**args))]
        assert calls == {"kda_prefill": 4}
        args |= problem(1, device)
        results += [(fla_kda.fused_recurrent_kda(**args), ours.fused_recurrent_kda(**args))]
        assert calls == {"kda_prefill": 4, "kda_decode": 2}
    for theirs, own in results:
        for a, b in zip(theirs, own, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_fla_serves_from_a_pool_by_our_operators(device, calls):
    pool = randn(5, 2, 64, 64, seed=7).to(device)
    expected = pool.clone()
    indices, bounds = torch.tensor([3], device=device, dtype=torch.int32), torch.tensor([0, 1], device=device)
    args = problem(1, device, cu_seqlens=bounds, ssm_state_indices=indices, state_v_first=True)
    out, final = THEIRS["fused_recurrent_kda_fwd"](**args, initial_state=pool)
    assert calls == {"kda_decode": 1} and final is pool
    assert_same_bits(out, ours.fused_recurrent_kda_fwd(**args, initial_state=expected)[0])
    assert_same_bits(pool, expected)


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("chunk_kda", {"cp_context": object()}, "cp_context: context parallelism"),
        ("chunk_kda", {"chunk_size": 32, "return_intermediate_states": True}, "chunk_size=64 alone"),
        ("chunk_kda", {"something_new": True}, "unknown arguments something_new"),
        ("chunk_kda", {"beta": torch.zeros(1, 3, 2)}, "beta must have shape"),
        ("chunk_kda", {"q": torch.zeros(1, 70, 2, 64, requires_grad=True)}, "gradients are not computed"),
        ("fused_recurrent_kda_fwd", {"beta": torch.zeros(1, 70, 2, 64), "inplace_final_state": False}, "beta for each value channel"),
        ("fused_recurrent_kda_fwd", {"v": torch.zeros(1, 70, 2, 512), "inplace_final_state": False}, "V = 512"),
    ],
)
def test_what_we_decline_fla_computes(name, change, reason, calls, caplog):
    REGISTRIES[name]._logged.clear()  # fla says each thing once
    with caplog.at_level(logging.INFO, "fla.backends"):
        assert with_stand_in(name)(**problem(70, "cpu") | change) == "computed by fla"
    assert not calls
    assert any("kimi_native rejected" in record.getMessage() and reason in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", REGISTRIES)
def test_the_variable_turns_it_off(name, calls, monkeypatch):
    args = problem(70, "cpu") | ({} if name == "chunk_kda" else {"inplace_final_state": False})
    dispatched = with_stand_in(name)
    assert len(dispatched(**args)) == 2
    assert calls == {"kda_prefill": 1}
    monkeypatch.setenv("FLA_KIMI_NATIVE", "0")
    assert dispatched(**args) == "computed by fla"
    monkeypatch.setenv("FLA_KIMI_NATIVE", "1")
    assert len(dispatched(**args)) == 2
    assert calls == {"kda_prefill": 2}


def test_other_functions_of_fla_are_left_alone():
    ours_alone = [type(b) for b in REGISTRIES["fused_recurrent_kda_fwd"]._backends.values() if b.backend_type == "kimi_native"]
    assert len(ours_alone) == 1
    offered = {name for name in vars(ours_alone[0]) if not name.startswith("_") and callable(getattr(ours_alone[0], name))}
    assert {name.removesuffix("_verifier") for name in offered} == {"chunk_kda", "fused_recurrent_kda_fwd"}


def test_flash_kda_is_asked_first():
    names = [backend.backend_type for backend in REGISTRIES["chunk_kda"]._get_sorted_backends()]
    assert names.index("flash_kda") < names.index("kimi_native")


@pytest.mark.parametrize(
    "imports, variable, expected",
    [
        ("import kimi_native, fla", "1", "True"),
        ("import fla, kimi_native", "1", "True"),
        ("import kimi_native.compat.fla; from fla.ops import kda", "1", "True"),
        ("import kimi_native, fla", "0", "False"),
    ],
)
def test_both_are_imported_in_any_order(imports, variable, expected):
    program = f"""{imports}
import inspect, fla.backends, fla.ops.kda
backends = fla.backends._function_registries[inspect.unwrap(fla.ops.kda.chunk_kda)]._get_sorted_backends()
print([b.is_available() and b.is_enabled() for b in backends if b.backend_type == "kimi_native"])
"""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"FLA_KIMI_NATIVE": variable, "PYTHONPATH": paths}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"[{expected}]"


def test_transformers_reaches_our_operators_through_fla(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Counter[str], request: pytest.FixtureRequest
):
    """A KimiLinear of transformers calls fla where that is installed; logits as by its own torch code."""
    pytest.importorskip("transformers.models.kimi_linear")
    if "vllm" in sys.modules:  # its import on a CPU takes triton's place, and transformers does not find fla then: a process without it
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{request.node.name}"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout
        return
    from transformers import AutoModelForCausalLM
    from transformers.models.kimi_linear import modeling_kimi_linear as library

    from kimi_native.tiny import make_tiny

    make_tiny(tmp_path, preset="tiny", seed=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(0, model.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(1))

    def logits() -> Tensor:
        with torch.no_grad():
            first = model(tokens, use_cache=True)
            return torch.cat([first.logits, model(tokens[:, :1], past_key_values=first.past_key_values).logits], 1)

    through_fla = logits()
    layers = sum(isinstance(module, library.KimiLinearDeltaAttention) for module in model.modules())
    assert calls == {"kda_prefill": layers, "kda_decode": layers}
    for name in ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"):
        monkeypatch.setattr(library, name, inspect.unwrap(getattr(library, name)))
    by_torch = logits()
    assert calls == {"kda_prefill": layers, "kda_decode": layers}
    assert (through_fla - by_torch).abs().max() < 1e-4 * by_torch.std()
