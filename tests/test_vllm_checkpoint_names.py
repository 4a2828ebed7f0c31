"""Names that the vLLM plugin's loader accepts: every tensor of transformers' own model, in memory, becomes the hub's tensors."""

import pytest
import torch
from model_kit import SMALL, build_reference, hub_names, read_tensors

from kimi_native.compat.vllm.names import hub_tensors
from kimi_native.config import KimiLinearConfig


@pytest.fixture(scope="module")
def model():
    return build_reference(SMALL)


CONFIG = KimiLinearConfig.from_dict(SMALL.config)


def same(ours, expected):
    assert sorted(ours) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name].squeeze(), tensor.squeeze(), rtol=0, atol=0, msg=name)


def test_transformers_names_become_the_hubs(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = hub_names(read_tensors(tmp_path))
    in_memory = model.state_dict()
    assert any(name.endswith("experts.gate_up_proj") for name in in_memory)
    assert any(name.endswith("self_attn.conv1d.weight") for name in in_memory)
    same({hub: part for name, t in in_memory.items() for hub, part in hub_tensors(name, t, CONFIG)}, saved)
    same({hub: part for name, t in read_tensors(tmp_path).items() for hub, part in hub_tensors(name, t, CONFIG)}, saved)


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("model.layers.0.block_sparse_moe.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.1.mlp.gate.weight", "model.layers.1.block_sparse_moe.gate.weight"),
        ("model.layers.1.self_attn.q_conv1d.weight", "model.layers.1.self_attn.q_conv1d.weight"),
        ("model.layers.2.input_layernorm.weight", "model.layers.2.input_layernorm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.layers.x.y", "model.layers.x.y"),
    ],
)
def test_one_name(name, hub):
    assert [found for found, _ in hub_tensors(name, torch.zeros(1), CONFIG)] == [hub]
