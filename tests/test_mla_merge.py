import pytest
import torch
from kit import (
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
    threads,
)
from spec.mla_merge import MAX_R
from spec.mla_merge import mla_merge as spec

import kimi_native
from kimi_native.ops import mla_merge

INF = float("inf")


def case(tokens, heads, dim, spread=1.0, device="cpu"):
    """Outputs and log-sum-exps of two key sets; `spread` sets how unequal they are. Every fifth row lacks a side."""
    out, other = randn(tokens, heads, dim, device=device), randn(tokens, heads, dim, seed=1, device=device)
    lse, other_lse = (randn(tokens, heads, seed=s, scale=spread, device=device) for s in (2, 3))
    flat, other_flat = lse.view(-1), other_lse.view(-1)
    flat[::5], other_flat[1::5] = -INF, -INF
    flat[2::10], other_flat[2::10] = -INF, -INF
    out.view(-1, dim)[flat == -INF] = 0
    other.view(-1, dim)[other_flat == -INF] = 0
    return out, lse, other, other_lse


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 4, 16), (1, 1, 1), (5, 3, 7), (33, 4, 128)])
@pytest.mark.parametrize("spread", [0.1, 3.0, 100.0])
def test_against_spec(shape, spread, device):
    args = case(*shape, spread, device)
    ref_out, ref_lse = spec(*args)
    out, lse = args[0].clone(), args[1].clone()
    mla_merge(out, lse, *args[2:])
    assert_close(out, ref_out, MAX_R)
    assert_close(lse, ref_lse, MAX_R, "lse")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [30, 128])
def test_a_side_without_keys_leaves_the_other_bits(dim, device):
    out, lse, other, other_lse = case(20, 4, dim, device=device)
    before, before_lse = out.clone(), lse.clone()
    mla_merge(out, lse, other, other_lse)
    only_first, only_other = other_lse == -INF, (before_lse == -INF) & (other_lse > -INF)
    assert only_first.any() and only_other.any()
    assert_same_bits(out[only_first], before[only_first])
    assert_same_bits(lse[only_first], before_lse[only_first])
    assert_same_bits(out[only_other], other[only_other])
    assert_same_bits(lse[only_other], other_lse[only_other])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_independent_of_neighbours_and_memory(device):
    args = case(13, 3, 128, device=device)
    whole, lse = args[0].clone(), args[1].clone()
    mla_merge(whole, lse, *args[2:])
    row = [t[7:8].clone() for t in args]
    assert_same_bits(mla_merge(*row), whole[7:8])
    assert_same_bits(row[1], lse[7:8])
    guarded = Guarded(13 * 3 * 128 + 1, dtype=torch.float32, device=device, fill=0.0)  # not on a boundary of 16 bytes
    odd = guarded.tensor[1:].view(13, 3, 128).copy_(args[0])
    assert_same_bits(mla_merge(odd, args[1].clone(), *args[2:]), whole)
    guarded.check()
    assert guarded.tensor[0] == 0


@needs_gpu
def test_graph_replay():
    args = case(13, 3, 128, device="cuda")
    out, lse = torch.empty_like(args[0]), torch.empty_like(args[1])
    graph_replays(lambda: mla_merge(out.copy_(args[0]), lse.copy_(args[1]), *args[2:]), [out, lse])


@needs_gpu
def test_rows_past_2_to_the_31_elements():
    rows = 2**31 // 128 + 3
    out, other = torch.zeros(rows, 1, 128, device="cuda"), torch.ones(rows, 1, 128, device="cuda")
    lse, other_lse = torch.zeros(rows, 1, device="cuda"), torch.zeros(rows, 1, device="cuda")
    mla_merge(out, lse, other, other_lse)
    assert (out[-1] == 0.5).all() and (out[0] == 0.5).all() and lse[-1] == lse[0]


@needs_cpu_backend
def test_rows_are_independent_of_neighbours_and_threads():
    args = case(300, 4, 100)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(mla_merge(args[0].clone(), args[1].clone(), *args[2:]))
    assert_same_bits(*results)
    row = [t[7:8].clone() for t in args]
    assert_same_bits(mla_merge(*row), results[0][7:8])


@pytest.mark.parametrize("device", DEVICES)
def test_raw_pointer_entry_gives_the_same_bits(device):
    if kimi_native._C is None:
        pytest.skip("built without the pybind11 module")
    out, lse, other, other_lse = case(3, 2, 20, device=device)
    want = mla_merge(out.clone(), lse.clone(), other, other_lse)
    p = kimi_native._C.MlaMergeParams()
    p.out, p.lse, p.other_out, p.other_lse = (t.data_ptr() for t in (out, lse, other, other_lse))
    p.num_rows, p.dim = 6, 20
    getattr(kimi_native._C, "mla_merge_cuda" if cuda_backend(device) else "mla_merge_cpu")(p)
    assert_same_bits(out, want)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    opcheck(torch.ops.kimi_native.mla_merge, case(3, 2, 8, device=device))


def test_bad_input_is_named():
    out, lse, other, other_lse = case(3, 2, 8)
    with pytest.raises(RuntimeError, match="other_lse must have shape"):
        mla_merge(out, lse, other, other_lse[:2])
    with pytest.raises(RuntimeError, match="out must be float32"):
        mla_merge(out.bfloat16(), lse, other, other_lse)
