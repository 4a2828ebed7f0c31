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
from spec.gated_rms_norm import MAX_R
from spec.gated_rms_norm import gated_rms_norm as spec

import kimi_native
from kimi_native.ops import gated_rms_norm

SHAPES = [(0, 2, 64), (1, 1, 1), (3, 2, 7), (5, 3, 72), (2, 32, 128), (1, 5, 300), (2, 3, 1000)]


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e30])
def test_against_spec(shape, dtype, scale, device):
    if dtype == torch.float16:
        scale = min(scale, 1e4)  # its largest value is 65504
    x = randn(*shape, dtype=dtype, device=device, scale=scale)
    gate = randn(*shape, dtype=dtype, device=device, seed=1, scale=4.0)
    weight = randn(shape[-1], dtype=dtype, device=device, seed=2)
    assert_close(gated_rms_norm(x, gate, weight), spec(x, gate, weight, 1e-5), MAX_R[dtype])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_saturated_gates_and_zero_rows(dtype, device):
    x = randn(4, 2, 48, dtype=dtype, device=device)
    x[1] = 0
    gate = torch.tensor([-1e4, -100.0, -88.0, -20.0, 0.0, 20.0, 100.0, 1e4], dtype=dtype, device=device).repeat(4, 2, 6)
    weight = randn(48, dtype=dtype, device=device, seed=2)
    out = gated_rms_norm(x, gate, weight)
    assert_close(out, spec(x, gate, weight, 1e-5), MAX_R[dtype])
    assert (out[1] == 0).all()
    assert (gated_rms_norm(x, gate, weight, 0.0)[[0, 2, 3]]).isfinite().all()


def problem(tokens, heads, dim, dtype, device):
    """x, gate and weight."""
    shape = (tokens, heads, dim)
    return (randn(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate([shape, shape, (dim,)]))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_any_number_of_dimensions(device, dtype):
    x, gate, weight = problem(6, 4, 24, dtype, device)
    plain = gated_rms_norm(x, gate, weight)
    for shape in [(24, 24), (2, 3, 4, 24), (1, 6, 2, 2, 24)]:
        assert_same_bits(gated_rms_norm(x.view(shape), gate.view(shape), weight).view(6, 4, 24), plain)
    assert_same_bits(gated_rms_norm(x[0, 0], gate[0, 0], weight), plain[0, 0])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_strides_in_place_and_nothing_outside(device, dtype):
    x, gate, weight = problem(6, 4, 24, dtype, device)
    plain = gated_rms_norm(x, gate, weight)
    guarded = Guarded(6, 4, 24, dtype=dtype, device=device)
    gated_rms_norm(strided(x), strided(gate), weight, out=guarded.tensor)
    guarded.check()
    assert_same_bits(guarded.tensor, plain)
    packed = torch.full((6, 3, 4, 24), float("nan"), dtype=dtype, device=device)  # heads of one token apart from those of the next
    packed[:, 1] = gate
    by_head = x.transpose(0, 1).contiguous().transpose(0, 1)  # head stride larger than token stride
    wide = torch.full((6, 8, 24), 7.0, dtype=dtype, device=device)
    gated_rms_norm(by_head, packed[:, 1], weight, out=wide[:, ::2])
    assert_same_bits(wide[:, ::2], plain)
    assert (wide[:, 1::2] == 7).all()
    assert_same_bits(gated_rms_norm(x.clone(), gate, weight, out=gate.clone()), plain)
    assert_same_bits(gated_rms_norm(x, gate, weight, out=x), plain)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("dim", [24, 300])
def test_memory_that_is_not_aligned_gives_the_same_bits_on_a_gpu(dim, device, dtype):
    x, gate, weight = problem(5, 3, dim, dtype, device)
    plain = gated_rms_norm(x, gate, weight)
    shifted = [torch.empty(t.numel() + 1, dtype=dtype, device=device)[1:].view(t.shape).copy_(t) for t in (x, gate, weight)]
    out = Guarded(5, 3, dim + 1, dtype=dtype, device=device)
    odd = gated_rms_norm(*shifted, out=out.tensor[..., 1:])
    out.check()
    assert out.tensor[..., 0].isnan().all()
    if cuda_backend(device):
        assert_same_bits(odd, plain)
    assert_close(odd, spec(x, gate, weight, 1e-5), MAX_R[dtype])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_rows_are_independent_of_neighbours(device, dtype):
    """On a GPU a thread takes several rows where there are enough of them."""
    tokens = 4001 if device == "cuda" else 137
    x, gate, weight = problem(tokens, 5, 128, dtype, device)
    whole = gated_rms_norm(x, gate, weight)
    assert_same_bits(gated_rms_norm(x, gate, weight), whole)
    assert_same_bits(gated_rms_norm(strided(x), gate, weight), whole)
    assert_close(whole, spec(x, gate, weight, 1e-5), MAX_R[dtype])
    x[12] = 1e30 if dtype != torch.float16 else 6e4
    x[14] = float("nan")
    assert_same_bits(gated_rms_norm(x, gate, weight)[13], whole[13])
    assert_same_bits(gated_rms_norm(x[13:14, 3:4], gate[13:14, 3:4], weight), whole[13:14, 3:4])


@needs_cpu_backend
def test_rows_are_independent_of_neighbours_and_threads():
    x, gate, weight = randn(300, 5, 72), randn(300, 5, 72, seed=1), randn(72, seed=2)
    with threads(1):
        one = gated_rms_norm(x, gate, weight)
    with threads(2):
        assert_same_bits(gated_rms_norm(x, gate, weight), one)
        assert_same_bits(gated_rms_norm(x[13:14, 3:4], gate[13:14, 3:4], weight), one[13:14, 3:4])


@needs_gpu
def test_graph_replay():
    x, gate, weight = problem(5, 32, 128, torch.bfloat16, "cuda")
    out = torch.empty_like(x)
    graph_replays(lambda: gated_rms_norm(x, gate, weight, out=out), [out])


@needs_gpu
def test_tensors_past_2_to_the_31_elements():
    _, _, weight = problem(1, 1, 128, torch.bfloat16, "cuda")
    x = torch.zeros(2**31 // 4096 + 3, 32, 128, dtype=torch.bfloat16, device="cuda")
    x[-2:] = randn(2, 32, 128, dtype=torch.bfloat16, device="cuda")
    last = gated_rms_norm(x[-2:].clone(), x[-2:].clone(), weight)
    gated_rms_norm(x, x, weight, out=x)
    assert_same_bits(x[-2:], last)
    assert (x[0] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, gate, weight = problem(4, 2, 32, torch.float32, device)
    opcheck(torch.ops.kimi_native.gated_rms_norm, (x, gate, weight, 1e-5, torch.empty_like(x)))


@pytest.mark.skipif(kimi_native._C is None, reason="built without the pybind11 module")
@pytest.mark.parametrize("device", DEVICES)
def test_entry_on_raw_pointers(device):
    x, gate, weight = problem(4, 2, 32, torch.float32, device)
    out = torch.empty_like(x)
    p = kimi_native._C.GatedRmsNormParams()
    p.x, p.gate, p.weight, p.out = (t.data_ptr() for t in (x, gate, weight, out))
    p.num_tokens, p.num_heads, p.dim = x.shape
    p.x_token_stride = p.gate_token_stride = p.out_token_stride = 64
    p.x_head_stride = p.gate_head_stride = p.out_head_stride = 32
    getattr(kimi_native._C, "gated_rms_norm_cuda" if cuda_backend(device) else "gated_rms_norm_cpu")(p)
    assert_same_bits(out, gated_rms_norm(x, gate, weight))


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(gate=torch.ones(4, 2, 31)), "gate must have shape \\[4, 2, 32\\]"),
        (dict(gate=torch.ones(4, 2, 32, dtype=torch.bfloat16)), "gate must have the dtype"),
        (dict(weight=torch.ones(31)), "weight must have shape \\[32\\]"),
        (dict(out=torch.empty(4, 3, 32)), "out must have shape"),
        (dict(eps=-1.0), "eps must not be negative"),
        (dict(x=torch.ones(4, 32, 2).transpose(1, 2)), "x must be contiguous in its last dimension"),
    ],
)
def test_bad_input_is_named(change, text):
    args = dict(x=torch.ones(4, 2, 32), gate=torch.ones(4, 2, 32), weight=torch.ones(32)) | change
    with pytest.raises(RuntimeError, match=text):
        gated_rms_norm(**args)
