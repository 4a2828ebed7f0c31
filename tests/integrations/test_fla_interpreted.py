"""Our recurrent functions against fla's own kernel, without a GPU: in triton's interpreter, which must be chosen before triton is
imported, so in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import assert_close, randn
from torch import Tensor

import kimi_native.compat.fla as ours

for package in ("triton", "einops", "fla"):
    pytest.importorskip(package)

MAX_R = 1e-6  # both are fp32
# Runs fla's function of each (name, arguments) in the file argv[1] and saves (output, state) in argv[2].
FLA = """
import sys
import torch
from fla.ops.kda import fused_recurrent
calls = torch.load(sys.argv[1])
torch.save([getattr(fused_recurrent, name)(**arguments) for name, arguments in calls], sys.argv[2])
"""


def by_fla(directory: Path, calls: list[tuple[str, dict[str, Any]]]) -> list[tuple[Tensor, Tensor]]:
    torch.save(calls, directory / "calls.pt")
    environment = os.environ | {"TRITON_INTERPRET": "1", "FLA_DISABLE_BACKEND_DISPATCH": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", FLA, str(directory / "calls.pt"), str(directory / "results.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return torch.load(directory / "results.pt")


def problem(batch: int, tokens: int, heads: int, value_heads: int, key_dim: int, value_dim: int, **more: Any) -> dict[str, Any]:
    return {
        "q": randn(batch, tokens, heads, key_dim, seed=1),
        "k": randn(batch, tokens, heads, key_dim, seed=2),
        "v": randn(batch, tokens, value_heads, value_dim, seed=3),
        "g": randn(batch, tokens, value_heads, key_dim, seed=4),
        "beta": randn(batch, tokens, value_heads, seed=5),
        "A_log": randn(value_heads, seed=6),
        "dt_bias": randn(value_heads * key_dim, seed=7),
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        **more,
    }


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Both layouts of each: plain calls with either gate, a pool with empty sequences, drafts with accepted ones."""
    calls: list[tuple[str, dict[str, Any]]] = []
    for state_v_first in (False, True):
        layout = {"state_v_first": state_v_first}
        inner = (24, 20) if state_v_first else (20, 24)
        for lower_bound in (None, -5.0):
            more = layout | {"lower_bound": lower_bound, "allow_neg_eigval": True, "output_final_state": True}
            calls.append(("fused_recurrent_kda", problem(2, 5, 1, 2, 20, 24, initial_state=randn(2, 2, *inner, seed=8), **more)))
        bounds, rows = torch.tensor([0, 1, 1, 2, 3]), torch.tensor([7, 7, 2, 0], dtype=torch.int32)
        more = layout | {"cu_seqlens": bounds, "ssm_state_indices": rows, "initial_state": randn(10, 2, 32, 32, seed=9)}
        calls.append(("fused_recurrent_kda_fwd", problem(1, 4, 2, 2, 32, 32, **more)))
        rows = torch.tensor([[0, 1, 2], [5, 4, 3], [0, 1, 2], [8, 0, 0]], dtype=torch.int32)
        accepted = torch.tensor([1, 3, 2, 1], dtype=torch.int32)
        more = layout | {"cu_seqlens": torch.tensor([0, 3, 5, 5, 6]), "ssm_state_indices": rows, "num_accepted_tokens": accepted}
        calls.append(("fused_recurrent_kda_fwd", problem(1, 6, 2, 2, 32, 32, initial_state=randn(10, 2, 32, 32, seed=9), **more)))
    return calls


def test_the_recurrent_functions_do_what_flas_kernel_does(tmp_path: Path):
    calls = cases()
    theirs = by_fla(tmp_path, calls)
    assert len(theirs) == len(calls) == 8
    for (name, arguments), (out, state) in zip(calls, theirs, strict=True):
        own_out, own_state = getattr(ours, name)(**arguments)
        assert_close(own_out, out, MAX_R, f"output of {name}")
        assert_close(own_state, state, MAX_R, f"state of {name}")
