"""The whole model on a mid-size random checkpoint, beside transformers on the same cores, in the same process.

Twelve layers (nine KDA, three MLA), 512 wide, heads of 128, 64 experts of which 8 are used: 1.2 GB in float32. Prefill is the
time of one prompt with the caches filled; decode is the time of one token at batch 1 behind a prompt of 256.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from harness import Case, Job, main

from kimi_native import KimiLinear, SequenceCache
from kimi_native.model import make_batch
from kimi_native.tiny import make_tiny

PROMPT = 2048
DECODE_CONTEXT = 256
DECODE_TOKENS = 32


def ours_prefill(model: KimiLinear, ids: list[int]) -> Callable[[], torch.Tensor]:
    kda, latent = model.make_caches(1, -(-len(ids) // 64))

    def run() -> torch.Tensor:
        sequence = SequenceCache(kda, latent)
        logits = model.forward(make_batch([(sequence, ids)], [], model.device, "last"), kda, latent)
        sequence.free()
        return logits

    return run


def ours_decode(model: KimiLinear, ids: list[int], count: int) -> Callable[[], list[int]]:
    """Decodes `count` tokens greedily behind the prompt, from a snapshot so that every call does the same work."""
    kda, latent = model.make_caches(2, -(-(len(ids) + count) // 64) + 1)
    prompt = SequenceCache(kda, latent)
    first = int(model.forward(make_batch([(prompt, ids)], [], model.device, "last"), kda, latent).argmax())
    prompt.num_tokens = len(ids)

    def run() -> list[int]:
        sequence, tokens = prompt.fork(), [first]
        for _ in range(count):
            logits = model.forward(make_batch([], [(sequence, tokens[-1])], model.device), kda, latent)
            sequence.num_tokens += 1
            tokens.append(int(logits.argmax()))
        sequence.free()
        return tokens

    return run


def theirs_prefill(model: Any, ids: list[int]) -> Callable[[], torch.Tensor]:
    return lambda: model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).logits[0]


def theirs_decode(model: Any, ids: list[int], count: int) -> Callable[[], list[int]]:
    """The same tokens with transformers' own cache, whose copy of the prompt is not part of the time of a token: it is
    subtracted by being small (256 tokens) against 32 tokens of decoding."""
    import copy

    with torch.inference_mode():
        out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    first, prompt = int(out.logits[0, -1].argmax()), out.past_key_values

    def run() -> list[int]:
        cache, tokens = copy.deepcopy(prompt), [first]
        for _ in range(count):
            step = model(torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True)
            tokens.append(int(step.logits[0, -1].argmax()))
        return tokens

    return run


def flops_per_token(model: KimiLinear) -> float:
    """Two for every weight that a token meets (8 of 64 experts), without attention over the context."""
    c = model.config
    weights = sum(t.numel() for layer in model.weights.layers for t in vars(layer.attention).values())
    moe_layers = sum(c.is_moe(i) for i in range(c.num_hidden_layers))
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    weights += moe_layers * ((c.num_experts_per_token + c.num_shared_experts) * expert + c.num_experts * c.hidden_size)
    weights += 3 * c.hidden_size * c.intermediate_size * (c.num_hidden_layers - moe_layers)
    return 2.0 * (weights + c.vocab_size * c.hidden_size)


def same(ours: Any, theirs: Any, tolerance: float) -> Callable[[], None]:
    def check() -> None:
        with torch.inference_mode():
            a, b = ours(), theirs()
        if isinstance(a, list):
            assert a == b, "greedy tokens differ from transformers'"
        else:
            assert (a - b).abs().max() < tolerance, f"logits differ from transformers' by {(a - b).abs().max():.1e}"

    return check


@lru_cache(maxsize=1)
def models() -> tuple[KimiLinear, KimiLinear, Any]:
    """Ours, ours with batch_invariant, and transformers', of one random checkpoint."""
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        # Mild gates: with real ones fp32 itself is not good to 1e-3 in transformers.
        make_tiny(directory, preset="mid", layers="KKKM" * 3, gates="mild")
        ours = KimiLinear.from_pretrained(directory)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return ours, KimiLinear(ours.config, ours.weights, batch_invariant=True), theirs


def prompt() -> list[int]:
    return torch.randint(0, 3000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()


def prefill() -> Job:
    ours, invariant, theirs = models()
    run, peer = ours_prefill(ours, prompt()), theirs_prefill(theirs, prompt())
    return Job(
        run=run,
        check=same(run, peer, 2e-3),
        peers={"transformers": peer, "batch_invariant": ours_prefill(invariant, prompt())},
        flops=PROMPT * flops_per_token(ours),
        bytes=ours.weights_bytes,
        tokens=PROMPT,
    )


def decode() -> Job:
    (ours, invariant, theirs), head = models(), prompt()[:DECODE_CONTEXT]
    run, peer = ours_decode(ours, head, DECODE_TOKENS), theirs_decode(theirs, head, DECODE_TOKENS)
    return Job(
        run=run,
        check=same(run, peer, 0),
        peers={"transformers": peer, "batch_invariant": ours_decode(invariant, head, DECODE_TOKENS)},
        flops=DECODE_TOKENS * flops_per_token(ours),
        bytes=DECODE_TOKENS * flops_per_token(ours) / 2 * 4,
        tokens=DECODE_TOKENS,
    )


def cases(device: str) -> Iterator[Case]:
    if device == "cpu":
        yield Case("model", f"prefill T={PROMPT} fp32", prefill)
        yield Case("model", f"decode B=1 L={DECODE_CONTEXT} fp32", decode)


if __name__ == "__main__":
    main(cases)
