"""What kimi_native's plugin does not support: it says so in one sentence, and vLLM is left as it would be without the plugin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-integrations)")

import model_kit
from vllm.engine.arg_utils import EngineArgs

from kimi_native.compat.vllm import model, platform, support
from kimi_native.tiny import make_tiny

OWN_MODEL, OUR_MODEL = "vllm.models.kimi_k3", "kimi_native.compat.vllm.model"

# A process with vLLM and its plugins: what stands in the two places that ours touches.
CHILD = """
import json, sys
# An editable install puts a finder before PYTHONPATH, which here names the package to be found.
sys.meta_path = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildInplaceFinder"]
import vllm
if len(sys.argv) > 1:
    vllm.__version__ = sys.argv[1]
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.models import ModelRegistry
from vllm.platforms.cpu import CpuPlatform
print(json.dumps({
    "model": ModelRegistry.models["KimiLinearForCausalLM"].module_name,
    "platform": CpuPlatform.check_and_update_config.__module__,
    "operators": "kimi_native.ops" in sys.modules,
}))
"""


def state_of_vllm(*arguments: str, **environment: str) -> tuple[dict[str, Any], str]:
    """What CHILD prints, and the log."""
    env = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"} | environment
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def assert_untouched(state: dict[str, Any]) -> None:
    assert state["model"] == OWN_MODEL
    assert state["platform"] == "vllm.platforms.cpu"


def test_registered_by_the_entry_point() -> None:
    state, log = state_of_vllm()
    assert state == {"model": OUR_MODEL, "platform": "kimi_native.compat.vllm.platform", "operators": True}
    assert "WARNING" not in log


def test_turned_off() -> None:
    state, log = state_of_vllm(KIMI_NATIVE_VLLM="0")
    assert_untouched(state)
    assert "WARNING" not in log


def test_unknown_version() -> None:
    state, log = state_of_vllm("0.99.0")
    assert_untouched(state)
    assert "kimi_native knows vLLM 0.32 and 0.33, this is 0.99.0: vLLM runs its own code" in log


def test_installed_but_not_built(tmp_path: Path) -> None:
    """The package and its entry point are there, its libraries are not."""
    import kimi_native

    site = tmp_path / "a" / "site"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(kimi_native.__file__).parent, site / "kimi_native", ignore=ignore)
    entry_points = metadata.distribution("kimi-native").read_text("entry_points.txt")
    information = site / f"kimi_native-{kimi_native.__version__}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kimi-native\nVersion: {kimi_native.__version__}\n")
    (information / "entry_points.txt").write_text(entry_points)
    state, log = state_of_vllm(PYTHONPATH=str(site), KIMI_NATIVE_LIB_DIR=str(tmp_path))
    assert_untouched(state)
    assert "kimi_native is not built: no _ops.so in" in log
    assert "In a source checkout run `make build`; otherwise `pip install .`" in log


# ------------------------------------------------------------------------------------------------ one model, or one engine


class OwnModel:
    """Stands for vLLM's model class."""

    def __init__(self, **arguments: Any):
        self.arguments = arguments


DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
UNSUPPORTED = [
    pytest.param({}, {"kda_head_dim": 24}, "linear_attn_config.head_dim 24 is not supported", id="head-dim"),
    pytest.param({"kv_cache_dtype": "fp8"}, {}, "kv_cache_dtype 'fp8' is not supported", id="fp8-cache"),
    pytest.param({"speculative_config": DRAFTS}, {}, "speculative decoding is not supported", id="drafts"),
    pytest.param({"enable_lora": True}, {}, "LoRA is not supported", id="lora"),
]


@pytest.mark.parametrize(("options", "sizes", "reason"), UNSUPPORTED)
def test_left_to_vllms_own_code(options: dict[str, Any], sizes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """The model class is vLLM's own, the schedule is the one that vLLM chooses without the plugin, and the warning says why."""
    make_tiny(tmp_path, preset="tiny", **sizes)
    arguments = EngineArgs(str(tmp_path), dtype="float32", skip_tokenizer_init=True, enable_prefix_caching=False, **options)
    said: list[str] = []

    class Logger:
        @staticmethod
        def warning_once(text: str, *values: Any) -> None:
            said.append(text % values)

    with model_kit.replaced((support, "logger", Logger), (model, "own_class", lambda: OwnModel)):
        config = arguments.create_engine_config()
        made = model.KimiLinearForCausalLM(vllm_config=config)
    assert isinstance(made, OwnModel)
    assert made.arguments["vllm_config"] is config
    assert said
    assert all(text.startswith("kimi_native leaves this model to vLLM's own code: ") and reason in text for text in said)
    platform.restore()
    try:
        without = arguments.create_engine_config()
    finally:
        platform.keep_chunked_prefill()
    assert config.scheduler_config == without.scheduler_config
    assert config.cache_config == without.cache_config


@pytest.mark.slow
def test_an_engine_that_is_refused_ends_as_without_the_plugin(checkpoint: Path) -> None:
    """A whole start with an 8-bit cache: the same error from vLLM with the plugin on and off, and the reason in the log."""
    code = (
        "import sys; from vllm import LLM; LLM(sys.argv[1], dtype='float32', kv_cache_dtype='fp8', max_model_len=256, enforce_eager=True)"
    )
    ends, logs = [], []
    for switch in ("0", "1"):
        environment = os.environ | {"KIMI_NATIVE_VLLM": switch}
        done = subprocess.run([sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, env=environment, timeout=300)
        ends.append([line for line in done.stderr.splitlines() if "Error" in line][-1:])
        logs.append(done.stdout + done.stderr)
    assert ends[0] == ends[1]
    reason = "kimi_native leaves this model to vLLM's own code: kv_cache_dtype 'fp8' is not supported"
    assert reason not in logs[0]
    assert reason in logs[1]


def test_a_checkpoint_with_a_missing_tensor(tmp_path: Path) -> None:
    """The error names it."""
    from safetensors.torch import load_file, save_file
    from vllm import LLM

    make_tiny(tmp_path, preset="tiny", shards=1)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.A_log"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"missing tensor 'model.layers.1.self_attn.A_log' in the checkpoint"):
        LLM(str(tmp_path), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=256)
