"""Generation: an engine of requests that join and leave between steps, sampling, stopping, streaming.

    engine = Engine(model)
    request = engine.add(prompt_ids, SamplingParams(max_new_tokens=100))
    while engine.has_unfinished:
        for event in engine.step(): ...

A step takes a chunk of the waiting prompts (at most `prefill_chunk` tokens, cut on the 64-token grid) and one token of every
running request through the model together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kimi_native.cache import PAGE_TOKENS, CacheError, OutOfPages, SequenceCache
from kimi_native.config import KimiLinearConfig
from kimi_native.model import KimiLinear, _progress_bar, check_prefill_chunk, greedy, make_batch

if TYPE_CHECKING:
    from kimi_native.graphs import DecodeGraphs
    from kimi_native.text import StreamDecoder

# Prompt tokens of a step: enough to fill the machine. A chunk of MoE layers reads nearly all experts however long it is.
PREFILL_CHUNK, GPU_PREFILL_CHUNK = 2048, 8192


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends. Raises ValueError, naming the field, on a value out of range."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int | None = None  # None: a fresh one for each request
    stop: tuple[str | int, ...] = ()  # strings (need a tokenizer) and token ids
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, (str, int)):
            object.__setattr__(self, "stop", (self.stop,))
        else:
            object.__setattr__(self, "stop", tuple(self.stop or ()))
        if any(s == "" for s in self.stop):
            raise ValueError("stop must not hold an empty string")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise ValueError(f"seed must fit 64 bits, got {self.seed}")


@dataclass(frozen=True)
class TokenEvent:
    """One token of a request, or its end. `text` is what became readable by it; all texts of a request add up to its text."""

    request_id: int
    token_id: int | None  # None when a request ends without a token (aborted, error)
    text: str = ""
    logprob: float | None = None  # natural log of the token's probability before temperature, top_k and top_p
    finish_reason: str | None = None  # "stop", "length", "aborted" or "error" on the last event, else None
    error: str | None = None


@dataclass
class Completion:
    """What became of one prompt."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)  # with the end token, if one ended it
    text: str | None = None  # without end tokens, cut before a stop string; None without a tokenizer
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    error: str | None = None


def check_prompt(config: KimiLinearConfig, token_ids: list[int]) -> None:
    """Raises ValueError on an empty prompt, ids out of range (by position) or more tokens than the model's limit."""
    if len(token_ids) == 0:
        raise ValueError("the prompt is empty: give at least one token")
    if len(token_ids) > config.model_max_length:
        raise ValueError(f"the prompt has {len(token_ids)} tokens; the model's limit is {config.model_max_length}")
    for position, token in enumerate(token_ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"token ids must be integers; position {position} holds {token!r}")
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"token id {token} at position {position} is out of range [0, {config.vocab_size})")


class _Request:
    """A request's progress: prompt, cache, tokens so far, its own random generator and text decoder."""

    def __init__(self, request_id: int, prompt: list[int], params: SamplingParams, model: KimiLinear):
        self.id, self.prompt, self.params = request_id, prompt, params
        self.cache: SequenceCache | None = None
        self.last_token: int | None = None  # set once the prompt is done
        self.num_generated = 0
        self.limit = min(params.max_new_tokens, max(1, model.config.model_max_length - len(prompt)))
        stop_ids = {s for s in params.stop if isinstance(s, int)}
        if not params.ignore_eos:
            stop_ids |= set(model.config.eos_token_ids)
            stop_ids |= set(model.tokenizer.stop_token_ids) if model.tokenizer else set()
        self.stop_ids = stop_ids
        self.text = _StopStrings(model, [s for s in params.stop if isinstance(s, str)])
        self.generator = torch.Generator().manual_seed(params.seed) if params.seed is not None else torch.Generator()
        if params.seed is None:
            self.generator.seed()

    @property
    def prompt_left(self) -> int:
        return len(self.prompt) - (self.cache.num_tokens if self.cache else 0)

    @property
    def may_grow(self) -> bool:
        """Whether the tokens it may still generate need another page; the last one is never stored."""
        pages = -(-(len(self.prompt) + self.limit - 1) // PAGE_TOKENS)
        return pages > (len(self.cache.pages) if self.cache else 0)


class _StopStrings:
    """Turns tokens into text, holding back what may still become a stop string."""

    def __init__(self, model: KimiLinear, stops: list[str]):
        if stops and model.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this checkpoint has no tiktoken.model; give token ids")
        self._decoder: StreamDecoder | None = model.tokenizer.stream() if model.tokenizer else None
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that the token makes certain. Sets `stopped`, and gives only what lies before it, when a stop string is complete."""
        return self._release(self._decoder.add(token)) if self._decoder else ""

    def finish(self) -> str:
        """Whatever was held back, at the end of the request."""
        if self._decoder is None or self.stopped:
            return ""
        text = self._release(self._decoder.finish())
        text, self._held = text + ("" if self.stopped else self._held), ""
        return text

    def _release(self, new: str) -> str:
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Engine:
    """Runs many requests through a model, in steps. Requests may be added and aborted between steps.

    Args:
        max_num_seqs: requests that run side by side; more wait in the order they came.
        num_slots: KDA state slots (default: max_num_seqs).
        num_pages: latent pages of 64 tokens (default: 4,096 tokens for each of max_num_seqs).
        prefill_chunk: prompt tokens in a step, a multiple of 64 (default: 2048, on a GPU 8192).
        cuda_graphs: replay decode steps as CUDA graphs (default: on a GPU).
        kda_state_dtype: torch.float32, or torch.bfloat16 for half the bytes of a slot, where it matters more than a state's last
            bits (docs/kda.md). Not with a model that is `batch_invariant`: what is rounded then depends on where a prompt is cut.

    A request that can never fit, or whose next page cannot be had, ends with an event of finish_reason "error" that says so;
    the others go on unharmed.
    """

    def __init__(
        self,
        model: KimiLinear,
        *,
        max_num_seqs: int = 64,
        num_slots: int | None = None,
        num_pages: int | None = None,
        prefill_chunk: int | None = None,
        cuda_graphs: bool | None = None,
        kda_state_dtype: torch.dtype = torch.float32,
    ):
        on_gpu = model.device.type == "cuda"
        if prefill_chunk is None:
            prefill_chunk = GPU_PREFILL_CHUNK if on_gpu else PREFILL_CHUNK
        check_prefill_chunk(prefill_chunk)
        if cuda_graphs and not on_gpu:
            raise ValueError("cuda_graphs needs a model on a GPU")
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, got {max_num_seqs}")
        if model.batch_invariant and kda_state_dtype != torch.float32:
            raise ValueError("a batch_invariant model needs KDA states in float32")
        self.model, self.max_num_seqs, self.prefill_chunk = model, max_num_seqs, prefill_chunk
        self.kda, self.latent = model.make_caches(
            max_num_seqs if num_slots is None else num_slots, max_num_seqs * 64 if num_pages is None else num_pages, kda_state_dtype
        )
        self._graphs: DecodeGraphs | None = None
        if on_gpu if cuda_graphs is None else cuda_graphs:
            from kimi_native.graphs import DecodeGraphs

            self._graphs = DecodeGraphs(model, self.kda, self.latent, max_num_seqs)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._events: list[TokenEvent] = []  # ends that happened between steps
        self._next_id = 0

    # ---- requests ---------------------------------------------------------------------------------------------------------

    def add(self, prompt_ids: list[int], params: SamplingParams | None = None, *, prefix: SequenceCache | None = None) -> int:
        """Queues a request and returns its id.

        Args:
            prompt_ids: token ids of the whole prompt.
            prefix: a snapshot from `cache_prefix` for the first tokens of this very prompt; they are not computed again. Forked
                at once, so the snapshot may be freed or used for other requests.

        Raises:
            ValueError: an empty prompt, ids out of range, a prompt past the model's limit, or one that `prefix` covers whole.
            OutOfSlots: no free state slot for the fork of `prefix`.
        """
        check_prompt(self.model.config, prompt_ids)
        if prefix is not None and prefix.num_tokens >= len(prompt_ids):
            raise ValueError(f"the prefix has {prefix.num_tokens} tokens; the prompt must be longer, and has {len(prompt_ids)}")
        request = _Request(self._next_id, list(prompt_ids), params or SamplingParams(), self.model)
        if prefix is not None:
            request.cache = prefix.fork()
        self._next_id += 1
        self._waiting.append(request)
        return request.id

    def abort(self, request_id: int) -> None:
        """Ends a request; its last event (finish_reason "aborted") comes with the next step. Raises KeyError on an unknown id."""
        for request in [*self._waiting, *self._running]:
            if request.id == request_id:
                self._events.append(self._end(request, "aborted"))
                return
        raise KeyError(f"no unfinished request {request_id}")

    def cache_prefix(self, token_ids: list[int]) -> SequenceCache:
        """Computes the longest multiple of 64 tokens of `token_ids` and keeps its states and pages, for `add(prefix=...)`.

        Free it with `.free()`. Raises ValueError when there are fewer than 64 tokens, OutOfSlots and OutOfPages.
        """
        check_prompt(self.model.config, token_ids)
        length = len(token_ids) // PAGE_TOKENS * PAGE_TOKENS
        if length == 0:
            raise ValueError(f"a cached prefix needs at least {PAGE_TOKENS} tokens, got {len(token_ids)}")
        cache = SequenceCache(self.kda, self.latent)
        try:
            cache.reserve(length)
            for start in range(0, length, self.prefill_chunk):
                chunk = token_ids[start : min(length, start + self.prefill_chunk)]
                self.model.forward(make_batch([(cache, chunk)], [], self.model.device, "last"), self.kda, self.latent)
                cache.num_tokens += len(chunk)
        except BaseException:
            cache.free()
            raise
        return cache

    def warm_up(self, num_seqs: int) -> None:
        """Captures the CUDA graph of decode steps of `num_seqs` requests now (otherwise the first such step does); nothing on a CPU."""
        if self._graphs and num_seqs <= self._graphs.max_rows:
            self._graphs.capture(num_seqs)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running or self._events)

    @property
    def free_slots(self) -> int:
        return self.kda.num_free

    @property
    def free_pages(self) -> int:
        return self.latent.num_free

    # ---- a step -----------------------------------------------------------------------------------------------------------

    def step(self) -> list[TokenEvent]:
        """Takes the requests one step further and returns what happened, in the order of the requests."""
        self._admit()
        prefill, decode = self._plan()
        events, self._events = self._events, []
        if not prefill and not decode:
            return events
        logits, best, sampling = self._forward(prefill, decode)
        for (token, logprob, broken), row, request in zip(best.tolist(), logits, sampling, strict=True):
            if broken:
                events.append(self._end(request, "error", "the model's logits are NaN for this request"))
            elif request.params.temperature == 0:
                events.append(self._take(request, int(token), logprob))
            else:
                events.append(self._take(request, *sample(row.cpu(), request.params, request.generator)))
        return events

    def _forward(self, prefill: list[tuple[_Request, list[int]]], decode: list[_Request]) -> tuple[Tensor, Tensor, list[_Request]]:
        """One step through the model: logits and `greedy` of them, one row for each of the requests that get a token."""
        caches = [(r.cache, r.last_token) for r in decode]
        if self._graphs and not prefill and len(decode) <= self._graphs.max_rows:
            logits, best = self._graphs.run(caches)  # type: ignore[arg-type]
        else:
            wanted, position = [], 0
            for r, chunk in prefill:
                position += len(chunk)
                if r.prompt_left == len(chunk):
                    wanted.append(position - 1)
            wanted += range(position, position + len(decode))
            chunks = [(r.cache, chunk) for r, chunk in prefill]
            batch = make_batch(chunks, caches, self.model.device, wanted)  # type: ignore[arg-type]
            logits = self.model.forward(batch, self.kda, self.latent)
            best = greedy(logits)
        for r, chunk in prefill:
            r.cache.num_tokens += len(chunk)  # type: ignore[union-attr]
        for r in decode:
            r.cache.num_tokens += 1  # type: ignore[union-attr]
        return logits, best, [r for r, _ in prefill if r.prompt_left == 0] + decode

    def _admit(self) -> None:
        """Moves waiting requests to the running ones while there is a slot, and pages for their prompt."""
        while self._waiting and len(self._running) < self.max_num_seqs:
            request = self._waiting[0]
            pages = -(-len(request.prompt) // PAGE_TOKENS) - (len(request.cache.pages) if request.cache else 0)
            slots = 0 if request.cache else 1
            growing = sum(r.may_grow for r in self._running)
            if self._running and (pages + growing > self.latent.num_free or slots > self.kda.num_free):
                return  # what the running ones hold comes free; until then each of these may grow by a page
            if pages > self.latent.num_free or slots > self.kda.num_free:
                what = (
                    f"out of KDA state slots: none of {self.kda.num_slots} is free"
                    if slots > self.kda.num_free
                    else f"out of latent pages: the prompt of {len(request.prompt)} tokens needs {pages}, "
                    f"{self.latent.num_free} of {self.latent.num_pages} are free"
                )
                self._events.append(self._end(request, "error", what))
                continue
            self._waiting.popleft()
            if request.cache is None:
                request.cache = SequenceCache(self.kda, self.latent)
            request.cache.reserve(len(request.prompt))
            self._running.append(request)

    def _plan(self) -> tuple[list[tuple[_Request, list[int]]], list[_Request]]:
        """This step's chunks and decoding requests. A decoding request that finds no page for its next token ends here."""
        decode = []
        for request in [r for r in self._running if r.last_token is not None]:
            try:
                request.cache.reserve(request.cache.num_tokens + 1)  # type: ignore[union-attr]
                decode.append(request)
            except OutOfPages as error:
                self._events.append(self._end(request, "error", str(error)))
        prefill, budget = [], self.prefill_chunk
        for request in [r for r in self._running if r.last_token is None]:
            count = min(request.prompt_left, budget)
            if count < request.prompt_left:
                count = count // PAGE_TOKENS * PAGE_TOKENS  # only a prompt's end may lie off the grid
            if count == 0:
                break
            start = request.cache.num_tokens  # type: ignore[union-attr]
            prefill.append((request, request.prompt[start : start + count]))
            budget -= count
        return prefill, decode

    def _take(self, request: _Request, token: int, logprob: float) -> TokenEvent:
        """Records a sampled token and decides whether the request ends with it."""
        request.last_token = token
        request.num_generated += 1
        reason, text = None, ""
        if token in request.stop_ids:
            reason = "stop"
        else:
            text = request.text.add(token)
            if request.text.stopped:
                reason = "stop"
            elif request.num_generated >= request.limit:
                reason = "length"
        if reason:
            text += request.text.finish()
            self._end(request, reason)
        return TokenEvent(request.id, token, text, logprob, reason)

    def _end(self, request: _Request, reason: str, error: str | None = None) -> TokenEvent:
        """Takes a request out of the engine and gives back what it held."""
        for queue in (self._waiting, self._running):
            if request in queue:
                queue.remove(request)
        if request.cache is not None:
            request.cache.free()
            request.cache = None
        text = request.text.finish() if reason in ("aborted", "error") else ""
        return TokenEvent(request.id, None, text, None, reason, error)


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> tuple[int, float]:
    """A token of one row of logits ``[vocab]`` (float32), and its log-probability before temperature, top_k and top_p.

    Works row by row, so that a request's choice cannot depend on the others of its step. `greedy` does what this does at
    temperature 0 for many rows.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    if params.temperature == 0:
        token = int(logits.argmax())
        return token, float(logprobs[token])
    scaled = torch.softmax((logits - logits.max()) / max(params.temperature, 1e-30), dim=-1)  # 0 / 0 would be below float32
    probabilities, ids = scaled.sort(descending=True, stable=True)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    if params.top_p < 1:
        # the smallest set whose probability (after top_k) reaches top_p: a token stays while those before it have not
        kept = torch.where(keep, probabilities, 0)
        kept = kept / kept.sum()
        keep &= kept.cumsum(-1) - kept < params.top_p
    chosen = torch.multinomial(torch.where(keep, probabilities, 0).cpu(), 1, generator=generator)
    token = int(ids[int(chosen)])
    return token, float(logprobs[token])


def generate(
    model: KimiLinear,
    prompts: Any,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | int | list[str | int] | None = None,
    ignore_eos: bool = False,
    stream: Callable[[TokenEvent], None] | None = None,
    prefill_chunk: int | None = None,
    max_num_seqs: int = 64,
    progress: bool = False,
) -> Completion | list[Completion]:
    """See `KimiLinear.generate`."""
    one, many = _as_prompts(model, prompts)
    params = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed, () if stop is None else stop, ignore_eos)  # type: ignore[arg-type]
    for ids in many:
        check_prompt(model.config, ids)
    if not many:
        return []
    pages = sorted((-(-min(len(ids) + max_new_tokens, model.config.model_max_length + 1) // PAGE_TOKENS) for ids in many), reverse=True)
    slots = min(len(many), max_num_seqs)
    engine = Engine(model, max_num_seqs=slots, num_pages=sum(pages[:slots]), prefill_chunk=prefill_chunk)
    completions = {}
    for ids in many:
        completions[engine.add(ids, params)] = Completion(ids, text="" if model.tokenizer else None)
    total = sum(len(ids) for ids in many)
    with _progress_bar(progress, "prefill", " tokens") as report:
        while engine.has_unfinished:
            events = engine.step()
            if report:
                report(total - sum(r.prompt_left for r in [*engine._waiting, *engine._running]), total)
            for event in events:
                _record(completions[event.request_id], event)
                if stream:
                    stream(event)
    done = list(completions.values())
    return done[0] if one else done


def _record(completion: Completion, event: TokenEvent) -> None:
    if event.token_id is not None:
        completion.token_ids.append(event.token_id)
        completion.logprobs.append(event.logprob)  # type: ignore[arg-type]
    if completion.text is not None:
        completion.text += event.text
    if event.finish_reason:
        completion.finish_reason, completion.error = event.finish_reason, event.error


def _as_prompts(model: KimiLinear, prompts: Any) -> tuple[bool, list[list[int]]]:
    """Whether one prompt was given, and all of them as token ids."""

    def ids_of(prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise ValueError("a text prompt needs a tokenizer, and this checkpoint has no tiktoken.model; give token ids")
            return model.tokenizer.encode(prompt)
        if isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        return list(prompt)

    if isinstance(prompts, (str, Tensor)) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return True, [ids_of(prompts)]
    if len(prompts) == 0:
        return False, []
    return False, [ids_of(p) for p in prompts]


__all__ = ["CacheError", "Completion", "Engine", "SamplingParams", "TokenEvent", "check_prompt", "generate", "sample"]
