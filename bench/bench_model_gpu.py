"""The full-size model on one GPU: random weights (98 GB in bfloat16), prefill, decode, memory; transformers with fla-core beside it.

    python bench/bench_model_gpu.py --json            # our model, then transformers in the same process
    python bench/bench_model_gpu.py --size tiny       # does it run

Prefill is the time until the first token of one prompt, cut into chunks of 8,192; decode is the time of one step as an engine runs
it: inputs to the device, the replayed graph, greedy tokens back on the host. Weights are drawn at random, as in `make-tiny`: a
random router spreads tokens evenly over the experts, so a step of many rows reads nearly all of them.

transformers' model is built of the same sizes with as many layers as fit beside nothing else; with fewer layers than ours its
figures are scaled to ours, and the record says so.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from devices import Cuda, Effort
from harness import Session

from kimi_native import KimiLinear, KimiLinearConfig, SequenceCache
from kimi_native.cache import KdaCache, LatentCache
from kimi_native.graphs import DecodeGraphs, padded_rows
from kimi_native.model import greedy, make_batch
from kimi_native.plan import make_plan
from kimi_native.tiny import tiny_config
from kimi_native.weights import places

CHUNK = 8192
STEPS = 24  # timed decode steps of a case
OP = "model"
DEVICE = "cuda"


def used() -> int:
    """Bytes of GPU memory that live tensors hold."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Bench:
    """Runs the cases and keeps their records, in the form of bench/harness.py."""

    def __init__(self, session: Session, title: str):
        self.session, self.title = session, title
        self.ours: dict[str, float] = {}  # microseconds of a case

    def record(self, case: str, us: list[float], tokens: int, least_bytes: float, flops: float, **more: Any) -> None:
        median, c = statistics.median(us), self.session.ceilings
        self.ours[case] = median
        roof = max(flops / c.tflops / 1e6, least_bytes / c.gbps / 1e3)
        record = {
            "record": "case", "op": OP, "case": f"{self.title} {case}", "path": more.pop("path", "portable"),
            "us": round(median, 1), "us_min": round(min(us), 1), "samples": len(us), "timing": "clock",
            "tflops": round(flops / median / 1e6, 2), "gbps": round(least_bytes / median / 1e3, 1),
            "roof_pct": round(100 * roof / median, 1), "tokens_per_s": round(tokens / median * 1e6, 1), **more,
        }  # fmt: skip
        self.session.records.append(record)
        print(
            f"{record['case']:<52} {median / 1e3:>10.3f} ms {record['tokens_per_s']:>12,.1f} tokens/s {record['roof_pct']:>6.1f} %roof",
            flush=True,
        )

    def peer(self, case: str, name: str, us: list[float], **more: Any) -> None:
        median = statistics.median(us)
        ratio = round(median / self.ours[case], 2) if case in self.ours else None
        self.session.records.append(
            {"record": "peer", "op": OP, "case": f"{self.title} {case}", "peer": name, "peer_us": round(median, 1),
             "peer_us_min": round(min(us), 1), "timing": "clock", "ratio": ratio, **more}
        )  # fmt: skip
        print(f"  {name:<50} {median / 1e3:>10.3f} ms   {ratio}x  {more or ''}", flush=True)

    def fact(self, case: str, **values: Any) -> None:
        self.session.records.append({"record": "fact", "op": OP, "case": f"{self.title} {case}", **values})
        print(f"{self.title} {case}: {values}", flush=True)


def active_weights(config: KimiLinearConfig, rows: int) -> tuple[float, float]:
    """Weights that `rows` tokens read at least (bytes in bf16, experts drawn evenly), and flops of one token."""
    c = config
    groups = {name: parameters for name, (parameters, _) in make_plan(c, context=1).weights.items()}
    experts = groups.get("routed experts", 0)
    chance = 1 - (1 - c.num_experts_per_token / c.num_experts) ** rows
    dense = sum(groups.values()) - experts - groups.get("embedding", 0)
    return 2.0 * (dense + experts * chance), 2.0 * (dense + experts * c.num_experts_per_token / c.num_experts)


def memory(bench: Bench, config: KimiLinearConfig) -> KimiLinear:
    """Builds the model; what it takes against what `kimi-native plan` says, by group and in all."""
    before = used()
    start = time.perf_counter()
    model = KimiLinear.random(config, device="cuda", dtype=getattr(torch, config.dtype))
    torch.cuda.synchronize()
    build_s = time.perf_counter() - start
    plan = make_plan(config, context=CHUNK)
    small = config.hidden_size < 1000  # where allocation granules and the float32 bias of the router count
    groups: dict[str, int] = {}
    for _, spec, place in places(model.weights, config):
        assert place.device.type == "cuda"
        groups[spec.group] = groups.get(spec.group, 0) + place.numel() * place.element_size()
    for group, (_, planned) in plan.weights.items():
        assert small or abs(groups[group] - planned) <= 0.01 * planned, f"{group}: {groups[group]} bytes, planned {planned}"
    taken = used() - before
    assert small or abs(taken - plan.weight_bytes) <= 0.01 * plan.weight_bytes, f"{taken} bytes, planned {plan.weight_bytes}"
    bench.fact(
        "weights",
        build_seconds=round(build_s, 2),
        bytes=taken,
        planned_bytes=plan.weight_bytes,
        **{f"bytes_{g}": n for g, n in groups.items()},
    )
    return model


def cache_memory(bench: Bench, config: KimiLinearConfig) -> None:
    """Bytes that one sequence's caches take on the device, beside those of the same model with MLA in every layer."""
    every_layer = replace(config, full_attn_layers=tuple(range(config.num_hidden_layers)))
    for name, context in (("128k", 131072), ("1M", 1048576)):
        if context > config.model_max_length:
            continue
        sizes = []
        for c in (config, every_layer):
            before = used()
            held = KdaCache(c, 1, "cuda"), LatentCache(c, context // 64, "cuda")
            sizes.append(used() - before)
            del held
        planned = make_plan(config, context=context).cache_bytes
        bench.fact(
            f"caches of {name} tokens", bytes=sizes[0], planned_bytes=planned, all_mla_bytes=sizes[1],
            saved_pct=round(100 * (1 - sizes[0] / sizes[1]), 1),
        )  # fmt: skip


def prefill(bench: Bench, model: KimiLinear, length: int, repeats: int) -> None:
    ids = torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    kda, latent = model.make_caches(1, -(-length // 64))

    def run() -> None:
        sequence = SequenceCache(kda, latent)
        for start in range(0, length, CHUNK):
            chunk = ids[start : start + CHUNK]
            logits = model.forward(make_batch([(sequence, chunk)], [], model.device, "last"), kda, latent)
            sequence.num_tokens += len(chunk)
        assert greedy(logits).tolist()[0][2] == 0, "NaN"
        sequence.free()

    run()
    us = [1e6 * seconds(run) for _ in range(repeats)]
    size, flops = active_weights(model.config, min(length, CHUNK))
    c = model.config
    attention = len(c.full_attn_layers) * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * length * length
    state = len(c.kda_layers) * c.kda_num_heads * 8 * c.kda_head_dim**2 * length
    bench.record(f"prefill T={length}", us, length, size * -(-length // CHUNK), flops * length + attention + state)


def decode(bench: Bench, model: KimiLinear, batch: int, context: int) -> None:
    """Steps of `batch` sequences behind `context` tokens each, whose cache is random: what it holds does not change the time."""
    c = model.config
    kda, latent = model.make_caches(batch, batch * (-(-(context + 2 * STEPS) // 64)))
    kda.recurrent.normal_(std=0.1)
    kda.conv.normal_(std=0.3)
    for pages in latent.pages:
        pages.normal_()
    graphs = DecodeGraphs(model, kda, latent, batch)
    sequences = [SequenceCache(kda, latent) for _ in range(batch)]
    for sequence in sequences:
        sequence.reserve(context)
        sequence.num_tokens = context
    tokens = torch.randint(c.vocab_size, (batch,), generator=torch.Generator().manual_seed(1)).tolist()
    graphs.capture(batch)
    us = []
    for step in range(STEPS + 4):
        start = time.perf_counter()
        _, best = graphs.run(list(zip(sequences, tokens)))
        rows = best.tolist()  # waits for the step
        if step >= 4:
            us.append(1e6 * (time.perf_counter() - start))
        assert all(broken == 0 for _, _, broken in rows), "NaN"
        tokens = [int(token) for token, _, _ in rows]
        for sequence in sequences:
            sequence.num_tokens += 1
    replay = graphs._graphs[padded_rows(batch)][0]
    gpu_us = statistics.median(1e6 * seconds(replay.replay) for _ in range(8))
    size, flops = active_weights(c, batch)
    plan = make_plan(c, context=min(context, c.model_max_length), batch=batch)
    # states are read and written, latents read
    least = size + batch * (2 * plan.state_bytes + context * plan.latent_bytes_per_token)
    attention = len(c.full_attn_layers) * c.num_attention_heads * 2 * (c.latent_dim + c.kv_lora_rank) * context
    name = "1M" if context > 1_000_000 else f"{context}"
    bench.record(f"decode B={batch} L={name}", us, batch, least, batch * (flops + attention), gpu_us=round(gpu_us, 1))


# ---- transformers ----------------------------------------------------------------------------------------------------------


def build_theirs(config: KimiLinearConfig, layers: int) -> Any:
    """transformers' model of these sizes with `layers` layers (and the kinds of our first ones), random weights, on the GPU."""
    os.environ["FLA_KIMI_NATIVE"] = "0"  # fla's own kernels: it would hand its KDA to ours (kimi_native.compat.fla)
    from transformers import KimiLinearConfig as TheirConfig
    from transformers import KimiLinearForCausalLM

    full = tuple(i for i in config.full_attn_layers if i < layers)
    theirs = TheirConfig(**replace(config, num_hidden_layers=layers, full_attn_layers=full).to_dict())
    with torch.device(DEVICE):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = KimiLinearForCausalLM(theirs)
        finally:
            torch.set_default_dtype(before)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if not p.is_floating_point():
                continue
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith(("A_log", "dt_bias", "e_score_correction_bias")):
                p.normal_(generator=generator)
            else:
                p.normal_(std=0.96 * p.shape[-1] ** -0.5, generator=generator)
    return model.eval().requires_grad_(False)


def theirs(bench: Bench, config: KimiLinearConfig, lengths: list[int], decodes: list[tuple[int, int]]) -> None:
    import transformers
    from transformers.models.kimi_linear import modeling_kimi_linear as code

    layers = config.num_hidden_layers
    while True:
        try:
            model = build_theirs(config, layers)
            break
        except torch.cuda.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            layers -= 3
    try:
        import fla

        kernels = f"fla-core {fla.__version__}"
    except ImportError:
        kernels = "its torch code"
    name = f"transformers {transformers.__version__}, {kernels}"
    scale = config.num_hidden_layers / layers
    more = {"layers": layers, "scaled": layers != config.num_hidden_layers}
    print(f"{name}: {layers} of {config.num_hidden_layers} layers; chunk_kda is {code.chunk_kimi_delta_attention}", flush=True)

    @torch.inference_mode()
    def measure(case: str, run: Callable[[], list[float]]) -> None:
        try:
            bench.peer(case, name, [scale * t for t in run()], **more)
        except Exception as error:  # out of memory, or not supported there: said in the record
            traceback.print_exc(limit=2)
            text = str(error).strip().splitlines()[0][:160] if str(error) else type(error).__name__
            bench.session.records.append({"record": "peer", "op": OP, "case": f"{bench.title} {case}", "peer": name, "error": text, **more})
        gc.collect()
        torch.cuda.empty_cache()

    def one_prefill(length: int) -> list[float]:
        ids = torch.randint(config.vocab_size, (1, length), device="cuda")

        def run() -> None:
            cache = None
            for start in range(0, length, CHUNK):
                cache = model(ids[:, start : start + CHUNK], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

        run()
        return [1e6 * seconds(run) for _ in range(2)]

    def one_decode(batch: int, context: int) -> list[float]:
        ids = torch.randint(config.vocab_size, (batch, context), device="cuda")
        out = model(ids, use_cache=True, logits_to_keep=1)
        token, cache, us = out.logits[:, -1:].argmax(-1), out.past_key_values, []
        for step in range(12):
            start = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            token.tolist()
            if step >= 4:
                us.append(1e6 * (time.perf_counter() - start))
        return us

    for batch, context in decodes:
        measure(f"decode B={batch} L={context}", lambda: one_decode(batch, context))  # noqa: B023
    for length in lengths:
        measure(f"prefill T={length}", lambda: one_prefill(length))  # noqa: B023


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", default="48b", help="48b, or a preset of make-tiny (default 48b)")
    parser.add_argument("--json", nargs="?", type=Path, const=Path(), help="add the results to this file (bench/results/<device>.json)")
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--long", action="store_true", help="also prefill of 131,072 tokens and decode at 1M tokens")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    config = KimiLinearConfig() if args.size == "48b" else tiny_config(args.size, dtype="bfloat16")
    session = Session.start("cuda", Effort(3, 0.5))
    assert isinstance(session.device, Cuda)
    bench = Bench(session, f"{args.size} bf16")
    del session.device._written, session.device._read  # nothing here is measured behind a flush: the weights alone exceed any cache
    failed = False

    def step(run: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal failed
        try:
            with torch.inference_mode():
                return run(bench, *arguments)
        except Exception as error:
            failed = True
            traceback.print_exc()
            text = str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__
            session.records.append({"record": "failed", "op": OP, "case": f"{bench.title} {run.__name__} {arguments[1:]}", "error": text})
        finally:
            gc.collect()
            torch.cuda.empty_cache()
            if args.json is not None:
                session.write(session.results_file() if args.json == Path() else args.json)

    step(cache_memory, config)
    model = step(memory, config)
    if model is not None:
        for batch, context in [(1, 1024), (32, 1024), (128, 1024)]:
            step(decode, model, batch, context)
        step(prefill, model, 8192, 3)
        if args.long:
            if config.model_max_length >= 1 << 20:
                step(decode, model, 1, (1 << 20) - 2 * STEPS)
            step(prefill, model, 131072 if config.model_max_length >= 131072 else 16384, 1)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    if not args.no_peer:
        step(theirs, config, [8192], [(1, 1024), (32, 1024), (128, 1024)])
    sys.exit(failed)


if __name__ == "__main__":
    main()
