"""What an engine does with the logits: sampling, ends of requests, stop strings, text and streams."""

from __future__ import annotations

import math

import pytest
import torch
from engine_kit import CROWD, DEFAULT_TOLERANCE, MODES, Ask, assert_same, run
from kit import DEVICES
from model_kit import SMALL, WITH_TEXT, Zoo, tokens
from torch import Tensor

from kimi_native import Completion, KimiLinear, SamplingParams, TokenEvent
from kimi_native.generate import sample


@pytest.fixture(params=DEVICES)
def zoo(request: pytest.FixtureRequest, zoo: Zoo) -> Zoo:
    """The zoo with our models on each device: every test of this file runs on all of them."""
    return zoo.on(request.param)


# ------------------------------------------------------------------------------------------------ sampling


def plain_distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What `sample` draws from, written token by token in fp64."""
    weights = [math.exp((x - max(logits.tolist())) / temperature) for x in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    if top_k:
        order = order[:top_k]
    total, kept, reached = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if reached >= top_p:
            break
        kept.append(i)
        reached += weights[i] / total
    out = torch.zeros(len(weights), dtype=torch.float64)
    for i in kept:
        out[i] = weights[i] / sum(weights[j] for j in kept)
    return out


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.0, 0, 1.0),
        (1.0, 5, 1.0),
        (1.0, 0, 0.6),
        (0.7, 8, 0.8),
        (1.0, 1, 1.0),
        (1.5, 0, 0.01),
        (1.0, 100, 1.0),
    ],
)
def test_sampling_distribution(temperature, top_k, top_p):
    logits = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 1.5
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = plain_distribution(logits, temperature, top_k, top_p)
    generator, draws = torch.Generator().manual_seed(2), 4000
    counts = torch.zeros(24, dtype=torch.float64)
    logprobs = logits.double().log_softmax(-1)
    for _ in range(draws):
        token, logprob = sample(logits, params, generator)
        counts[token] += 1
        assert logprob == pytest.approx(logprobs[token].item(), abs=1e-5)
    assert counts[expected == 0].sum() == 0, "a token was drawn that top_k or top_p excludes"
    likely = expected * draws >= 5
    chi2 = ((counts - expected * draws)[likely] ** 2 / (expected * draws)[likely]).sum().item()
    df = int(likely.sum()) - 1
    assert chi2 <= df + 5 * math.sqrt(2 * df) if df else counts[likely].item() == draws


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert sample(logits, SamplingParams(), torch.Generator())[0] == 1
    for top_k, temperature in ((1, 1.0), (1, 1e-6), (1, 100.0)):
        assert sample(logits, SamplingParams(top_k=top_k, temperature=temperature), torch.Generator().manual_seed(0))[0] == 1


@MODES
def test_seed(zoo: Zoo, batch_invariant):
    model = zoo.model(SMALL, batch_invariant=batch_invariant)
    prompt = tokens(40, seed=70)

    def ask(seed: int | None) -> Ask:
        return Ask(prompt, SamplingParams(max_new_tokens=30, temperature=1.0, seed=seed, ignore_eos=True))

    first = run(model, ask(1))[0]
    assert_same(run(model, ask(1))[0], first, "the same seed")
    crowd = run(model, ask(2), CROWD[0], ask(1), CROWD[3], ask(1), ask(None), ask(None))
    for i in (2, 4):
        assert_same(crowd[i], first, "the same seed among others", bits=batch_invariant)
    assert len({tuple(crowd[i].token_ids) for i in (0, 2, 5, 6)}) == 4, "different seeds, or none, differ"
    torch.manual_seed(0)
    assert_same(run(model, ask(1))[0], first, "torch's own generator plays no part")


def test_sampled_tokens_have_the_logprob_of_the_model(zoo: Zoo):
    """Temperature, top_k and top_p change what is drawn, not the reported logprob."""
    model, prompt = zoo.model(SMALL), tokens(20, seed=71)
    got = run(model, Ask(prompt, SamplingParams(max_new_tokens=25, temperature=1.7, top_k=20, top_p=0.9, seed=5, ignore_eos=True)))[0]
    logits = model.score(prompt + got.token_ids)[len(prompt) - 1 : -1].cpu()
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(got.token_ids)[:, None])[:, 0].tolist()
    assert got.logprobs == pytest.approx(wanted, abs=DEFAULT_TOLERANCE)
    allowed = logits.topk(20, dim=-1).indices
    assert all(token in row for token, row in zip(got.token_ids, allowed.tolist()))
    assert got.token_ids != logits.argmax(-1).tolist()


# ------------------------------------------------------------------------------------------------ ends, text, streams


def test_stop_ids_and_lengths(zoo: Zoo):
    model, prompt = zoo.model(SMALL), tokens(40, seed=80)
    free: Completion = model.generate(prompt, max_new_tokens=40, ignore_eos=True)
    assert len(free.token_ids) == len(free.logprobs) == 40 and free.finish_reason == "length" and free.text is None and free.error is None
    stop = free.token_ids[9]
    at = free.token_ids.index(stop)
    for given in ([stop], stop, [stop, 5, 7] if 5 not in free.token_ids[:at] and 7 not in free.token_ids[:at] else [stop]):
        got = model.generate(prompt, max_new_tokens=40, ignore_eos=True, stop=given)
        assert got.token_ids == free.token_ids[: at + 1] and got.finish_reason == "stop"
    assert model.generate(prompt, max_new_tokens=1, ignore_eos=True).token_ids == free.token_ids[:1]
    both = model.generate(prompt, max_new_tokens=at + 1, ignore_eos=True, stop=[stop])
    assert both.finish_reason == "stop" and len(both.token_ids) == at + 1


def prompt_before(model: KimiLinear, token: int) -> list[int]:
    """A prompt after which `token` is the likeliest."""
    ids = tokens(1500, seed=81)
    found = (model.score(ids).argmax(-1) == token).nonzero().flatten().tolist()
    assert found, f"token {token} is never the likeliest here; choose another seed"
    return ids[: found[0] + 1]


def test_stop_id_zero(zoo: Zoo):
    """Token id 0 is an id like any other, alone or in a list."""
    model = zoo.model(SMALL)
    prompt = prompt_before(model, 0)
    for stop in ([0], 0):
        got = model.generate(prompt, max_new_tokens=5, ignore_eos=True, stop=stop)
        assert got.token_ids == [0] and got.finish_reason == "stop"


def test_end_token_of_the_model(zoo: Zoo):
    model = zoo.model(SMALL)
    (eos,) = model.config.eos_token_ids
    prompt = prompt_before(model, eos)
    got = model.generate(prompt, max_new_tokens=8)
    assert got.token_ids == [eos] and got.finish_reason == "stop"
    on = model.generate(prompt, max_new_tokens=8, ignore_eos=True)
    assert on.token_ids[0] == eos and len(on.token_ids) == 8 and on.finish_reason == "length"


def test_generate_takes_one_or_many(zoo: Zoo):
    model = zoo.model(SMALL, batch_invariant=True)
    prompts = [tokens(n, seed=90 + n) for n in (5, 200, 64, 1)]
    events: list[TokenEvent] = []
    many = model.generate(prompts, max_new_tokens=7, ignore_eos=True, stream=events.append, prefill_chunk=128)
    assert [c.prompt_token_ids for c in many] == prompts
    for i, completion in enumerate(many):
        assert model.generate(prompts[i], max_new_tokens=7, ignore_eos=True) == completion
        own = [e for e in events if e.request_id == i]
        assert [e.token_id for e in own] == completion.token_ids and [e.logprob for e in own] == completion.logprobs
        assert [e.finish_reason for e in own] == [None] * 6 + ["length"]
    assert model.generate(torch.tensor(prompts[0]), max_new_tokens=7, ignore_eos=True) == many[0]
    assert model.generate([], max_new_tokens=7) == []
    assert model.generate(prompts, max_new_tokens=7, ignore_eos=True, max_num_seqs=1) == many


def test_text_in_text_out(zoo: Zoo):
    model = zoo.model(WITH_TEXT)
    assert model.tokenizer is not None
    prompt = "the rain and the 中文 😀"
    ids = model.tokenizer.encode(prompt)
    events: list[TokenEvent] = []
    got = model.generate(prompt, max_new_tokens=60, ignore_eos=True, stream=events.append)
    assert got.prompt_token_ids == ids
    assert got.text == model.tokenizer.decode(got.token_ids) == "".join(e.text for e in events)
    assert got == model.generate(ids, max_new_tokens=60, ignore_eos=True)
    assert "" in [e.text for e in events], "no incomplete character came up; choose another prompt"


def test_stop_strings(zoo: Zoo):
    """A stop string may begin and end inside tokens and span several; the text ends before it, and nothing of it is streamed."""
    model = zoo.model(WITH_TEXT)
    prompt = "the sea"
    free = model.generate(prompt, max_new_tokens=60, ignore_eos=True)
    assert free.text is not None
    ends = [len(model.tokenizer.decode(free.token_ids[: n + 1])) for n in range(60)]  # may count an incomplete character
    checked = 0
    for first in range(4, 40, 5):
        for length in (1, 2, 5, 12):
            start = ends[first] - 1
            stop = free.text[start : start + length]
            if len(stop) < length or "\N{REPLACEMENT CHARACTER}" in stop:
                continue
            at = free.text.index(stop)
            events: list[TokenEvent] = []
            got = model.generate(prompt, max_new_tokens=60, ignore_eos=True, stop=[stop, "never to be seen"], stream=events.append)
            assert got.finish_reason == "stop" and got.text == free.text[:at] == "".join(e.text for e in events)
            assert got.token_ids == free.token_ids[: len(got.token_ids)]
            assert stop in model.tokenizer.decode(got.token_ids) and stop not in model.tokenizer.decode(got.token_ids[:-1])
            checked += 1
    assert checked >= 8
    # the beginning of a stop string that does not come true is given back at the end
    tail = free.text[-3:]
    held = model.generate(prompt, max_new_tokens=60, ignore_eos=True, stop=tail + "X")
    assert held.text == free.text and held.finish_reason == "length"


def test_end_token_is_not_in_the_text(zoo: Zoo):
    model = zoo.model(WITH_TEXT)
    prompt = "the sea"
    free = model.generate(prompt, max_new_tokens=60, ignore_eos=True)
    stop = free.token_ids[20]
    at = free.token_ids.index(stop)
    got = model.generate(prompt, max_new_tokens=60, ignore_eos=True, stop=[stop])
    assert got.token_ids == free.token_ids[: at + 1]
    assert got.text == model.tokenizer.decode(free.token_ids[:at])
