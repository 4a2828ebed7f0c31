"""The `vllm serve` command with kimi_native installed, over HTTP: the plugin is found through its entry point alone, in the server's
own processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-integrations)")

import openai
from vllm_kit import TOLERANCE, Reference, prompts

START_SECONDS = 240
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "vllm_serve" / "serve.py"


@dataclass
class Server:
    url: str
    log: Path

    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def metric(self, name: str) -> float:
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(checkpoint), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    command += ["--max-num-batched-tokens", "64", "--max-num-seqs", "8"]
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    it = Server(f"http://127.0.0.1:{port}", log)
    try:
        wait_until_healthy(it, process)
        yield it
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, f"vllm serve ended with {process.returncode}:\n{server.log.read_text()[-4000:]}"
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"vllm serve is not up after {START_SECONDS} s:\n{server.log.read_text()[-4000:]}")


@dataclass
class Stream:
    """Tokens and their alternatives as they arrived, and the number of pieces they arrived in."""

    tokens: list[int]
    alternatives: list[dict[int, float]]
    pieces: int


def token_id(text: str) -> int:
    """of "token_id:17" """
    return int(text.removeprefix("token_id:"))


def streamed(server: Server, prompt: list[int] | str, new_tokens: int, stop_after: int | None = None) -> Stream:
    """One request, read piece by piece. With `stop_after`, the connection is closed after so many pieces."""
    out = Stream([], [], 0)
    extra = {"return_tokens_as_token_ids": True, "ignore_eos": True}
    request = server.client().completions.create(
        model="tiny", prompt=prompt, max_tokens=new_tokens, temperature=0.0, logprobs=5, stream=True, extra_body=extra
    )
    with request as pieces:
        for piece in pieces:
            said = piece.choices[0].logprobs
            if said is None:
                continue
            out.pieces += 1
            out.tokens += [token_id(text) for text in said.tokens]
            out.alternatives += [{token_id(text): value for text, value in at.items()} for at in said.top_logprobs]
            if out.pieces == stop_after:
                break
    return out


def check(stream: Stream, prompt: list[int], reference: Reference) -> float:
    expected = reference.log_probabilities(prompt + stream.tokens[:-1])[len(prompt) - 1 :]
    assert len(stream.alternatives) == len(stream.tokens) == expected.shape[0]
    worst = 0.0
    for row, token, alternatives in zip(expected, stream.tokens, stream.alternatives):
        assert len(alternatives) >= 5
        assert token == max(alternatives, key=lambda name: alternatives[name])
        worst = max(worst, *(abs(row[name].item() - value) for name, value in alternatives.items()))
    assert worst <= TOLERANCE, f"a log-probability is off by {worst:.2e}"
    return worst


def test_clients_stream_at_the_same_time(server: Server, reference: Reference, difference: Any) -> None:
    some = prompts([1, 3, 33, 64, 65, 129, 300, 600], seed=5)
    with ThreadPoolExecutor(len(some)) as clients:
        streams = list(clients.map(lambda prompt: streamed(server, prompt, 16), some))
    assert "kimi_native" in server.log.read_text() and "runs this model" in server.log.read_text()
    for stream, prompt in zip(streams, some):
        assert len(stream.tokens) == 16
        assert stream.pieces > 4, "the answer came in one piece: it was not streamed"
        difference(check(stream, prompt, reference))


def test_a_client_hangs_up(server: Server, reference: Reference, difference: Any) -> None:
    """The others' answers stay right, and the server stops working for the one that left."""
    stay, leave = prompts([65, 300], seed=6), prompts([64, 200, 31], seed=7)
    with ThreadPoolExecutor(8) as clients:
        leavers = [clients.submit(streamed, server, prompt, 800, stop_after=3) for prompt in leave]
        stayers = [clients.submit(streamed, server, prompt, 48) for prompt in stay]
        assert all(leaver.result().pieces == 3 for leaver in leavers)
        for stayer, prompt in zip(stayers, stay):
            stream = stayer.result()
            assert len(stream.tokens) == 48
            difference(check(stream, prompt, reference))
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running") == 0
    late = prompts([100], seed=8)[0]
    difference(check(streamed(server, late, 8), late, reference))


def test_text_in_and_text_out(server: Server, checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "Tell me about the history of a city."
    answer = server.client().completions.create(model="tiny", prompt=text, max_tokens=8, temperature=0.0, extra_body={"ignore_eos": True})
    stream = streamed(server, text, 8)
    assert answer.usage.prompt_tokens == len(tokenizer(text).input_ids)
    assert answer.choices[0].text == tokenizer.decode(stream.tokens, skip_special_tokens=True)


def test_the_example() -> None:
    """examples/vllm_serve/serve.py, as its text says to run it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=START_SECONDS + 60, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    prompt = "Most of the layers of this model carry"  # how the example's begins
    command, *text, last = done.stdout.splitlines()
    assert command.startswith("$ ")
    assert "\n".join(text).startswith(prompt)
    assert len("\n".join(text)) > 100
    assert "runs this model" in last
