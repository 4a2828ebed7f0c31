"""The random checkpoints: the hub's format, values that do not depend on how they are stored, and a usable tokenizer."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kimi_native import KimiLinear, tiny
from kimi_native.config import ConfigError, KimiLinearConfig
from kimi_native.text import Tokenizer
from kimi_native.tiny import draw, make_tiny, make_tokens, tiny_config
from kimi_native.weights import checkpoint_tensors, load_weights, places


def stored(directory):
    """Every tensor of a checkpoint, by name, and the file that it lies in."""
    tensors, files = {}, {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in tensors
            tensors[name], files[name] = tensor, path.name
    return tensors, files


def test_hub_format(tmp_path):
    config = make_tiny(tmp_path / "new" / "place", shards=3)
    directory = tmp_path / "new" / "place"
    assert KimiLinearConfig.from_pretrained(directory) == config
    values = json.loads((directory / "config.json").read_text())
    assert values["linear_attn_config"]["kda_layers"] == [1, 2, 3] and values["linear_attn_config"]["full_attn_layers"] == [4]
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == values["eos_token_id"] == 514

    tensors, files = stored(directory)
    specs = checkpoint_tensors(config)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == {n: (s.shape, s.dtype) for n, s in specs.items()}
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == files
    assert index["metadata"]["total_size"] == sum(spec.num_bytes for spec in specs.values())
    assert sorted(set(files.values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    with safe_open(directory / "model-00001-of-00003.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    load_weights(directory, config)


def test_one_shard_has_no_index(tmp_path):
    config = make_tiny(tmp_path, shards=1)
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "model.safetensors.index.json").exists()
    load_weights(tmp_path, config)


def test_shards_are_of_about_equal_size():
    specs = checkpoint_tensors(tiny_config("demo"))
    total = sum(spec.num_bytes for spec in specs.values())
    for shards in (1, 2, 5, 20):
        groups = list(tiny._in_shards(specs, total, shards))
        assert [name for group in groups for name in group] == list(specs) and len(groups) == shards
        largest = max(spec.num_bytes for spec in specs.values())
        assert max(sum(spec.num_bytes for spec in group.values()) for group in groups) <= total / shards + largest


def test_values_depend_on_seed_and_name_only(tmp_path):
    make_tiny(tmp_path / "a", shards=2)
    make_tiny(tmp_path / "b", shards=1)
    make_tiny(tmp_path / "c", shards=5, dtype="bfloat16")
    make_tiny(tmp_path / "d", seed=1)
    a, b, c, d = (stored(tmp_path / x)[0] for x in "abcd")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(a[name].to(c[name].dtype), c[name]) for name in a)
    assert {name for name in c if c[name].dtype == torch.float32} == {name for name in c if name.endswith(("A_log", "dt_bias"))}
    assert not any(torch.equal(a[name], d[name]) for name in a)


def test_weights_are_wide():
    for name, spec in checkpoint_tensors(tiny_config("demo")).items():
        values = draw(name, spec, 0)
        assert torch.isfinite(values).all()
        if name.endswith("_proj.weight") or ".experts." in name:
            assert abs(values.std() * spec.shape[-1] ** 0.5 - 0.96) < 0.06, name
        elif name.endswith("norm.weight"):
            assert abs(values.mean() - 1) < 0.06 and 0.05 < values.std() < 0.15, name
        elif "conv1d" in name:
            assert 0.4 < values.std() < 0.9, name
        elif name.endswith("correction_bias"):
            assert 0.02 < values.std() < 0.09, name


def test_gates_span_the_range_of_the_released_model():
    config = tiny_config(kda_num_heads=8, kda_head_dim=64)
    specs = checkpoint_tensors(config)
    for layer in config.kda_layers:
        prefix = f"model.layers.{layer}.self_attn."
        decay = draw(prefix + "A_log", specs[prefix + "A_log"], 0).exp().flatten()
        assert 0.1 <= decay.min() < 0.3 and 70 < decay.max() <= 200
        step = torch.nn.functional.softplus(draw(prefix + "dt_bias", specs[prefix + "dt_bias"], 0).view(8, 64))
        log_decay = decay[:, None] * step
        assert 500 < log_decay.max() < 3000
        assert (log_decay.min(1).values < 0.05).all() and (log_decay.max(1).values > 0.7).all()  # slow and fast in one head
        mild = draw(prefix + "A_log", specs[prefix + "A_log"], 0, "mild").exp()
        assert 1 <= mild.min() and mild.max() <= 16
        step = torch.nn.functional.softplus(draw(prefix + "dt_bias", specs[prefix + "dt_bias"], 0, "mild"))
        assert 0.9e-3 < step.min() and step.max() < 0.11


def test_presets_and_patterns():
    released = KimiLinearConfig()
    assert tiny_config("tiny27").full_attn_layers == released.full_attn_layers
    assert tiny_config(num_layers=27).kda_layers == released.kda_layers
    assert tiny_config(layers="MKK").full_attn_layers == (0,)
    mid = tiny_config("mid")
    assert (mid.num_experts, mid.num_experts_per_token, mid.kda_head_dim, mid.v_head_dim) == (64, 8, 128, 128)
    assert min(len(mid.kda_layers), len(mid.full_attn_layers)) >= 2
    assert 0.5e9 < sum(spec.num_bytes for spec in checkpoint_tensors(mid).values()) < 1e9
    assert 30e6 < sum(spec.num_bytes for spec in checkpoint_tensors(tiny_config("demo")).values()) < 60e6


@pytest.mark.parametrize("preset", list(tiny.PRESETS))
def test_tokenizer_of_a_preset(tmp_path, preset):
    config = tiny_config(preset)
    tiny._write_tokenizer(tmp_path, make_tokens(config.vocab_size - 256))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.special_tokens["<|im_end|>"] == config.eos_token_ids[0]
    assert tokenizer.special_tokens["[BOS]"] == config.bos_token_id and tokenizer.special_tokens["[PAD]"] == config.pad_token_id
    for text in ("Tell me about the history of a river.", "1999, é, 中文, 🌍\n\n  x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" the memory of the state")) <= (8 if preset in ("tiny", "tiny27") else 6)


@pytest.mark.parametrize("num_ranks", [256, 300, 1792, 6000])
def test_merges_are_consistent(num_ranks):
    """Merging a token's own bytes by rank, it comes from exactly two tokens of lower rank, as a trained tokenizer's do."""
    tokens = make_tokens(num_ranks)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert len(ranks) == num_ranks and tokens[:256] == [bytes([b]) for b in range(256)]
    for token in tokens[256:]:
        parts = [bytes([b]) for b in token]
        while len(parts) > 1:
            merges = [(ranks.get(parts[i] + parts[i + 1], num_ranks), i) for i in range(len(parts) - 1)]
            rank, i = min(merges)
            if rank >= ranks[token]:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        assert len(parts) == 2, token


def test_without_tokenizer_any_vocabulary(tmp_path):
    config = make_tiny(tmp_path, vocab_size=128, tokenizer=False)
    assert not (tmp_path / "tiktoken.model").exists() and Tokenizer.from_pretrained(tmp_path) is None
    assert KimiLinearConfig.from_pretrained(tmp_path) == config and config.eos_token_ids == ()


def test_overwrite(tmp_path):
    make_tiny(tmp_path, shards=3)
    with pytest.raises(FileExistsError, match="is not empty"):
        make_tiny(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    config = make_tiny(tmp_path, shards=1, tokenizer=False, overwrite=True)
    left = {p.name for p in tmp_path.iterdir()}
    assert "model.safetensors" in left and "notes.txt" in left and "tiktoken.model" not in left
    assert not any("-of-00003" in name or "index" in name for name in left)
    load_weights(tmp_path, config)


def test_progress(tmp_path):
    seen = []
    config = make_tiny(tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = sum(spec.num_bytes for spec in checkpoint_tensors(config).values())
    assert seen[-1] == (total, total) and seen == sorted(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "unknown preset 'huge'"),
        ({"layers": "KXM"}, "layers must be letters K"),
        ({"layers": ""}, "layers must be letters K"),
        ({"layers": "KM", "num_layers": 3}, "num_layers is 3"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"shards": 0}, "shards must be positive"),
        ({"gates": "wild"}, "gates must be 'real' or 'mild'"),
        ({"vocab_size": 300}, "vocab_size must be at least 512"),
        ({"vocab_size": 100_000}, "vocab_size is at most"),
        ({"num_experts": 0}, "'num_experts' must be a positive integer"),
        ({"num_experts": 2}, "'num_experts_per_token' is larger"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_tiny(tmp_path, **options)
    assert isinstance(caught.value, ConfigError) == ("num_experts" in options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("gates", ["real", "mild"])
def test_random_weights_are_those_of_the_checkpoint(tmp_path, gates):
    make_tiny(tmp_path, seed=5, gates=gates, dtype="bfloat16")
    loaded = KimiLinear.from_pretrained(tmp_path)
    drawn = KimiLinear.random(loaded.config, seed=5, gates=gates)
    assert drawn.dtype == torch.bfloat16 and drawn.tokenizer is None
    ids = list(range(70))
    assert torch.equal(drawn.score(ids), loaded.score(ids))
    assert not torch.equal(KimiLinear.random(loaded.config, seed=6, gates=gates).score(ids), loaded.score(ids))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("gates", ["real", "mild"])
def test_random_weights_on_a_gpu_have_the_same_distribution(gates):
    config = tiny_config("tiny", dtype="float32")
    host = dict((name, place) for name, _, place in places(KimiLinear.random(config, gates=gates).weights, config))
    there = dict((name, place) for name, _, place in places(KimiLinear.random(config, device="cuda", gates=gates).weights, config))
    assert host.keys() == there.keys()
    for name, t in host.items():
        assert there[name].device.type == "cuda"
        if t.numel() >= 1000:
            assert there[name].std().item() == pytest.approx(t.std().item(), rel=0.2), name
            assert there[name].mean().item() == pytest.approx(t.mean().item(), abs=0.2 * t.std().item()), name
