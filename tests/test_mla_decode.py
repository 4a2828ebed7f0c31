import pytest
import torch
from kit import (
    DEVICE_DTYPES,
    DEVICES,
    FLOAT_DTYPES,
    Guarded,
    assert_close,
    assert_same_bits,
    generator,
    graph_replays,
    needs_gpu,
    opcheck,
    randn,
    relative_error,
    strided,
    threads,
)
from spec.mla_decode import MAX_R, MAX_R_LSE, MAX_R_PEAKED
from spec.mla_decode import mla_decode as spec

import kimi_native
from kimi_native.ops import mla_decode, mla_prefill

GARBAGE = 2147480000  # a page id that must never be followed


def make(lengths, heads=4, latent_dim=32, rope_dim=8, dtype=torch.float32, device="cpu", sigma=1.0, page_size=64, width=None, seed=0):
    """Arguments of mla_decode: shuffled pages, NaN in every row that no sequence owns, garbage ids past the end of the table."""
    columns = latent_dim + rope_dim
    used = [-(-max(n, 0) // page_size) for n in lengths]
    width = max([1, *used]) + 2 if width is None else width
    order = torch.randperm(sum(used) + 1, generator=generator(seed))
    cache = torch.full((sum(used) + 1, page_size, columns), torch.nan, dtype=dtype)
    table = torch.full((len(lengths), width), GARBAGE, dtype=torch.int32)
    at = 0
    for b, (length, pages) in enumerate(zip(lengths, used, strict=True)):
        table[b, :pages] = order[at : at + pages]
        rows = randn(length, columns, dtype=dtype, seed=1000 * seed + length + 17)
        for i in range(pages):
            piece = rows[i * page_size : (i + 1) * page_size]
            cache[order[at + i], : len(piece)] = piece
        at += pages
    q = torch.cat(
        [randn(1, heads, columns, dtype=dtype, seed=1000 * seed + n + 18, scale=sigma) for n in lengths]
        or [torch.empty(0, heads, columns, dtype=dtype)]
    )
    return dict(
        q=q.to(device),
        cache=cache.to(device),
        block_table=table.to(device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        scale=columns**-0.5,
        latent_dim=latent_dim,
    )


def run(args, **more):
    lse = torch.full(args["q"].shape[:2], torch.nan, device=args["q"].device)
    return mla_decode(**args, lse=lse, **more), lse


def check(args, max_r=MAX_R):
    ref, ref_lse = spec(**args)
    out, lse = run(args)
    assert_close(out, ref, max_r[out.dtype])
    assert_close(lse, ref_lse, MAX_R_LSE, "lse")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("heads, latent_dim, rope_dim", [(4, 32, 8), (1, 7, 2), (7, 33, 0), (70, 24, 8)])
def test_against_spec(heads, latent_dim, rope_dim, dtype, device):
    """Lengths around a page, around the 16 splits of the shortest kind (1024) and past those of the longest (8192)."""
    lengths = [1, 0, 63, 64, 65, 1023, 1025, 8200 if heads == 4 else 130, 0]
    check(make(lengths, heads, latent_dim, rope_dim, dtype, device))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("heads", [32, 16, 8, 40])
def test_real_shape(heads, dtype, device):
    check(make([70, 1100, 0, 1] if heads == 32 else [130, 3], heads, 512, 64, dtype, device))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("sigma", [0.0, 10.0, 30.0])
def test_flat_and_peaked_logits(sigma, dtype, device):
    check(make([300, 129, 2000], dtype=dtype, device=device, sigma=sigma), MAX_R_PEAKED)
    check(make([300, 129], 16, 512, 64, dtype=dtype, device=device, sigma=sigma), MAX_R_PEAKED)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("scale", [-0.1, 0.0, 3e-3])
@pytest.mark.parametrize("heads, latent_dim, rope_dim", [(4, 32, 8), (32, 512, 64)])
def test_scales(heads, latent_dim, rope_dim, scale, dtype, device):
    check(make([200, 70], heads, latent_dim, rope_dim, dtype=dtype, device=device, sigma=3.0) | dict(scale=scale), MAX_R_PEAKED)


@pytest.mark.parametrize("device", DEVICES)
def test_large_magnitudes_as_good_as_plain_torch(device):
    args = make([700], 8, 512, 64, device=device, sigma=1000.0)
    args["cache"] *= 30
    ref, _ = spec(**args)
    rows = args["cache"][args["block_table"][0, :11].long()].flatten(0, 1)[:700]
    plain = torch.softmax(args["q"][0] @ rows.T * args["scale"], -1) @ rows[:, :512]
    out = mla_decode(**args)
    assert torch.isfinite(out).all()
    assert relative_error(out, ref) <= 2 * relative_error(plain[None], ref) + 1e-6


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_empty_sequences_give_zero_and_minus_infinity(dtype, device):
    args = make([0, 5, 0], dtype=dtype, device=device)
    args["block_table"][0] = -1
    args["q"][0] = torch.nan
    out, lse = run(args)
    assert (out[[0, 2]] == 0).all() and (lse[[0, 2]] == -torch.inf).all() and torch.isfinite(out[1]).all()
    nothing = make([0, 0], dtype=dtype, device=device, width=0)
    assert (mla_decode(**nothing) == 0).all()
    assert mla_decode(**make([], dtype=dtype, device=device)).shape == (0, 4, 32)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("shape", [(4, 32, 8), (32, 512, 64)])
def test_bits_depend_on_the_sequence_alone(shape, dtype, device):
    """Not on neighbours, threads, the run, the width of the block table, or where the pages lie."""
    lengths = [70, 0, 1500, 9000, 1, 640]
    args = make(lengths, *shape, dtype=dtype, device=device)
    with threads(1):
        one, one_lse = run(args)
    with threads(2):
        for _ in range(3):
            out, lse = run(args)
            assert_same_bits(out, one)
            assert_same_bits(lse, one_lse, "lse")
    for b, length in enumerate(lengths):
        alone = make([length], *shape, dtype=dtype, device=device, width=200 + b)
        assert_same_bits(alone["q"][0], args["q"][b], "the test's own queries")
        out, lse = run(alone)
        assert_same_bits(out[0], one[b], f"sequence of {length} alone")
        assert_same_bits(lse[0], one_lse[b], f"lse of {length} alone")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("shape", [(4, 32, 8), (32, 512, 64)])
def test_page_size_does_not_change_the_bits(shape, device, dtype):
    wide = mla_decode(**make([333, 64, 1000], *shape, dtype=dtype, device=device))
    for page_size in (16, 48, 128):
        assert_same_bits(mla_decode(**make([333, 64, 1000], *shape, dtype=dtype, page_size=page_size, device=device)), wide)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("shape", [(4, 32, 8), (32, 512, 64)])
def test_more_sequences_than_threads_of_a_block(shape, device, dtype):
    lengths = [(i * i) % 7 for i in range(300)]
    args = make(lengths, *shape, dtype=dtype, device=device, page_size=16)
    check(args)
    out, lse = run(args)
    last = args | {name: args[name][290:] for name in ("q", "block_table", "lengths")}
    last_out, last_lse = run(last)
    assert_same_bits(last_out, out[290:])
    assert_same_bits(last_lse, lse[290:], "lse")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("heads, latent_dim, rope_dim", [(3, 33, 5), (3, 512, 64)])
def test_strides_and_nothing_outside(heads, latent_dim, rope_dim, dtype, device):
    args = make([100, 7], heads, latent_dim, rope_dim, dtype=dtype, device=device)
    plain, plain_lse = run(args)
    pages, size, columns = args["cache"].shape
    layers = torch.full((pages, 2, size, columns), torch.nan, dtype=dtype, device=device)
    layers[:, 1] = args["cache"]
    table = torch.full((2, 9), GARBAGE, dtype=torch.int32, device=device)
    table[:, : args["block_table"].shape[1]] = args["block_table"]
    apart = args | dict(q=strided(args["q"]), cache=layers[:, 1], block_table=table[:, : args["block_table"].shape[1]])
    out, lse = Guarded(2, 3, latent_dim, dtype=dtype, device=device), Guarded(2, 3, dtype=torch.float32, device=device)
    mla_decode(**apart, out=out.tensor, lse=lse.tensor)
    out.check()
    lse.check()
    assert_same_bits(out.tensor, plain)
    assert_same_bits(lse.tensor, plain_lse, "lse")
    wide = torch.full((2, 3, latent_dim + 7), 7.0, dtype=dtype, device=device)
    assert_same_bits(mla_decode(**args, out=wide[..., :latent_dim]), plain)
    assert (wide[..., latent_dim:] == 7).all()


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("heads", [3, 20])
def test_memory_that_is_not_aligned(heads, dtype, device):
    args = make([100, 7], heads, 512, 64, dtype=dtype, device=device)
    plain, plain_lse = run(args)

    def moved(t):
        flat = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(t.shape)

    for names in (["q"], ["cache"], ["q", "cache"]):
        out, lse = run(args | {name: moved(args[name]) for name in names})
        assert_same_bits(out, plain)
        assert_same_bits(lse, plain_lse, "lse")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_replay_with_other_lengths(dtype):
    """One graph, replayed after the lengths and the table have changed, on tables that are far wider than the lengths."""
    lengths = [700, 0, 64, 5000]
    args = make(lengths, 32, 512, 64, dtype, "cuda", width=16384)
    out, lse = torch.empty(4, 32, 512, dtype=dtype, device="cuda"), torch.empty(4, 32, device="cuda")
    graph_replays(lambda: mla_decode(**args, out=out, lse=lse), [out, lse])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_decode(**args, out=out, lse=lse)
    for now in ([1, 300, 0, 4999], [0, 0, 0, 0], lengths):
        args["lengths"].copy_(torch.tensor(now, dtype=torch.int32))
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        args["block_table"][:2] = args["block_table"][3].clone()  # sequences 0 and 1 read pages of sequence 3
        graph.replay()
        torch.cuda.synchronize()
        ref, ref_lse = spec(**args)
        assert_close(out, ref, MAX_R[dtype])
        assert_close(lse, ref_lse, MAX_R_LSE, "lse")


@needs_gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(4, 32, 8), (32, 512, 64)])
def test_gpu_equals_cpu(shape, dtype):
    args = make([3000, 64, 0, 200], *shape, dtype=dtype, sigma=3.0)
    want, want_lse = run(args)
    out, lse = run({name: x.cuda() if torch.is_tensor(x) else x for name, x in args.items()})
    assert_close(out, want, 2 * MAX_R[dtype])
    assert_close(lse, want_lse, 2 * MAX_R_LSE, "lse")


@needs_gpu
@pytest.mark.parametrize("heads", [32, 16, 64])
def test_batches_of_any_size_give_the_same_bits(heads):
    """From one sequence, cut into splits for all multiprocessors, to so many that each takes whole segments."""
    lengths = [8200, 40000, 1, 130, 2048, 2049, 0, 20000] * 20
    args = make(lengths[:8], heads, 512, 64, torch.bfloat16, "cuda")
    out, lse = run(args)
    many = args | {name: args[name].repeat(20, *[1] * (args[name].dim() - 1)) for name in ("q", "block_table", "lengths")}
    many_out, many_lse = run(many)
    for i in range(20):
        assert_same_bits(many_out[8 * i : 8 * i + 8], out)
        assert_same_bits(many_lse[8 * i : 8 * i + 8], lse, "lse")
    for b in range(8):
        alone_out, alone_lse = run(args | {name: args[name][b : b + 1] for name in ("q", "block_table", "lengths")})
        assert_same_bits(alone_out, out[b : b + 1])
        assert_same_bits(alone_lse, lse[b : b + 1], "lse")
    ref, ref_lse = spec(**args)
    assert_close(out, ref, MAX_R[torch.bfloat16])
    assert_close(lse, ref_lse, MAX_R_LSE, "lse")


@needs_gpu
def test_a_million_rows():
    """Rows whose best match is known: the query of head h is a large multiple of one row."""
    length, heads = 1_000_000, 32
    pages = -(-length // 64)
    cache = torch.empty(pages, 64, 576, dtype=torch.bfloat16, device="cuda").normal_()
    table = torch.randperm(pages, device="cuda").to(torch.int32)[None]
    wanted = torch.arange(heads, device="cuda") * 31_250 + 77
    rows = cache[table[0, wanted // 64].long(), wanted % 64]
    lengths = torch.tensor([length], dtype=torch.int32, device="cuda")
    lse = torch.empty(1, heads, device="cuda")
    out = mla_decode(rows[None], cache, table, lengths, 1.0, latent_dim=512, lse=lse)
    assert_close(out[0], rows[:, :512].double(), MAX_R[torch.bfloat16])
    assert_close(lse[0], rows.double().square().sum(-1), MAX_R_LSE, "lse")


@needs_gpu
def test_caches_past_2_to_the_31_elements():
    pages = 2**31 // (64 * 576) + 100
    cache = torch.full((pages, 64, 576), torch.nan, dtype=torch.bfloat16, device="cuda")
    used = torch.tensor([[pages - 1, 3, pages - 50]], dtype=torch.int32, device="cuda")
    cache[used[0].long()] = randn(3, 64, 576, dtype=torch.bfloat16, device="cuda")
    q = randn(1, 32, 576, dtype=torch.bfloat16, device="cuda", seed=1)
    lengths = torch.tensor([180], dtype=torch.int32, device="cuda")
    out = mla_decode(q, cache, used, lengths, 0.05, latent_dim=512)
    table = torch.tensor([[0, 1, 2]], dtype=torch.int32, device="cuda")
    small = mla_decode(q, cache[used[0].long()].clone(), table, lengths, 0.05, latent_dim=512)
    assert_same_bits(out, small)


@pytest.mark.parametrize("device", DEVICES)
def test_absorbed_equals_expanded(device):
    """q W_UK against latents, then W_UV, is mla_prefill of the last token on keys and values expanded by W_UK and W_UV."""
    heads, nope, rope, value, latent, length = 4, 16, 8, 12, 32, 200
    args = make([length], heads, latent, rope, device=device)
    q = randn(1, heads, nope + rope, device=device, seed=5, scale=3.0)
    w_uk, w_uv = randn(heads, nope, latent, device=device, seed=6), randn(heads, value, latent, device=device, seed=7)
    args["q"] = torch.cat([torch.einsum("bhd,hdl->bhl", q[..., :nope], w_uk), q[..., nope:]], -1)
    args["scale"] = (nope + rope) ** -0.5
    rows = args["cache"][args["block_table"][0, :4].long()].flatten(0, 1)[:length]
    k, v = (torch.einsum("tl,hdl->thd", rows[:, :latent], w).contiguous() for w in (w_uk, w_uv))
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (1, length))
    want = mla_prefill(q, k, rows[:, latent:], v, cu_q, cu_k, args["scale"])
    assert_close(torch.einsum("bhl,hdl->bhd", mla_decode(**args), w_uv), want, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck(with_lse, device):
    a = make([70, 3], device=device)
    a["cache"].nan_to_num_(0)  # opcheck compares arguments before and after, and NaN equals nothing
    out, lse = torch.empty(2, 4, 32, device=device), torch.empty(2, 4, device=device) if with_lse else None
    opcheck(torch.ops.kimi_native.mla_decode, (a["q"], a["cache"], a["block_table"], a["lengths"], 0.2, out, lse))


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(q=torch.ones(2, 40)), "q must have shape"),
        (dict(q=torch.ones(2, 4, 39)), "cache must have shape"),
        (dict(cache=torch.ones(5, 64, 40, dtype=torch.bfloat16)), "cache must have the dtype"),
        (dict(cache=torch.ones(5, 8, 40)), "page_size must be a positive multiple of 16, got 8"),
        (dict(cache=torch.ones(5, 40, 64).transpose(1, 2)), "cache must be contiguous from dimension 1"),
        (dict(block_table=torch.zeros(3, 2, dtype=torch.int32)), "block_table must have shape"),
        (dict(block_table=torch.zeros(2, 2)), "block_table must be int32"),
        (dict(lengths=torch.zeros(2, dtype=torch.int64)), "lengths must be int32"),
        (dict(latent_dim=41), "latent_dim is larger than the rows of the cache"),
        (dict(out=torch.empty(2, 4, 31)), "out must have latent_dim = 32 columns, got 31"),
        (dict(out=torch.empty(2, 3, 32)), "out must have shape"),
        (dict(lse=torch.empty(2, 4, dtype=torch.bfloat16)), "lse must be float32"),
        (dict(scale=float("inf")), "scale must be finite"),
    ],
)
def test_bad_input_is_named(change, text):
    with pytest.raises(RuntimeError, match=text):
        mla_decode(**(make([70, 3]) | change))


@pytest.mark.parametrize("device", DEVICES)
def test_raw_pointers_give_the_same_bits(device):
    c = kimi_native._C
    if c is None:
        pytest.skip("built without the pybind11 module")
    args = make([300, 0, 77], device=device)
    want, want_lse = run(args)
    out, lse = torch.empty_like(want), torch.empty_like(want_lse)
    p = c.MlaDecodeParams()
    for name in ("q", "cache", "block_table", "lengths"):
        setattr(p, name, args[name].data_ptr())
    p.out, p.lse, p.scale = out.data_ptr(), lse.data_ptr(), args["scale"]
    p.num_seqs, p.num_heads, p.latent_dim, p.rope_dim = 3, 4, 32, 8
    p.max_pages = p.block_table_stride = args["block_table"].shape[1]
    p.q_seq_stride, p.q_head_stride, p.page_stride, p.out_seq_stride, p.out_head_stride = 160, 40, 64 * 40, 128, 32
    workspace = torch.empty(getattr(c, f"mla_decode_workspace_bytes_{device}")(p), dtype=torch.uint8, device=device)
    p.workspace = workspace.data_ptr()
    if device == "cuda":
        c.mla_decode_cuda(p, torch.cuda.current_stream().cuda_stream)
    else:
        c.mla_decode_cpu(p)
    assert_same_bits(out, want)
    assert_same_bits(lse, want_lse, "lse")
