import pytest
import torch
from kit import (
    DEVICE_DTYPES,
    DEVICES,
    FLOAT_DTYPES,
    Guarded,
    assert_close,
    assert_same_bits,
    cuda_backend,
    graph_replays,
    needs_gpu,
    opcheck,
    randn,
    relative_error,
    strided,
    threads,
)
from spec.mla_prefill import MAX_R, MAX_R_LSE, MAX_R_PEAKED
from spec.mla_prefill import mla_prefill as spec

import kimi_native
from kimi_native.ops import mla_prefill

TINY, ODD, REAL = (16, 8, 16), (5, 3, 7), (128, 64, 128)
PACKS = {
    "one token": [(1, 1)],
    "block edges": [(63, 63), (64, 64), (65, 65)],
    "ragged with prefixes": [(0, 0), (3, 130), (0, 70), (129, 200), (7, 7), (1, 300), (2, 0)],
}


def cumulative(lengths, device="cpu"):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)


def make(pack, heads=3, dims=TINY, dtype=torch.float32, device="cpu", sigma=1.0, seed=0):
    """Arguments of mla_prefill for sequences of (queries, keys); logits have standard deviation about `sigma`."""
    nope, rope, value = dims
    num_q, num_k = sum(q for q, _ in pack), sum(k for _, k in pack)
    kv = randn(num_k, heads, nope + value, dtype=dtype, device=device, seed=seed + 1)
    return dict(
        q=randn(num_q, heads, nope + rope, dtype=dtype, device=device, seed=seed, scale=sigma),
        k_nope=kv[..., :nope],
        k_rope=randn(num_k, rope, dtype=dtype, device=device, seed=seed + 2),
        v=kv[..., nope:],
        cu_seqlens_q=cumulative([q for q, _ in pack], device),
        cu_seqlens_k=cumulative([k for _, k in pack], device),
        scale=(nope + rope) ** -0.5,
    )


def run(args, **more):
    """(out, lse) of the operator."""
    lse = torch.full(args["q"].shape[:2], torch.nan, device=args["q"].device)
    return mla_prefill(**args, lse=lse, **more), lse


def check(args, max_r=MAX_R, **more):
    ref, ref_lse = spec(**args, **more)
    out, lse = run(args, **more)
    assert_close(out, ref, max_r[out.dtype])
    assert_close(lse, ref_lse, MAX_R_LSE, "lse")
    blind = torch.isinf(ref_lse)
    assert (out.cpu()[blind] == 0).all(), "rows that see nothing must be zero"


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("dims", [TINY, ODD, REAL, (24, 0, 40)])
@pytest.mark.parametrize("pack", PACKS)
def test_against_spec(pack, dims, dtype, device):
    check(make(PACKS[pack], heads=2, dims=dims, dtype=dtype, device=device))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("sigma", [0.0, 10.0, 30.0])
def test_flat_and_peaked_logits(sigma, dtype, device):
    check(make([(150, 150), (40, 170)], dtype=dtype, device=device, sigma=sigma), MAX_R_PEAKED)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_large_magnitudes_as_good_as_plain_torch(dtype, device):
    """Logits of several thousand, values of 1e4: no overflow, and no worse than an fp32 softmax in torch."""
    args = make([(100, 100)], heads=2, dims=REAL, dtype=dtype, device=device, sigma=1000.0)
    args["v"] = args["v"] * 1e4
    ref, _ = spec(**args)
    k = torch.cat([args["k_nope"], args["k_rope"][:, None].expand(-1, 2, -1)], -1).float()
    s = torch.einsum("ihd,jhd->hij", args["q"].float(), k) * args["scale"]
    s = s.masked_fill(torch.ones_like(s[0], dtype=torch.bool).triu(1), -torch.inf)
    plain = torch.einsum("hij,jhd->ihd", s.softmax(-1), args["v"].float()).to(dtype)
    out = mla_prefill(**args)
    assert torch.isfinite(out).all()
    assert relative_error(out, ref) <= 2 * relative_error(plain, ref) + 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("begin", [[-3, -200, -70, -64], [0, 0, 0, 0], [5, 63, 64, 1], [90, 70, 71, 1000]])
def test_q_begin(begin, device):
    """Rows that see nothing, rows that see everything, and offsets that are not those of a suffix."""
    args = make([(10, 90), (130, 70), (70, 70), (66, 130)], device=device)
    check(args, q_begin=torch.tensor(begin, dtype=torch.int32, device=device))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("dims", [ODD, REAL])
def test_a_row_has_the_same_bits_however_the_prompt_is_cut(dims, dtype, device):
    args = make([(300, 300)], heads=2, dims=dims, dtype=dtype, device=device, sigma=4.0)
    whole, whole_lse = run(args)
    cuts = [0, 1, 64, 100, 101, 230, 300]
    for begin, end in zip(cuts, cuts[1:], strict=False):
        piece = args | {name: args[name][:end] for name in ("k_nope", "k_rope", "v")}
        piece |= dict(q=args["q"][begin:end], cu_seqlens_q=cumulative([end - begin], device), cu_seqlens_k=cumulative([end], device))
        out, lse = run(piece)
        assert_same_bits(out, whole[begin:end], f"rows {begin}:{end}")
        assert_same_bits(lse, whole_lse[begin:end], f"lse of rows {begin}:{end}")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_sequences_are_independent_of_neighbours_threads_and_runs(dtype, device):
    pack = [(70, 70), (1, 150), (0, 3), (200, 333), (5, 5)]
    args = make(pack, dims=(40, 24, 40), dtype=dtype, device=device)
    with threads(1):
        one, one_lse = run(args)
    with threads(2):
        for _ in range(3):
            out, lse = run(args)
            assert_same_bits(out, one)
            assert_same_bits(lse, one_lse, "lse")
    cu_q, cu_k = args["cu_seqlens_q"].tolist(), args["cu_seqlens_k"].tolist()
    for n, (len_q, len_k) in enumerate(pack):
        alone = args | {name: args[name][cu_k[n] : cu_k[n + 1]] for name in ("k_nope", "k_rope", "v")}
        alone |= dict(
            q=args["q"][cu_q[n] : cu_q[n + 1]], cu_seqlens_q=cumulative([len_q], device), cu_seqlens_k=cumulative([len_k], device)
        )
        assert_same_bits(mla_prefill(**alone), one[cu_q[n] : cu_q[n + 1]], f"sequence {n} alone")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("dims", [TINY, REAL])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_a_query_may_not_see_never_reaches_it(bad, dims, device, dtype):
    args = make([(100, 200)], heads=2, dims=dims, device=device, dtype=dtype)
    clean = mla_prefill(**args)
    kv = torch.cat([args["k_nope"], args["v"]], -1)
    kv[150:] = bad
    args["k_rope"][150:] = bad
    args |= dict(k_nope=kv[..., : dims[0]], v=kv[..., dims[0] :])
    out = mla_prefill(**args)
    assert_same_bits(out[:50], clean[:50])
    assert not torch.isfinite(out[50:]).any(), "a NaN that is seen must show"


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("dims", [TINY, REAL])
def test_single_values_that_are_not_finite_reach_exactly_who_sees_them(dims, device, dtype):
    args = make([(150, 150)], heads=2, dims=dims, device=device, dtype=dtype)
    clean = mla_prefill(**args)
    v = args["v"].clone()
    spots = [(3, 0, 5, float("nan")), (70, 1, 2, float("inf")), (149, 0, 1, float("-inf")), (100, 1, dims[2] - 1, float("nan"))]
    for key, head, column, value in spots:
        v[key, head, column] = value
    out = mla_prefill(**args | dict(v=v))
    expected = clean.clone()
    for key, head, column, value in spots:
        expected[key:, head, column] = value
    assert torch.equal(torch.isnan(out), torch.isnan(expected))
    assert_same_bits(out.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("scale", [-0.05, 0.0, 3e-3])
@pytest.mark.parametrize("dims", [TINY, REAL])
def test_scales(scale, dims, device, dtype):
    check(make([(70, 100)], heads=2, dims=dims, device=device, dtype=dtype, sigma=3.0) | dict(scale=scale))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_many_short_sequences(device, dtype):
    """More sequences than a search step has candidates, among them empty ones."""
    lengths = [(i * 7) % 5 for i in range(83)]
    check(make([(n, n + i % 3) for i, n in enumerate(lengths)], heads=2, device=device, dtype=dtype))
    check(make([(n, n + i % 3) for i, n in enumerate(lengths)], heads=1, dims=REAL, device=device, dtype=dtype))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_memory_that_is_not_aligned(device, dtype):
    args = make([(40, 40), (9, 80)], heads=2, dims=REAL, dtype=dtype, device=device)
    plain, plain_lse = run(args)

    def moved(t):
        flat = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(t.shape)

    apart = args | {name: moved(args[name]) for name in ("q", "k_nope", "k_rope", "v")}
    out = Guarded(49, 2, 129, dtype=dtype, device=device)
    mla_prefill(**apart, out=out.tensor[..., :128], lse=(lse := torch.empty_like(plain_lse)))
    out.check()
    assert_same_bits(out.tensor[..., :128].contiguous(), plain)
    assert_same_bits(lse, plain_lse, "lse")
    assert torch.isnan(out.tensor[..., 128]).all()


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("dims", [(20, 12, 33), REAL])
def test_strides_float32_output_and_nothing_outside(dims, dtype, device):
    args = make([(40, 40), (9, 80)], dims=dims, dtype=dtype, device=device)
    columns = dims[2]
    plain, plain_lse = run(args)
    apart = args | {name: strided(args[name]) for name in ("q", "k_nope", "k_rope", "v")}
    guarded, lse = Guarded(50, 3, columns, dtype=dtype, device=device), Guarded(49, 3, dtype=torch.float32, device=device)
    mla_prefill(**apart, out=guarded.tensor[:49], lse=lse.tensor)
    guarded.check()
    lse.check()
    assert_same_bits(guarded.tensor[:49], plain)
    assert_same_bits(lse.tensor, plain_lse, "lse")
    assert torch.isnan(guarded.tensor[49]).all()
    wide = torch.full((49, 3, columns + 7), 7.0, device=device)
    out = mla_prefill(**args, out=wide[..., :columns])
    assert (wide[..., columns:] == 7).all()
    assert_same_bits(out.to(dtype), plain, "rounded float32 output")
    on_tensor_cores = dims == REAL and cuda_backend(device)  # where probabilities are rounded to dtype
    assert_close(out, spec(**args)[0], MAX_R[dtype if on_tensor_cores else torch.float32], "float32 output")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("dims", [TINY, REAL])
def test_rows_past_the_last_sequence_are_not_written(dims, device, dtype):
    args = make([(10, 10)], dims=dims, device=device, dtype=dtype)
    args["q"] = torch.cat([args["q"], torch.full_like(args["q"][:5], torch.nan)])
    out = mla_prefill(**args, out=torch.full((15, 3, dims[2]), 5.0, device=device))
    assert torch.isfinite(out[:10]).all() and (out[10:] == 5).all()


@pytest.mark.parametrize("device", DEVICES)
def test_pieces_merged_by_lse_give_the_whole(device):
    args = make([(30, 150)], dims=REAL, device=device, sigma=4.0)
    whole, whole_lse = run(args)
    outs, lses = [], []
    for begin, end in [(0, 50), (50, 120), (120, 150)]:
        piece = args | {name: args[name][begin:end] for name in ("k_nope", "k_rope", "v")}
        piece |= dict(cu_seqlens_k=cumulative([end - begin], device), q_begin=torch.tensor([120 - begin], dtype=torch.int32, device=device))
        out, lse = run(piece)
        outs.append(out)
        lses.append(lse)
    weights = torch.stack(lses).softmax(0)
    assert_close((torch.stack(outs) * weights[..., None]).sum(0), whole, 2e-6)
    assert_close(torch.stack(lses).logsumexp(0), whole_lse, 1e-6, "lse")


@pytest.mark.parametrize("device", DEVICES)
def test_empty_calls(device):
    assert mla_prefill(**make([], device=device)).shape == (0, 3, 16)
    assert mla_prefill(**make([(0, 0), (0, 9)], device=device)).shape == (0, 3, 16)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_replay_and_another_stream(dtype):
    args = make([(200, 300), (0, 5), (70, 70)], dims=REAL, dtype=dtype, device="cuda")
    out, lse = torch.empty(270, 3, 128, dtype=dtype, device="cuda"), torch.empty(270, 3, device="cuda")
    graph_replays(lambda: mla_prefill(**args, out=out, lse=lse), [out, lse])
    expected = out.clone()
    out.fill_(torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mla_prefill(**args, out=out)
    stream.synchronize()
    assert_same_bits(out, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gpu_equals_cpu(dtype):
    args = make([(300, 500), (65, 65)], dims=REAL, dtype=dtype, device="cpu", sigma=3.0)
    want, want_lse = run(args)
    out, lse = run({name: x.cuda() if torch.is_tensor(x) else x for name, x in args.items()})
    assert_close(out, want, 2 * MAX_R[dtype])
    assert_close(lse, want_lse, 2 * MAX_R_LSE, "lse")


@needs_gpu
def test_heads_in_groups_that_fit_the_cache():
    """40,000 keys and 5 heads: groups of one head; the rows of a long prompt do not depend on how it is cut here either."""
    args = make([(600, 40000)], heads=5, dims=REAL, dtype=torch.bfloat16, device="cuda")
    whole, whole_lse = run(args)
    last = args | dict(q=args["q"][590:], cu_seqlens_q=cumulative([10], "cuda"))
    out, lse = run(last)
    assert_same_bits(out, whole[590:])
    assert_same_bits(lse, whole_lse[590:])
    ref, ref_lse = spec(**last)
    assert_close(out, ref, MAX_R[torch.bfloat16])
    assert_close(lse, ref_lse, MAX_R_LSE, "lse")


@needs_gpu
def test_tensors_past_2_to_the_31_elements():
    num_keys, heads = 270_000, 32  # k_nope and v in one tensor of 2.2e9 elements
    kv = torch.empty(num_keys, heads, 256, dtype=torch.bfloat16, device="cuda").normal_()
    k_rope = randn(num_keys, 64, dtype=torch.bfloat16, device="cuda")
    q = randn(4, heads, 192, dtype=torch.bfloat16, device="cuda", seed=1)
    lengths = [num_keys - 200, 200]
    args = dict(q=q, k_nope=kv[..., :128], k_rope=k_rope, v=kv[..., 128:], cu_seqlens_q=cumulative([2, 2], "cuda"),
                cu_seqlens_k=cumulative(lengths, "cuda"), scale=192**-0.5)  # fmt: skip
    out = mla_prefill(**args)
    last = slice(num_keys - 200, num_keys)
    alone = args | dict(q=q[2:], k_nope=kv[last, :, :128].clone(), k_rope=k_rope[last].clone(), v=kv[last, :, 128:].clone(),
                        cu_seqlens_q=cumulative([2], "cuda"), cu_seqlens_k=cumulative([200], "cuda"))  # fmt: skip
    assert_same_bits(out[2:], mla_prefill(**alone))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck(with_lse, device):
    a = make([(4, 9), (3, 3)], device=device)
    out, lse = torch.empty(7, 3, 16, device=device), torch.empty(7, 3, device=device) if with_lse else None
    begin = torch.tensor([5, 0], dtype=torch.int32, device=device) if with_lse else None
    inputs = [a[n].contiguous() for n in ("q", "k_nope", "k_rope", "v")]
    opcheck(torch.ops.kimi_native.mla_prefill, (*inputs, a["cu_seqlens_q"], a["cu_seqlens_k"], 0.2, begin, out, lse))


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(q=torch.ones(7, 24)), "q must have shape"),
        (dict(q=torch.ones(7, 3, 12)), "k_nope has 16 columns and q only 12"),
        (dict(q=torch.ones(7, 3, 25)), "k_rope must have shape \\[12, 9\\], got \\[12, 8\\]"),
        (dict(k_nope=torch.ones(12, 2, 16)), "k_nope must have shape"),
        (dict(v=torch.ones(11, 3, 16)), "v must have shape"),
        (dict(v=torch.ones(12, 3, 16, dtype=torch.bfloat16)), "v must have the dtype"),
        (dict(v=torch.ones(12, 16, 3).transpose(1, 2)), "v must be contiguous in its last dimension"),
        (dict(cu_seqlens_q=torch.tensor([0, 4, 7])), "cu_seqlens_q must be int32"),
        (dict(cu_seqlens_k=torch.tensor([0, 4], dtype=torch.int32)), "cu_seqlens_k must have shape"),
        (dict(q_begin=torch.zeros(3, dtype=torch.int32)), "q_begin must have shape \\[2\\]"),
        (dict(out=torch.empty(7, 3, 15)), "out must have shape"),
        (dict(out=torch.empty(7, 3, 16, dtype=torch.bfloat16)), "out must be float32 or have the dtype of q, got bfloat16"),
        (dict(lse=torch.empty(7, 3, dtype=torch.bfloat16)), "lse must be float32"),
        (dict(scale=float("nan")), "scale must be finite"),
    ],
)
def test_bad_input_is_named(change, text):
    with pytest.raises(RuntimeError, match=text):
        mla_prefill(**(make([(4, 9), (3, 3)]) | change))


@pytest.mark.parametrize("device", DEVICES)
def test_raw_pointers_give_the_same_bits(device):
    c = kimi_native._C
    if c is None:
        pytest.skip("built without the pybind11 module")
    args = make([(20, 30), (40, 40)], device=device)
    want, want_lse = run(args)
    out, lse = torch.empty_like(want), torch.empty_like(want_lse)
    p = c.MlaPrefillParams()
    for name in ("q", "k_nope", "k_rope", "v", "cu_seqlens_q", "cu_seqlens_k"):
        setattr(p, name, args[name].data_ptr())
    p.out, p.lse, p.scale = out.data_ptr(), lse.data_ptr(), args["scale"]
    p.num_queries, p.num_seqs, p.num_heads, p.nope_dim, p.rope_dim, p.value_dim = 60, 2, 3, 16, 8, 16
    p.q_stride, p.q_head_stride, p.k_nope_stride, p.k_nope_head_stride, p.k_rope_stride = 72, 24, 96, 32, 8
    p.v_stride, p.v_head_stride, p.out_stride, p.out_head_stride = 96, 32, 48, 16
    if device == "cuda":
        c.mla_prefill_cuda(p, torch.cuda.current_stream().cuda_stream)
    else:
        workspace = torch.empty(c.mla_prefill_workspace_bytes_cpu(p), dtype=torch.uint8)
        p.workspace = workspace.data_ptr()
        c.mla_prefill_cpu(p)
    assert_same_bits(out, want)
    assert_same_bits(lse, want_lse, "lse")
    if device == "cpu":
        p.workspace = 0
        with pytest.raises(c.Error, match="workspace must not be null"):
            c.mla_prefill_cpu(p)
