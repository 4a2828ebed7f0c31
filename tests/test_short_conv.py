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
from spec.short_conv import MAX_R
from spec.short_conv import short_conv as spec

import kimi_native
from kimi_native.ops import short_conv, short_conv_update

NAN = float("nan")


def i32(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def problem(lengths, channels, dtype, device="cpu", num_slots=None, seed=0, scale=1.0):
    """x, weight, state, slots (spread and out of order) and cu_seqlens; slots that no sequence has hold NaN."""
    n = len(lengths)
    num_slots = num_slots or 2 * n + 1
    x = randn(sum(lengths), channels, dtype=dtype, device=device, seed=seed, scale=scale)
    weight = randn(channels, 4, dtype=dtype, device=device, seed=seed + 1)
    slots = i32(*[(num_slots - 1 - 2 * i) for i in range(n)], device=device)
    state = torch.full((num_slots, 3, channels), NAN, dtype=dtype, device=device)
    state[slots.long()] = randn(n, 3, channels, dtype=dtype, device=device, seed=seed + 2, scale=scale)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    return x, weight, state, slots, cu


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 48, 530])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_against_spec(channels, dtype, scale, device):
    if dtype == torch.float16:
        scale = min(scale, 1e3)  # its largest value is 65504
    lengths = [5, 0, 1, 2, 3, 67, 64]
    x, weight, state, slots, cu = problem(lengths, channels, dtype, device, scale=scale)
    before = state.clone()
    fresh = torch.tensor([True, False, True, False, True, True, False], device=device)  # false: starts from zero
    state[slots[3].long()] = NAN
    out = short_conv(x, weight, state, slots, cu, has_initial_state=fresh)
    refs = []
    for n, length in enumerate(lengths):
        slot = int(slots[n])
        past = before[slot] if fresh[n] else torch.zeros_like(before[slot])
        ref, after = spec(x[int(cu[n]) : int(cu[n + 1])].cpu(), weight.cpu(), past.cpu())
        refs.append(ref)
        assert_same_bits(state[slot].cpu(), after if length else before[slot].cpu(), f"state of sequence {n}")
    assert_close(out, torch.cat(refs), MAX_R[dtype])  # at once: a bf16 rounding of few values may be off by more
    others = [s for s in range(len(state)) if s not in slots.tolist()]
    assert state[others].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_real_width(device):
    x, weight, state, slots, cu = problem([70, 1], 3 * 4096, torch.bfloat16, device)
    ref, after = spec(x[:70].cpu(), weight.cpu(), state[int(slots[0])].cpu())
    out = short_conv(x, weight, state, slots, cu)
    assert_close(out[:70], ref, MAX_R[torch.bfloat16])
    assert_same_bits(state[int(slots[0])].cpu(), after)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_any_split_and_the_one_token_form_give_the_same_bits(dtype, device):
    x, weight, state, slots, cu = problem([150], 72, dtype, device)
    whole_state = state.clone()
    whole = short_conv(x, weight, whole_state, slots, cu)
    for cuts in [(64,), (128,), (1, 2, 3, 4), (17, 40, 149)]:
        s = state.clone()
        bounds = [0, *cuts, 150]
        parts = [short_conv(x[a:b], weight, s, slots, i32(0, b - a, device=device)) for a, b in zip(bounds, bounds[1:], strict=False)]
        assert_same_bits(torch.cat(parts), whole, f"cut at {cuts}")
        assert_same_bits(s[slots.long()], whole_state[slots.long()], f"state, cut at {cuts}")
    s = state.clone()
    steps = [short_conv_update(x[t : t + 1], weight, s, slots) for t in range(150)]
    assert_same_bits(torch.cat(steps), whole)
    assert_same_bits(s[slots.long()], whole_state[slots.long()])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_neighbours_and_runs(device, dtype):
    """On a GPU the length of a run follows from the number of tokens: a sequence is cut differently alone and in company."""
    lengths = [30, 1, 0, 65, 1, 2, 3, 1, 4, 2, 1, 1, 130, *[1] * 40, 33]
    x, weight, state, slots, cu = problem(lengths, 80, dtype, device)
    together_state = state.clone()
    together = short_conv(x, weight, together_state, slots, cu)
    again_state = state.clone()
    assert_same_bits(short_conv(x, weight, again_state, slots, cu), together)
    assert_same_bits(again_state, together_state)
    for n, length in enumerate(lengths):
        rows, slot = slice(int(cu[n]), int(cu[n + 1])), slots[n].long()
        alone_state = state.clone()
        alone = short_conv(x[rows], weight, alone_state, slots[n : n + 1], i32(0, length, device=device))
        assert_same_bits(alone, together[rows], f"sequence {n}")
        assert_same_bits(alone_state[slot], together_state[slot], f"state of sequence {n}")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("channels", [16, 33])
def test_memory_that_is_not_aligned(channels, device, dtype):
    x, weight, state, slots, cu = problem([5, 40], channels, dtype, device)
    plain_state = state.clone()
    plain = short_conv(x, weight, plain_state, slots, cu)
    shifted = [torch.empty(t.numel() + 1, dtype=dtype, device=device)[1:].view(t.shape).copy_(t) for t in (x, weight, state)]
    out = Guarded(45, channels + 1, dtype=dtype, device=device)
    assert_same_bits(short_conv(*shifted, slots, cu, out=out.tensor[:, 1:]), plain)
    assert_same_bits(shifted[2], plain_state)
    out.check()
    assert out.tensor[:, 0].isnan().all()


@needs_gpu
def test_graph_replay():
    x, weight, state, slots, cu = problem([5, 0, 70, 1], 256, torch.bfloat16, "cuda")
    work, out = state.clone(), torch.empty_like(x)
    graph_replays(lambda: short_conv(x, weight, work.copy_(state), slots, cu, out=out), [out, work])
    work_1, out_1 = state.clone(), torch.empty_like(x[:4])
    graph_replays(lambda: short_conv_update(x[:4], weight, work_1.copy_(state), slots, out=out_1), [out_1, work_1])


@needs_gpu
def test_another_stream():
    x, weight, state, slots, cu = problem([5, 300], 256, torch.bfloat16, "cuda")
    expected_state, stream = state.clone(), torch.cuda.Stream()
    expected = short_conv(x, weight, expected_state, slots, cu)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        x2 = x * 1
        out = short_conv(x2, weight, state, slots, cu)
    stream.synchronize()
    assert_same_bits(out, expected)
    assert_same_bits(state, expected_state)


@needs_gpu
def test_tensors_past_2_to_the_31_elements():
    tokens, channels = 2**31 // 4096 + 70, 4096
    x = torch.zeros(tokens, channels, dtype=torch.bfloat16, device="cuda")
    x[-66:] = randn(66, channels, dtype=torch.bfloat16, device="cuda")
    weight = randn(channels, 4, dtype=torch.bfloat16, device="cuda", seed=1)
    pool = torch.empty(2**31 // (3 * channels) + 2, 3, channels, dtype=torch.bfloat16, device="cuda")
    pool[-1] = randn(3, channels, dtype=torch.bfloat16, device="cuda", seed=2)
    pool[0] = pool[-1]
    cu = i32(0, tokens - 66, tokens, device="cuda")
    out = short_conv(
        x, weight, pool, i32(1, len(pool) - 1, device="cuda"), cu, has_initial_state=torch.tensor([False, True], device="cuda")
    )
    small = pool[:1].clone()
    last = short_conv(x[-66:].clone(), weight, small, i32(0, device="cuda"), i32(0, 66, device="cuda"))
    assert_same_bits(out[-66:], last)
    assert (out[:1000] == 0).all() and (out[-1000:-66] == 0).all()
    assert_same_bits(pool[-1], x[-3:])


@needs_cpu_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_threads_and_repeats(dtype):
    lengths = [30, 1, 0, 65]
    x, weight, state, slots, cu = problem(lengths, 1030, dtype)
    with threads(1):
        one_state = state.clone()
        one = short_conv(x, weight, one_state, slots, cu)
    with threads(2):
        two_state = state.clone()
        assert_same_bits(short_conv(x, weight, two_state, slots, cu), one)
        assert_same_bits(two_state, one_state)
        for n, length in enumerate(lengths):
            rows = slice(int(cu[n]), int(cu[n + 1]))
            alone_state = state.clone()
            alone = short_conv(x[rows], weight, alone_state, slots[n : n + 1], i32(0, length))
            assert_same_bits(alone, one[rows])
            assert_same_bits(alone_state[slots[n].long()], one_state[slots[n].long()])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_snapshots_are_the_states_of_the_prefixes(dtype, device):
    lengths = [200, 63, 64, 0]
    x, weight, state, slots, cu = problem(lengths, 40, dtype, device, num_slots=20)
    state[:] = torch.where(state.isnan(), 9.0, state)
    snapshot_slots = torch.tensor([[0, -1, 2, 4], [6, 8, 10, -1], [12, 14, -1, -1], [16, -1, -1, -1]], dtype=torch.int32, device=device)
    after = state.clone()
    out = short_conv(x, weight, after, slots, cu, snapshot_slots=snapshot_slots)
    plain = state.clone()
    assert_same_bits(short_conv(x, weight, plain, slots, cu), out)
    expected = plain.clone()
    for n, tokens, slot in [(0, 64, 0), (0, 192, 2), (2, 64, 12)]:
        prefix = state.clone()
        begin = int(cu[n])
        short_conv(x[begin : begin + tokens], weight, prefix, slots[n : n + 1], i32(0, tokens, device=device))
        expected[slot] = prefix[int(slots[n])]
    assert_same_bits(after, expected)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_skipped_sequences_padding_and_strides(dtype, device):
    x, weight, state, slots, cu = problem([4, 3, 6], 24, dtype, device)
    plain_state = state.clone()
    plain = short_conv(x, weight, plain_state, slots, cu)
    slots = slots.clone()
    slots[1] = -1
    padded = torch.full((20, 24), NAN, dtype=dtype, device=device)  # rows past the last sequence are not touched
    padded[:13] = x
    guarded = Guarded(20, 24, dtype=dtype, device=device, fill=5.0)
    pool = torch.full((len(state), 5, 24), 7.0, dtype=dtype, device=device)  # slots apart in a larger pool
    pool[:, :3] = state
    short_conv(strided(padded), weight, pool[:, :3], slots, cu, out=guarded.tensor)
    guarded.check()
    assert (guarded.tensor[13:] == 5).all() and (guarded.tensor[4:7] == 0).all()
    assert_same_bits(guarded.tensor[:4], plain[:4])
    assert_same_bits(guarded.tensor[7:13], plain[7:])
    expected = plain_state.clone()
    expected[len(state) - 3] = state[len(state) - 3]  # the slot that sequence 1 had
    assert_same_bits(pool[:, :3], expected)
    assert (pool[:, 3:] == 7).all()

    slots = i32(2, -1, 0, device=device)
    state = randn(3, 3, 24, dtype=dtype, device=device)
    state[1] = NAN
    before = state.clone()
    out = short_conv_update(x[:3], weight, state, slots)
    assert (out[1] == 0).all() and out.isfinite().all()
    assert_same_bits(state[1], before[1])
    assert_same_bits(state[[0, 2], 2], x[[2, 0]])


def test_nothing_to_do():
    weight, state = torch.ones(8, 4), torch.zeros(2, 3, 8)
    assert short_conv(torch.ones(0, 8), weight, state, i32(), i32(0)).shape == (0, 8)
    assert short_conv(torch.ones(0, 8), weight, state, i32(0, 1), i32(0, 0, 0)).shape == (0, 8)
    assert short_conv_update(torch.ones(0, 8), weight, state, i32()).shape == (0, 8)
    assert (state == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, weight, state, slots, cu = problem([4, 70], 32, torch.float32, device)
    state.nan_to_num_(0)
    out = torch.empty_like(x)
    opcheck(torch.ops.kimi_native.short_conv, (x, weight, state, slots, cu, None, None, out))
    flags, snapshots = torch.tensor([True, False], device=device), i32(-1, 0, device=device).view(2, 1)
    opcheck(torch.ops.kimi_native.short_conv, (x, weight, state, slots, cu, flags, snapshots, out))
    opcheck(torch.ops.kimi_native.short_conv_update, (x[:2], weight, state, slots, out[:2]))


@pytest.mark.skipif(kimi_native._C is None, reason="built without the pybind11 module")
@pytest.mark.parametrize("device", DEVICES)
def test_entry_on_raw_pointers(device):
    entry = getattr(kimi_native._C, "short_conv_cuda" if cuda_backend(device) else "short_conv_cpu")
    x, weight, state, slots, cu = problem([4, 70], 33, torch.bfloat16, device)
    expected_state = state.clone()
    expected = short_conv(x, weight, expected_state, slots, cu)
    out = torch.empty_like(x)
    p = kimi_native._C.ShortConvParams()
    p.x, p.weight, p.state, p.slots, p.cu_seqlens, p.out = (t.data_ptr() for t in (x, weight, state, slots, cu, out))
    p.num_tokens, p.num_channels = x.shape
    p.num_sequences = 2
    p.x_stride = p.out_stride = 33
    p.state_slot_stride = 99
    p.dtype = kimi_native._C.DType.bfloat16
    entry(p)
    assert_same_bits(out, expected)
    assert_same_bits(state, expected_state)
    # tokens_per_sequence instead of cu_seqlens, and fewer tokens committed than given
    commit = i32(2, 37, device=device)
    start = state.clone()
    expected = short_conv(x, weight, expected_state.copy_(state), slots, i32(0, 37, 74, device=device))
    p.cu_seqlens, p.tokens_per_sequence, p.num_commit = 0, 37, commit.data_ptr()
    entry(p)
    assert_same_bits(out, expected)
    expected_state[int(slots[0])] = torch.cat([start[int(slots[0]), 2:], x[:2]])
    assert_same_bits(state, expected_state)
    p.x = 0
    with pytest.raises(RuntimeError, match="must not be null"):
        entry(p)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(weight=torch.ones(32, 3)), "weight must have shape \\[32, 4\\]"),
        (dict(weight=torch.ones(32, 4, dtype=torch.bfloat16)), "weight must have the dtype"),
        (dict(state=torch.ones(4, 4, 32)), "state must have shape \\[\\*, 3, 32\\]"),
        (dict(state=torch.ones(4, 32, 3).transpose(1, 2)), "state must be contiguous from dimension 1"),
        (dict(slots=torch.tensor([0, 1])), "slots must be int32"),
        (dict(cu_seqlens=i32(0, 4)), "cu_seqlens must have shape \\[3\\]"),
        (dict(has_initial_state=i32(0, 1)), "has_initial_state must be bool"),
        (dict(snapshot_slots=i32(0, 1)), "snapshot_slots must have shape \\[2, \\*\\]"),
        (dict(out=torch.empty(4, 31)), "out must have shape"),
        (dict(x=torch.ones(4)), "x must have shape \\[num_tokens, num_channels\\]"),
    ],
)
def test_bad_input_is_named(change, text):
    args = dict(x=torch.ones(4, 32), weight=torch.ones(32, 4), state=torch.ones(4, 3, 32), slots=i32(0, 1), cu_seqlens=i32(0, 1, 4))
    with pytest.raises(RuntimeError, match=text):
        short_conv(**(args | change))


def test_out_must_not_be_the_input():
    x = torch.ones(4, 32)
    with pytest.raises(RuntimeError, match="out must not be x"):
        short_conv(x, torch.ones(32, 4), torch.ones(4, 3, 32), i32(0), i32(0, 4), out=x)
