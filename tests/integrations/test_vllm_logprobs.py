"""kimi_native inside vLLM: log-probabilities against transformers, many requests at once, prompts cut in pieces, requests that end
early, state pages used again; and that a mistake would have been seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_kit import replaced

pytest.importorskip("vllm", reason="vLLM is not installed (make test-integrations)")

from vllm_kit import TOLERANCE, Engine, Reference, engine, loses, one_key_short, prompts, watched

# Tokens a step: all prompts whole; pieces on the grid of 64; pieces of an odd length, which also cut a prompt off the grid.
WHOLE, ON_THE_GRID, OFF_THE_GRID = 4096, 64, 37

PAGES = 15  # of a small pool


@pytest.fixture(scope="module", params=[WHOLE, ON_THE_GRID, OFF_THE_GRID], ids=lambda tokens: f"{tokens}-a-step")
def served(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Engine]:
    with engine(checkpoint, max_num_batched_tokens=request.param) as it:
        yield it


whole_prompts = pytest.mark.parametrize("served", [WHOLE], indirect=True, ids=lambda tokens: f"{tokens}-a-step")


def test_sixteen_prompts_at_once(served: Engine, reference: Reference, difference: Any) -> None:
    difference(reference.check(served.answer(prompts())))


def test_requests_aborted_in_the_middle(served: Engine, reference: Reference, difference: Any) -> None:
    """Some of the requests end before, while and after their prompt is read; newcomers take their pages. Nobody else notices."""
    first = {served.add(prompt): prompt for prompt in prompts(seed=1)}
    names = list(first)
    victims = [[names[-1], names[2]], [names[9]], [names[-2], names[5]], [names[12], names[0]]]
    done: dict[str, Any] = {}
    for some in victims:
        served.abort(some)
        for _ in range(2):
            done |= served.step()
    late = {served.add(prompt): prompt for prompt in prompts([300, 7, 64, 130], seed=2)}
    done |= served.finish()
    gone = {name for some in victims for name in some}
    assert set(done) == (set(first) | set(late)) - gone
    difference(reference.check(list(done.values())))


@whole_prompts
def test_our_operators_do_the_work(served: Engine, reference: Reference) -> None:
    """One request of P tokens and N new ones: a prefill and N - 1 decode steps, in three layers of KDA and one of MLA."""
    with watched() as operators:
        answers = served.answer(prompts([100]), new_tokens=6)
    reference.check(answers)
    calls = {name: operator.calls for name, operator in operators.items() if operator.calls}
    assert calls["short_conv"] == calls["kda_prefill"] == 3
    assert calls["kda_decode_fused"] == 3 * 5
    assert calls["mla_prefill"] == 1
    assert calls["mla_decode"] == 5
    assert calls["mla_cache_write"] == 6
    assert calls["moe_router"] == calls["moe_experts"] == 3 * 6  # the first layer is dense


@whole_prompts
@pytest.mark.parametrize(
    ("operator", "change"),
    [
        pytest.param("kda_prefill", loses("state"), id="prefill-state-not-written-back"),
        pytest.param("kda_decode_fused", loses("state"), id="decode-state-not-written-back"),
        pytest.param("short_conv", loses("state"), id="prefill-convolution-not-written-back"),
        pytest.param("kda_decode_fused", loses("conv_state"), id="decode-convolution-not-written-back"),
        pytest.param("mla_decode", one_key_short, id="decode-one-key-short"),
    ],
)
def test_a_mistake_would_be_seen(served: Engine, reference: Reference, operator: str, change: Any) -> None:
    some = prompts([5, 64, 129], seed=3)
    with watched(**{operator: change}) as operators:
        wrong = served.answer(some)
    assert operators[operator].calls > 0
    for answer in wrong:
        assert reference.difference(answer) > 10 * TOLERANCE, f"prompt of {len(answer.prompt)} tokens"
    reference.check(served.answer(some))  # and it leaves nothing behind


@pytest.fixture(scope="module")
def small(checkpoint: Path) -> Iterator[Engine]:
    """An engine with so few pages that all of them are used again and again."""
    with engine(checkpoint, max_num_seqs=4, max_num_batched_tokens=128, max_model_len=256, num_gpu_blocks_override=PAGES) as it:
        assert it.core.vllm_config.cache_config.num_gpu_blocks == PAGES
        yield it


def test_pages_used_again(small: Engine, reference: Reference, difference: Any) -> None:
    """More requests than the engine has pages, each as right as alone on the fresh engine."""
    requests = prompts([1, 2, 5, 17, 31, 33, 63, 64, 65, 100, 127, 129] * 2, seed=4)
    assert len(requests) > PAGES  # and every request takes at least one page of states and one of latents
    alone = [small.answer([prompt], new_tokens=4)[0] for prompt in requests[:4]]
    together = small.answer(requests, new_tokens=4)
    for before, after in zip(alone, together):
        assert before.tokens == after.tokens
        assert (before.log_probabilities - after.log_probabilities).abs().max() < 1e-4
    difference(reference.check(together))


def test_prompts_of_one_token_join_decoding_requests(small: Engine, reference: Reference, difference: Any) -> None:
    """Then every request of a step has one token, and some of them start from nothing on pages that hold somebody's states."""
    small.add(prompts([65], seed=5)[0], new_tokens=16)
    done: dict[str, Any] = {}
    for late in prompts([1, 1, 1], seed=6):
        for _ in range(3):
            done |= small.step()
        small.add(late)
    done |= small.finish()
    assert len(done) == 4
    difference(reference.check(list(done.values())))


def test_preempted_and_computed_again(small: Engine, reference: Reference, difference: Any) -> None:
    """Answers that outgrow the pool: vLLM drops a request's pages and computes them anew, with the same answer."""
    scheduler = small.core.engine_core.engine_core.scheduler
    preempted: list[str] = []

    def preempt(request: Any, *arguments: Any, **named: Any) -> Any:
        preempted.append(request.request_id)
        return type(scheduler)._preempt_request(scheduler, request, *arguments, **named)

    with replaced((scheduler, "_preempt_request", preempt)):
        answers = small.continuations(prompts([120, 124, 126, 120], seed=7), new_tokens=20)
    assert preempted
    difference(reference.check(answers))


@pytest.mark.parametrize("tokens_a_step", [WHOLE, ON_THE_GRID])
def test_prefixes_continued_from_the_cache(tokens_a_step: int, checkpoint: Path, reference: Reference, difference: Any) -> None:
    """Prompts that begin alike: vLLM copies states at the end of a cached page, and the answers are those without a cache."""
    start = prompts([600], seed=9)[0]
    ends = [[], [1, 2, 3], list(range(50)), list(range(300, 330)), [1, 2, 3]]
    with engine(checkpoint, max_num_batched_tokens=tokens_a_step, enable_prefix_caching=True) as it:
        first = it.continuations([start])
        rest = it.continuations([start + end for end in ends[1:]])
        others = it.continuations([start[:300] + ends[2], ends[3] + start])
    assert [answer.cached_tokens for answer in first] == [0]
    assert all(answer.cached_tokens >= 512 for answer in rest)
    assert [answer.cached_tokens for answer in others] == [0, 0]  # vLLM keeps the states of the last whole page only
    difference(reference.check([*first, *rest, *others]))
