"""transformers' own model with our operators under it (`kimi_native.accelerate`), beside the same model as it comes, in one process.

The checkpoint, prompt and cases are those of bench_model.py: 1.2 GB in float32, nine KDA and three MLA layers, 8 of 64 experts. Both
models read the same weights. Prefill is the time of one prompt with the cache filled; decode is the time of a token at batch 1 behind a
prompt, which shows how either grows with the context. `kimi_native` among the peers is our own engine (`KimiLinear`).
"""

import copy
import tempfile
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from bench_model import (
    DECODE_CONTEXT,
    DECODE_TOKENS,
    PROMPT,
    flops_per_token,
    ours_decode,
    ours_prefill,
    prompt,
    same,
    theirs_decode,
    theirs_prefill,
)
from harness import Case, Job, main

from kimi_native import KimiLinear, accelerate
from kimi_native.tiny import make_tiny


@lru_cache(maxsize=1)
def models() -> tuple[Any, Any, KimiLinear]:
    """transformers' accelerated, transformers' as it comes, and ours, of one random checkpoint."""
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        # Mild gates: with real ones fp32 itself is not good to 1e-3 in transformers.
        make_tiny(directory, preset="mid", layers="KKKM" * 3, gates="mild")
        engine = KimiLinear.from_pretrained(directory)
        plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    accelerated = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})  # another model of the same weights
    return accelerate(accelerated), plain, engine


def prefill() -> Job:
    accelerated, plain, engine = models()
    run, peer = theirs_prefill(accelerated, prompt()), theirs_prefill(plain, prompt())
    return Job(
        run=run,
        check=same(run, peer, 2e-3),
        peers={"unpatched": peer, "kimi_native": ours_prefill(engine, prompt())},
        flops=PROMPT * flops_per_token(engine),
        bytes=engine.weights_bytes,
        tokens=PROMPT,
    )


def decode(context: int) -> Job:
    (accelerated, plain, engine), head = models(), prompt()[:context]
    run, peer = theirs_decode(accelerated, head, DECODE_TOKENS), theirs_decode(plain, head, DECODE_TOKENS)
    return Job(
        run=run,
        check=same(run, peer, 0),
        peers={"unpatched": peer, "kimi_native": ours_decode(engine, head, DECODE_TOKENS)},
        flops=DECODE_TOKENS * flops_per_token(engine),
        bytes=DECODE_TOKENS * flops_per_token(engine) / 2 * 4,
        tokens=DECODE_TOKENS,
    )


def cases(device: str) -> Iterator[Case]:
    if device == "cpu":
        yield Case("transformers", f"prefill T={PROMPT} fp32", prefill)
        for context in (DECODE_CONTEXT, PROMPT):
            yield Case("transformers", f"decode B=1 L={context} fp32", partial(decode, context))


if __name__ == "__main__":
    main(cases)
