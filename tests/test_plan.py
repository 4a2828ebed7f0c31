"""The planner: exact bytes of the released model, and that its sizes are those of real checkpoints and caches."""

import json
from dataclasses import replace

import pytest
import torch

from kimi_native.cache import KdaCache, LatentCache
from kimi_native.config import KimiLinearConfig
from kimi_native.plan import human_bytes, make_plan, parse_bytes
from kimi_native.tiny import make_tiny, tiny_config
from kimi_native.weights import load_weights

RELEASED = KimiLinearConfig()


def test_the_released_model():
    plan = make_plan(RELEASED, context=131072)
    assert plan.weight_bytes == 98_245_528_576 and plan.num_parameters == 49_122_681_728
    assert {group: parameters for group, (parameters, _) in plan.weights.items()} == {
        "routed experts": 47_110_422_528, "KDA": 790_285_440, "embedding": 377_487_360, "lm_head": 377_487_360, "MLA": 203_804_160,
        "shared experts": 184_025_088, "dense MLP": 63_700_992, "router": 15_342_080, "norms": 126_720,
    }  # fmt: skip
    assert sum(size - 2 * parameters for parameters, size in plan.weights.values()) == 165_120  # A_log and dt_bias in float32
    assert (plan.recurrent_bytes, plan.conv_bytes, plan.state_bytes) == (41_943_040, 1_474_560, 43_417_600)
    assert (plan.latent_bytes_per_token, plan.all_mla_bytes_per_token) == (8_064, 31_104)
    assert plan.pages == 2048 and plan.sequence_bytes == 43_417_600 + 131_072 * 8_064
    assert plan.total_bytes == 98_245_528_576 + plan.sequence_bytes
    text = plan.render()
    for number in ("98,245,528,576 B", "8,064 B", "43,417,600 B", "31,104 B"):
        assert number in text


@pytest.mark.parametrize(("context", "pages"), [(1, 1), (64, 1), (65, 2), (4096, 64), (1048576, 16384)])
def test_whole_pages_of_every_sequence(context, pages):
    plan = make_plan(RELEASED, context=context, batch=3)
    assert plan.pages == pages and plan.cache_bytes == 3 * (43_417_600 + pages * 64 * 8_064)


def test_break_even():
    plan = make_plan(RELEASED, context=1)
    at = plan.smaller_from
    assert 43_417_600 + at * 8_064 < at * 31_104 and 43_417_600 + (at - 1) * 8_064 >= (at - 1) * 31_104


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("memory", ["99GB", "141GB", "192GiB"])
def test_what_fits_is_the_most_that_fits(memory, batch):
    plan = make_plan(RELEASED, context=10_000, batch=batch, memory=parse_bytes(memory), reserve=10**8)
    available = parse_bytes(memory) - 10**8

    def total(context, sequences):
        return make_plan(RELEASED, context=context, batch=sequences).total_bytes

    assert plan.max_batch == 0 or total(10_000, plan.max_batch) <= available
    assert total(10_000, plan.max_batch + 1) > available
    assert plan.max_context % 64 == 0 and total(plan.max_context, batch) <= available
    if plan.max_context < RELEASED.model_max_length:
        assert total(plan.max_context + 1, batch) > available
    assert f"{plan.max_context:,} tokens each" in plan.render()


def test_memory_too_small():
    plan = make_plan(RELEASED, context=64, memory=parse_bytes("80GB"))
    assert plan.max_batch == plan.max_context == 0 and "the weights alone do not fit" in plan.render()
    just_weights = make_plan(RELEASED, context=64, memory=98_245_528_576)
    assert just_weights.max_batch == just_weights.max_context == just_weights.free_bytes == 0


def test_layers_of_one_kind():
    only_mla = make_plan(tiny_config(layers="MM"), context=100, memory=10**9)
    assert only_mla.state_bytes == 0 and only_mla.smaller_from is None and "the same model" in only_mla.render()
    only_kda = make_plan(tiny_config(layers="KK"), context=100, memory=10**9)
    assert only_kda.page_bytes == 0 and only_kda.max_context == 65536


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_a_checkpoint_and_its_caches(tmp_path, dtype):
    config = make_tiny(tmp_path, dtype=dtype)
    plan = make_plan(config, context=200, dtype="bf16" if dtype == "bfloat16" else None)
    assert plan.weight_bytes == json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    bias_bytes = config.num_experts * sum(map(config.is_moe, range(config.num_hidden_layers)))
    in_float32 = (4 - (2 if dtype == "bfloat16" else 4)) * bias_bytes  # the router's bias, which is loaded in float32
    assert load_weights(tmp_path, config).num_bytes == plan.weight_bytes + in_float32

    torch_dtype = getattr(torch, dtype)
    assert KdaCache(config, 2, "cpu", torch_dtype).bytes_per_slot == plan.state_bytes
    assert LatentCache(config, 3, "cpu", torch_dtype).bytes_per_page == plan.page_bytes


def test_to_dict_is_json():
    values = json.loads(json.dumps(make_plan(RELEASED, context=131072, memory=141 * 10**9).to_dict()))
    assert values["weight_bytes"] == 98_245_528_576 and values["weights"]["KDA"]["bytes"] == 1_580_736_000
    assert values["latent_bytes_per_token"] == 8_064 and values["state_bytes"] == 43_417_600 and values["max_context"] == 1048576


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be positive"),
        ({"context": 2_000_000}, "the model's limit is 1048576"),
        ({"context": 1, "batch": 0}, "batch must be positive"),
        ({"context": 1, "dtype": "int8"}, "dtype must be one of"),
        ({"context": 1, "memory": -1}, "must not be negative"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(RELEASED, **options)
    with pytest.raises(ValueError, match="dtype must be bfloat16, float16 or float32"):
        make_plan(replace(RELEASED, dtype="float64"), context=1)


def test_parse_bytes():
    cases = {"141GB": 141 * 10**9, "80 GiB": 80 * 2**30, "1.5kb": 1500, "512mib": 2**29, "7": 7, "2 TB": 2 * 10**12, "9B": 9}
    assert {text: parse_bytes(text) for text in cases} == cases
    for bad in ("", "GB", "10 apples", "-3GB", "1e9"):
        with pytest.raises(ValueError, match="is not an amount of memory"):
            parse_bytes(bad)


def test_human_bytes():
    cases = {
        0: "0 B",
        999: "999 B",
        1000: "1.00 kB",
        98_245_528_576: "98.2 GB",
        999_600: "1.00 MB",
        123_456: "123 kB",
        -5 * 10**9: "-5.00 GB",
    }
    assert {size: human_bytes(size) for size in cases} == cases
