"""Requests of a test, and an engine that runs them to their ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from model_kit import tokens

from kimi_native import Engine, KimiLinear, SamplingParams, TokenEvent

MODES = pytest.mark.parametrize("batch_invariant", [False, True], ids=["default", "batch_invariant"])
DEFAULT_TOLERANCE = 1e-4  # of logprobs between two ways to compute the same, default mode


@dataclass
class Ask:
    """A request of a test: it joins before step `joins`, and is aborted before step `leaves`."""

    prompt: list[int]
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=6, ignore_eos=True))
    joins: int = 0
    leaves: int | None = None


@dataclass
class Got:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None

    def take(self, event: TokenEvent) -> None:
        assert self.finish_reason is None, "an event after the end"
        if event.token_id is not None:
            assert event.logprob is not None
            self.token_ids.append(event.token_id)
            self.logprobs.append(event.logprob)
        self.text += event.text
        self.finish_reason, self.error = event.finish_reason, event.error


def play(engine: Engine, asks: list[Ask]) -> list[Got]:
    """Runs the requests to their ends, in steps, joining and leaving as they ask."""
    got: dict[int, Got] = {}
    ids: dict[int, int] = {}
    step = 0
    while engine.has_unfinished or len(ids) < len(asks):
        for i, ask in enumerate(asks):
            if ask.joins == step:
                ids[i] = engine.add(ask.prompt, ask.params)
                got[ids[i]] = Got()
            if ask.leaves == step:
                engine.abort(ids[i])
        for event in engine.step():
            got[event.request_id].take(event)
        step += 1
        assert step < 10_000
    return [got[ids[i]] for i in range(len(asks))]


def run(model: KimiLinear, *asks: Ask, **options: int) -> list[Got]:
    engine = Engine(model, **({"max_num_seqs": 8, "num_pages": 64} | options))
    slots, pages = engine.free_slots, engine.free_pages
    got = play(engine, list(asks))
    assert (engine.free_slots, engine.free_pages) == (slots, pages), "a finished request kept memory"
    return got


def assert_same(a: Got, b: Got, what: str, *, bits: bool = True) -> None:
    assert a.token_ids == b.token_ids and a.finish_reason == b.finish_reason, what
    if bits:
        assert a.logprobs == b.logprobs, f"{what}: logprobs differ by {max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs))}"
    else:
        assert a.logprobs == pytest.approx(b.logprobs, abs=DEFAULT_TOLERANCE, rel=0), what


CROWD = [
    Ask(tokens(200, seed=10), SamplingParams(max_new_tokens=9, ignore_eos=True)),
    Ask(tokens(1, seed=11), SamplingParams(max_new_tokens=20, ignore_eos=True)),
    Ask(tokens(65, seed=12), SamplingParams(max_new_tokens=3, ignore_eos=True)),
    Ask(tokens(333, seed=13), SamplingParams(max_new_tokens=5, ignore_eos=True), joins=1),
    Ask(tokens(70, seed=14), SamplingParams(max_new_tokens=50, ignore_eos=True), joins=2, leaves=9),
    Ask(tokens(63, seed=15), SamplingParams(max_new_tokens=8, ignore_eos=True), joins=3),
    Ask(tokens(64, seed=16), SamplingParams(max_new_tokens=70, ignore_eos=True), joins=5),
    Ask(tokens(30, seed=17), SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, ignore_eos=True), joins=6),
    Ask(tokens(250, seed=18), SamplingParams(max_new_tokens=12, ignore_eos=True), joins=6, leaves=7),
    Ask(tokens(129, seed=19), SamplingParams(max_new_tokens=4, ignore_eos=True), joins=20),
]
