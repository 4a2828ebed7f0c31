"""kimi_native inside vLLM with its weights split over processes: tensor parallel, and expert parallel. The workers find the plugin by
themselves, and the answers are those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-integrations)")

from vllm_kit import Engine, Reference, engine, prompts

LENGTHS = [1, 3, 33, 64, 65, 129, 200]


def counted_in_worker(worker: Any) -> dict[str, int]:
    """Runs in a worker process: the calls of our operators since the last time, after the first time."""
    import vllm_kit

    known = getattr(worker, "kimi_native_operators", None)
    if known is None:
        context = vllm_kit.watched()
        worker.kimi_native_context, worker.kimi_native_operators = context, context.__enter__()
        return {}
    counts = {name: operator.calls for name, operator in known.items()}
    for operator in known.values():
        operator.calls = 0
    return counts


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({"tensor_parallel_size": 2}, id="two-ranks"),
        pytest.param({"tensor_parallel_size": 2, "enable_expert_parallel": True}, id="two-ranks-expert-parallel"),
        pytest.param({"tensor_parallel_size": 4}, id="four-ranks"),
    ],
)
def split(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Engine]:
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send counted_in_worker
    patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parents[1]}", prepend=":")
    try:
        with engine(checkpoint, max_num_batched_tokens=64, **request.param) as it:
            yield it
    finally:
        patch.undo()


@pytest.mark.slow
def test_split_over_processes(split: Engine, reference: Reference, difference: Any) -> None:
    ranks = split.core.vllm_config.parallel_config.tensor_parallel_size
    assert split.llm.collective_rpc(counted_in_worker) == [{}] * ranks
    difference(reference.check(split.answer(prompts(LENGTHS, seed=10))))
    for counts in split.llm.collective_rpc(counted_in_worker):
        for name in ("kda_prefill", "kda_decode_fused", "mla_prefill", "mla_decode", "moe_experts"):
            assert counts[name] > 0, f"{name} was not called in a worker"
