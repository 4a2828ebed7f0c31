"""An engine of vLLM that reports whole distributions, and transformers' model to judge them.

Tokens alone prove little: a wrong kernel leaves many an argmax as it was. So every comparison is of log-probabilities, over the
whole vocabulary, at every position of the prompt and of the answer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import model_kit
import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import kimi_native  # noqa: F401  (loads torch.ops.kimi_native)

VOCAB_SIZE = 768  # of the preset "tiny"
TOLERANCE = 1e-3  # of a log-probability, float32
LENGTHS = [1, 2, 3, 5, 17, 31, 33, 63, 64, 65, 100, 127, 129, 192, 300, 600]  # tokens: around the edges of chunks and pages
NEW_TOKENS = 12


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    return [model_kit.tokens(length, seed=1000 * seed + i, vocab_size=512) for i, length in enumerate(lengths)]


@dataclass
class Answer:
    """What the engine said of one request.

    Attributes:
        prompt: [P] token ids.
        tokens: [N] generated token ids.
        log_probabilities: [P + N - 1, vocab] float32; row i is the distribution of the token after the first i + 1. Only the last N
            rows where the prompt's were not asked for.
        cached_tokens: how many of the prompt were found in vLLM's prefix cache.
    """

    prompt: list[int]
    tokens: list[int]
    log_probabilities: Tensor
    cached_tokens: int = 0


class Reference:
    """transformers' KimiLinearForCausalLM, float32, with the token-by-token form of KDA."""

    def __init__(self, checkpoint: Path):
        self.model = model_kit.Reference(checkpoint)
        self.known: dict[tuple[int, ...], Tensor] = {}

    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """[T, vocab]"""
        key = tuple(ids)
        if key not in self.known:
            self.known[key] = self.model.recurrent_logits(list(ids)).log_softmax(-1)
        return self.known[key]

    def difference(self, answer: Answer) -> float:
        """The largest |log-probability - reference| of all positions and tokens, given the engine's own tokens as input."""
        ids = answer.prompt + answer.tokens[:-1]
        expected = self.log_probabilities(ids)[-answer.log_probabilities.shape[0] :]
        return (answer.log_probabilities - expected).abs().max().item()

    def check(self, answers: Sequence[Answer]) -> float:
        """All of them are right, and every token is the likeliest. Returns the largest difference."""
        differences = [self.difference(answer) for answer in answers]
        for answer, difference in zip(answers, differences):
            where = f"prompt of {len(answer.prompt)} tokens"
            assert difference <= TOLERANCE, f"{where}: a log-probability is off by {difference:.2e}"
            likeliest = answer.log_probabilities[-len(answer.tokens) :].argmax(-1).tolist()
            assert answer.tokens == likeliest, f"{where}: generated {answer.tokens}, likeliest {likeliest}"
        return max(differences)


def whole_distributions(flat: Any, first: int) -> Tensor:
    """vLLM's flat log-probabilities from position `first` on as [positions, vocab]; NaN where it has none."""
    table = torch.full((len(flat) - first, VOCAB_SIZE), float("nan"))
    for row in range(table.shape[0]):
        part = slice(flat.start_indices[first + row], flat.end_indices[first + row])
        table[row, torch.tensor(flat.token_ids[part])] = torch.tensor(flat.logprobs[part])
    return table


def to_answer(output: Any) -> Answer:
    completion, prompt = output.outputs[0], list(output.prompt_token_ids)
    parts, expected = [whole_distributions(completion.logprobs, 0)], len(completion.token_ids)
    if output.prompt_logprobs is not None and len(prompt) > 1:
        parts.insert(0, whole_distributions(output.prompt_logprobs, 1))  # nothing precedes the first token
        expected += len(prompt) - 1
    answer = Answer(prompt, list(completion.token_ids), torch.cat(parts), output.num_cached_tokens)
    assert answer.log_probabilities.shape == (expected, VOCAB_SIZE)
    assert answer.log_probabilities.isfinite().all(), "a log-probability is missing or not finite"
    return answer


class Engine:
    """vLLM on one checkpoint, in float32, greedy. `options` are vLLM's engine arguments."""

    def __init__(self, checkpoint: Path, **options: Any):
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "max_model_len": 1024,
            "max_num_batched_tokens": 4096,
            "max_num_seqs": 16,
            "max_logprobs": -1,
            "disable_log_stats": True,
        }
        self.llm = LLM(str(checkpoint), **(defaults | options))
        self.core = self.llm.llm_engine
        self.requests = 0

    @staticmethod
    def sampling(new_tokens: int = NEW_TOKENS, prompt: bool = True) -> SamplingParams:
        return SamplingParams(
            max_tokens=new_tokens,
            temperature=0.0,
            logprobs=-1,
            prompt_logprobs=-1 if prompt else None,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
        )

    def answer(self, prompts: Sequence[list[int]], new_tokens: int = NEW_TOKENS) -> list[Answer]:
        """All prompts at once."""
        return self._generate(prompts, self.sampling(new_tokens))

    def continuations(self, prompts: Sequence[list[int]], new_tokens: int = NEW_TOKENS) -> list[Answer]:
        """The same without the prompts' own log-probabilities, for which vLLM would compute every token and use no cached prefix."""
        return self._generate(prompts, self.sampling(new_tokens, prompt=False))

    def _generate(self, prompts: Sequence[list[int]], sampling: SamplingParams) -> list[Answer]:
        texts: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [to_answer(output) for output in self.llm.generate(texts, sampling, use_tqdm=False)]

    def add(self, prompt: list[int], new_tokens: int = NEW_TOKENS) -> str:
        """One more request for `step`; returns its id."""
        self.requests += 1
        name = f"request-{self.requests}"
        self.core.add_request(name, {"prompt_token_ids": prompt}, self.sampling(new_tokens))
        return name

    def step(self) -> dict[str, Answer]:
        """One step of the engine; the requests that it finished."""
        return {output.request_id: to_answer(output) for output in self.core.step() if output.finished}

    def abort(self, names: list[str]) -> None:
        self.core.abort_request(names)

    def finish(self) -> dict[str, Answer]:
        done: dict[str, Answer] = {}
        while self.core.has_unfinished_requests():
            done |= self.step()
        return done

    def close(self) -> None:
        self.core.engine_core.shutdown()
        del self.llm, self.core
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def engine(checkpoint: Path, **options: Any) -> Iterator[Engine]:
    it = Engine(checkpoint, **options)
    try:
        yield it
    finally:
        it.close()


# ------------------------------------------------------------------------------------------------ our operators inside it


class Replacement:
    """Stands for an operator in torch.ops.kimi_native: counts its calls and may change them."""

    def __init__(self, operator: Any, change: Change | None = None):
        self.operator, self.change, self.calls = operator, change, 0
        self.names = [argument.name for argument in operator.default._schema.arguments]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        named |= dict(zip(self.names, arguments))
        return self.change(self.operator, named) if self.change else self.operator(**named)

    @property
    def default(self) -> Any:
        return self


Change = Callable[[Any, dict[str, Any]], Any]

OPERATORS = [
    *("kda_decode", "kda_decode_fused", "kda_prefill", "short_conv", "short_conv_update", "gated_rms_norm", "rms_norm"),
    *("mla_cache_write", "mla_decode", "mla_merge", "mla_prefill", "moe_experts", "moe_router"),
]


@contextmanager
def watched(**changes: Change) -> Iterator[dict[str, Replacement]]:
    """Inside, every operator of torch.ops.kimi_native counts its calls in this process; those named have a change."""
    namespace = torch.ops.kimi_native
    replacements = {name: Replacement(getattr(namespace, name), changes.get(name)) for name in OPERATORS}
    with model_kit.replaced(*((namespace, name, replacement) for name, replacement in replacements.items())):
        yield replacements


def loses(argument: str) -> Change:
    """The operator computes, but what it wrote to the slots of the pool `argument` is gone afterwards."""

    def change(operator: Any, named: dict[str, Any]) -> None:
        pool, slots = named[argument], named["slots"]
        rows = slots[slots >= 0].long()
        before = pool[rows].clone()
        operator(**named)
        pool[rows] = before

    return change


def one_key_short(operator: Any, named: dict[str, Any]) -> None:
    """The newest key is not attended to."""
    lengths = named["lengths"]
    operator(**(named | {"lengths": torch.where(lengths > 1, lengths - 1, lengths)}))
