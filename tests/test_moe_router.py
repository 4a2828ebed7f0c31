import pytest
import torch
from kit import (
    DEVICE_DTYPES,
    DEVICES,
    Guarded,
    assert_close,
    assert_same_bits,
    cuda_backend,
    graph_replays,
    needs_gpu,
    opcheck,
    randn,
    strided,
    threads,
)
from spec.moe_router import MAX_R, TIE, scores
from spec.moe_router import moe_router as spec

import kimi_native
from kimi_native.ops import moe_router

# tokens, experts, top_k, width
SHAPES = [(0, 8, 2, 16), (1, 1, 1, 1), (3, 7, 7, 5), (5, 33, 4, 40), (30, 64, 8, 130), (2, 256, 8, 2304), (27, 512, 32, 24), (4, 40, 32, 9)]


def check(weights, ids, score, bias, top_k, scale, renormalize):
    """Against the spec, where experts whose biased scores are equal to fp32 rounding may come in either order."""
    _, ref_ids, ref_biased = spec(score, bias, top_k, scale, renormalize)
    assert weights.shape == ids.shape == ref_ids.shape and ids.dtype == torch.int32 and weights.dtype == torch.float32
    if ids.numel() == 0:
        return
    assert ids.min() >= 0 and ids.max() < score.shape[1]
    assert all(len(set(row)) == top_k for row in ids.tolist()), "an expert was chosen twice"
    biased = (score + bias.double()).gather(1, ids.long())
    assert (biased - ref_biased).abs().max() <= TIE
    chosen = score.gather(1, ids.long())
    assert_close(weights, (chosen / (chosen.sum(1, keepdim=True) + 1e-20) if renormalize else chosen) * scale, MAX_R, "weights")
    return (ids == ref_ids).double().mean().item()


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("renormalize", [True, False])
def test_against_spec(shape, renormalize, dtype, device):
    t, e, k, d = shape
    x, weight = randn(t, d, dtype=dtype, device=device), randn(e, d, dtype=dtype, device=device, seed=1, scale=d**-0.5)
    bias = randn(e, device=device, seed=2, scale=0.1)
    weights, ids = moe_router(x, weight, bias, top_k=k, scale=2.446, renormalize=renormalize)
    same = check(weights.cpu(), ids.cpu(), scores(x, weight).cpu(), bias.cpu(), k, 2.446, renormalize)
    assert same is None or same > 0.98


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sigma, bias_sigma", [(10.0, 0.1), (1e-3, 0.0), (1.0, 30.0), (40.0, 1.0)])
def test_regimes(sigma, bias_sigma, device):
    logits, bias = randn(40, 256, device=device, scale=sigma), randn(256, device=device, seed=1, scale=bias_sigma)
    weights, ids = moe_router(None, None, bias, top_k=8, scale=2.446, logits=logits)
    check(weights.cpu(), ids.cpu(), scores(None, None, logits).cpu(), bias.cpu(), 8, 2.446, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("e", [9, 64, 256, 500])
def test_lowest_id_wins_a_tie(e, device):
    bias = torch.zeros(e, device=device)
    _, ids = moe_router(None, None, bias, top_k=9, logits=torch.zeros(3, e, device=device))
    assert ids.tolist() == [list(range(9))] * 3
    logits = torch.zeros(2, e, device=device)  # two levels, ties within each
    logits[0, [e - 1, e // 2, 3]] = 1.0
    logits[1, ::2] = -1.0
    _, ids, _ = spec(scores(None, None, logits.cpu()), bias.cpu(), 4, 1.0, True)
    assert moe_router(None, None, bias, top_k=4, logits=logits)[1].tolist() == ids.tolist()
    bias[1::2] = -0.0  # and zeros of both signs are equal
    none = torch.full((1, e), float("-inf"), device=device)
    assert moe_router(None, None, bias, top_k=4, logits=none)[1].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("device", DEVICES)
def test_bias_chooses_and_does_not_weigh(device):
    logits = torch.zeros(1, 16, device=device)
    bias = torch.zeros(16, device=device)
    bias[11], bias[5] = 100.0, 50.0
    weights, ids = moe_router(None, None, bias, top_k=2, scale=3.0, logits=logits)
    assert ids.tolist() == [[11, 5]] and weights.tolist() == [[1.5, 1.5]]
    weights, _ = moe_router(None, None, bias, top_k=2, scale=3.0, renormalize=False, logits=logits)
    assert weights.tolist() == [[1.5, 1.5]]


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinite_logits(device):
    e, k = 20, 6
    bias = randn(e, device=device, scale=0.01)
    nan, inf = float("nan"), float("inf")
    logits = randn(5, e, device=device, seed=1)
    logits[0] = nan
    logits[1, :15] = nan
    logits[2] = -inf
    logits[3, 4], logits[3, 5] = inf, -nan
    weights, ids = moe_router(None, None, bias, top_k=k, logits=logits)
    assert ids.min() >= 0 and ids.max() < e and all(len(set(row)) == k for row in ids.tolist())
    assert ids[0].tolist() == list(range(k)) and weights[0].isnan().all()
    assert sorted(ids[1].tolist()) == [0, 15, 16, 17, 18, 19] and ids[1, 5] == 0  # NaN last, and only when nothing else is left
    assert weights[2].tolist() == [0.0] * k  # 0 / (0 + 1e-20)
    assert 4 in ids[3].tolist() and 5 not in ids[3].tolist() and weights[3].isfinite().all()
    clean = moe_router(None, None, bias, top_k=k, logits=logits[4:])
    assert_same_bits(weights[4:], clean[0], "beside NaN")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_strides_given_outputs_and_nothing_outside(dtype, device):
    x, weight, bias = randn(30, 50, dtype=dtype, device=device), randn(37, 50, dtype=dtype, device=device, seed=1), randn(37, device=device)
    plain = moe_router(x, weight, bias, top_k=5)
    weights, ids = Guarded(30, 5, dtype=torch.float32, device=device), Guarded(30, 5, dtype=torch.int32, device=device)
    moe_router(strided(x), strided(weight), bias, top_k=5, out=(weights.tensor, ids.tensor))
    for guarded, want in ((weights, plain[0]), (ids, plain[1])):
        guarded.check()
        assert_same_bits(guarded.tensor, want)
    logits = randn(30, 37, device=device)
    assert_same_bits(
        moe_router(None, None, bias, top_k=5, logits=strided(logits))[0], moe_router(None, None, bias, top_k=5, logits=logits)[0]
    )


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_a_token_has_the_same_bits_in_every_batch(dtype, device):
    x, weight, bias = (
        randn(150, 300, dtype=dtype, device=device),
        randn(96, 300, dtype=dtype, device=device, seed=1),
        randn(96, device=device),
    )
    weights, ids = moe_router(x, weight, bias, top_k=8)
    for first, rows in ((0, 1), (7, 2), (100, 24), (50, 25), (3, 100)):
        part = moe_router(x[first : first + rows], weight, bias, top_k=8)
        assert_same_bits(part[0], weights[first : first + rows])
        assert_same_bits(part[1], ids[first : first + rows])
    for n in (1, 2, 5):
        with threads(n):
            again = moe_router(x, weight, bias, top_k=8)
        assert_same_bits(again[0], weights)
        assert_same_bits(again[1], ids)


def test_opcheck():
    x, weight, bias, logits = randn(4, 32), randn(7, 32, seed=1), randn(7), randn(4, 7)
    out = torch.empty(4, 3), torch.empty(4, 3, dtype=torch.int32)
    opcheck(torch.ops.kimi_native.moe_router, (x, weight, bias, None, 3, 1.5, True, *out))
    opcheck(torch.ops.kimi_native.moe_router, (None, None, bias, logits, 3, 1.5, False, *out))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_real_width_in_every_batch(dtype, device):
    """All kernels of the logits at once: few tokens, small and large tiles; and what the sum over 2304 columns costs in accuracy."""
    x, weight = randn(400, 2304, dtype=dtype, device=device), randn(256, 2304, dtype=dtype, device=device, seed=1, scale=2304**-0.5)
    bias = randn(256, device=device, seed=2, scale=0.1)
    weights, ids = moe_router(x, weight, bias, top_k=8, scale=2.446)
    same = check(weights.cpu(), ids.cpu(), scores(x, weight).cpu(), bias.cpu(), 8, 2.446, True)
    assert same > 0.998
    for rows in (1, 16, 17, 64, 65, 130):
        part = moe_router(x[100 : 100 + rows], weight, bias, top_k=8, scale=2.446)
        assert_same_bits(part[0], weights[100 : 100 + rows], f"{rows} tokens")
        assert_same_bits(part[1], ids[100 : 100 + rows], f"{rows} tokens")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("tokens", [5, 70])
def test_memory_that_is_not_aligned(tokens, dtype, device):
    x, weight = randn(tokens, 72, dtype=dtype, device=device), randn(40, 72, dtype=dtype, device=device, seed=1)
    bias = randn(40, device=device, seed=2)
    plain = moe_router(x, weight, bias, top_k=5)
    moved = torch.cat([x.new_full((1,), float("nan")), x.flatten()])[1:].view(tokens, 72)
    again = moe_router(moved, weight, bias, top_k=5)
    assert_same_bits(again[0], plain[0])
    assert_same_bits(again[1], plain[1])


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 40, 3000])
def test_graph_replay(tokens):
    x, weight = randn(tokens, 2304, dtype=torch.bfloat16, device="cuda"), randn(256, 2304, dtype=torch.bfloat16, device="cuda", seed=1)
    bias = randn(256, device="cuda", seed=2)
    out = torch.empty(tokens, 8, device="cuda"), torch.empty(tokens, 8, dtype=torch.int32, device="cuda")
    graph_replays(lambda: moe_router(x, weight, bias, top_k=8, out=out), list(out))


@needs_gpu
def test_tensors_past_2_to_the_31_elements():
    dim, e = 2304, 16
    tokens = 2**31 // dim + 80
    last, weight = randn(100, dim, dtype=torch.bfloat16, device="cuda"), randn(e, dim, dtype=torch.bfloat16, device="cuda", seed=1)
    x = torch.zeros(tokens, dim, dtype=torch.bfloat16, device="cuda")
    x[-100:] = last
    bias = torch.zeros(e, device="cuda")
    weights, ids = moe_router(x, weight, bias, top_k=4)
    few_weights, few_ids = moe_router(last, weight, bias, top_k=4)
    assert_same_bits(weights[-100:], few_weights)
    assert_same_bits(ids[-100:], few_ids)


@pytest.mark.skipif(kimi_native._C is None, reason="built without the pybind11 module")
@pytest.mark.parametrize("device", DEVICES)
def test_raw_pointers(device):
    c = kimi_native._C
    x, weight, bias = randn(30, 50, device=device), randn(37, 50, seed=1, device=device), randn(37, device=device)
    weights, ids = torch.empty(30, 4, device=device), torch.empty(30, 4, dtype=torch.int32, device=device)
    on = "cuda" if cuda_backend(device) else "cpu"
    stream = (torch.cuda.current_stream().cuda_stream,) if device == "cuda" else ()
    p = c.MoeRouterParams()
    p.x, p.weight, p.bias, p.weights, p.ids = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), weights.data_ptr(), ids.data_ptr()
    p.num_tokens, p.dim, p.num_experts, p.top_k, p.x_stride, p.weight_stride, p.scale = 30, 50, 37, 4, 50, 50, 2.5
    with pytest.raises(c.Error, match="workspace must not be null"):
        getattr(c, f"moe_router_{on}")(p, *stream)
    workspace = torch.empty(getattr(c, f"moe_router_workspace_bytes_{on}")(p), dtype=torch.uint8, device=device)
    p.workspace = workspace.data_ptr()
    getattr(c, f"moe_router_{on}")(p, *stream)
    want = moe_router(x, weight, bias, top_k=4, scale=2.5)
    assert_same_bits(weights, want[0])
    assert_same_bits(ids, want[1])


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(weight=None), "either x and weight, or logits"),
        (dict(x=None, weight=None), "either x and weight, or logits"),
        (dict(logits=torch.ones(4, 8)), "either x and weight, or logits"),
        (dict(weight=torch.ones(8, 31)), "weight must have shape \\[8, 32\\]"),
        (dict(weight=torch.ones(8, 32).bfloat16()), "weight must have the dtype"),
        (dict(bias=torch.ones(8).bfloat16()), "bias must be float32"),
        (dict(bias=torch.ones(8, 1)), "bias must have shape"),
        (dict(top_k=9), "top_k must be 1 to 32 and at most num_experts = 8, got 9"),
        (dict(top_k=0), "top_k must be 1 to 32"),
        (dict(weight=torch.ones(513, 32), bias=torch.ones(513)), "num_experts must be 1 to 512, got 513"),
        (dict(out=(torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int64))), "ids must be int32"),
        (dict(out=(torch.empty(4, 3), torch.empty(4, 2, dtype=torch.int32))), "weights must have shape"),
        (dict(x=None, weight=None, logits=torch.ones(4, 7)), "logits must have shape \\[4, 8\\]"),
        (dict(x=None, weight=None, logits=torch.ones(4, 8).bfloat16()), "logits must be float32"),
    ],
)
def test_bad_input_is_named(change, text):
    args = dict(x=torch.ones(4, 32), weight=torch.ones(8, 32), bias=torch.ones(8), top_k=2) | change
    with pytest.raises(RuntimeError, match=text):
        moe_router(**args)
