"""Kimi-Linear behind an HTTP server: `vllm serve` with kimi_native's operators, asked by the `openai` client.

    pip install kimi-native vllm openai
    python examples/vllm_serve/serve.py                a small random checkpoint: the answer is noise, the way is the real one
    python examples/vllm_serve/serve.py --model DIR    a checkpoint of your own

kimi_native is a plugin that vLLM finds by itself, so the server is the ordinary command, here on a CPU:

    vllm serve DIR --dtype float32 --enforce-eager --max-model-len 4096

and KIMI_NATIVE_VLLM=0 in its environment turns the plugin off.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROMPT = "Most of the layers of this model carry a state of fixed size from token to token."
NAME = "kimi-linear"


@contextmanager
def serve(model: Path, log: Path, start_seconds: int) -> Iterator[str]:
    """Runs `vllm serve` until the end of the block; gives the server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--served-model-name", NAME, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"]
    print("$", " ".join(command), flush=True)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}  # GB
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + start_seconds
        while not answers(f"{url}/health"):
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"vllm serve did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield url
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def ask(url: str, prompt: str, max_tokens: int) -> str:
    """Prints the answer as it arrives; returns it."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    pieces = client.completions.create(model=NAME, prompt=prompt, max_tokens=max_tokens, temperature=0.0, stream=True)
    text = ""
    for piece in pieces:
        print(piece.choices[0].text, end="", flush=True)
        text += piece.choices[0].text
    print()
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; without one, a small random one is made")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--start-seconds", type=int, default=300, help="how long the server may take to start")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = args.model
        if model is None:
            from kimi_native.tiny import make_tiny

            model = Path(directory) / "model"
            make_tiny(model, preset="demo")
        log = Path(directory) / "log"
        with serve(model, log, args.start_seconds) as url:
            print(args.prompt, end="", flush=True)
            ask(url, args.prompt, args.max_tokens)
        ours = [line for line in log.read_text().splitlines() if "kimi_native" in line and "runs this model" in line]
        print(ours[0] if ours else "kimi_native did not run this model; the server's log says why")


if __name__ == "__main__":
    main()
