"""kda_prefill with its kernels for Hopper: the tests of test_kda_prefill.py that reach them, once more in the emulator, which must be
asked for them; with two kernels, the second one with 64 values a block or with 16, and with one for whole heads, which calls get that
say how long their sequences are."""

import ctypes
import functools
import subprocess

import pytest
import test_kda_prefill
import torch
from kit import DEVICES, SANITIZER, assert_close, assert_same_bits, hopper_kernels, needs_gpu
from test_kda_prefill import (  # noqa: F401
    HALF_DTYPES,
    MAX_R_CHUNKED,
    MAX_R_STATE_CHUNKED,
    check_against_spec,
    on,
    problem,
    reference,
    test_a_call_in_several_segments,
    test_beta_in_float32,
    test_correlated_keys_and_large_steps,
    test_fresh_sequences_do_not_read_their_slot,
    test_keys_and_steps_that_are_not_normalized,
    test_large_finite_inputs,
    test_many_chunks,
    test_memory_that_is_not_aligned,
    test_nothing_to_do,
    test_options,
    test_skipped_sequences_padding_and_strides,
    test_snapshots_are_the_states_of_the_prefixes,
    test_the_same_bits_for_every_max_seqlen,
    test_the_same_bits_for_every_split_after_whole_chunks,
    test_the_same_bits_in_a_batch_that_fills_the_device,
    test_values_of_any_magnitude,
    test_values_of_many_magnitudes_in_one_chunk,
    test_views_of_one_packed_tensor,
    tokens,
)

from kimi_native._loader import load_ops
from kimi_native.ops import kda_prefill

pytestmark = hopper_kernels


def on_zeros(prefill, **args):
    """The call, its output written to zeros unless the caller has a place for it."""
    return prefill(**{"out": torch.zeros(args["v"].shape, dtype=args["v"].dtype, device=args["v"].device)} | args)


# On how many multiprocessors calls of few heads take these kernels.
MULTIPROCESSORS = {"two": 3, "strips": 132, "one": 3}


@pytest.fixture(autouse=True, params=["two", "strips", "one"])
def kernels(request, monkeypatch):
    """The kernels of a call with few heads, an fp32 state and gates of the inputs' dtype."""
    monkeypatch.setenv("KIMI_CUDA_MULTIPROCESSORS", str(MULTIPROCESSORS[request.param]))
    if request.param == "one":  # sequences of one token, if that were true: no block would have more to do than others
        one = functools.partial(kda_prefill, max_seqlen=1)
        if SANITIZER == "initcheck":  # it does not see what the copy engine stores
            one = functools.partial(on_zeros, one)
        monkeypatch.setattr(test_kda_prefill, "kda_prefill", one)
        monkeypatch.setitem(globals(), "kda_prefill", one)
    return request.param


@pytest.mark.parametrize("device, dtype", HALF_DTYPES)
@pytest.mark.parametrize("heads, value_heads, size", [(1, 3, 64), (1, 1, 128), (1, 2, 128)])
def test_head_shapes(heads, value_heads, size, dtype, device):
    check_against_spec(problem([5, 70, 0, 64], heads, value_heads, size, size, dtype), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [64, 128])
def test_values_of_many_magnitudes_in_one_head(size, device):
    """A warp has 16 values of each 64: what it does alone because of them changes nothing for the others, to the bit."""
    args = problem([150], 1, 1, size, size, torch.bfloat16, regime="remember")
    factor = torch.tensor([1.0, 1e-6, 1e6, 1.0]).repeat_interleave(16).repeat(size // 64)
    mixed = args | {"v": args["v"] * factor.to(args["v"].dtype), "state": args["state"] * factor[:, None]}
    ours, plain = (on(device, a | {"state": a["state"].clone()}) for a in (mixed, args))
    out, expected = kda_prefill(**ours).cpu(), kda_prefill(**plain).cpu()
    assert_same_bits(out[..., factor == 1], expected[..., factor == 1])
    slot = args["slots"].item()
    assert_same_bits(ours["state"][slot][:, factor == 1], plain["state"][slot][:, factor == 1], "state")
    ref, ref_state = reference(mixed)
    for size_of_values in factor.unique():
        rows = factor == size_of_values
        assert_close(out[..., rows], ref[..., rows], MAX_R_CHUNKED[torch.bfloat16], f"times {size_of_values:g}")
        assert_close(ours["state"].cpu()[slot][:, rows], ref_state[slot][:, rows], MAX_R_STATE_CHUNKED, f"state times {size_of_values:g}")


def runs(device, **args) -> set[str]:
    """Which of the kernels of one call there are: "two", "strips", "one"."""
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            kda_prefill(**args)
            torch.cuda.synchronize()
        kernels = [event.key for event in profile.key_averages()]
    else:
        library = str(load_ops())
        read, offsets = ctypes.CDLL(library).kimi_emulator_launches, (ctypes.c_uint64 * 1000)()
        read(offsets, len(offsets))
        kda_prefill(**args)
        launched = {f"{offset:016x}" for offset in offsets[: read(offsets, len(offsets))]}
        symbols = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout.splitlines()
        kernels = [line for line in symbols if line[:16] in launched]
    names = {"two": "kda_chain_sm90_kernel", "strips": "kda_strip_sm90_kernel", "one": "kda_whole_sm90_kernel"}
    return {which for which, name in names.items() if any(name in kernel for kernel in kernels)}


@pytest.mark.parametrize("device", DEVICES)
def test_the_hopper_kernels_run(kernels, device):
    """Or all of this file would test the portable ones, or the same one twice."""
    assert runs(device, **on(device, problem([100], 1, 1, 128, 128, torch.bfloat16))) == {kernels}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", ["two"], indirect=True)
def test_which_calls_take_one_kernel(kernels, device):
    """Those that say that their sequences are alike, or short beside all, where there are enough for the device."""
    blocks = MULTIPROCESSORS[kernels]

    def which(lengths, **change):
        return runs(device, **on(device, problem(lengths, 1, 1, 64, 64, torch.bfloat16) | change))

    alike = [64] * (2 * blocks)
    assert which(alike, max_seqlen=64) == {"one"}
    assert which([1, *alike], max_seqlen=64) == {"one"}
    assert which(alike, max_seqlen=0) == {"two"}  # nothing said
    assert which(alike, max_seqlen=2**62) == {"two"}  # nothing that helps, nor overflows
    assert which([64 * 12] + [64] * blocks, max_seqlen=64 * 12) == {"two"}  # one block would be at work for ever
    assert which([64 * 12], max_seqlen=64 * 12) == {"two"}
    args = problem(alike, 1, 1, 64, 64, torch.bfloat16)
    assert which(alike, max_seqlen=64, g=args["g"].float()) == {"two"}
    assert which(alike, max_seqlen=64, state=args["state"].bfloat16()) == {"two"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", ["two"], indirect=True)
@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 10, 13, 18])
def test_one_kernel_in_any_number_of_blocks(blocks, kernels, device, monkeypatch):
    """Whichever heads a block takes, and when it begins: all are taken, once."""
    monkeypatch.setenv("KIMI_CUDA_MULTIPROCESSORS", str(blocks))
    args = problem([64] * (2 * blocks + 1), 1, 1, 64, 64, torch.bfloat16)
    ours, expected = (on(device, args | {"state": args["state"].clone()}) for _ in range(2))
    out = torch.full_like(ours["v"], float("nan"))
    assert runs(device, **ours, out=out, max_seqlen=64) == {"one"}
    assert_same_bits(out, kda_prefill(**expected))
    assert_same_bits(ours["state"], expected["state"], "state")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", ["strips"], indirect=True)
@pytest.mark.parametrize("size, most", [(64, 4), (128, 2)])
def test_which_calls_take_strips(size, most, kernels, device, monkeypatch):
    """Those whose strips need no more than half of the device, whatever the state's dtype."""
    monkeypatch.setenv("KIMI_CUDA_MULTIPROCESSORS", "32")

    def which(lengths, value_heads=1, dtype=torch.float32):
        args = problem(lengths, 1, value_heads, size, size, torch.bfloat16)
        return runs(device, **on(device, args | {"state": args["state"].to(dtype)}))

    assert which([70] * most) == which([70], most) == which([70], most, torch.bfloat16) == {"strips"}
    assert which([70] * (most + 1)) == which([70], most + 1) == {"two"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", ["strips"], indirect=True)
def test_strips_in_several_segments(kernels, device, monkeypatch):
    """As test_a_call_in_several_segments: the first segment has chunks 0 to 5, of which the fifth sequence has the last two."""
    monkeypatch.setenv("KIMI_CUDA_MULTIPROCESSORS", "1000000")  # so many that all heads take strips
    heads, lengths = 64, [1, 0, 0, 0, 200] + [0] * 45
    args = problem(lengths, 1, heads, 64, 64, torch.bfloat16)
    args["slots"] = torch.where(torch.tensor(lengths) == 200, args["slots"], -1)
    check_against_spec(args, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", ["strips"], indirect=True)
@pytest.mark.parametrize("regime", ["remember", "forget", "mixed"])
@pytest.mark.parametrize("size", [64, 128])
def test_strips_have_the_same_bits(size, regime, kernels, device, monkeypatch):
    """As 64 values a block, whatever the values: products by mma or by wgmma, and what is done again in other units."""
    args = problem([64 * 5 + 7], 1, 2, size, size, torch.bfloat16, regime=regime)
    args["state"][args["slots"].long()] = 0.0
    args["v"][:64] *= 1e-4  # beside such a state fp16 does not hold v' of the first chunk; of the next one it does
    args["v"][64:128] *= 2e-3
    args["v"][200, :, :16] *= 1e20
    args = on(device, args)
    state, slot = args["state"].clone(), args["slots"].item()
    out = kda_prefill(**args | {"state": state})
    monkeypatch.setenv("KIMI_CUDA_MULTIPROCESSORS", str(MULTIPROCESSORS["two"]))
    assert_same_bits(kda_prefill(**args), out)
    assert_same_bits(args["state"][slot], state[slot], "state")


@needs_gpu
@pytest.mark.parametrize("heads", [8, 16, 32])
@pytest.mark.parametrize("regime", ["remember", "mixed"])
def test_segments_that_overlap(regime, heads, monkeypatch):
    """Segments of 48, 72, 107, ... chunks of 8 heads (in strips) or of 16, or of 84 of 32; the kernels of the next one run beside
    each. Nothing of that may be seen."""
    monkeypatch.delenv("KIMI_CUDA_MULTIPROCESSORS", raising=False)
    args = on("cuda", problem([64 * 300 + 5], heads, heads, 128, 128, torch.bfloat16, regime=regime))
    slot, part_state = args["slots"].long(), args["state"].clone()
    cuts = range(0, len(args["q"]), 64 * 30)  # calls of one segment
    parts = [kda_prefill(**tokens(args, a, min(a + 64 * 30, len(args["q"])), state=part_state)) for a in cuts]
    for _ in range(5):
        state = args["state"].clone()
        assert_same_bits(kda_prefill(**args | {"state": state}), torch.cat(parts))
        assert_same_bits(state[slot], part_state[slot])
