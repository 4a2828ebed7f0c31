"""transformers' own Kimi-Linear, accelerated and given back. README.md beside this file says how to run it."""

import sys
import tempfile
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import kimi_native
from kimi_native.tiny import make_tiny

NEW_TOKENS = 64


def timed_generate(model: Any, prompts: list[list[int]], label: str) -> torch.Tensor:
    """Continues prompts of unequal length, greedily; `[len(prompts), NEW_TOKENS]`."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])  # left padding: any token will do
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    ids, mask = ids.to(model.device), mask.to(model.device)
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    seconds = time.perf_counter() - start
    new = out[:, longest:].cpu()
    print(f"{label:<12} {new.numel() / seconds:7.1f} tokens/s   first row: {new[0, :8].tolist()} ...")
    return new


def main(directory: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompts = [list(range(1, 40)), list(range(50, 60))]

    before = timed_generate(model, prompts, "transformers")
    kimi_native.accelerate(model)
    ours = timed_generate(model, prompts, "accelerated")
    kimi_native.restore(model)
    after = timed_generate(model, prompts, "restored")

    print("accelerated tokens are the same:", torch.equal(before, ours))
    print("restored tokens are the same:", torch.equal(before, after))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as directory:
            make_tiny(directory, gates="mild")
            main(directory)
