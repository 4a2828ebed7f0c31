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
    needs_cpu_backend,
    needs_gpu,
    opcheck,
    randn,
    strided,
    threads,
)
from spec.batch_invariant_linear import MAX_R
from spec.batch_invariant_linear import batch_invariant_linear as spec

import kimi_native
from kimi_native.ops import batch_invariant_linear

# rows, outputs, inputs: one row, tails in every dimension (below a vector too), several slabs of rows of the CPU kernel
SHAPES = [
    (0, 8, 8),
    (1, 1, 1),
    (1, 7, 3),
    (3, 5, 17),
    (5, 33, 72),
    (6, 64, 512),
    (23, 19, 129),
    (25, 19, 129),
    (31, 70, 520),
    (64, 66, 1040),
    (97, 3, 515),
    (26, 9, 1),
]


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_spec(shape, dtype, device):
    m, n, k = shape
    x, weight = randn(m, k, dtype=dtype, device=device), randn(n, k, dtype=dtype, device=device, seed=1)
    assert_close(batch_invariant_linear(x, weight), spec(x, weight), MAX_R[dtype])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("n, k", [(4096, 2304), (2304, 4096), (32, 2304), (4096, 128), (60, 9216)])
def test_real_shapes(n, k, rows, dtype, device):
    x, weight = randn(rows, k, dtype=dtype, device=device), randn(n, k, dtype=dtype, device=device, seed=1, scale=0.02)
    assert_close(batch_invariant_linear(x, weight), spec(x, weight), MAX_R[dtype])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 5, 29])
@pytest.mark.parametrize("groups, n, k", [(1, 6, 10), (4, 70, 35), (32, 64, 128)])
def test_grouped(rows, groups, n, k, dtype, device):
    x, weight = randn(rows, groups, k, dtype=dtype, device=device), randn(groups, n, k, dtype=dtype, device=device, seed=1)
    out = batch_invariant_linear(x, weight)
    assert_close(out, spec(x, weight), MAX_R[dtype])
    for g in range(groups):
        assert_same_bits(out[:, g], batch_invariant_linear(x[:, g], weight[g]), f"group {g}")


@pytest.mark.parametrize("device", DEVICES)
def test_float32_out_of_bfloat16(device):
    x, weight = (randn(s, 96, dtype=torch.bfloat16, device=device, seed=s) for s in (9, 21))
    out = torch.empty(9, 21, device=device)
    assert batch_invariant_linear(x, weight, out=out) is out
    assert_close(out, spec(x, weight), MAX_R[torch.float32])
    assert_same_bits(out.bfloat16(), batch_invariant_linear(x, weight), "rounded")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("rows", [7, 30])
def test_strides_and_nothing_outside(dtype, rows, device):
    x, weight = randn(rows, 70, dtype=dtype, device=device), randn(37, 70, dtype=dtype, device=device, seed=1)
    plain = batch_invariant_linear(x, weight)
    guarded = Guarded(rows, 37, dtype=dtype, device=device)
    batch_invariant_linear(strided(x), strided(weight), out=guarded.tensor)
    guarded.check()
    assert_same_bits(guarded.tensor, plain)
    wide = torch.full((rows, 50), 3.0, dtype=dtype, device=device)
    batch_invariant_linear(x, weight, out=wide[:, 5:42])
    assert_same_bits(wide[:, 5:42], plain)
    assert (wide[:, :5] == 3).all() and (wide[:, 42:] == 3).all()
    x3, weight3 = randn(rows, 3, 33, dtype=dtype, device=device), randn(3, 10, 33, dtype=dtype, device=device, seed=1)
    assert_same_bits(batch_invariant_linear(strided(x3), strided(weight3)), batch_invariant_linear(x3, weight3), "grouped")


def test_leading_dimensions():
    x, weight = randn(2, 3, 4, 40), randn(11, 40, seed=1)
    out = batch_invariant_linear(x, weight)
    assert out.shape == (2, 3, 4, 11)
    assert_same_bits(out.view(24, 11), batch_invariant_linear(x.view(24, 40), weight))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("n, k", [(70, 1040), (130, 77), (9, 2304)])
def test_a_row_has_the_same_bits_in_every_batch(n, k, dtype, device):
    x, weight = randn(300, k, dtype=dtype, device=device), randn(n, k, dtype=dtype, device=device, seed=1)
    whole = batch_invariant_linear(x, weight)
    assert_same_bits(batch_invariant_linear(x, weight), whole, "repeat")
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 24, 25, 26, 64, 100):
        for first in (0, 131):
            assert_same_bits(batch_invariant_linear(x[first : first + rows], weight), whole[first : first + rows], f"{rows} rows")
    noisy = x.clone()
    noisy[:17], noisy[18:] = float("nan"), float("inf")
    assert_same_bits(batch_invariant_linear(noisy, weight)[17], whole[17], "neighbours of NaN")
    for first in range(0, n, 7):  # an output does not depend on which other outputs are computed
        assert_same_bits(batch_invariant_linear(x[:30], weight[first : first + 5]), whole[:30, first : first + 5], "columns")


@needs_cpu_backend
@pytest.mark.parametrize("rows", [1, 24, 40, 300])
def test_thread_count_does_not_matter(rows):
    x, weight = randn(rows, 513), randn(333, 513, seed=1)
    with threads(1):
        one = batch_invariant_linear(x, weight)
    for n in (2, 3, 7):
        with threads(n):
            assert_same_bits(batch_invariant_linear(x, weight), one, f"{n} threads")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("rows", [3, 40, 130])
@pytest.mark.parametrize("n, k, x_at, weight_at", [(70, 72, 1, 0), (70, 72, 0, 1), (140, 64, 4, 4)])
def test_memory_that_is_not_aligned(rows, n, k, x_at, weight_at, dtype, device):
    """The same bits from addresses that 16-byte accesses cannot take."""
    x, weight = randn(rows, k, dtype=dtype, device=device), randn(n, k, dtype=dtype, device=device, seed=1)
    moved_x = torch.cat([x.new_full((x_at,), float("nan")), x.flatten()])[x_at:].view(rows, k)
    moved_weight = torch.cat([x.new_full((weight_at,), float("nan")), weight.flatten()])[weight_at:].view(n, k)
    assert_same_bits(batch_invariant_linear(moved_x, moved_weight), batch_invariant_linear(x, weight))


@needs_cpu_backend
def test_the_cpu_refuses_float16():
    with pytest.raises(RuntimeError, match="the CPU backend takes float32 and bfloat16, got float16"):
        batch_invariant_linear(torch.ones(4, 32).half(), torch.ones(8, 32).half())


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, k", [(2304, 4096), (12576, 2304), (4096, 128), (576, 2304), (2304, 9216)])
def test_real_shapes_have_the_same_bits_in_every_batch(n, k, dtype):
    """All kernels and tile sizes at once: one warp's stream, small and large tiles."""
    x, weight = randn(1000, k, dtype=dtype, device="cuda"), randn(n, k, dtype=dtype, device="cuda", seed=1, scale=k**-0.5)
    whole = batch_invariant_linear(x, weight)
    assert_close(whole, spec(x.double(), weight.double()), MAX_R[dtype])
    for rows in (1, 8, 9, 16, 17, 63, 64, 65, 129, 500):
        assert_same_bits(batch_invariant_linear(x[77 : 77 + rows], weight), whole[77 : 77 + rows], f"{rows} rows")


@needs_gpu
@pytest.mark.parametrize("rows", [1, 16, 100, 2000])
@pytest.mark.parametrize("groups, n, k", [(1, 4096, 2304), (32, 512, 128)])
def test_graph_replay(groups, n, k, rows):
    x = randn(rows, groups, k, dtype=torch.bfloat16, device="cuda")
    weight = randn(groups, n, k, dtype=torch.bfloat16, device="cuda", seed=1)
    out = torch.empty(rows, groups, n, dtype=torch.bfloat16, device="cuda")
    graph_replays(lambda: batch_invariant_linear(x, weight, out=out), [out])


@needs_gpu
def test_tensors_past_2_to_the_31_elements():
    k, n = 2048, 64
    rows = 2**31 // k + 70
    weight = randn(n, k, dtype=torch.bfloat16, device="cuda", seed=1)
    last = randn(100, k, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(rows, k, dtype=torch.bfloat16, device="cuda")
    x[-100:] = last
    assert_same_bits(batch_invariant_linear(x, weight)[-100:], batch_invariant_linear(last, weight), "many rows")
    assert_same_bits(batch_invariant_linear(weight[:9], x)[:, -100:], batch_invariant_linear(weight[:9], last), "many outputs")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [4, 30])
def test_infinities_and_nan_stay_in_their_rows(rows, device):
    x, weight = randn(rows, 20, device=device), randn(6, 20, seed=1, device=device)
    x[1, 3], x[2, 19] = float("inf"), float("nan")
    out = batch_invariant_linear(x, weight)
    assert torch.isinf(out[1]).all() and torch.isnan(out[2]).all()
    assert torch.isfinite(out[0]).all() and torch.isfinite(out[3:]).all()


def test_opcheck():
    x, weight = randn(4, 32), randn(7, 32, seed=1)
    opcheck(torch.ops.kimi_native.batch_invariant_linear, (x, weight, torch.empty(4, 7)))
    opcheck(torch.ops.kimi_native.batch_invariant_linear, (randn(4, 2, 8), randn(2, 3, 8), torch.empty(4, 2, 3)))


@pytest.mark.skipif(kimi_native._C is None, reason="built without the pybind11 module")
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("rows", [3, 30])
def test_raw_pointers(rows, dtype, device):
    c = kimi_native._C
    x, weight = randn(rows, 2, 50, dtype=dtype, device=device), randn(2, 9, 50, dtype=dtype, device=device, seed=1)
    out = torch.empty(rows, 2, 9, dtype=dtype, device=device)
    p = c.BatchInvariantLinearParams()
    p.x, p.weight, p.out = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    p.num_tokens, p.num_groups, p.in_features, p.out_features = rows, 2, 50, 9
    p.x_token_stride, p.x_group_stride, p.weight_group_stride, p.weight_row_stride = 100, 50, 450, 50
    p.out_token_stride, p.out_group_stride = 18, 9
    p.dtype = p.out_dtype = getattr(c.DType, str(dtype).removeprefix("torch."))
    if cuda_backend(device):
        c.batch_invariant_linear_cuda(p, torch.cuda.current_stream().cuda_stream if device == "cuda" else 0)
    else:
        c.batch_invariant_linear_cpu(p)
    assert_same_bits(out, batch_invariant_linear(x, weight))


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(x=torch.ones(4, 31)), "x must have shape \\[\\*, 32\\]"),
        (dict(weight=torch.ones(8)), "weight must have shape \\[out, in\\]"),
        (dict(weight=torch.ones(8, 32, dtype=torch.bfloat16)), "weight must have the dtype"),
        (dict(weight=torch.ones(32, 8).T), "weight must be contiguous in its last dimension"),
        (dict(weight=torch.ones(2, 8, 32)), "x must have shape \\[\\*, 2, 32\\]"),
        (dict(out=torch.empty(4, 7)), "out must have shape"),
        (dict(out=torch.empty(4, 8, dtype=torch.bfloat16)), "out must have the dtype of x or float32"),
        (dict(x=torch.ones(4, 0), weight=torch.ones(8, 0)), "in_features must be positive"),
        (dict(x=torch.ones(4, 32).double(), weight=torch.ones(8, 32).double()), "x must be float32, bfloat16 or float16"),
    ],
)
def test_bad_input_is_named(change, text):
    args = dict(x=torch.ones(4, 32), weight=torch.ones(8, 32)) | change
    if args["weight"].dim() == 3:
        args["out"] = torch.empty(4, 2, 8)
    with pytest.raises(RuntimeError, match=text):
        batch_invariant_linear(**args)
