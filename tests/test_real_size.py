"""One layer of each kind at the released model's size: 2304 wide, 32 heads of 128, latents of 512 + 64, an MLP of 9216, 256 experts.

The attention layers and the dense MLP run as a two-layer model against transformers; the mixture of experts, 3.6 GB in bf16, against its
fp64 specs, and only the chosen experts are ever written or read.
"""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from kit import DEVICES, assert_close, assert_same_bits, randn
from model_kit import LOGIT_TOLERANCE, Variant, Zoo, hub_config, tokens
from spec.moe_experts import MAX_R as EXPERTS_MAX_R
from spec.moe_experts import moe_experts as experts_spec
from spec.moe_router import MAX_R as ROUTER_MAX_R
from spec.moe_router import moe_router as router_spec
from spec.moe_router import scores

from kimi_native import KimiLinear, KimiLinearConfig, SequenceCache, ops
from kimi_native.model import make_batch
from kimi_native.weights import MoeWeights

pytestmark = pytest.mark.real_size

# Layer 0: KDA and the dense MLP. Layer 1: MLA, and experts small enough not to matter here.
TWO_LAYERS = Variant(
    "real_size",
    hub_config(
        num_hidden_layers=2,
        kda_layers=[1],
        full_attn_layers=[2],
        num_heads=32,
        head_dim=128,
        hidden_size=2304,
        num_attention_heads=32,
        num_key_value_heads=32,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=9216,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=64,
    ),
    gates="real",
    shards=2,
    seed=11,
)


@pytest.mark.parametrize("device", DEVICES)
def test_attention_and_dense_mlp(zoo: Zoo, device):
    """Prefill of 100 tokens, then decoding, against transformers in fp32."""
    zoo = zoo.on(device)
    ids = tokens(104)
    reference, model = zoo.reference(TWO_LAYERS).recurrent_logits(ids), zoo.model(TWO_LAYERS)
    kda, latent = model.make_caches(1, 2)
    sequence = SequenceCache(kda, latent)
    parts = [model.forward(make_batch([(sequence, ids[:100])], [], model.device), kda, latent)]
    sequence.num_tokens = 100
    for token in ids[100:]:
        parts.append(model.forward(make_batch([], [(sequence, token)], model.device), kda, latent))
        sequence.num_tokens += 1
    ours = torch.cat(parts).cpu()
    assert 0.5 < reference.std() < 2
    assert (ours - reference).abs().max() <= (LOGIT_TOLERANCE if device == "cpu" else 5e-4)
    assert torch.equal(ours.argmax(-1), reference.argmax(-1))


@pytest.mark.parametrize("device", DEVICES)
def test_mixture_of_experts_in_bf16(device):
    """Router, 8 of 256 experts and the shared one, as the model calls them, in bf16."""
    config = KimiLinearConfig()
    hidden, inner, count, top_k = config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_token
    x = randn(5, hidden, dtype=torch.bfloat16)
    layer = MoeWeights(
        router=randn(count, hidden, dtype=torch.bfloat16, seed=1, scale=hidden**-0.5),
        router_bias=randn(count, seed=2, scale=0.05),
        w13=torch.empty(count, 2 * inner, hidden, dtype=torch.bfloat16),  # pages that nothing touches cost nothing
        w2=torch.empty(count, hidden, inner, dtype=torch.bfloat16),
        shared_w13=randn(2 * inner, hidden, dtype=torch.bfloat16, seed=3, scale=hidden**-0.5),
        shared_w2=randn(hidden, inner, dtype=torch.bfloat16, seed=4, scale=inner**-0.5),
    )
    score = scores(x, layer.router)
    weights, ids, biased = router_spec(score, layer.router_bias, top_k, config.routed_scaling_factor, True)
    assert (biased[:, :-1] - biased[:, 1:]).min() > 1e-5  # no near ties: the ids are certain
    base13, base2 = randn(2 * inner, hidden, seed=5, scale=hidden**-0.5), randn(hidden, inner, seed=6, scale=inner**-0.5)
    for e in ids.unique().tolist():
        layer.w13[e] = (base13.roll(e, 0) * (1 + e % 3)).to(torch.bfloat16)
        layer.w2[e] = base2.roll(e, 1).to(torch.bfloat16)

    host_layer, layer, x = layer, MoeWeights(*(getattr(layer, f.name).to(device) for f in fields(layer))), x.to(device)
    our_weights, our_ids = ops.moe_router(x, layer.router, layer.router_bias, top_k=top_k, scale=config.routed_scaling_factor)
    assert torch.equal(our_ids.cpu(), ids)
    assert_close(our_weights, weights, ROUTER_MAX_R, "routing weights")
    model = object.__new__(KimiLinear)
    model.config = config
    out = model._moe(x, layer)
    expected = experts_spec(x.cpu(), host_layer.w13, host_layer.w2, weights, ids, host_layer.shared_w13, host_layer.shared_w2)
    assert_close(out, expected, EXPERTS_MAX_R[torch.bfloat16])
    assert_same_bits(model._moe(x[2:3], layer), out[2:3], "one token alone")
