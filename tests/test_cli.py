"""The command line: what it prints for people and for machines, and that every error is one line and exit code 1."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kimi_native
from kimi_native import cli
from kimi_native.model import KimiLinear
from kimi_native.tiny import make_tiny

ROOT = Path(__file__).resolve().parent.parent

DTYPE_NAMES = "must be one of bf16, bfloat16, fp32, float32, fp16, float16"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    make_tiny(path)
    return str(path)


@pytest.fixture(scope="module")
def model(directory):
    return KimiLinear.from_pretrained(directory)


@pytest.fixture(scope="module")
def without_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("ids-only")
    make_tiny(path, tokenizer=False, vocab_size=100)
    return str(path)


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command line: (exit code, stdout, stderr)."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = cli.main([str(a) for a in arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def process(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "kimi_native", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**environment, **options}, timeout=120)


# ---- without a model ------------------------------------------------------------------------------------------------


def test_help_and_version():
    help_ = process("--help")
    assert help_.returncode == 0 and help_.stderr == ""
    for command in ("generate", "chat", "info", "plan", "make-tiny", "bench", "demo"):
        assert f"\n    {command}" in help_.stdout
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])


@pytest.mark.parametrize("command", ["generate", "chat", "info", "plan", "make-tiny", "bench", "demo"])
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert f"usage: kimi-native {command}" in capsys.readouterr().out


def test_plan_prints_the_exact_bytes(run):
    code, out, err = run("plan", "--context", 1048576, "--memory", "141GB")
    assert code == 0 and err == ""
    for number in ("98,245,528,576 B", "8,064 B", "43,417,600 B", "1,048,576 tokens each (the model's limit)"):
        assert number in out


def test_plan_for_a_machine(run, directory):
    code, out, _ = run("plan", "--context", 4096, "--batch", 8, "--dtype", "fp32", "--memory", "400GiB", "--reserve", "2GB", "--json")
    values = json.loads(out)
    assert code == 0 and values["dtype"] == "float32" and values["batch"] == 8 and values["reserve"] == 2 * 10**9
    assert values["latent_bytes_per_token"] == 2 * 8064 and values["weight_bytes"] == 4 * 49_122_681_728
    for config in (directory, Path(directory) / "config.json"):
        code, out, _ = run("plan", "--config", config, "--context", 64, "--json")
        total = json.loads((Path(directory) / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        assert code == 0 and json.loads(out)["weight_bytes"] == total


def test_info(run):
    code, out, err = run("info", "--json")
    facts = json.loads(out)
    assert code == 0 and err == "" and facts["version"] == kimi_native.__version__
    assert facts["torch"]["version"] == torch.__version__ and "rms_norm" in facts["operators"]
    assert facts["devices"][0]["device"] == "cpu" and facts["devices"][0]["usable"]
    if kimi_native._C is not None:
        assert facts["build"] == dict(kimi_native._C.build_facts())
        assert kimi_native._C.cpu_isa() in facts["devices"][0]["name"]
    assert facts["cuda_build"] == torch.ops.kimi_native.cuda_build()
    assert [d["device"] for d in facts["devices"][1:]] == [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    code, out, _ = run("info")
    assert code == 0 and f"kimi-native {kimi_native.__version__}" in out and "usable, float32, bfloat16" in out
    has_kernels = facts["cuda_build"] not in ("none", "emulated")
    assert (f"\ncuda       kernels built by CUDA {facts['cuda_build']}\n" in out) == has_kernels


HOPPER = dict(usable=True, kernels="sm90", dtypes=["float32", "bfloat16", "float16"])
PORTABLE = {**HOPPER, "kernels": "portable"}
UNUSABLE = dict(usable=False, reason="this build has no CUDA kernels")
DEFAULT = "90a-real 80-virtual"


@pytest.mark.parametrize(
    ("capability", "build", "architectures", "path", "expected"),
    [
        ((9, 0), "13.0.88", DEFAULT, None, HOPPER),
        ((9, 0), "13.0.88", DEFAULT, "portable", PORTABLE),
        ((9, 0), "13.0.88", "80-virtual", None, PORTABLE),
        ((8, 0), "13.0.88", DEFAULT, None, PORTABLE),
        ((12, 0), "13.0.88", DEFAULT, None, PORTABLE),
        ((9, 0), "13.0.88", "", None, HOPPER),  # _C is not built
        ((9, 0), "13.0.88", "90a-real", None, HOPPER),
        ((8, 9), "13.0.88", "80-real", None, PORTABLE),
        ((7, 5), "13.0.88", DEFAULT, None, dict(usable=False, reason="the kernels need compute capability 8.0")),
        ((8, 0), "13.0.88", "90a-real", None, dict(usable=False, reason="this build is for 90a-real (KIMI_CUDA_ARCHITECTURES)")),
        ((9, 0), "13.0.88", "80-real 100", None, dict(usable=False, reason="this build is for 80-real 100 (KIMI_CUDA_ARCHITECTURES)")),
        ((9, 0), "none", "", None, UNUSABLE),
        ((9, 0), "emulated", "", None, UNUSABLE),
    ],
)
def test_info_of_a_gpu(run, monkeypatch, capability, build, architectures, path, expected):
    gpu = SimpleNamespace(name="NVIDIA Test", major=capability[0], minor=capability[1], total_memory=2**30)
    facts = {"version": "0", "compiler": "c", "build_type": "Release", "cuda": build, "cuda_architectures": architectures}
    module = SimpleNamespace(build_facts=lambda: facts, cpu_isa=lambda: "base", cpu_threads=lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.ops.kimi_native, "cuda_build", lambda: build)
    monkeypatch.setattr(kimi_native, "_C", module if architectures else None)
    monkeypatch.delenv("KIMI_CUDA_PATH", raising=False)
    if path is not None:
        monkeypatch.setenv("KIMI_CUDA_PATH", path)
    number = ".".join(map(str, capability))
    name = f"NVIDIA Test, compute capability {number}, 1024 MiB"
    assert cli.collect_info()["devices"][1] == dict(device="cuda:0", name=name, compute_capability=number, **expected)
    line = run("info")[1].splitlines()[-2]
    assert line.startswith(f"cuda:0     {name}; ") and line.endswith(expected.get("reason", f"float16, {expected.get('kernels')} kernels"))


def test_make_tiny(run, tmp_path):
    place = tmp_path / "model"
    code, out, _ = run("make-tiny", place, "--shards", 3, "--dtype", "bf16", "--set", "num_experts=8", "--layers", "KM", "--json")
    made = json.loads(out)
    assert code == 0 and made["config"]["num_experts"] == 8 and made["config"]["dtype"] == "bfloat16"
    assert made["files"] == {p.name: p.stat().st_size for p in place.iterdir()} and "model-00003-of-00003.safetensors" in made["files"]
    code, out, err = run("make-tiny", place)
    assert (code, out, err) == (1, "", f"kimi-native: {place} is not empty\n")
    code, out, _ = run("make-tiny", place, "--force", "--no-tokenizer")
    assert code == 0 and out.startswith(f"{place}: 4 layers, float32, 2.1") and not (place / "tiktoken.model").exists()


# ---- generate -------------------------------------------------------------------------------------------------------

PROMPT = " the river runs past the old town"


def test_generate_streams_the_text(run, directory, model):
    expected = model.generate(PROMPT, max_new_tokens=12)
    code, out, err = run("generate", directory, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert (code, out, err) == (0, expected.text + "\n", "")


def test_generate_for_a_machine(run, directory, model):
    code, out, err = run("generate", directory, "--prompt", PROMPT, "--ids", "1, 2 3", "--max-new-tokens", 6, "--json")
    values = json.loads(out)
    assert code == 0 and err == ""
    for got, prompt in zip(values["completions"], (PROMPT, [1, 2, 3])):
        expected = model.generate(prompt, max_new_tokens=6)
        for key in ("prompt_token_ids", "token_ids", "text", "finish_reason"):
            assert got[key] == getattr(expected, key)
        assert got["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)
    stats = values["stats"]
    assert stats["prompt_tokens"] == 3 + len(model.tokenizer.encode(PROMPT)) and stats["new_tokens"] == 12
    assert stats["decode_tokens"] == 10 and stats["decode_tokens_per_second"] > 0 and stats["prefill_tokens_per_second"] > 0
    assert stats["weights_bytes"] == model.weights_bytes and stats["peak_memory_bytes"] > model.weights_bytes


def test_generate_many(run, directory, model, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    files = ["--prompt-file", tmp_path / "prompt.txt", "--prompt-file", "-"]
    code, out, err = run("generate", directory, *files, "--max-new-tokens", 4, "--stats", stdin="Tell")
    first, second = (model.generate(p, max_new_tokens=4) for p in (PROMPT, "Tell"))
    assert code == 0 and out == f"--- 1 (length)\n{first.text}\n--- 2 (length)\n{second.text}\n"
    assert "prefill" in err and "tokens/s" in err and "memory   weights 2.09 MB" in err


def test_generate_chat_template(run, directory, model):
    code, out, _ = run(
        "generate", directory, "--prompt", "hi<|im_end|>", "--chat", "--system", "Be brief.", "--max-new-tokens", 1, "--json"
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi<|im_end|>"}]
    assert code == 0 and json.loads(out)["completions"][0]["prompt_token_ids"] == model.tokenizer.apply_chat_template(messages)


def test_generate_options_reach_the_model(run, directory, model):
    sampled = ["--temperature", 0.9, "--top-k", 20, "--top-p", 0.9, "--seed", 5, "--max-new-tokens", 16]
    expected = model.generate(PROMPT, temperature=0.9, top_k=20, top_p=0.9, seed=5, max_new_tokens=16)
    _, out, _ = run("generate", directory, "--prompt", PROMPT, *sampled)
    assert out == expected.text + "\n"
    stop = expected.text[5:8]
    _, out, _ = run("generate", directory, "--prompt", PROMPT, *sampled, "--stop", stop, "--stop", "\x00never")
    assert out == expected.text[: expected.text.index(stop)] + "\n"
    code, out, _ = run(
        "generate", directory, "--prompt", PROMPT, "--batch-invariant", "--dtype", "bf16", "--max-new-tokens", 3, "--ignore-eos", "--json"
    )
    exact = KimiLinear.from_pretrained(directory, dtype="bfloat16", batch_invariant=True).generate(
        PROMPT, max_new_tokens=3, ignore_eos=True
    )
    assert code == 0 and json.loads(out)["completions"][0]["token_ids"] == exact.token_ids


def test_generate_ids_without_a_tokenizer(run, without_tokenizer):
    code, out, _ = run("generate", without_tokenizer, "--ids", "5,6,7", "--max-new-tokens", 4)
    expected = KimiLinear.from_pretrained(without_tokenizer).generate([5, 6, 7], max_new_tokens=4)
    assert code == 0 and out.split() == [str(i) for i in expected.token_ids]


# ---- chat, bench, demo ----------------------------------------------------------------------------------------------


def test_chat_remembers_the_conversation(run, directory, model):
    code, out, err = run(
        "chat", directory, "--system", "S", "--max-new-tokens", 5, stdin="hello\n\nand you\n/nonsense\n/reset\nhello\n/exit\nno\n"
    )
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "hello"}]
    first = model.generate(model.tokenizer.apply_chat_template(messages), max_new_tokens=5).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "and you"}]
    second = model.generate(model.tokenizer.apply_chat_template(messages), max_new_tokens=5).text
    assert (code, out) == (0, f"{first}\n{second}\n{first}\n")
    assert err == "commands: /exit, /reset\n"
    assert run("chat", directory, "--stats", stdin="")[0] == 0


def test_chat_goes_on_after_a_message_that_is_too_long(run, tmp_path):
    make_tiny(tmp_path, model_max_length=64)
    code, out, err = run("chat", tmp_path, "--max-new-tokens", 2, stdin="x " * 200 + "\nhi\n")
    assert code == 0 and "the model's limit is 64" in err and err.count("\n") == 1
    assert len(out.splitlines()) >= 2 and out.startswith("\n") and out[1:].strip()


def test_chat_interrupted_answer_is_kept(run, directory, monkeypatch):
    prompts = []

    def interrupted(self, prompt, stream, **options):
        prompts.append(self.tokenizer.decode(prompt))
        stream(kimi_native.TokenEvent(0, 5, "so far"))
        raise KeyboardInterrupt

    monkeypatch.setattr(KimiLinear, "generate", interrupted)
    code, out, _ = run("chat", directory, stdin="a\nb\n")
    assert (code, out) == (0, "so far\nso far\n")
    assert "<|im_middle|>so far<|im_end|><|im_user|>user<|im_middle|>b" in prompts[1]


def test_bench(run, directory):
    options = ["--prompt-tokens", 70, "--new-tokens", 3, "--batch", 2, "--repeat", 2]
    code, out, _ = run("bench", directory, *options, "--json")
    result = json.loads(out)
    assert code == 0 and result["batch"] == 2 and result["dtype"] == "float32"
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        assert 0 < result[name]["min"] <= result[name]["median"] <= result[name]["max"]
    code, out, _ = run("bench", directory, *options)
    assert code == 0 and "prefill  2 x 70 tokens" in out and "decode   2 x 3 tokens" in out
    code, out, _ = run("bench", directory, "--prompt-tokens", 5, "--new-tokens", 1, "--repeat", 1, "--json")
    assert code == 0 and json.loads(out)["decode_tokens_per_second"] is None


def test_demo_makes_its_checkpoint_once(run, tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_NATIVE_CACHE", str(tmp_path))
    code, first, err = run("demo", "--preset", "tiny", "--max-new-tokens", 4)
    assert code == 0 and first.strip() and "making a random checkpoint" in err
    for line in ("prefill", "decode", "memory", "the weights are random"):
        assert line in err
    code, second, err = run("demo", "--preset", "tiny", "--max-new-tokens", 4)
    assert (code, second) == (0, first) and "making" not in err
    code, _, err = run("demo", "--preset", "tiny", "--max-new-tokens", 1, "--dir", tmp_path / "here")
    assert code == 0 and (tmp_path / "here" / "config.json").is_file()
    (tmp_path / "here" / "config.json").unlink()  # as after an interrupted run
    assert "making" in run("demo", "--preset", "tiny", "--max-new-tokens", 1, "--dir", tmp_path / "here")[2]


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{model}"], "no prompt: give --prompt, --prompt-file or --ids"),
        (["generate", "{model}", "--ids", "1 x"], "--ids must be whole numbers, got '1 x'"),
        (["generate", "{model}", "--ids", "1 9999"], "token id 9999 at position 1 is out of range [0, 768)"),
        (["generate", "{model}", "--prompt", ""], "the prompt is empty: give at least one token"),
        (["generate", "{model}", "--prompt", "a", "--system", "b"], "--system needs --chat"),
        (["generate", "{model}", "--ids", "1", "--chat"], "--chat takes text, not --ids"),
        (["generate", "{model}", "--prompt", "a", "--temperature", "-1"], "temperature must be 0 or more, got -1.0"),
        (
            ["generate", "{model}", "--prompt", "a", "--dtype", "int4"],
            f"--dtype {DTYPE_NAMES}, got 'int4'",
        ),
        (["generate", "{model}", "--prompt", "a", "--prefill-chunk", "100"], "prefill_chunk must be a positive multiple of 64, got 100"),
        (["generate", "{model}", "--prompt-file", "/does/not/exist"], "[Errno 2] No such file or directory: '/does/not/exist'"),
        (["generate", "/does/not/exist", "--prompt", "a"], "no directory /does/not/exist"),
        (["generate", "{ids}", "--prompt", "a"], "this checkpoint has no tiktoken.model: give token ids with --ids"),
        (["chat", "{ids}"], "this checkpoint has no tiktoken.model, and chat needs text"),
        (["plan", "--dtype", "int4"], f"dtype {DTYPE_NAMES}, got 'int4'"),
        (["plan", "--memory", "much"], "'much' is not an amount of memory; write for example 141GB, 80GiB or 512MiB"),
        (["plan", "--context", "2000000"], "context is 2000000; the model's limit is 1048576"),
        (["plan", "--config", "/does/not/exist"], "no config.json in /does/not/exist"),
        (["make-tiny", "{new}", "--preset", "huge"], "unknown preset 'huge'; there are tiny, tiny27, demo, mid"),
        (["make-tiny", "{new}", "--set", "num_experts"], "--set takes KEY=N, such as num_experts=32, got 'num_experts'"),
        (["make-tiny", "{new}", "--set", "experts=3"], "KimiLinearConfig has no field 'experts'"),
    ],
)
def test_errors_are_one_line(run, directory, without_tokenizer, tmp_path, arguments, message):
    places = {"{model}": directory, "{ids}": without_tokenizer, "{new}": tmp_path / "new"}
    code, out, err = run(*(places.get(a, a) for a in arguments))
    assert (code, out, err) == (1, "", f"kimi-native: {message}\n")


def test_failed_request_is_an_error(run, directory, monkeypatch):
    failed = kimi_native.Completion([1], finish_reason="error", error="out of pages")
    monkeypatch.setattr(KimiLinear, "generate", lambda self, prompts, **options: [failed])
    code, _, err = run("generate", directory, "--ids", "1")
    assert (code, err) == (1, "kimi-native: out of pages\n")


def test_unexpected_error_says_how_to_see_more(run, monkeypatch):
    def broken():
        raise KeyError("x")

    monkeypatch.setattr(cli, "collect_info", broken)
    monkeypatch.delenv("KIMI_NATIVE_TRACEBACK", raising=False)
    assert run("info") == (1, "", "kimi-native: KeyError: 'x' (KIMI_NATIVE_TRACEBACK=1 shows where)\n")
    monkeypatch.setenv("KIMI_NATIVE_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run("info")


def test_error_exit_code_of_the_process(tmp_path):
    done = process("plan", "--config", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"kimi-native: no config.json in {tmp_path}\n")


def test_wrong_usage_is_exit_code_2(capsys):
    for arguments in ([], ["nonsense"], ["plan", "--batch", "0"], ["generate"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
    assert "must be positive, got 0" in capsys.readouterr().err


def test_interrupt_and_broken_pipe(run, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "collect_info", stopped)
    assert run("info")[0] == 130
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "kimi_native", "plan"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, timeout=120)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


def test_terminal_is_not_steered_by_output(capsys, monkeypatch):
    text = "a\x1b[2Jb\tc\n\x9bd\x7fé中"
    cli._write(text)
    assert capsys.readouterr().out == text  # a file gets it as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli._write(text)
    assert capsys.readouterr().out == "a\ufffd[2Jb\tc\n\ufffdd\ufffdé中"
