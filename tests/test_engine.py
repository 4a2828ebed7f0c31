"""The engine: what a request gets does not depend on how its prompt is cut, who runs beside it, or who held its memory before.

With `batch_invariant=True` to the bit; in the default mode within 1e-4, because a library GEMM rounds differently for different
numbers of rows. Also running out of memory. Sampling, stopping and streaming: test_sampling.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_kit import CROWD, DEFAULT_TOLERANCE, MODES, Ask, Got, assert_same, play, run
from kit import DEVICES, assert_same_bits, needs_gpu, threads
from model_kit import REAL_GATES, REAL_LAYERS, SMALL, STORED_BF16, Variant, Zoo, replaced, tokens
from torch import Tensor

import kimi_native.generate as generate_module
import kimi_native.model as model_module
from kimi_native import Engine, KimiLinear, SamplingParams, SequenceCache
from kimi_native.cache import OutOfPages, OutOfSlots
from kimi_native.model import make_batch

LENGTHS = [1, 63, 64, 65, 200, 333]


@pytest.fixture(params=DEVICES)
def zoo(request: pytest.FixtureRequest, zoo: Zoo) -> Zoo:
    """The zoo with our models on each device: every test of this file runs on all of them."""
    return zoo.on(request.param)


def by_name(variants: list[Variant]):
    return pytest.mark.parametrize("variant", variants, ids=lambda v: v.name)


def first_part(whole: Got, part: Got) -> Got:
    """Of a request that ran to its end, what one that ended early had got by then."""
    count = len(part.token_ids)
    return Got(whole.token_ids[:count], whole.logprobs[:count], finish_reason=part.finish_reason)


# ------------------------------------------------------------------------------------------------ splits, neighbours, threads


@MODES
@by_name([SMALL, REAL_GATES])
@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_in_chunks(zoo: Zoo, variant, length, batch_invariant):
    model, prompt = zoo.model(variant, batch_invariant=batch_invariant), tokens(length, seed=length)
    whole, logits = run(model, Ask(prompt), prefill_chunk=2048)[0], model.score(prompt)
    assert len(whole.token_ids) == 6
    for chunk in (64, 128, 192):
        assert_same(run(model, Ask(prompt), prefill_chunk=chunk)[0], whole, f"chunks of {chunk}", bits=batch_invariant)
        split = model.score(prompt, prefill_chunk=chunk)
        if batch_invariant:
            assert_same_bits(split, logits, f"score in chunks of {chunk}")
        else:
            assert (split - logits).abs().max() <= DEFAULT_TOLERANCE


@MODES
@by_name([SMALL, REAL_GATES, REAL_LAYERS])
def test_alone_or_among_others(zoo: Zoo, variant, batch_invariant):
    model = zoo.model(variant, batch_invariant=batch_invariant)
    crowd = run(model, *CROWD, prefill_chunk=128)
    for i, (ask, got) in enumerate(zip(CROWD, crowd)):
        alone = run(model, Ask(ask.prompt, ask.params), prefill_chunk=2048)[0]
        assert got.finish_reason == ("aborted" if ask.leaves else "length")
        assert_same(got, first_part(alone, got) if ask.leaves else alone, f"request {i}", bits=batch_invariant)
    assert 0 < len(crowd[4].token_ids) < 50


def test_score_of_a_prefix(zoo: Zoo):
    """Later tokens change nothing before them, to the bit."""
    model, prompt = zoo.model(SMALL, batch_invariant=True), tokens(333, seed=20)
    whole = model.score(prompt)
    for length in (1, 2, 16, 63, 64, 65, 100, 128, 200, 332):
        assert_same_bits(model.score(prompt[:length]), whole[:length], f"the first {length}")


def test_decode_row_in_a_mixed_step(zoo: Zoo):
    """A row that decodes has the same bits alone, among decoding rows, and beside prompts of any length."""
    model = zoo.model(SMALL, batch_invariant=True)
    history = tokens(70, seed=21)

    def decode(others: list[int], prompts: list[int], before: int) -> Tensor:
        kda, latent = model.make_caches(len(others) + len(prompts) + 1, 64)
        decoding = []
        for n in [*others[:before], len(history), *others[before:]]:
            ids = history if n == len(history) else tokens(n, seed=n)
            sequence = SequenceCache(kda, latent)
            model.forward(make_batch([(sequence, ids)], [], model.device, "last"), kda, latent)
            sequence.num_tokens += len(ids)
            decoding.append((sequence, 5 if ids is history else 9))
        chunks = [(SequenceCache(kda, latent), tokens(n, seed=n + 1)) for n in prompts]
        logits = model.forward(make_batch(chunks, decoding, model.device, "last"), kda, latent)
        return logits[len(prompts) + before]

    alone = decode([], [], 0)
    for others, prompts, before in [([3], [], 0), ([3], [], 1), ([1, 130, 64, 65, 2], [], 3), ([], [1], 0), ([20, 90], [64, 7, 200], 1)]:
        assert_same_bits(decode(others, prompts, before), alone, f"beside {others} and prompts of {prompts}")


@MODES
def test_run_after_run(zoo: Zoo, batch_invariant):
    model = zoo.model(SMALL, batch_invariant=batch_invariant)
    first = run(model, *CROWD, prefill_chunk=128)
    for i, (a, b) in enumerate(zip(run(model, *CROWD, prefill_chunk=128), first)):
        assert_same(a, b, f"request {i}")


@by_name([SMALL, REAL_GATES])
def test_thread_counts(zoo: Zoo, variant):
    model, prompt = zoo.model(variant, batch_invariant=True), tokens(333, seed=22)
    with threads(1):
        logits, crowd = model.score(prompt), run(model, *CROWD[:6], prefill_chunk=192)
    with threads(2):
        assert_same_bits(model.score(prompt), logits)
        for i, (a, b) in enumerate(zip(run(model, *CROWD[:6], prefill_chunk=192), crowd)):
            assert_same(a, b, f"request {i}")


def test_chunks_begin_on_the_grid(zoo: Zoo, monkeypatch: pytest.MonkeyPatch):
    """Whatever shares a step's budget of prompt tokens, a prompt is only cut at multiples of 64."""
    starts: list[tuple[int, int]] = []

    def spy(prefill: list, decode: list, *args: object) -> object:
        starts.extend((sequence.num_tokens, len(chunk)) for sequence, chunk in prefill)
        assert sum(len(chunk) for _, chunk in prefill) <= 128
        return make_batch(prefill, decode, *args)

    monkeypatch.setattr(generate_module, "make_batch", spy)
    run(zoo.model(SMALL), *CROWD, prefill_chunk=128)
    assert all(start % 64 == 0 for start, _ in starts) and any(start > 0 for start, _ in starts)


def test_prefix_in_pieces(zoo: Zoo):
    """Where keys are expanded piece by piece (here 64 at a time), neither the split of the prompt nor a neighbour that needs more
    pieces changes bits."""
    model, prompt = zoo.model(SMALL, batch_invariant=True), tokens(333, seed=23)
    whole = model.score(prompt)
    with replaced((model_module, "PREFIX_PIECE_TOKENS", 64)):
        pieces = model.score(prompt)
        assert (pieces - whole).abs().max() <= DEFAULT_TOLERANCE
        for chunk in (64, 128, 192):
            assert_same_bits(model.score(prompt, prefill_chunk=chunk), pieces, f"chunks of {chunk}")
        short, long = Ask(tokens(50, seed=24)), Ask(prompt)
        assert_same(run(model, long, short)[1], run(model, short)[0], "beside a longer prompt")
    assert_same_bits(model.score(prompt[:64]), pieces[:64], "a prompt of a single piece")


def test_kda_states_in_bfloat16(zoo: Zoo):
    """Half the bytes, and nearly the same probabilities; refused where it would break a promise."""
    model = zoo.model(STORED_BF16, dtype=torch.bfloat16)
    asks = [Ask(tokens(200, seed=26)), Ask(tokens(70, seed=27), joins=2)]
    whole, half = (
        play(Engine(model, max_num_seqs=2, num_pages=16, kda_state_dtype=dtype), asks) for dtype in (torch.float32, torch.bfloat16)
    )
    for a, b in zip(whole, half):
        assert b.logprobs[0] == pytest.approx(a.logprobs[0], abs=0.05), "the first token after a prompt"
        assert len(b.logprobs) == len(a.logprobs) and b.logprobs != a.logprobs
    pools = [model.make_caches(1, 1, dtype)[0] for dtype in (torch.float32, torch.bfloat16)]
    assert pools[0].recurrent.nbytes == 2 * pools[1].recurrent.nbytes
    with pytest.raises(ValueError, match="bfloat16 beside a model in 16 bits"):
        Engine(zoo.model(STORED_BF16), kda_state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="batch_invariant model needs KDA states in float32"):
        Engine(zoo.model(STORED_BF16, batch_invariant=True, dtype=torch.bfloat16), kda_state_dtype=torch.bfloat16)


def test_bfloat16(zoo: Zoo):
    """The same promises in bfloat16: chunks, neighbours, pieces of the prefix, threads."""
    model, prompt = zoo.model(STORED_BF16, batch_invariant=True, dtype=torch.bfloat16), tokens(333, seed=25)
    whole = model.score(prompt)
    for chunk in (64, 192):
        assert_same_bits(model.score(prompt, prefill_chunk=chunk), whole, f"score in chunks of {chunk}")
    assert_same_bits(model.score(prompt[:65]), whole[:65], "the first 65")
    with threads(2):
        assert_same_bits(model.score(prompt), whole, "two threads")
    for i, (ask, got) in enumerate(zip(CROWD, run(model, *CROWD, prefill_chunk=128))):
        alone = run(model, Ask(ask.prompt, ask.params))[0]
        assert_same(got, first_part(alone, got) if ask.leaves else alone, f"request {i}")
    with replaced((model_module, "PREFIX_PIECE_TOKENS", 64)):
        pieces = model.score(prompt)
        assert_same_bits(model.score(prompt, prefill_chunk=128), pieces, "pieces, in chunks")
        short, long = Ask(tokens(50, seed=24)), Ask(prompt)
        assert_same(run(model, long, short)[1], run(model, short)[0], "pieces, beside a longer prompt")
    assert_same_bits(model.score(prompt[:64]), pieces[:64], "a prompt of a single piece")


# ------------------------------------------------------------------------------------------------ CUDA graphs


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@MODES
def test_graphs_change_nothing(zoo: Zoo, dtype, batch_invariant):
    """Steps that are replayed, and padded, give what the same steps give eagerly."""
    model = zoo.on("cuda").model(STORED_BF16, batch_invariant=batch_invariant, dtype=dtype)
    eager, replayed = (run(model, *CROWD, prefill_chunk=128, cuda_graphs=graphs) for graphs in (False, True))
    for i, (a, b) in enumerate(zip(replayed, eager)):
        if batch_invariant:
            assert_same(a, b, f"request {i}")
        else:  # a padded step may take another GEMM of the library
            assert a.finish_reason == b.finish_reason and len(a.token_ids) == len(b.token_ids)
            if dtype == torch.float32:
                assert_same(a, b, f"request {i}", bits=False)


@needs_gpu
def test_padding_rows_write_nothing(zoo: Zoo):
    """Five sequences in a step of eight rows: free slots and pages keep their NaN."""
    model = zoo.on("cuda").model(SMALL, batch_invariant=True)
    engine = Engine(model, max_num_seqs=8, num_pages=32)
    for n in range(5):
        engine.add(tokens(20 + n, seed=n), SamplingParams(max_new_tokens=6, ignore_eos=True))
    engine.step()
    spoil(engine)
    slots, pages = list(engine.kda._free), list(engine.latent._free)
    for _ in range(4):
        assert all(event.token_id is not None for event in engine.step())
    assert engine.kda.recurrent[:, slots].isnan().all() and engine.kda.conv[:, slots].isnan().all()
    assert engine.latent.pages[:, pages].isnan().all()


def test_cuda_graphs_need_a_gpu(zoo: Zoo):
    model = zoo.on("cpu").model(SMALL)
    with pytest.raises(ValueError, match="cuda_graphs needs a model on a GPU"):
        Engine(model, cuda_graphs=True)


# ------------------------------------------------------------------------------------------------ snapshots and reuse


def spoil(engine: Engine) -> None:
    """NaN into every free slot and page: whoever gets them next must not see what was there."""
    engine.kda.recurrent[:, engine.kda._free] = float("nan")
    engine.kda.conv[:, engine.kda._free] = float("nan")
    engine.latent.pages[:, engine.latent._free] = float("nan")


@MODES
@by_name([SMALL, REAL_GATES])
def test_slots_and_pages_are_reused(zoo: Zoo, variant, batch_invariant):
    model = zoo.model(variant, batch_invariant=batch_invariant)
    options = {"max_num_seqs": 2, "num_pages": 12}
    asks = [Ask(tokens(n, seed=30 + n)) for n in (1, 200, 64, 130, 63)]
    fresh = [run(model, ask, **options)[0] for ask in asks]
    engine = Engine(model, **options)
    for _ in range(3):
        for ask, expected in zip(asks, fresh):
            spoil(engine)
            # a request that is aborted in its prompt or soon after, so that pages come back out of order
            left = engine.add(tokens(100, seed=31))
            engine.step()
            engine.abort(left)
            spoil(engine)
            engine.step()
            assert_same(play(engine, [ask])[0], expected, f"prompt of {len(ask.prompt)}")
    assert (engine.free_slots, engine.free_pages) == (2, 12)


@MODES
@by_name([SMALL, REAL_GATES])
def test_prefix_is_computed_once(zoo: Zoo, variant, batch_invariant):
    """Requests that fork a cached prefix get the bits of a run without it; so does whoever comes after the prefix is freed."""
    model = zoo.model(variant, batch_invariant=batch_invariant)
    prefix = tokens(150, seed=40)
    tails = [tokens(n, seed=41 + n) for n in (1, 30, 64, 100)]
    options = {"max_num_seqs": 8, "num_pages": 64, "prefill_chunk": 128}
    # without a prefix and in the same chunks: 128 tokens, then the rest one request at a time
    fresh = [run(model, Ask(prefix[:128] + tail), **options)[0] for tail in tails]
    engine = Engine(model, **options)
    snapshot = engine.cache_prefix(prefix)
    assert snapshot.num_tokens == 128
    for tail, expected in zip(tails, fresh):
        got = Got()
        engine.add(prefix[:128] + tail, Ask(tail).params, prefix=snapshot)
        while engine.has_unfinished:
            for event in engine.step():
                got.take(event)
        assert_same(got, expected, f"tail of {len(tail)}")
    # all at once, with the snapshot freed before they run
    together = {engine.add(prefix[:128] + tail, Ask(tail).params, prefix=snapshot): Got() for tail in tails}
    snapshot.free()
    spoil(engine)
    while engine.has_unfinished:
        for event in engine.step():
            together[event.request_id].take(event)
    for got, expected in zip(together.values(), fresh):
        assert_same(got, expected, "together", bits=batch_invariant)
    assert (engine.free_slots, engine.free_pages) == (8, 64)


@MODES
@by_name([SMALL, REAL_GATES])
def test_snapshot_fork_restore(zoo: Zoo, variant, batch_invariant):
    """On the caches themselves: go on from a snapshot any number of times, each with the bits of the first time."""
    model = zoo.model(variant, batch_invariant=batch_invariant)
    prompt, after = tokens(128, seed=50), tokens(70, seed=51)
    kda, latent = model.make_caches(4, 16)

    def go_on(sequence: SequenceCache, ids: list[int]) -> Tensor:
        parts = []
        for token in ids:
            parts.append(model.forward(make_batch([], [(sequence, token)], model.device), kda, latent))
            sequence.num_tokens += 1
        return torch.cat(parts)

    sequence = SequenceCache(kda, latent)
    model.forward(make_batch([(sequence, prompt)], [], model.device, "last"), kda, latent)
    sequence.num_tokens = 128
    snapshot = sequence.snapshot()
    first = go_on(sequence, after)
    assert sequence.num_tokens == 198
    fork = snapshot.fork()
    other = go_on(fork, after[::-1])
    assert not torch.equal(other, first)
    fork.free()
    sequence.free()
    restored = snapshot.fork()
    assert_same_bits(go_on(restored, after[:40]), first[:40], "restored")
    snapshot.free()
    assert_same_bits(go_on(restored, after[40:]), first[40:], "restored, with the snapshot freed")
    restored.free()
    assert (kda.num_free, latent.num_free) == (4, 16)


# ------------------------------------------------------------------------------------------------ running out


@MODES
def test_out_of_pages_while_decoding(zoo: Zoo, batch_invariant):
    """The request whose next page cannot be had ends with an error; the other gets the bits that it gets without it."""
    model = zoo.model(SMALL, batch_invariant=batch_invariant)
    survivor = Ask(tokens(64, seed=60), SamplingParams(max_new_tokens=30, ignore_eos=True))
    loser = Ask(tokens(60, seed=61), SamplingParams(max_new_tokens=30, ignore_eos=True))
    options = {"num_pages": 3, "max_num_seqs": 4}
    got, lost = run(model, survivor, loser, **options)
    assert lost.finish_reason == "error" and lost.error is not None and "page" in lost.error
    assert 1 <= len(lost.token_ids) <= 5
    beside = run(model, survivor, loser, num_pages=8, max_num_seqs=4)
    assert_same(
        Got(lost.token_ids, lost.logprobs), Got(*(x[: len(lost.token_ids)] for x in (beside[1].token_ids, beside[1].logprobs))), "lost"
    )
    assert got.finish_reason == "length" and got.error is None
    assert_same(got, run(model, survivor, **options)[0], "survivor", bits=batch_invariant)


@MODES
def test_prompt_that_never_fits(zoo: Zoo, batch_invariant):
    model = zoo.model(SMALL, batch_invariant=batch_invariant)
    options = {"num_pages": 4, "max_num_seqs": 4}
    small, big = Ask(tokens(100, seed=62)), Ask(tokens(300, seed=63), joins=2)
    last = Ask(tokens(10, seed=64), joins=3)
    got = run(model, small, big, last, **options)
    assert got[1].finish_reason == "error" and got[1].token_ids == []
    assert got[1].error is not None and "page" in got[1].error and "300" in got[1].error
    assert_same(got[0], run(model, small, **options)[0], "before it", bits=batch_invariant)
    assert_same(got[2], run(model, Ask(last.prompt), **options)[0], "after it", bits=batch_invariant)


def test_more_requests_than_slots_or_pages_wait(zoo: Zoo):
    model = zoo.model(SMALL, batch_invariant=True)
    asks = [Ask(tokens(n, seed=n)) for n in (50, 3, 180, 20, 100, 1)]  # whose next 6 tokens need no further page
    expected = [run(model, ask)[0] for ask in asks]
    for options in ({"max_num_seqs": 2}, {"num_slots": 1}, {"num_pages": 5}, {"num_slots": 3, "num_pages": 6, "prefill_chunk": 64}):
        for i, (a, b) in enumerate(zip(run(model, *asks, **options), expected)):
            assert_same(a, b, f"request {i} with {options}")


def test_out_of_slots(zoo: Zoo):
    """A snapshot holds the only slot: a request says so and ends, a fork says so at once; then everything works again."""
    model = zoo.model(SMALL, batch_invariant=True)
    engine = Engine(model, num_slots=1, num_pages=8)
    snapshot = engine.cache_prefix(tokens(64, seed=65))
    (got,) = play(engine, [Ask(tokens(5))])
    assert got.finish_reason == "error" and got.error is not None and "slot" in got.error
    with pytest.raises(OutOfSlots, match="slot"):
        engine.add(tokens(100, seed=65), prefix=snapshot)
    with pytest.raises(OutOfSlots, match="slot"):
        engine.cache_prefix(tokens(64))
    snapshot.free()
    with pytest.raises(OutOfPages, match="page"):
        engine.cache_prefix(tokens(1000))
    assert (engine.free_slots, engine.free_pages) == (1, 8)
    assert_same(play(engine, [Ask(tokens(5))])[0], run(model, Ask(tokens(5)))[0], "afterwards")


def test_abort(zoo: Zoo):
    engine = Engine(zoo.model(SMALL), max_num_seqs=1, num_pages=8)
    running, waiting = engine.add(tokens(10)), engine.add(tokens(10))
    engine.step()
    engine.abort(waiting)
    engine.abort(running)
    with pytest.raises(KeyError):
        engine.abort(running)
    with pytest.raises(KeyError):
        engine.abort(99)
    events = []
    while engine.has_unfinished:
        events += engine.step()
    assert sorted((e.request_id, e.token_id, e.finish_reason) for e in events) == [(running, None, "aborted"), (waiting, None, "aborted")]
    assert (engine.free_slots, engine.free_pages) == (1, 8)


def test_requests_that_cannot_grow_hold_no_page_back(zoo: Zoo):
    engine = Engine(zoo.model(SMALL), max_num_seqs=3, num_pages=3)
    for seed in range(3):
        engine.add(tokens(9, seed=seed), SamplingParams(max_new_tokens=4))
    assert len(engine.step()) == 3  # all in the first step: nine tokens and four more fit in each one's page


def test_nan_logits_end_their_request_alone(zoo: Zoo):
    model = zoo.model(SMALL, batch_invariant=True)
    good = [Ask(tokens(40)), Ask(tokens(9, seed=1), SamplingParams(max_new_tokens=20, temperature=1.0, seed=3, ignore_eos=True))]
    clean = run(model, *good)
    used = {t for ask, got in zip(good, clean) for t in ask.prompt + got.token_ids}
    poison = next(t for t in range(model.config.vocab_size) if t not in used)
    embedding = model.weights.embedding.clone()
    embedding[poison] = float("nan")
    broken = KimiLinear(model.config, replace(model.weights, embedding=embedding), batch_invariant=True)
    bad = Ask([1, poison, 2], SamplingParams(temperature=1.0))
    first, middle, last = run(broken, good[0], bad, good[1])
    assert (middle.finish_reason, middle.error) == ("error", "the model's logits are NaN for this request")
    assert_same(first, clean[0], "beside a request with NaN")
    assert_same(last, clean[1], "beside a request with NaN")
