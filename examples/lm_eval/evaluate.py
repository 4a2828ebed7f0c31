"""Kimi-Linear on our operators under lm-eval, on tasks of one's own. README.md beside this file says more."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything here is local
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import kimi_native  # noqa: E402
from kimi_native.tiny import make_tiny  # noqa: E402

HERE = Path(__file__).resolve().parent


def tasks() -> list[dict[str, Any]]:
    """The two tasks, with the path of the questions in place."""
    configs = [yaml.safe_load((HERE / name).read_text()) for name in ("capitals.yaml", "counting.yaml")]
    for config in configs:
        config["dataset_kwargs"] = {"data_files": {"test": str(HERE / "questions.jsonl")}}
    return configs


def evaluate(directory: str | Path, *, accelerated: bool = True, batch_size: int = 4) -> dict[str, Any]:
    """lm-eval's results for a checkpoint, with the answers to every question under "samples"."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if accelerated:
        kimi_native.accelerate(model)
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(directory), batch_size=batch_size, max_length=256)
    return lm_eval.simple_evaluate(model=lm, tasks=tasks(), log_samples=True, bootstrap_iters=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", help="checkpoint in the hub's format (default: a tiny random one)")
    parser.add_argument("--unpatched", action="store_true", help="without our operators")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if args.directory is None:
            make_tiny(temporary, gates="mild")
        results = evaluate(args.directory or temporary, accelerated=not args.unpatched)
    for task, samples in results["samples"].items():
        print(task, {name: value for name, value in results["results"][task].items() if name.endswith(",none")})
        for sample in samples:
            print("  ", sample["arguments"][0][0] if isinstance(sample["arguments"], list) else sample["doc"]["question"], sample["resps"])


if __name__ == "__main__":
    main()
