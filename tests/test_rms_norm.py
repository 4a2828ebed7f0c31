import pytest
import torch
from kit import (
    DEVICE_DTYPES,
    DEVICES,
    Guarded,
    assert_close,
    assert_same_bits,
    graph_replays,
    needs_cpu_backend,
    needs_gpu,
    opcheck,
    randn,
    strided,
    threads,
)
from spec.rms_norm import MAX_R
from spec.rms_norm import rms_norm as spec

from kimi_native.ops import rms_norm

SHAPES = [(0, 64), (1, 1), (3, 7), (5, 72), (2, 2304), (33, 512)]


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_against_spec(shape, dtype, scale, device):
    x = randn(*shape, dtype=dtype, device=device, scale=scale)
    weight = randn(shape[1], dtype=dtype, device=device, seed=1)
    ref, _ = spec(x, weight, 1e-5)
    assert_close(rms_norm(x, weight), ref, MAX_R[dtype])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_is_added_first_and_stored(shape, dtype, device):
    x, residual = (randn(*shape, dtype=dtype, device=device, seed=s) for s in (1, 2))
    weight = randn(shape[1], dtype=dtype, device=device, seed=3)
    ref, ref_residual = spec(x, weight, 1e-5, residual)
    out = rms_norm(x, weight, residual=residual)
    assert_close(out, ref, MAX_R[dtype])
    assert_same_bits(residual, ref_residual, "residual")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_strides_in_place_and_nothing_outside(device, dtype):
    x, weight = randn(6, 72, dtype=dtype, device=device), randn(72, dtype=dtype, device=device, seed=1)
    plain = rms_norm(x, weight)
    guarded = Guarded(6, 72, dtype=dtype, device=device)
    rms_norm(strided(x), weight, out=guarded.tensor)
    guarded.check()
    assert_same_bits(guarded.tensor, plain)
    assert_same_bits(rms_norm(x, weight, out=x), plain)


@needs_cpu_backend
def test_rows_are_independent_of_neighbours_and_threads():
    x, weight = randn(700, 200), randn(200, seed=1)
    with threads(1):
        one = rms_norm(x, weight)
    with threads(2):
        assert_same_bits(rms_norm(x, weight), one)
        assert_same_bits(rms_norm(x[13:14], weight), one[13:14])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_rows_are_independent_of_neighbours(device, dtype):
    x, weight = randn(37, 2304, dtype=dtype, device=device), randn(2304, dtype=dtype, device=device, seed=1)
    whole = rms_norm(x, weight)
    assert_same_bits(rms_norm(x, weight), whole)
    assert_same_bits(rms_norm(x[13:14], weight), whole[13:14])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("dim", [40, 41, 2304, 5000])
def test_few_rows_and_many_rows_are_the_same_bits(dim, device, dtype):
    """On a GPU there is a kernel for each."""
    rows = 1030
    x, residual = (randn(rows, dim, dtype=dtype, device=device, seed=s) for s in (1, 2))
    weight = randn(dim, dtype=dtype, device=device, seed=3)
    few_residual, many_residual = residual[:5].clone(), residual.clone()
    few = rms_norm(x[:5], weight, residual=few_residual)
    assert_same_bits(rms_norm(x, weight, residual=many_residual)[:5], few)
    assert_same_bits(many_residual[:5], few_residual, "residual")
    ref, _ = spec(x, weight, 1e-5, residual)
    assert_close(rms_norm(x, weight, residual=residual.clone()), ref, MAX_R[dtype])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_memory_that_is_not_aligned(device, dtype):
    x, weight = randn(3 * 72 + 1, dtype=dtype, device=device)[1:].view(3, 72), randn(72, dtype=dtype, device=device, seed=1)
    ref, _ = spec(x, weight, 1e-5)
    assert_close(rms_norm(x, weight), ref, MAX_R[dtype])


@needs_gpu
def test_graph_replay():
    x, weight = randn(5, 2304, dtype=torch.bfloat16, device="cuda"), randn(2304, dtype=torch.bfloat16, device="cuda", seed=1)
    out = torch.empty_like(x)
    graph_replays(lambda: rms_norm(x, weight, out=out), [out])


@needs_gpu
def test_tensors_past_2_to_the_31_elements():
    x = torch.zeros(2**31 // 2048 + 3, 2048, dtype=torch.bfloat16, device="cuda")
    x[-2:] = randn(2, 2048, dtype=torch.bfloat16, device="cuda")
    weight = randn(2048, dtype=torch.bfloat16, device="cuda", seed=1)
    rms_norm(x, weight, out=(out := torch.empty_like(x)))
    assert_same_bits(out[-2:], rms_norm(x[-2:].clone(), weight))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, weight, residual = (randn(*shape, device=device, seed=i) for i, shape in enumerate([(4, 32), (32,), (4, 32)]))
    opcheck(torch.ops.kimi_native.rms_norm, (x, weight, residual, 1e-5, torch.empty_like(x)))


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(weight=torch.ones(31)), "weight must have shape \\[32\\]"),
        (dict(weight=torch.ones(32, dtype=torch.bfloat16)), "weight must have the dtype"),
        (dict(out=torch.empty(4, 31)), "out must have shape"),
        (dict(eps=-1.0), "eps must not be negative"),
        (dict(residual=torch.ones(3, 32)), "residual must have shape"),
    ],
)
def test_bad_input_is_named(change, text):
    args = dict(x=torch.ones(4, 32), weight=torch.ones(32)) | change
    with pytest.raises(RuntimeError, match=text):
        rms_norm(**args)
