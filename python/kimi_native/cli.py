"""The command `kimi-native`: generate, chat, info, plan, make-tiny, bench and demo.

Results go to stdout (with `--json` as one JSON object), everything else to stderr. An error is one line on stderr and exit code 1;
KIMI_NATIVE_TRACEBACK=1 shows where it came from.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from kimi_native import __version__
from kimi_native.info import CUDA_BUILDS, collect_info

if TYPE_CHECKING:
    from kimi_native.config import KimiLinearConfig
    from kimi_native.generate import Completion, TokenEvent
    from kimi_native.model import KimiLinear

EXAMPLES = """examples:
  kimi-native demo
  kimi-native plan --context 1048576 --memory 141GB
  kimi-native make-tiny ./tiny-model
  kimi-native generate ./tiny-model --prompt "The river runs" --max-new-tokens 64 --stats
  kimi-native chat moonshotai/Kimi-Linear-48B-A3B-Instruct --dtype bf16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows something
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output is gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("KIMI_NATIVE_TRACEBACK") == "1":
            raise
        print(f"kimi-native: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text} (KIMI_NATIVE_TRACEBACK=1 shows where)"


# ---- the arguments --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kimi-native",
        description="Kimi-Linear on native kernels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kimi-native {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    generate = command("generate", _generate, "continue a prompt")
    _model_arguments(generate)
    prompt = generate.add_argument_group("prompt")
    prompt.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given several times")
    prompt.add_argument("--prompt-file", action="append", metavar="FILE", help="a file of text to continue, - for stdin")
    prompt.add_argument("--ids", action="append", metavar="IDS", help='token ids to continue, as "1 2 3" or "1,2,3"')
    prompt.add_argument("--chat", action="store_true", help="put each prompt into the chat template, as a user's message")
    prompt.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    _sampling_arguments(generate, max_new_tokens=128)
    generate.add_argument("--prefill-chunk", type=_positive, metavar="N", help="prompt tokens of a step (default 2048, on a GPU 8192)")
    generate.add_argument("--stats", action="store_true", help="show speed and memory on stderr")
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end instead of streaming text")

    chat = command("chat", _chat, "talk with the model, one message a line")
    _model_arguments(chat)
    chat.add_argument("--system", metavar="TEXT", help="system message")
    _sampling_arguments(chat, max_new_tokens=1024)
    chat.add_argument("--stats", action="store_true", help="show speed and memory on stderr after each answer")

    info = command("info", _info, "show what was built and what this machine can use")
    info.add_argument("--json", action="store_true", help="print one JSON object")

    plan = command("plan", _plan, "show the exact bytes of weights and caches, and what fits in a given memory")
    plan.add_argument("--config", metavar="PATH", help="a checkpoint's directory or config.json (default: the released model)")
    plan.add_argument("--context", type=_positive, default=131072, metavar="N", help="tokens of a sequence (default %(default)s)")
    plan.add_argument("--batch", type=_positive, default=1, metavar="N", help="sequences (default %(default)s)")
    plan.add_argument("--dtype", metavar="NAME", help="bf16 or fp32 (default: the config's)")
    plan.add_argument("--memory", metavar="BYTES", help="such as 141GB or 80GiB: also show what fits")
    plan.add_argument("--reserve", metavar="BYTES", default="0", help="of the memory, for activations and workspace (default %(default)s)")
    plan.add_argument("--json", action="store_true", help="print one JSON object")

    tiny = command("make-tiny", _make_tiny, "write a small random checkpoint in the hub's format")
    tiny.add_argument("directory", metavar="DIR")
    tiny.add_argument("--preset", default="tiny", help="tiny, tiny27, demo or mid (default %(default)s)")
    tiny.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    tiny.add_argument("--shards", type=_positive, default=2, metavar="N", help="safetensors files (default %(default)s)")
    tiny.add_argument("--dtype", default="fp32", metavar="NAME", help="fp32 or bf16 (default %(default)s)")
    tiny.add_argument("--layers", metavar="KKKM", help="one letter a layer: K for KDA, M for MLA")
    tiny.add_argument("--gates", default="real", help="real: forget gates as in the released model; mild (default %(default)s)")
    tiny.add_argument("--set", action="append", default=[], metavar="KEY=N", help="another size, such as num_experts=32")
    tiny.add_argument("--no-tokenizer", action="store_true", help="token ids only")
    tiny.add_argument("--force", action="store_true", help="write into a directory that is not empty")
    tiny.add_argument("--json", action="store_true", help="print one JSON object")

    bench = command("bench", _bench, "measure prefill and decode tokens/s of a checkpoint")
    _model_arguments(bench)
    bench.add_argument("--prompt-tokens", type=_positive, default=2048, metavar="N", help="default %(default)s")
    bench.add_argument("--new-tokens", type=_positive, default=64, metavar="N", help="default %(default)s")
    bench.add_argument("--batch", type=_positive, default=1, metavar="N", help="requests side by side (default %(default)s)")
    bench.add_argument("--repeat", type=_positive, default=3, metavar="N", help="default %(default)s")
    bench.add_argument("--prefill-chunk", type=_positive, metavar="N", help="default 2048, on a GPU 8192")
    bench.add_argument("--seed", type=int, default=0, metavar="N", help="of the random prompts (default %(default)s)")
    bench.add_argument("--json", action="store_true", help="print one JSON object")

    demo = command("demo", _demo, "make a small random checkpoint and generate from it")
    demo.add_argument("--dir", metavar="DIR", help="where to keep the checkpoint (default: in the user's cache directory)")
    demo.add_argument("--preset", default="demo", help="tiny, tiny27, demo or mid (default %(default)s)")
    demo.add_argument("--max-new-tokens", type=_positive, default=96, metavar="N", help="default %(default)s")
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("model", metavar="MODEL", nargs="?", help="a checkpoint's directory, or an id on the hub")
    which.add_argument(
        "--random", metavar="SIZE", help="instead of MODEL: random weights, drawn on the device; 48b, tiny, tiny27, demo or mid"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is a GPU that this build can use)")
    parser.add_argument("--dtype", metavar="NAME", help="bf16, fp32 or, on a GPU, fp16 (default: the checkpoint's)")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="the same bits whatever runs beside and however prompts are cut; slower"
    )


def _sampling_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=_positive, default=max_new_tokens, metavar="N", help="default %(default)s")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest token (default)")
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="sample among the N likeliest; 0 for all (default)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="X", help="sample among the likeliest that make up X (default 1)")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    group.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; may be given several times")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the end of an answer")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


# ---- commands with a model ------------------------------------------------------------------------------------------------


def _load(args: argparse.Namespace) -> KimiLinear:
    import torch

    from kimi_native.config import KimiLinearConfig
    from kimi_native.model import KimiLinear, default_device
    from kimi_native.tiny import tiny_config

    device = args.device or default_device()
    if args.random is not None:
        dtype = getattr(torch, _dtype(args.dtype) or "bfloat16")
        config = KimiLinearConfig() if args.random == "48b" else tiny_config(args.random)
        return KimiLinear.random(config, device=device, dtype=dtype, batch_invariant=args.batch_invariant)
    return KimiLinear.from_pretrained(
        args.model,
        device=device,
        dtype=_dtype(args.dtype),
        batch_invariant=args.batch_invariant,
        progress=sys.stderr.isatty(),
    )


def _dtype(name: str | None) -> str | None:
    from kimi_native.plan import DTYPES

    if name is not None and name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name] if name is not None else None


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "ignore_eos")
    return {name: getattr(args, name) for name in names}


@dataclass
class _Stats:
    """Speed of one `generate` call, from the times at which its tokens arrive."""

    prompt_tokens: int
    start: float = field(default_factory=time.perf_counter)
    first: float | None = None  # when the last of the prompts had its first token
    last: float = 0.0
    new_tokens: int = 0
    decoded: int = 0  # those that came after `first`
    _waiting: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> _Stats:
        return cls(sum(map(len, prompts)), _waiting=set(range(len(prompts))))

    def add(self, event: TokenEvent) -> None:
        self.last = time.perf_counter()
        self.new_tokens += event.token_id is not None
        if self.first is not None:
            self.decoded += event.token_id is not None
        else:
            self._waiting.discard(event.request_id)
            self.first = None if self._waiting else self.last

    def to_dict(self, model: KimiLinear) -> dict[str, Any]:
        first = self.first or self.last
        prefill, decode = first - self.start, self.last - first
        return {
            "prompt_tokens": self.prompt_tokens,
            "prefill_seconds": prefill,
            "prefill_tokens_per_second": self.prompt_tokens / prefill if prefill > 0 else None,
            "new_tokens": self.new_tokens,
            "decode_tokens": self.decoded,
            "decode_seconds": decode,
            "decode_tokens_per_second": self.decoded / decode if decode > 0 else None,
            **_memory(model),
        }


def _memory(model: KimiLinear) -> dict[str, int]:
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    memory = {"weights_bytes": model.weights_bytes, "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    if model.device.type == "cuda":
        import torch

        memory["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(model.device)
    return memory


def _memory_line(stats: dict[str, Any]) -> str:
    from kimi_native.plan import human_bytes

    gpu = stats.get("peak_gpu_memory_bytes")
    peaks = f"peak of the process {human_bytes(stats['peak_memory_bytes'])}" + (f", of the GPU {human_bytes(gpu)}" if gpu else "")
    return f"memory   weights {human_bytes(stats['weights_bytes'])}, {peaks}"


def _show_stats(stats: dict[str, Any]) -> None:
    def rate(value: float | None) -> str:
        return "" if value is None else f"{value:>10,.1f} tokens/s"

    lines = [
        f"prefill  {stats['prompt_tokens']:>7,} tokens in {stats['prefill_seconds']:>7.3f} s {rate(stats['prefill_tokens_per_second'])}",
        f"decode   {stats['decode_tokens']:>7,} tokens in {stats['decode_seconds']:>7.3f} s {rate(stats['decode_tokens_per_second'])}",
        _memory_line(stats),
    ]
    print("\n".join(lines), file=sys.stderr)


def _write(text: str) -> None:
    """Shows text at once. On a terminal, characters that would steer it are replaced: a model's output is not to be trusted."""
    if sys.stdout.isatty():
        text = "".join("\ufffd" if ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 else c for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def _generate(args: argparse.Namespace) -> int:
    texts = [*(args.prompt or []), *(_read_text(file) for file in args.prompt_file or [])]
    ids = [_parse_ids(item) for item in args.ids or []]
    if not texts and not ids:
        raise ValueError("no prompt: give --prompt, --prompt-file or --ids")
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat")
    if args.chat and ids:
        raise ValueError("--chat takes text, not --ids")

    model = _load(args)
    prompts = [*(_encode(model, text, args.chat, args.system) for text in texts), *ids]
    stats = _Stats.of(prompts)
    live = len(prompts) == 1 and not args.json

    def show(event: TokenEvent) -> None:
        stats.add(event)
        if live:
            _write(event.text if model.tokenizer else "" if event.token_id is None else f"{event.token_id} ")

    options = {"prefill_chunk": args.prefill_chunk, **_sampling(args)}
    completions = model.generate(prompts, stream=show, progress=sys.stderr.isatty(), **options)
    assert isinstance(completions, list)
    summary = stats.to_dict(model)
    if args.json:
        print(json.dumps({"completions": [_completion_dict(c) for c in completions], "stats": summary}))
    elif live:
        _write("\n")
    else:
        for number, completion in enumerate(completions, start=1):
            _write(f"--- {number} ({completion.finish_reason})\n{_text_of(completion)}\n")
    if args.stats:
        _show_stats(summary)
    failed = [c.error for c in completions if c.finish_reason == "error"]
    for error in failed:
        print(f"kimi-native: {error}", file=sys.stderr)
    return 1 if failed else 0


def _read_text(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(item) for item in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--ids must be whole numbers, got {text!r}") from None


def _encode(model: KimiLinear, text: str, chat: bool, system: str | None) -> list[int]:
    if model.tokenizer is None:
        raise ValueError("this checkpoint has no tiktoken.model: give token ids with --ids")
    if not chat:
        return model.tokenizer.encode(text)
    return model.tokenizer.apply_chat_template([*_system(system), {"role": "user", "content": text}])


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _text_of(completion: Completion) -> str:
    return completion.text if completion.text is not None else " ".join(map(str, completion.token_ids))


def _completion_dict(completion: Completion) -> dict[str, Any]:
    names = ("prompt_token_ids", "token_ids", "text", "logprobs", "finish_reason", "error")
    return {name: getattr(completion, name) for name in names}


def _chat(args: argparse.Namespace) -> int:
    model = _load(args)
    if model.tokenizer is None:
        raise ValueError("this checkpoint has no tiktoken.model, and chat needs text")
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (gives input() line editing)

        print("/exit leaves, /reset starts over, Ctrl-C stops an answer", file=sys.stderr)
    messages: list[dict[str, str]] = _system(args.system)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if line == "/exit":
            return 0
        if line == "/reset":
            messages = _system(args.system)
        elif line.startswith("/"):
            print("commands: /exit, /reset", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _answer(model, messages, args)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _answer(model: KimiLinear, messages: list[dict[str, str]], args: argparse.Namespace) -> str | None:
    """Streams the answer to a conversation and returns it; None when it failed (said on stderr, the chat goes on)."""
    assert model.tokenizer is not None
    prompt = model.tokenizer.apply_chat_template(messages)
    stats = _Stats.of([prompt])
    pieces: list[str] = []

    def show(event: TokenEvent) -> None:
        stats.add(event)
        pieces.append(event.text)
        _write(event.text)

    try:
        completion = model.generate(prompt, stream=show, progress=sys.stderr.isatty(), **_sampling(args))
        error = getattr(completion, "error", None)
    except KeyboardInterrupt:
        error = None
    except ValueError as problem:  # a conversation that has grown past the model's limit
        error = f"{problem} (/reset starts over)"
    _write("\n")
    if error:
        print(f"kimi-native: {error}", file=sys.stderr)
        return None
    if args.stats:
        _show_stats(stats.to_dict(model))
    return "".join(pieces)


def _bench(args: argparse.Namespace) -> int:
    import torch

    model = _load(args)
    generator = torch.Generator().manual_seed(args.seed)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(vocabulary, (args.batch, args.prompt_tokens), generator=generator).tolist()
    _bench_once(model, [ids[:64] for ids in prompts], min(4, args.new_tokens), args.prefill_chunk)  # warm up
    runs = [_bench_once(model, prompts, args.new_tokens, args.prefill_chunk) for _ in range(args.repeat)]
    prefill, decode = zip(*runs)
    result: dict[str, Any] = {
        "model": f"random {args.random}" if args.model is None else str(args.model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "batch_invariant": model.batch_invariant,
        **{name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "batch", "repeat", "prefill_chunk")},
        "threads": torch.get_num_threads(),
        "prefill_tokens_per_second": _spread(prefill),
        "decode_tokens_per_second": _spread([rate for rate in decode if rate is not None]),
        **_memory(model),
    }
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{result['model']}: {result['dtype']}, {result['device']}, {result['threads']} threads, {args.repeat} runs")
    for name, what in (("prefill", f"{args.batch} x {args.prompt_tokens} tokens"), ("decode", f"{args.batch} x {args.new_tokens} tokens")):
        spread = result[f"{name}_tokens_per_second"]
        if spread is not None:
            print(f"{name:<8} {what:<18} {spread['median']:>12,.1f} tokens/s  ({spread['min']:,.1f} to {spread['max']:,.1f})")
    print(_memory_line(result))
    return 0


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    return {"median": median(values), "min": min(values), "max": max(values)} if values else None


def _bench_once(model: KimiLinear, prompts: list[list[int]], new_tokens: int, prefill_chunk: int | None) -> tuple[float, float | None]:
    """Tokens/s of the prefill (until every request has its first token) and of the decoding after it (None: there is none)."""
    from kimi_native.cache import PAGE_TOKENS
    from kimi_native.generate import Engine, SamplingParams

    pages = sum(-(-(len(ids) + new_tokens) // PAGE_TOKENS) for ids in prompts)
    engine = Engine(model, max_num_seqs=len(prompts), num_pages=pages, prefill_chunk=prefill_chunk)
    engine.warm_up(len(prompts))
    waiting = {engine.add(ids, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)) for ids in prompts}
    decoded, start = 0, time.perf_counter()
    first = start
    while engine.has_unfinished:
        events = engine.step()
        if waiting:
            waiting -= {event.request_id for event in events}
            first = time.perf_counter()
        else:
            decoded += len(events)
        failed = [event.error for event in events if event.finish_reason == "error"]
        if failed:
            raise RuntimeError(failed[0])
    end = time.perf_counter()
    return sum(map(len, prompts)) / (first - start), decoded / (end - first) if decoded else None


def _demo(args: argparse.Namespace) -> int:
    from kimi_native.plan import human_bytes
    from kimi_native.tiny import SAMPLE_TEXT, make_tiny, tiny_config

    directory = Path(args.dir) if args.dir else _cache_directory() / f"random-{args.preset}"
    config = tiny_config(args.preset)
    if not _holds(directory, config):
        print(f"making a random checkpoint in {directory}", file=sys.stderr)
        with _bar("making") as report:
            make_tiny(directory, preset=args.preset, overwrite=True, progress=report)
    args.model, args.random, args.device, args.dtype, args.batch_invariant = str(directory), None, None, None, False
    model = _load(args)
    assert model.tokenizer is not None
    kinds = "".join("M" if i in config.full_attn_layers else "K" for i in range(config.num_hidden_layers))
    print(
        f"{directory}: {len(kinds)} layers ({kinds}), {config.num_experts} experts, {human_bytes(model.weights_bytes)} of random weights",
        file=sys.stderr,
    )
    prompt = model.tokenizer.encode(SAMPLE_TEXT)
    print(f"prompt of {len(prompt)} tokens: {SAMPLE_TEXT[:60].strip()}...", file=sys.stderr)
    stats = _Stats.of([prompt])

    def show(event: TokenEvent) -> None:
        stats.add(event)
        _write(event.text)

    options = {"max_new_tokens": args.max_new_tokens, "temperature": 0.7, "top_k": 50, "seed": 0, "ignore_eos": True}
    model.generate(prompt, stream=show, **options)
    _write("\n")
    _show_stats(stats.to_dict(model))
    print("the weights are random, so the text means nothing; `kimi-native chat` talks with a real checkpoint", file=sys.stderr)
    return 0


def _cache_directory() -> Path:
    base = os.environ.get("KIMI_NATIVE_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kimi_native"


def _holds(directory: Path, config: KimiLinearConfig) -> bool:
    """Whether a finished checkpoint of this configuration is there already."""
    from kimi_native.config import ConfigError, KimiLinearConfig

    try:
        return KimiLinearConfig.from_pretrained(directory) == config
    except (OSError, ConfigError):
        return False


# ---- commands without a model ---------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    facts = collect_info()
    if args.json:
        print(json.dumps(facts))
        return 0
    build = facts["build"]
    print(f"kimi-native {facts['version']}, Python {facts['python']}, {facts['platform']}")
    print("build      " + ("tensor-free module _C not built" if build is None else ", ".join(f"{k} {v}" for k, v in build.items() if v)))
    print(f"cuda       {CUDA_BUILDS.get(facts['cuda_build'], 'kernels built by CUDA ' + facts['cuda_build'])}")
    print(f"library    {facts['ops_library']}")
    print(f"torch      {facts['torch']['version']}, {facts['torch']['threads']} threads")
    print("packages   " + ", ".join(f"{name} {version or 'missing'}" for name, version in facts["packages"].items()))
    for device in facts["devices"]:
        state = f"usable, {', '.join(device['dtypes'])}" if device["usable"] else f"not usable: {device['reason']}"
        state += f", {device['kernels']} kernels" if "kernels" in device else ""
        print(f"{device['device']:<10} {device['name']}; {state}")
    print("operators  " + ", ".join(facts["operators"]))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from kimi_native.config import KimiLinearConfig
    from kimi_native.plan import make_plan, parse_bytes

    config = KimiLinearConfig()
    if args.config is not None:
        path = Path(args.config)
        config = KimiLinearConfig.from_pretrained(path.parent if path.name == "config.json" else path)
    plan = make_plan(
        config,
        context=args.context,
        batch=args.batch,
        dtype=args.dtype,
        memory=None if args.memory is None else parse_bytes(args.memory),
        reserve=parse_bytes(args.reserve),
    )
    print(json.dumps(plan.to_dict()) if args.json else plan.render())
    return 0


def _make_tiny(args: argparse.Namespace) -> int:
    from kimi_native.plan import human_bytes
    from kimi_native.tiny import make_tiny

    sizes = {}
    for item in args.set:
        key, _, value = item.partition("=")
        if not key.isidentifier() or not value.isdecimal():
            raise ValueError(f"--set takes KEY=N, such as num_experts=32, got {item!r}")
        sizes[key] = int(value)
    dtype = _dtype(args.dtype)
    assert dtype is not None
    with _bar("making") as report:
        config = make_tiny(
            args.directory,
            preset=args.preset,
            seed=args.seed,
            shards=args.shards,
            dtype=dtype,
            layers=args.layers,
            gates=args.gates,
            tokenizer=not args.no_tokenizer,
            overwrite=args.force,
            progress=report,
            **sizes,
        )
    files = {path.name: path.stat().st_size for path in sorted(Path(args.directory).iterdir()) if path.is_file()}
    if args.json:
        print(json.dumps({"directory": args.directory, "files": files, "config": config.to_dict()}))
        return 0
    print(f"{args.directory}: {config.num_hidden_layers} layers, {dtype}, {human_bytes(sum(files.values()))} in {len(files)} files")
    return 0


def _bar(label: str) -> Any:
    from kimi_native.model import _progress_bar

    return _progress_bar(sys.stderr.isatty(), label)
