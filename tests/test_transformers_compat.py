"""`kimi_native.accelerate`: transformers' own model on our operators, against the same model as it comes.

The gates are moderate, where transformers' chunked form of KDA is good to fp32 (tests/test_model.py has the real range, and what is
compared with there). The logits have a standard deviation near 1. Errors and refusals are in test_transformers_errors.py.
"""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import DEVICES, assert_same_bits
from model_kit import ALL_EXPERTS_BF16, REAL_LAYERS, SMALL, Variant, Zoo, build_reference, hub_config, replaced, tokens
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.models.kimi_linear import modeling_kimi_linear as library

from kimi_native import accelerate, ops, restore
from kimi_native.compat.transformers_cache import LatentLayer

TOLERANCE = {"cpu": 1e-4, "cuda": 5e-4}  # of a logit, fp32
# The released sizes of a head, in both kinds of attention.
REAL_HEADS = Variant(
    "real_heads",
    hub_config(
        num_hidden_layers=2, kda_layers=[1], full_attn_layers=[2], num_heads=2, head_dim=128, num_attention_heads=2, num_key_value_heads=2,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    ),
    seed=8,
)  # fmt: skip
PROMPT = tokens(200)
# Rows of unequal length, padded on the left with a token that means something elsewhere.
ROWS = [tokens(31, seed=1), tokens(131, seed=2), tokens(70, seed=3)]
MASK = torch.tensor([[0] * (131 - len(row)) + [1] * len(row) for row in ROWS])
PADDED = torch.tensor([[7] * (131 - len(row)) + row for row in ROWS])


def another(model: nn.Module) -> nn.Module:
    """A second model on the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@pytest.fixture(scope="module")
def plain(zoo: Zoo) -> nn.Module:
    """transformers' model as it comes; shared with other test files, never changed."""
    return zoo.reference(SMALL).model


@pytest.fixture(scope="module")
def fast(plain: nn.Module) -> nn.Module:
    return accelerate(another(plain))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def logits(model: nn.Module, ids: Any, **options: Any) -> Tensor:
    where = model.lm_head.weight.device
    options = {name: value.to(where) if isinstance(value, Tensor) else value for name, value in options.items()}
    with torch.no_grad():
        return model(torch.as_tensor(ids).to(where), **options).logits.cpu()


def generate(model: nn.Module, ids: Any, mask: Tensor | None = None, count: int = 200, **options: Any) -> Tensor:
    ids = torch.as_tensor(ids).to(model.device)
    mask = torch.ones_like(ids) if mask is None else mask.to(model.device)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **options)[:, ids.shape[1] :].cpu()


def in_chunks(model: nn.Module, ids: Tensor, sizes: list[int], mask: Tensor | None = None, cache: Any = None) -> Tensor:
    """Logits of all tokens, in forward passes of these many tokens behind one cache."""
    cache, parts, start = cache or DynamicCache(config=model.config), [], 0
    for size in sizes:
        stop = start + size
        options = {} if mask is None else {"attention_mask": mask[:, :stop]}
        parts.append(logits(model, ids[:, start:stop], past_key_values=cache, use_cache=True, **options))
        start = stop
    assert start == ids.shape[1] == cache.get_seq_length()
    return torch.cat(parts, dim=1)


def assert_near(ours: Tensor, theirs: Tensor, where: Tensor | None = None, device: str = "cpu") -> None:
    """Every logit (where `where` is 1) within the tolerance."""
    assert torch.isfinite(ours).all() and ours.shape == theirs.shape
    if where is not None:
        ours, theirs = ours[where.bool()], theirs[where.bool()]
    worst = (ours - theirs).abs().max().item()
    assert worst <= TOLERANCE[device], f"largest difference {worst:.1e}"


class Calls(Counter):
    """Counts the calls of every operator while it is entered."""

    def __enter__(self) -> Calls:
        self._originals = {name: getattr(ops, name) for name in ops.__all__}
        for name, op in self._originals.items():
            setattr(ops, name, self._counted(name, op))
        return self

    def __exit__(self, *_: object) -> None:
        for name, op in self._originals.items():
            setattr(ops, name, op)

    def _counted(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self[name] += 1
            return op(*args, **kwargs)

        return counted


# ------------------------------------------------------------------------------------------------ the same results


@pytest.mark.parametrize("variant", [SMALL, REAL_LAYERS, REAL_HEADS], ids=lambda v: v.name)
def test_logits(zoo: Zoo, variant: Variant, device: str):
    model = zoo.reference(variant).model
    ours = accelerate(copy.deepcopy(model).to(device))
    for length in (1, 2, 64, 65, 200):
        theirs, found = logits(model, [PROMPT[:length]]), logits(ours, [PROMPT[:length]])
        assert_near(found, theirs, device=device)
        assert torch.equal(found.argmax(-1), theirs.argmax(-1))
    assert 0.8 < theirs.std() < 1.2
    assert_near(logits(ours, PADDED, attention_mask=MASK), logits(model, PADDED, attention_mask=MASK), MASK, device)


def test_greedy_tokens(zoo: Zoo, plain: nn.Module, device: str):
    ours = accelerate(copy.deepcopy(plain).to(device))
    for prompt in (tokens(1, seed=5), tokens(70, seed=5)):
        expected = zoo.greedy(SMALL, prompt, 200)  # of transformers' own generate
        assert generate(ours, [prompt])[0].tolist() == expected
        assert len(set(expected)) > 20


def test_greedy_tokens_of_a_left_padded_batch(plain: nn.Module, device: str):
    ours = accelerate(copy.deepcopy(plain).to(device))
    found = generate(ours, PADDED, MASK)
    assert torch.equal(found, generate(plain, PADDED, MASK))
    for row, expected in zip(ROWS, found):  # and padding is nothing: as the row alone
        assert torch.equal(generate(ours, [row], count=60)[0], expected[:60])


CHUNKS = [[64, 64, 72], [63, 1, 2, 134], [1, 1, 1, 8, 9, 180], [200], [130] + [1] * 70, [100, 3, 5, 7, 85]]


@pytest.mark.parametrize("sizes", CHUNKS, ids=lambda s: "-".join(map(str, s[:6])))
def test_chunks_behind_a_cache(plain: nn.Module, sizes: list[int], device: str):
    ours, ids = accelerate(copy.deepcopy(plain).to(device)), torch.tensor([PROMPT, tokens(200, seed=9)])
    assert_near(in_chunks(ours, ids, sizes), logits(plain, ids), device=device)


@pytest.mark.parametrize("sizes", [[40, 91], [64, 3, 64], [110, 20, 1], [90, 11, 1, 1, 8, 20]], ids=lambda s: "-".join(map(str, s)))
def test_chunks_of_a_left_padded_batch(plain: nn.Module, fast: nn.Module, sizes: list[int]):
    """The first chunk may be padding altogether for some rows, and the padding may end within a later one."""
    theirs = in_chunks(plain, PADDED, sizes, MASK)
    assert_near(theirs, logits(plain, PADDED, attention_mask=MASK), MASK)
    assert_near(in_chunks(fast, PADDED, sizes, MASK), theirs, MASK)


def test_other_masks(plain: nn.Module, fast: nn.Module):
    """Right padding, holes, a row without any token, a mask that is given late, an additive mask: the library's attention, our rest."""
    holes = (torch.rand(3, 131, generator=torch.Generator().manual_seed(0)) > 0.2).long()
    for mask in (MASK.flip(1), holes, torch.cat([MASK[:2], torch.zeros_like(MASK[:1])])):
        assert_near(logits(fast, PADDED, attention_mask=mask), logits(plain, PADDED, attention_mask=mask), mask)
    assert_near(in_chunks(fast, PADDED, [64, 60, 7], holes), in_chunks(plain, PADDED, [64, 60, 7], holes), holes)
    causal = torch.full((3, 1, 131, 131), float("-inf")).triu(1)
    causal[:, :, :, :20] = float("-inf")
    causal.diagonal(dim1=2, dim2=3).zero_()
    assert_near(logits(fast, PADDED, attention_mask=causal), logits(plain, PADDED, attention_mask=causal))
    positions = torch.cat([torch.arange(60), torch.arange(71)])[None]  # two sequences in one row
    theirs = logits(plain, PADDED, position_ids=positions, use_cache=False)
    assert (theirs - logits(plain, PADDED)).abs().max() > 0.01
    assert_near(logits(fast, PADDED, position_ids=positions, use_cache=False), theirs)


def test_a_mask_that_changes(plain: nn.Module, fast: nn.Module):
    """Tokens that are seen, then masked, then seen again."""
    other, results = MASK.clone(), []
    other[1, :60] = 0
    for model in (plain, fast):
        cache = DynamicCache(config=model.config)
        masks = [None, MASK[1:2, :103], other[1:2, :118], other[1:2, :119], None]
        parts = [
            logits(model, PADDED[1:2, start:stop], past_key_values=cache, attention_mask=mask)
            for (start, stop), mask in zip([(0, 100), (100, 103), (103, 118), (118, 119), (119, 131)], masks)
        ]
        results.append(torch.cat(parts, dim=1))
    assert_near(results[1], results[0])
    assert (results[1] - logits(plain, PADDED[1:2])).abs().amax(-1)[0, 103:119].min() > 0.01


def test_beams(plain: nn.Module, fast: nn.Module):
    options = {"num_beams": 4, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 40}
    found, expected = (m.generate(PADDED, attention_mask=MASK, do_sample=False, **options) for m in (fast, plain))
    assert torch.equal(found.sequences, expected.sequences)
    assert (found.sequences_scores - expected.sequences_scores).abs().max() < 1e-4


def test_sampling(plain: nn.Module, fast: nn.Module):
    found = []
    for model in (fast, plain):
        torch.manual_seed(3)
        found.append(model.generate(PADDED, attention_mask=MASK, do_sample=True, temperature=0.8, top_p=0.9, max_new_tokens=30))
    assert torch.equal(*found)


def test_embeddings_instead_of_tokens(plain: nn.Module, fast: nn.Module):
    embeddings = plain.model.embed_tokens(PADDED)
    with torch.no_grad():
        found, expected = (m(inputs_embeds=embeddings, attention_mask=MASK).logits for m in (fast, plain))
        assert_near(found, expected, MASK)
        positional = fast.model(PADDED, MASK).last_hidden_state
    assert_near(fast.lm_head(positional), expected, MASK)


def test_bfloat16(zoo: Zoo):
    """Against fp32 on the same weights: no further from it than the library is. No expert can flip in this checkpoint."""
    theirs = zoo.reference(ALL_EXPERTS_BF16).model
    theirs = copy.deepcopy(theirs).to(torch.bfloat16)
    exact, ours = copy.deepcopy(theirs).float(), accelerate(another(theirs))
    ids = torch.tensor([PROMPT, tokens(200, seed=9)])
    reference, library_error = logits(exact, ids), None
    for sizes in ([200], [100] + [1] * 30 + [70]):
        library_error = (in_chunks(theirs, ids, sizes).float() - reference).norm()
        assert (in_chunks(ours, ids, sizes).float() - reference).norm() <= 1.1 * library_error
    assert 0 < library_error < 0.1 * reference.norm()


# ------------------------------------------------------------------------------------------------ it is ours that runs


def test_which_operators_run(fast: nn.Module):
    kda, mla, moe, norms = 3, 2, 4, 2 * 5 + 1
    with Calls() as calls:
        logits(fast, [PROMPT], use_cache=False)
    norms_of_latents = mla
    assert calls == {
        "short_conv": kda, "kda_prefill": kda, "gated_rms_norm": kda, "mla_prefill": mla, "moe_router": moe, "moe_experts": moe,
        "rms_norm": norms + norms_of_latents,
    }  # fmt: skip
    cache = DynamicCache(config=fast.config)
    logits(fast, [PROMPT], past_key_values=cache)
    with Calls() as calls:
        logits(fast, [[5]], past_key_values=cache)
    calls.pop("batch_invariant_linear")  # every projection, of one row
    assert calls == {
        "kda_decode_fused": kda, "mla_cache_write": mla, "mla_decode": mla, "moe_router": moe, "moe_experts": moe, "rms_norm": norms,
    }  # fmt: skip


OPERATORS = {
    "short_conv", "kda_prefill", "gated_rms_norm", "kda_decode_fused", "mla_cache_write", "mla_prefill", "mla_decode", "moe_router",
    "moe_experts", "rms_norm", "batch_invariant_linear",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_a_wrong_operator_is_seen(plain: nn.Module, fast: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch):
    """One hundredth off in any one of them is more than the tolerance."""
    original = getattr(ops, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        if name == "mla_cache_write":
            return original(args[0] * 1.01, *args[1:], **kwargs)
        out = original(*args, **kwargs)
        (out[0] if isinstance(out, tuple) else out).mul_(1.01)
        return out

    ids, sizes = torch.tensor([PROMPT]), [150] + [1] * 50
    expected = logits(plain, ids)
    assert_near(in_chunks(fast, ids, sizes), expected)
    monkeypatch.setattr(ops, name, wrong)
    assert (in_chunks(fast, ids, sizes) - expected).abs().max() > 2 * TOLERANCE["cpu"]


HOOKED = [
    "layers.0", "layers.0.self_attn", "layers.0.self_attn.q_proj", "layers.0.self_attn.conv1d", "layers.0.self_attn.forget_gate",
    "layers.0.self_attn.o_norm", "layers.1.mlp", "layers.1.mlp.gate", "layers.1.mlp.experts", "layers.1.mlp.shared_experts.down_proj",
    "layers.3.self_attn", "layers.3.self_attn.kv_a_layernorm", "layers.3.self_attn.kv_b_proj", "layers.4.input_layernorm", "norm",
]  # fmt: skip


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_of_modules_fire(plain: nn.Module, name: str):
    """As in the library, whichever module it is, with the library's outputs (conv1d's is never called there either)."""
    seen: dict[str, list[Any]] = {"plain": [], "fast": []}
    for kind, model in (("plain", another(plain)), ("fast", accelerate(another(plain)))):
        model.model.get_submodule(name).register_forward_hook(lambda _m, _i, out, kind=kind: seen[kind].append(out))
        in_chunks(model, torch.tensor([PROMPT[:12]]), [10, 1, 1])
    assert len(seen["fast"]) == len(seen["plain"]) == (0 if name.endswith("conv1d") else 3)
    for found, expected in zip(seen["fast"], seen["plain"]):
        if isinstance(expected, Tensor) and not name.endswith("kv_b_proj"):
            assert (found - expected).abs().max() < 1e-4


def test_no_weight_is_copied_or_moved(plain: nn.Module):
    model = copy.deepcopy(plain)

    def pointers() -> dict[str, int]:
        return {name: t.data_ptr() for name, t in [*model.named_parameters(), *model.named_buffers()]}

    def alive() -> dict[int, int]:
        """Bytes of every storage in this process, by address. Other tests may have left tensors of torch.compile without one."""
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.device.type != "meta"]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    generate(model, [PROMPT], count=3)  # what the library itself keeps
    before, held, attributes = pointers(), alive(), {name: set(vars(m)) for name, m in model.named_modules()}
    accelerate(model)
    generate(model, [PROMPT], count=3)
    assert pointers() == before
    weights = sum(t.nbytes for t in model.parameters())
    kept = sum(size for address, size in alive().items() if address not in held)
    assert kept < weights / 100, f"{kept} bytes of {weights}"
    added = {name: set(vars(m)) - attributes[name] for name, m in model.named_modules()}
    assert {name: names for name, names in added.items() if names} == {"model": {"_kimi_native_hook"}}


def test_weights_may_change_afterwards(plain: nn.Module):
    model, other = accelerate(copy.deepcopy(plain)), build_reference(Variant("other", seed=11))
    model.load_state_dict(other.state_dict())
    assert_near(in_chunks(model, torch.tensor([PROMPT]), [190] + [1] * 10), logits(other, [PROMPT]))
    with torch.no_grad():
        model.to(torch.bfloat16)(torch.tensor([PROMPT]))


# ------------------------------------------------------------------------------------------------ and back


def test_restore_gives_the_original_bits(plain: nn.Module):
    model = copy.deepcopy(plain)
    kinds, expected = [type(m) for m in model.modules()], logits(model, PADDED, attention_mask=MASK)
    hooks = len(model.model._forward_pre_hooks)
    tokens_before = generate(model, PADDED, MASK, count=5)
    assert accelerate(model) is model and accelerate(model) is model
    assert not torch.equal(logits(model, PADDED, attention_mask=MASK), expected)  # ours rounds otherwise
    once = len(model.model._forward_pre_hooks)
    assert once == hooks + 1
    assert restore(model) is model and restore(model) is model
    assert [type(m) for m in model.modules()] == kinds and len(model.model._forward_pre_hooks) == hooks
    assert not any("kimi_native" in name for m in model.modules() for name in vars(m))
    assert_same_bits(logits(model, PADDED, attention_mask=MASK), expected)
    assert torch.equal(generate(model, PADDED, MASK, count=5), tokens_before)
    with Calls() as calls:
        logits(model, [PROMPT])
    assert not calls
    for name, tensor in plain.state_dict().items():
        assert_same_bits(model.state_dict()[name], tensor, name)


@pytest.mark.parametrize("first", [True, False], ids=["ours then theirs", "theirs then ours"])
def test_switching_behind_one_cache(plain: nn.Module, first: bool):
    model, cache, parts = another(plain), DynamicCache(config=plain.config), []
    for i, (start, stop) in enumerate([(0, 70), (70, 102), (102, 103), (103, 104), (104, 108), (108, 131)]):
        (accelerate if (i % 2 == 0) == first else restore)(model)
        parts.append(logits(model, PADDED[:, start:stop], past_key_values=cache, attention_mask=MASK[:, :stop]))
    assert_near(torch.cat(parts, dim=1), logits(plain, PADDED, attention_mask=MASK), MASK)


def test_a_copy_and_a_saved_model(plain: nn.Module, fast: nn.Module, tmp_path):
    expected = logits(fast, [PROMPT])
    twin = copy.deepcopy(fast)
    assert_same_bits(logits(twin, [PROMPT]), expected)
    assert_same_bits(logits(restore(twin), [PROMPT]), logits(plain, [PROMPT]))
    assert_same_bits(logits(fast, [PROMPT]), expected)
    torch.save(fast, tmp_path / "model.pt")
    assert_same_bits(logits(torch.load(tmp_path / "model.pt", weights_only=False), [PROMPT]), expected)
    fast.save_pretrained(tmp_path / "saved")
    loaded = library.KimiLinearForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, attn_implementation="eager")
    assert loaded.config.architectures == ["KimiLinearForCausalLM"]
    assert_near(logits(loaded, [PROMPT]), expected)


# ------------------------------------------------------------------------------------------------ gradients, outputs, caches


def test_gradients_take_the_library(plain: nn.Module):
    ids = torch.tensor([PROMPT[:80]])
    gradients = []
    for model in (copy.deepcopy(plain), accelerate(copy.deepcopy(plain))):
        model.requires_grad_(True).train()
        with Calls() as calls:
            model(ids, labels=ids).loss.backward()
        assert not calls
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_same_bits(gradients[1][name], gradient, name)
    with Calls() as calls, torch.no_grad():
        model(ids)
    assert calls["kda_prefill"] == 3
    model.requires_grad_(False)
    embeddings = model.model.embed_tokens(ids).requires_grad_(True)
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0
    with Calls() as calls:  # nothing wants a gradient
        model(ids)
    assert calls["kda_prefill"] == 3


def test_gradients_behind_a_cache(plain: nn.Module):
    """A cache that ours has filled serves the library's code where gradients are wanted (which updates states in place, and so cannot
    differentiate behind a cache itself: here the forward alone)."""
    model, cache = accelerate(copy.deepcopy(plain)), DynamicCache(config=plain.config)
    logits(model, [PROMPT[:64]], past_key_values=cache)
    model.requires_grad_(True)
    with Calls() as calls:
        found = model(torch.tensor([PROMPT[64:80]]), past_key_values=cache).logits
    assert not calls and found.requires_grad
    assert_near(found.detach(), logits(plain, [PROMPT[:80]])[:, 64:])


def test_autocast_takes_the_library(plain: nn.Module, fast: nn.Module):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(logits(fast, [PROMPT]), logits(plain, [PROMPT]))


def test_recorded_outputs(plain: nn.Module, fast: nn.Module):
    options = {"output_attentions": True, "output_hidden_states": True, "output_router_logits": True, "use_cache": False}
    with torch.no_grad():
        found, expected = (m(PADDED, attention_mask=MASK, **options) for m in (fast, plain))
    assert_near(found.logits, expected.logits, MASK)
    counts = {"attentions": 2, "hidden_states": 6} | ({"router_logits": 4} if "router_logits" in expected else {})  # not in 5.17
    for name, count in counts.items():
        assert len(found[name]) == len(expected[name]) == count
        for a, b in zip(found[name], expected[name]):
            by_token = [t.transpose(1, 2) if name == "attentions" else t.reshape(*PADDED.shape, -1) for t in (a, b)]
            assert (by_token[0] - by_token[1])[MASK.bool()].abs().max() < 1e-4
    assert_near(logits(fast, PADDED, attention_mask=MASK), expected.logits, MASK)  # the recorder stays in place


def test_a_static_cache(plain: nn.Module, fast: nn.Module):
    """KDA and experts are ours, attention over the static buffer is the library's."""
    ids, sizes = torch.tensor([PROMPT[:100]]), [64, 30, 1, 1, 4]
    with Calls() as calls:
        found = in_chunks(fast, ids, sizes, cache=StaticCache(config=fast.config, max_cache_len=128))
    assert_near(found, in_chunks(plain, ids, sizes, cache=StaticCache(config=plain.config, max_cache_len=128)))
    assert calls["kda_decode_fused"] == 6 and calls["mla_decode"] == 0
    options = {"cache_implementation": "static", "disable_compile": True, "count": 40}
    assert torch.equal(generate(fast, PADDED, MASK, **options), generate(plain, PADDED, MASK, **options))


def test_the_cache_is_the_library_s(plain: nn.Module, fast: nn.Module):
    """What other code does with the model's cache object: lengths, contents, copies, selection, reset, refusals."""
    caches = []
    for model in (plain, fast):
        with torch.no_grad():
            caches.append(model(PADDED, attention_mask=MASK, use_cache=True).past_key_values)
    theirs, ours = caches
    assert type(ours) is type(theirs) is DynamicCache and ours.get_seq_length() == 131 and ours.get_max_length() == -1
    assert [type(layer) for layer in ours.layers[3:]] == [LatentLayer] * 2 and all(
        isinstance(layer, DynamicLayer) for layer in ours.layers[3:]
    )
    visible = MASK.bool()

    def same(ours: DynamicCache, theirs: DynamicCache, visible: Tensor) -> None:
        for a, b in zip(ours.layers, theirs.layers):
            if isinstance(b, DynamicLayer):
                assert a.get_mask_sizes(1) == b.get_mask_sizes(1)
                for x, y in ((a.keys, b.keys), (a.values, b.values)):
                    assert x.shape == y.shape and (x - y)[:, 0][visible].abs().max() < 1e-5
            else:
                assert (a.recurrent_states[0] - b.recurrent_states[0]).abs().max() < 1e-5
                assert (a.conv_states[0] - b.conv_states[0])[..., 1:].abs().max() < 1e-5  # the oldest of four is never used

    same(ours, theirs, visible)
    twin = copy.deepcopy(ours)
    step = torch.tensor([[3], [4], [5]])
    grown = torch.cat([MASK, torch.ones(3, 1, dtype=torch.int64)], dim=1)
    expected = logits(plain, step, past_key_values=copy.deepcopy(theirs), attention_mask=grown)
    assert_near(logits(fast, step, past_key_values=twin, attention_mask=grown), expected)
    same(ours, theirs, visible)  # the copy is another

    order = torch.tensor([2, 0, 0])
    for cache in (ours, theirs):
        cache.reorder_cache(order)
    same(ours, theirs, visible[order])
    expected = logits(plain, step, past_key_values=copy.deepcopy(theirs), attention_mask=grown[order])
    assert_near(logits(fast, step, past_key_values=copy.deepcopy(ours), attention_mask=grown[order]), expected)
    for a, b in zip(ours.layers[3:], theirs.layers[3:]):  # of these layers alone: the library has no such thing for KDA layers
        for layer in (a, b):
            layer.batch_repeat_interleave(2)
            layer.batch_select_indices(torch.tensor([5, 1, 2, 0]))
            layer.crop(-10)
        assert a.get_seq_length() == b.get_seq_length() == 121
        assert (a.keys - b.keys)[:, 0][visible[order][[2, 0, 1, 0], :121]].abs().max() < 1e-5
    for cache in (ours, theirs):
        with pytest.raises(RuntimeError, match="does not track past states"):
            cache.crop(-1)
        cache.reset()
    assert ours.get_seq_length() == 0
    assert_near(logits(fast, PADDED, past_key_values=ours, attention_mask=MASK), logits(plain, PADDED, attention_mask=MASK), MASK)
    with pytest.raises(ValueError, match="holds 3 sequences, the input 1"):
        logits(fast, [[1]], past_key_values=ours)


def test_the_buffer_grows(plain: nn.Module, fast: nn.Module):
    """One token at a time past several capacities, with padding that lies behind the end of the buffer."""
    mask = torch.tensor([[0] * 90 + [1] * 310, [0] * 3 + [1] * 397])
    ids = torch.tensor([tokens(400, seed=1), tokens(400, seed=2)])
    cache = DynamicCache(config=fast.config)
    found = in_chunks(fast, ids, [95, 90] + [1] * 20 + [100, 5] + [1] * 10 + [80], mask, cache)
    assert_near(found, logits(plain, ids, attention_mask=mask), mask)
    assert 400 <= cache.layers[3].capacity <= 640


def test_compiled(zoo: Zoo):
    """One graph without a cache."""
    plain = zoo.reference(REAL_HEADS).model
    model = accelerate(another(plain))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), Calls() as calls:
        found = compiled(torch.tensor([PROMPT]), use_cache=False).logits
    assert calls["kda_prefill"] == calls["mla_prefill"] == 1  # traced once
    assert_near(found, logits(plain, [PROMPT]))


def test_known_mistakes_are_seen(plain: nn.Module, fast: nn.Module):
    """What could go wrong in the wiring alone: the scale, the norm's epsilon, padding that is forgotten, a state that is not kept."""
    expected = logits(plain, PADDED, attention_mask=MASK)

    def error(**options: Any) -> float:
        found = in_chunks(fast, PADDED, [100] + [1] * 31, **options)
        return (found - expected)[MASK.bool()].abs().max().item()

    assert error(mask=MASK) <= TOLERANCE["cpu"]
    assert error() > 0.1  # padding taken for tokens
    attention = [layer.self_attn for layer in fast.model.layers[3:]]
    with replaced(*[(a, "scaling", 40**-0.5) for a in attention]):
        assert error(mask=MASK) > 0.01
    with replaced(*[(a.kv_a_layernorm, "variance_epsilon", 1e-5) for a in attention]):
        assert error(mask=MASK) > 2 * TOLERANCE["cpu"]
    with replaced((ops, "kda_decode_fused", _without_state(ops.kda_decode_fused))):
        assert error(mask=MASK) > 0.01


def _without_state(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forgetful(qkv: Tensor, weight: Tensor, conv: Tensor, g: Tensor, beta: Tensor, state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return op(qkv, weight, conv, g, beta, state.clone(), *args, **kwargs)

    return forgetful
