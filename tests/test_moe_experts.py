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
from spec import moe_experts as moe_experts_spec
from spec.moe_experts import MAX_R

import kimi_native
from kimi_native.ops import batch_invariant_linear, moe_experts


def spec(x, *args, device=None, **kwargs):
    """With the rounding between the two products that the backend of `device` (default: x's) does."""
    rounds = cuda_backend(device or x.device.type) and x.dtype != torch.float32
    return moe_experts_spec.moe_experts(x, *args, **kwargs, act_dtype=x.dtype if rounds else torch.float64)


def layer(e, d, inner, dtype, device="cpu", shared=0):
    """w13, w2 and the two keyword arguments of a shared expert; scaled so that outputs are of size 1 or so."""
    w13 = randn(e, 2 * inner, d, dtype=dtype, device=device, seed=11, scale=d**-0.5)
    w2 = randn(e, d, inner, dtype=dtype, device=device, seed=12, scale=2 * inner**-0.5)
    if not shared:
        return w13, w2, {}
    shared_w13 = randn(2 * shared, d, dtype=dtype, device=device, seed=13, scale=d**-0.5)
    shared_w2 = randn(d, shared, dtype=dtype, device=device, seed=14, scale=2 * shared**-0.5)
    return w13, w2, dict(shared_w13=shared_w13, shared_w2=shared_w2)


def route(t, k, e, seed=0, device="cpu"):
    """Weights of both signs and k distinct experts per token."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(t, e, generator=g).argsort(1)[:, :k].to(torch.int32).contiguous()
    return torch.randn(t, k, generator=g).to(device), ids.to(device)


# tokens, top_k, experts, width, inner, shared inner: tails everywhere, more and fewer than 24 rows an expert. The second half
# are multiples of 8, for the CUDA kernels that read 16 bytes at a time: few tokens, and tiles of 16, 32, 64 and 128 of them.
SHAPES = [
    (0, 2, 4, 16, 16, 0),
    (1, 1, 1, 1, 1, 0),
    (1, 2, 8, 40, 24, 24),
    (3, 8, 16, 72, 33, 0),
    (7, 2, 3, 17, 5, 9),
    (30, 4, 32, 64, 48, 96),
    (61, 2, 4, 130, 70, 70),
    (40, 1, 1, 96, 200, 0),
    (1, 8, 16, 200, 40, 24),
    (8, 15, 16, 136, 72, 16),
    (5, 20, 32, 64, 40, 40),
    (9, 2, 3, 264, 136, 0),
    (60, 2, 8, 136, 88, 72),
    (100, 3, 6, 136, 200, 40),
    (150, 3, 3, 264, 200, 136),
    (1400, 3, 5, 16, 8, 8),  # several blocks in the CUDA backend's sort
]


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_spec(shape, dtype, device):
    t, k, e, d, inner, shared = shape
    x = randn(t, d, dtype=dtype, device=device)
    w13, w2, extra = layer(e, d, inner, dtype, device, shared)
    weights, ids = route(t, k, e, device=device)
    out = moe_experts(x, w13, w2, weights, ids, **extra).cpu()
    # The specs go token by token: on a CPU, because thousands of small kernels take minutes under compute-sanitizer.
    inputs = [tensor.cpu() for tensor in (x, w13, w2, weights, ids)]
    extra = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in extra.items()}
    assert_close(out, spec(*inputs, **extra, device=device), MAX_R[dtype])
    # Without any rounding in between: as if by two independent roundings.
    assert_close(out, moe_experts_spec.moe_experts(*inputs, **extra), 2**0.5 * MAX_R[dtype])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("shared", [0, 20])
def test_regimes_of_routing(dtype, shared, device):
    """One hot expert, the same expert twice in a token, skipped slots and tokens, large and small weights."""
    t, k, e, d, inner = 70, 4, 24, 48, 20
    x = randn(t, d, dtype=dtype, device=device)
    w13, w2, extra = layer(e, d, inner, dtype, device, shared)
    weights, ids = route(t, k, e, device=device)
    weights[5] *= 1e4 if dtype != torch.float16 else 1e3  # results stay between 6e-5 and 65504
    weights[6] *= 1e-6 if dtype != torch.float16 else 1e-1
    ids[:, 2] = 17
    ids[8] = torch.tensor([3, 3, 3, 3], device=device)
    ids[9] = torch.tensor([-1, 2, -1, 1], device=device)
    ids[10:12] = -1
    ids[30:, 3] = -1
    weights[ids == -1] = float("nan")  # a skipped slot's weight is not looked at
    out, ref = moe_experts(x, w13, w2, weights, ids, **extra), spec(x, w13, w2, weights, ids, **extra)
    for rows in ([5], [6], [8], [9], range(12, t)):
        assert_close(out[rows], ref[rows], MAX_R[dtype], f"tokens {rows}")
    if shared:
        assert_close(out[10:12], ref[10:12], MAX_R[dtype], "shared expert alone")
    else:
        assert_same_bits(out[10:12], torch.zeros_like(out[10:12]), "skipped tokens")


@pytest.mark.parametrize("device", DEVICES)
def test_all_tokens_to_one_expert_and_row_blocks(device):
    """More rows than one task takes, and an expert that has them all."""
    t, d, inner = 600, 40, 24
    x = randn(t, d, device=device)
    w13, w2, _ = layer(5, d, inner, torch.float32, device)
    weights = torch.ones(t, 1, device=device)
    ids = torch.full((t, 1), 3, dtype=torch.int32, device=device)
    out = moe_experts(x, w13, w2, weights, ids)
    assert_close(out, spec(x, w13, w2, weights, ids), MAX_R[torch.float32])
    both = batch_invariant_linear(x, w13[3])
    act = torch.nn.functional.silu(both[:, :inner]) * both[:, inner:]
    assert_close(out, batch_invariant_linear(act, w2[3]).double(), 1e-6)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_unused_experts_are_not_read(dtype, device):
    x = randn(30, 40, dtype=dtype, device=device)
    w13, w2, _ = layer(12, 40, 16, dtype, device)
    weights, ids = route(30, 3, 6, device=device)
    plain = moe_experts(x, w13, w2, weights, 2 * ids)
    w13[1::2], w2[1::2] = float("nan"), float("nan")
    assert_same_bits(moe_experts(x, w13, w2, weights, 2 * ids), plain)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("tokens", [3, 8, 9])
def test_one_expert_in_all_slots(tokens, dtype, device):
    """More slots of an expert than a warp's 16 rows, and other experts before, between and after them."""
    x = randn(tokens, 72, dtype=dtype, device=device)
    w13, w2, extra = layer(6, 72, 40, dtype, device, 40)
    weights, ids = route(tokens, 5, 6, device=device)
    ids[:, 1:4] = 4
    ids[0, 1], ids[1, 2], ids[2, 3] = 2, -1, 5
    out = moe_experts(x, w13, w2, weights, ids, **extra)
    assert_close(out, spec(x, w13, w2, weights, ids, **extra), MAX_R[dtype])
    for t in range(tokens):
        assert_same_bits(moe_experts(x[t : t + 1], w13, w2, weights[t : t + 1], ids[t : t + 1], **extra)[0], out[t], f"token {t}")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("tokens", [4, 60])
def test_memory_that_is_not_aligned(tokens, dtype, device):
    """The same bits from addresses that 16-byte accesses cannot take."""
    x = randn(tokens, 72, dtype=dtype, device=device)
    w13, w2, extra = layer(6, 72, 40, dtype, device, 24)
    weights, ids = route(tokens, 2, 6, device=device)
    plain = moe_experts(x, w13, w2, weights, ids, **extra)
    moved = torch.cat([x.new_full((1,), float("nan")), x.flatten()])[1:].view(tokens, 72)
    assert_same_bits(moe_experts(moved, w13, w2, weights, ids, **extra), plain)
    out = torch.empty(tokens * 72 + 1, dtype=dtype, device=device)[1:].view(tokens, 72)
    assert_same_bits(moe_experts(x, w13, w2, weights, ids, out=out, **extra), plain, "out")


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 8, 60, 600, 3000])
def test_graph_replay(tokens):
    """Also with other ids in the same memory: nothing of the routing is known to the host."""
    d, inner, e, k = 512, 256, 32, 4
    x = randn(tokens, d, dtype=torch.bfloat16, device="cuda")
    w13, w2, extra = layer(e, d, inner, torch.bfloat16, "cuda", 256)
    weights, ids = route(tokens, k, e, device="cuda")
    out = torch.empty_like(x)
    graph_replays(lambda: moe_experts(x, w13, w2, weights, ids, out=out, **extra), [out])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe_experts(x, w13, w2, weights, ids, out=out, **extra)
    _, others = route(tokens, k, e, seed=5, device="cuda")
    others[::3, 1] = -1
    ids.copy_(others)
    graph.replay()
    assert_same_bits(out.clone(), moe_experts(x, w13, w2, weights, ids, **extra), "after a change of ids")


@needs_gpu
def test_tensors_past_2_to_the_31_elements():
    d, inner = 2304, 64
    tokens = 2**31 // d + 80
    last = randn(100, d, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(tokens, d, dtype=torch.bfloat16, device="cuda")
    x[-100:] = last
    w13, w2, extra = layer(3, d, inner, torch.bfloat16, "cuda", 64)
    weights = torch.ones(tokens, 1, device="cuda")
    ids = torch.full((tokens, 1), 2, dtype=torch.int32, device="cuda")
    few = moe_experts(last, w13, w2, weights[:100], ids[:100], **extra)
    assert_same_bits(moe_experts(x, w13, w2, weights, ids, **extra)[-100:], few)


@pytest.mark.parametrize("device", DEVICES)
def test_ids_outside_are_skipped(device):
    x = randn(4, 40, device=device)
    w13, w2, _ = layer(6, 40, 16, torch.float32, device)
    weights, ids = route(4, 3, 6, device=device)
    ids[:, 1] = torch.tensor([-1, -7, 6, 2**31 - 1], device=device)
    garbage = moe_experts(x, w13, w2, weights, ids)
    ids[:, 1] = -1
    assert_same_bits(garbage, moe_experts(x, w13, w2, weights, ids))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("t", [4, 60])
def test_strides_in_place_and_nothing_outside(t, dtype, device):
    x = randn(t, 40, dtype=dtype, device=device)
    w13, w2, extra = layer(6, 40, 16, dtype, device, 24)
    weights, ids = route(t, 2, 6, device=device)
    plain = moe_experts(x, w13, w2, weights, ids, **extra)
    guarded = Guarded(t, 40, dtype=dtype, device=device)
    moe_experts(strided(x), w13, w2, weights, ids, out=guarded.tensor, **extra)
    guarded.check()
    assert_same_bits(guarded.tensor, plain)
    wide = torch.full((t, 50), 3.0, dtype=dtype, device=device)
    moe_experts(x, w13, w2, weights, ids, out=wide[:, 5:45], **extra)
    assert_same_bits(wide[:, 5:45], plain)
    assert (wide[:, :5] == 3).all() and (wide[:, 45:] == 3).all()
    assert_same_bits(moe_experts(x, w13, w2, weights, ids, out=x, **extra), plain, "in place")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("d, inner, shared", [(70, 37, 50), (136, 72, 80)])
def test_a_token_has_the_same_bits_in_every_batch(d, inner, shared, dtype, device):
    t, k, e = 300, 3, 7
    x = randn(t, d, dtype=dtype, device=device)
    w13, w2, extra = layer(e, d, inner, dtype, device, shared)
    weights, ids = route(t, k, e, device=device)
    whole = moe_experts(x, w13, w2, weights, ids, **extra)
    assert_same_bits(moe_experts(x, w13, w2, weights, ids, **extra), whole, "repeat")
    for first, rows in ((0, 1), (299, 1), (10, 2), (40, 8), (20, 9), (77, 24), (100, 25), (210, 45), (13, 150)):
        s = slice(first, first + rows)
        assert_same_bits(moe_experts(x[s], w13, w2, weights[s], ids[s], **extra), whole[s], f"{rows} tokens")
    others = x.clone()
    others[:40], others[41:] = float("nan"), float("inf")
    crowd = torch.full_like(ids, 5)  # all the others crowd into one expert
    crowd[40] = ids[40]
    assert_same_bits(moe_experts(others, w13, w2, weights, crowd, **extra)[40], whole[40], "other neighbours")
    for n in (1, 2, 5):
        with threads(n):
            assert_same_bits(moe_experts(x, w13, w2, weights, ids, **extra), whole, f"{n} threads")
            assert_same_bits(moe_experts(x[:1], w13, w2, weights[:1], ids[:1], **extra), whole[:1], f"{n} threads")


@pytest.mark.parametrize("device", DEVICES)
def test_a_dense_mlp_is_one_expert(device):
    x = randn(5, 64, device=device)
    w13, w2, _ = layer(1, 64, 256, torch.float32, device)
    out = moe_experts(x, w13, w2, torch.ones(5, 1, device=device), torch.zeros(5, 1, dtype=torch.int32, device=device))
    none = torch.full((5, 1), -1, dtype=torch.int32, device=device)
    shared = moe_experts(x, w13, w2, torch.ones(5, 1, device=device), none, shared_w13=w13[0], shared_w2=w2[0])
    assert_same_bits(out, shared, "as the shared expert")


@pytest.mark.real_size
@pytest.mark.parametrize("device", DEVICES)
def test_real_size(device):
    """256 experts of 1024 x 2304 in bf16: 3.6 GB, of which only the chosen experts' pages are ever touched."""
    e, d, inner, k = 256, 2304, 1024, 8
    w13 = torch.empty(e, 2 * inner, d, dtype=torch.bfloat16, device=device)
    w2 = torch.empty(e, d, inner, dtype=torch.bfloat16, device=device)
    x = randn(3, d, dtype=torch.bfloat16, device=device)
    weights, ids = route(3, k, e, device=device)
    ids[2, 0], ids[2, 1] = 255, -1
    for whole, size in ((w13, d), (w2, inner)):
        block = randn(*whole.shape[1:], seed=size, scale=size**-0.5).to(torch.bfloat16).to(device)
        for i in ids[ids >= 0].unique().tolist():
            torch.mul(block, 2.0 ** (i % 5 - 2), out=whole[i])
    _, _, extra = layer(1, d, 1, torch.bfloat16, device, shared=1024)
    out = moe_experts(x, w13, w2, weights, ids, **extra)
    assert_close(out, spec(x, w13, w2, weights, ids, **extra), MAX_R[torch.bfloat16])
    assert_same_bits(moe_experts(x[:1], w13, w2, weights[:1], ids[:1], **extra), out[:1], "one token")


def test_opcheck():
    x, (w13, w2, extra) = randn(4, 32), layer(3, 32, 8, torch.float32, shared=8)
    weights, ids = route(4, 2, 3)
    opcheck(torch.ops.kimi_native.moe_experts, (x, w13, w2, weights, ids, None, None, torch.empty_like(x)))
    opcheck(torch.ops.kimi_native.moe_experts, (x, w13, w2, weights, ids, *extra.values(), torch.empty_like(x)))


@pytest.mark.skipif(kimi_native._C is None, reason="built without the pybind11 module")
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_raw_pointers(dtype, device):
    c = kimi_native._C
    t, k, e, d, inner, shared = 30, 2, 3, 40, 12, 20
    x = randn(t, d, dtype=dtype, device=device)
    w13, w2, extra = layer(e, d, inner, dtype, device, shared=shared)
    weights, ids = route(t, k, e, device=device)
    out = torch.empty_like(x)
    on = "cuda" if cuda_backend(device) else "cpu"
    stream = (torch.cuda.current_stream().cuda_stream,) if device == "cuda" else ()
    p = c.MoeExpertsParams()
    p.x, p.w13, p.w2, p.out = x.data_ptr(), w13.data_ptr(), w2.data_ptr(), out.data_ptr()
    p.topk_weights, p.topk_ids = weights.data_ptr(), ids.data_ptr()
    p.shared_w13, p.shared_w2 = extra["shared_w13"].data_ptr(), extra["shared_w2"].data_ptr()
    p.num_tokens, p.dim, p.inner, p.shared_inner, p.num_experts, p.top_k = t, d, inner, shared, e, k
    p.x_stride = p.out_stride = d
    p.dtype = getattr(c.DType, str(dtype).removeprefix("torch."))
    with pytest.raises(c.Error, match="workspace must not be null"):
        getattr(c, f"moe_experts_{on}")(p, *stream)
    workspace = torch.full((getattr(c, f"moe_experts_workspace_bytes_{on}")(p),), 0xFF, dtype=torch.uint8, device=device)
    p.workspace = workspace.data_ptr()
    getattr(c, f"moe_experts_{on}")(p, *stream)
    assert_same_bits(out, moe_experts(x, w13, w2, weights, ids, **extra))


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(w13=torch.ones(3, 15, 32)), "w13 must have shape \\[3, 16, 32\\]"),
        (dict(w2=torch.ones(3, 31, 8)), "w2 must have shape \\[3, 32, 8\\]"),
        (dict(w2=torch.ones(3, 8, 32).transpose(1, 2)), "w2 must be contiguous"),
        (dict(w13=torch.ones(3, 16, 32).bfloat16()), "w13 must have the dtype"),
        (dict(topk_ids=torch.zeros(4, 2, dtype=torch.int64)), "topk_ids must be int32"),
        (dict(topk_ids=torch.zeros(3, 2, dtype=torch.int32)), "topk_ids must have shape"),
        (dict(topk_weights=torch.zeros(4, 3)), "topk_weights must have shape"),
        (dict(topk_weights=torch.zeros(4, 2).bfloat16()), "topk_weights must be float32"),
        (dict(shared_w2=torch.ones(32, 8)), "shared_w13 and shared_w2 must be given together"),
        (dict(shared_w13=torch.ones(15, 32), shared_w2=torch.ones(32, 8)), "shared_w13 must have shape \\[16, 32\\]"),
        (dict(out=torch.empty(4, 31)), "out must have shape"),
        (dict(x=torch.ones(4, 32, 1)), "x must have shape"),
    ],
)
def test_bad_input_is_named(change, text):
    args = dict(x=torch.ones(4, 32), w13=torch.ones(3, 16, 32), w2=torch.ones(3, 32, 8), topk_weights=torch.ones(4, 2))
    args |= dict(topk_ids=torch.zeros(4, 2, dtype=torch.int32)) | change
    with pytest.raises(RuntimeError, match=text):
        moe_experts(**args)
