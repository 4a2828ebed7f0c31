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
    generator,
    graph_replays,
    needs_cpu_backend,
    needs_gpu,
    opcheck,
    randn,
    relative_error,
    strided,
    threads,
)
from spec.kda_prefill import MAX_R, MAX_R_CHUNKED, MAX_R_STATE, MAX_R_STATE_CHUNKED, kda, log_decay

import kimi_native
from kimi_native.ops import kda_prefill

NAN = float("nan")
GATES = ["softplus", "bounded", "log_decay"]
HALF_DTYPES = [x for x in DEVICE_DTYPES if (x.values if isinstance(x, type(pytest.param())) else x)[1] != torch.float32]
CHUNKED_SIZES = [64, 128]  # key_dim = value_dim of the chunked path of the CUDA backend


def i32(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def gates(regime, gate, num_tokens, heads, key_dim, dtype, seed=10):
    """(g, options): raw gates whose decays remember (|log decay| near 1e-3), forget (up to thousands), or both in one head."""
    if gate == "log_decay":
        exponent = {"remember": (-4, -2), "forget": (0, 3.5), "mixed": (-5, 3.5)}[regime]
        u = torch.rand(num_tokens, heads, key_dim, generator=generator(seed))
        g = -(10 ** (exponent[0] + (exponent[1] - exponent[0]) * u))
        if regime == "mixed":  # exactly 0 and -1000 among the others
            g[u < 0.1] = 0.0
            g[u > 0.9] = -1000.0
        return g.to(dtype), {}
    g = randn(num_tokens, heads, key_dim, seed=seed, scale=2.0)
    dt_bias = randn(heads, key_dim, seed=seed + 1)
    if gate == "bounded":
        g = {"remember": g - 7, "forget": g + 7, "mixed": 4 * g}[regime]
        A_log = randn(heads, seed=seed + 2, scale=0.5)
    else:
        g = {"remember": g - 9, "forget": g + 9, "mixed": 4 * g}[regime]
        top = torch.log(torch.tensor(200.0))  # the largest rate of the released model
        A_log = {"remember": torch.zeros(heads), "forget": top.expand(heads).clone(), "mixed": torch.linspace(-1, top, heads)}[regime]
    return g.to(dtype), {"A_log": A_log, "dt_bias": dt_bias}


def problem(lengths, heads, value_heads, key_dim, value_dim, dtype, gate="softplus", regime="mixed", seed=0, num_slots=None):
    """Arguments of kda_prefill by name, on the CPU; slots out of order, those that no sequence has hold NaN."""
    n, num_tokens = len(lengths), sum(lengths)
    num_slots = num_slots or 2 * n + 1
    g, options = gates(regime, gate, num_tokens, value_heads, key_dim, dtype, seed + 10)
    slots = i32(*[num_slots - 1 - 2 * i for i in range(n)])
    state = torch.full((num_slots, value_heads, value_dim, key_dim), NAN)
    state[slots.long()] = randn(n, value_heads, value_dim, key_dim, seed=seed + 1)
    return {
        "q": randn(num_tokens, heads, key_dim, dtype=dtype, seed=seed + 2),
        "k": randn(num_tokens, heads, key_dim, dtype=dtype, seed=seed + 3),
        "v": randn(num_tokens, value_heads, value_dim, dtype=dtype, seed=seed + 4),
        "g": g,
        "beta": randn(num_tokens, value_heads, dtype=dtype, seed=seed + 5, scale=2.0),
        "state": state,
        "slots": slots,
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        "gate": gate,
        **options,
    }


def on(device, args):
    return {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in args.items()}


def tokens(args, begin, end, **change):
    """The same call for some tokens of a single sequence."""
    part = {name: args[name][begin:end] for name in ("q", "k", "v", "g", "beta")}
    return args | part | {"cu_seqlens": i32(0, end - begin, device=args["q"].device)} | change


def reference(args, has_initial_state=None, dtype=torch.float64):
    """(out, state) of the whole pack, computed in `dtype`; rows of skipped sequences are zero."""
    out = torch.zeros_like(args["v"], dtype=dtype)
    state = args["state"].to(dtype, copy=True)
    names = ("gate", "A_log", "dt_bias", "lower_bound", "scale", "use_qk_l2norm", "use_beta_sigmoid")
    options = {name: args[name] for name in names if name in args}
    for n, slot in enumerate(args["slots"].tolist()):
        begin, end = args["cu_seqlens"][n : n + 2].tolist()
        if slot < 0 or begin == end:
            continue
        past = torch.zeros_like(state[slot]) if has_initial_state is not None and not has_initial_state[n] else state[slot]
        out[begin:end], state[slot] = kda(*(args[name][begin:end] for name in ("q", "k", "v", "g", "beta")), past, dtype=dtype, **options)
    return out, state


def is_chunked(args, device):
    """Whether a call takes the CUDA backend's chunked path."""
    key_dim = args["q"].shape[-1]
    return cuda_backend(device) and args["q"].dtype != torch.float32 and key_dim in CHUNKED_SIZES and args["v"].shape[-1] == key_dim


def check_against_spec(args, device, max_r_state=MAX_R_STATE, **more):
    dtype, chunked = args["q"].dtype, is_chunked(args, device)
    ref, ref_state = reference(args, more.get("has_initial_state"))
    ours = on(device, args | more | {"state": args["state"].clone()})
    out = kda_prefill(**ours)
    assert_close(out, ref, (MAX_R_CHUNKED if chunked else MAX_R)[dtype])
    used = args["slots"][args["slots"] >= 0].long()
    state = ours["state"].cpu()
    assert_close(state[used], ref_state[used], MAX_R_STATE_CHUNKED if chunked else max_r_state, "state")
    others = [s for s in range(len(state)) if s not in used.tolist()]
    assert_same_bits(state[others], args["state"][others], "other slots")
    return out


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("regime", ["remember", "forget", "mixed"])
def test_regimes(regime, gate, dtype, device):
    args = problem([67, 0, 1, 64, 65], 2, 2, 64, 64, dtype, gate, regime)
    if gate == "log_decay":
        args["g"] = args["g"].float()  # float32 gates beside bfloat16 inputs
    largest = log_decay(args["g"], gate, args.get("A_log"), args.get("dt_bias")).min()
    assert largest <= -1000 if gate != "bounded" and regime != "remember" else largest > -6
    check_against_spec(args, device)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize(
    "heads, value_heads, key_dim, value_dim",
    [(1, 1, 16, 16), (2, 6, 128, 64), (1, 2, 48, 80), (1, 1, 256, 256), (3, 3, 16, 112), (1, 3, 64, 64), (2, 2, 128, 128)],
)
def test_head_shapes(heads, value_heads, key_dim, value_dim, dtype, device):
    check_against_spec(problem([5, 70], heads, value_heads, key_dim, value_dim, dtype), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("size", [64, 128])
def test_many_chunks(size, heads, device):
    """Longer than the rings of the CUDA backend's kernels, which also cut heads otherwise when there are few."""
    check_against_spec(problem([64 * 7 + 5], heads, heads, size, size, torch.bfloat16, regime="remember"), device)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_real_shape(dtype, device):
    check_against_spec(problem([40, 3], 32, 32, 128, 128, dtype), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, size", [(torch.float32, 32), (torch.bfloat16, 64)])
@pytest.mark.parametrize(
    "gate, change",
    [
        ("softplus", {"use_qk_l2norm": False}),
        ("softplus", {"use_beta_sigmoid": False}),
        ("softplus", {"scale": 0.5, "dt_bias": None}),
        ("bounded", {"A_log": None, "lower_bound": -2.0}),
        ("bounded", {"A_log": None, "dt_bias": None}),
        ("log_decay", {"use_qk_l2norm": False, "use_beta_sigmoid": False, "scale": 1.0}),
    ],
)
def test_options(gate, change, dtype, size, device):
    args = problem([66], 2, 2, size, size, dtype, gate) | change
    if not args.get("use_qk_l2norm", True):
        args["q"], args["k"] = (args[name] * (0.94 * size**-0.5) for name in ("q", "k"))
    if not args.get("use_beta_sigmoid", True):
        args["beta"] = args["beta"].sigmoid()
    check_against_spec(args, device)


@pytest.mark.parametrize("device, dtype", HALF_DTYPES)
@pytest.mark.parametrize("size", [64, 128])
def test_beta_in_float32(size, dtype, device):
    """Beside 16-bit inputs, in rows of something larger: all of its bits count, and nothing else's."""
    args = problem([130, 3, 64], 1, 2, size, size, dtype)
    rows = torch.full((len(args["beta"]), 5), NAN)
    rows[:, 1:3] = randn(len(rows), 2, seed=7, scale=2.0)
    check_against_spec(args | {"beta": rows[:, 1:3]}, device)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("key_dim, value_dim", [(32, 48), (64, 64)])
@pytest.mark.parametrize("which", [["v"], ["q", "k"], ["v", "state"], ["q", "k", "v", "state"], ["state"]])
def test_large_finite_inputs(which, key_dim, value_dim, dtype, device):
    args = problem([70, 3], 1, 2, key_dim, value_dim, dtype)
    for name in which:
        args[name] = args[name] * (1e30 if dtype != torch.float16 else 1e3 if name == "state" else 1e4)
    check_against_spec(args, device)


@pytest.mark.parametrize("device, dtype", HALF_DTYPES)
@pytest.mark.parametrize("scale", [1e-7, 2e-4, 1e-3, 1e3, 1e4])
def test_values_of_any_magnitude(scale, dtype, device):
    args = problem([130], 1, 1, 64, 64, dtype, regime="remember")
    args["v"], args["state"] = (args["v"].float() * scale).to(dtype), args["state"] * scale
    if dtype == torch.float16 and scale < 1:
        pytest.skip("fp16 does not hold the outputs")
    check_against_spec(args, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("old, new", [(1e30, 1.0), (1e6, 1e-3), (1e-6, 1e6), (1.0, 1e-3)])
def test_values_of_many_magnitudes_in_one_chunk(old, new, device):
    """A state, forgotten within the chunk, and values of quite another size: both must keep their precision."""
    args = problem([150], 1, 1, 64, 64, torch.bfloat16, "log_decay", "remember")
    args["state"], args["v"] = args["state"] * old, args["v"] * new
    args["v"][:5] *= old / new
    args["g"][5] = -1000.0
    check_against_spec(args, device)
    ref, _ = reference(args)
    out = kda_prefill(**on(device, args | {"state": args["state"].clone()})).cpu()
    max_r = 2 * MAX_R[torch.bfloat16]
    assert_close(out[:5], ref[:5], max_r, "before")
    assert_close(out[5:64], ref[5:64], max_r, "after, same chunk")
    assert_close(out[64:], ref[64:], max_r, "after, next chunks")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "k_norm, q_norm, beta", [(1.0, 1.0, 1.9), (30.0, 1.0, 1e-3), (1e-3, 1e-4, 0.5), (1e3, 1e3, 1e-6), (1e7, 1.0, 1e-14), (1.0, 1e6, 1.0)]
)
def test_keys_and_steps_that_are_not_normalized(k_norm, q_norm, beta, device):
    args = problem([130], 1, 1, 64, 64, torch.bfloat16, regime="remember") | {"use_qk_l2norm": False, "use_beta_sigmoid": False}
    args["q"], args["k"] = args["q"] * (q_norm / 8), args["k"] * (k_norm / 8)
    args["beta"] = torch.full_like(args["beta"], beta) / (1 if k_norm > 1 else 1.3)
    check_against_spec(args, device)


@pytest.mark.parametrize("device, dtype", HALF_DTYPES)
@pytest.mark.parametrize("regime", ["slow", "zero", "mixed", "spiky", "fast"])
def test_correlated_keys_and_large_steps(regime, dtype, device):
    """The chunk's triangular system at its worst; token by token every step nearly cancels the one before, and
    plain float32, whose sums are in another order, is 5e-7 off itself."""
    args = problem([256], 1, 1, 128, 128, dtype, "log_decay", "mixed", seed=3)
    u = torch.rand(256, 1, 128, generator=generator(4))
    args["g"] = {
        "slow": -u * 1e-5,
        "zero": 0 * u,
        "mixed": -u * 10 ** (torch.rand(128, generator=generator(5)) * 6.5 - 4),
        "spiky": torch.where(u < 0.02, -1000.0, -1e-3 * u),
        "fast": -3000 * u,
    }[regime]
    args["k"] = (args["k"].float() + 2 * randn(1, 1, 128, seed=6)).to(dtype)
    args["beta"] = args["beta"] + 2
    plain, truth = (reference(args, dtype=precision)[1][args["slots"].long()] for precision in (torch.float32, torch.float64))
    check_against_spec(args, device, max_r_state=max(MAX_R_STATE, 3 * relative_error(plain.double(), truth)))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("size", [16, 64])
def test_zero_keys_and_saturated_gates(size, dtype, device):
    args = problem([20], 1, 1, size, size, dtype)
    args["q"][3], args["k"][3:5], args["v"][6], args["q"][:, :, 0] = 0, 0, 0, 0
    args["g"][7], args["g"][8], args["beta"][9], args["beta"][10] = 1e4, -1e4, 1e4, -1e4
    check_against_spec(args, device)


@pytest.mark.parametrize("device, dtype", HALF_DTYPES)
@pytest.mark.parametrize("key_dim, value_dim", [(48, 80), (64, 64), (128, 128)])
def test_a_bfloat16_state_is_the_float32_state_rounded(key_dim, value_dim, device, dtype):
    args = on(device, problem([130, 0, 64, 7], 1, 2, key_dim, value_dim, dtype, num_slots=12))
    unused = [s for s in range(12) if s not in args["slots"].tolist()]
    more = {
        "has_initial_state": torch.tensor([True, True, False, True], device=device),
        "snapshot_slots": i32([unused[0], unused[1]], [-1, -1], [unused[2], -1], [-1, -1], device=device),
    }
    half = args | more | {"state": args["state"].bfloat16()}
    full = args | more | {"state": half["state"].float()}
    assert_same_bits(kda_prefill(**half), kda_prefill(**full))
    assert_same_bits(half["state"], full["state"].bfloat16(), "state")
    odd = torch.empty(12, half["state"][0].numel() + 1, dtype=torch.bfloat16, device=device)[:, 1:].unflatten(1, half["state"].shape[1:])
    odd.copy_(args["state"])
    kda_prefill(**half | {"state": odd})
    assert_same_bits(odd, half["state"], "state that is not aligned")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, size", [(torch.float32, 32), (torch.bfloat16, 64)])
def test_fresh_sequences_do_not_read_their_slot(dtype, size, device):
    args = problem([5, 0, 66], 1, 2, size, size, dtype)
    fresh = torch.tensor([False, False, True])
    args["state"][args["slots"][0].long()] = NAN
    check_against_spec(args, device, has_initial_state=fresh)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_the_same_bits_for_every_split_of_a_sequence(dtype, device):
    args = on(device, problem([200], 2, 4, 48, 32, dtype))
    check_splits(args, [(64,), (128, 192), (1, 2, 65), (63, 130, 199), range(1, 200, 7)])


@pytest.mark.parametrize("device, dtype", HALF_DTYPES)
@pytest.mark.parametrize("size", CHUNKED_SIZES)
@pytest.mark.parametrize("regime", ["remember", "mixed"])
def test_the_same_bits_for_every_split_after_whole_chunks(regime, size, dtype, device):
    args = on(device, problem([200], 1, 2, size, size, dtype, regime=regime))
    args["v"][70] *= 1e4  # units other than 1 in one of the chunks
    check_splits(args, [(64,), (128,), (64, 128, 192)])


def check_splits(args, all_cuts):
    slot, length = args["slots"].long(), len(args["q"])
    whole_state = args["state"].clone()
    whole = kda_prefill(**args | {"state": whole_state})
    for cuts in all_cuts:
        state, bounds = args["state"].clone(), [0, *cuts, length]
        parts = [kda_prefill(**tokens(args, a, b, state=state)) for a, b in zip(bounds, bounds[1:], strict=False)]
        assert_same_bits(torch.cat(parts), whole, f"cut at {cuts}")
        assert_same_bits(state[slot], whole_state[slot], f"state, cut at {cuts}")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("size", [48, 64])
def test_the_same_bits_for_any_neighbours(size, dtype, device):
    lengths = [30, 1, 0, 65, 128]
    args = on(device, problem(lengths, 1, 2, size, size, dtype))
    state = args["state"].clone()
    out = kda_prefill(**args | {"state": state})
    again = args["state"].clone()
    assert_same_bits(kda_prefill(**args | {"state": again}), out)
    assert_same_bits(again, state)
    for n, slot in enumerate(args["slots"].tolist()):
        begin, end = args["cu_seqlens"][n : n + 2].tolist()
        alone_state = args["state"].clone()
        alone = kda_prefill(**tokens(args, begin, end, state=alone_state, slots=args["slots"][n : n + 1]))
        assert_same_bits(alone, out[begin:end])
        assert_same_bits(alone_state[slot], state[slot])


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_in_a_batch_that_fills_the_device(device):
    """The CUDA backend cuts heads into fewer slices then."""
    num_sequences = 4 if device == "cpu" else 300
    args = on(device, problem([70] * num_sequences, 1, 1, 64, 64, torch.bfloat16))
    state = args["state"].clone()
    out = kda_prefill(**args | {"state": state})
    slot, alone_state = int(args["slots"][1]), args["state"].clone()
    alone = kda_prefill(**tokens(args, 70, 140, state=alone_state, slots=args["slots"][1:2]))
    assert_same_bits(alone, out[70:140])
    assert_same_bits(alone_state[slot], state[slot])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("key_dim, value_dim", [(48, 32), (64, 64), (128, 128)])
@pytest.mark.parametrize("lengths", [[200], [30, 1, 0, 130]])
def test_the_same_bits_for_every_max_seqlen(lengths, key_dim, value_dim, dtype, device):
    args = on(device, problem(lengths, 1, 2, key_dim, value_dim, dtype))
    state = args["state"].clone()
    out = kda_prefill(**args | {"state": state})
    for max_seqlen in (0, max(lengths), 1, 64, 2**40):  # not known, right, too small, too large
        again = args["state"].clone()
        assert_same_bits(kda_prefill(**args | {"state": again}, max_seqlen=max_seqlen), out, f"max_seqlen = {max_seqlen}")
        assert_same_bits(again, state, f"state, max_seqlen = {max_seqlen}")


@needs_cpu_backend
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("heads, value_heads", [(1, 1), (2, 6)])
def test_the_same_bits_for_any_neighbours_threads_and_repeats(heads, value_heads, dtype):
    lengths = [30, 1, 0, 65]
    args = problem(lengths, heads, value_heads, 32, 80, dtype)  # 1 head: its rows are shared out between the threads
    with threads(1):
        one_state = args["state"].clone()
        one = kda_prefill(**args | {"state": one_state})
    with threads(2):
        for _ in range(3):
            two_state = args["state"].clone()
            assert_same_bits(kda_prefill(**args | {"state": two_state}), one)
            assert_same_bits(two_state, one_state)
    for threads_now in (1, 2, 5):
        with threads(threads_now):
            for n, slot in enumerate(args["slots"].tolist()):
                begin, end = args["cu_seqlens"][n : n + 2].tolist()
                state = args["state"].clone()
                alone = kda_prefill(**tokens(args, begin, end, state=state, slots=args["slots"][n : n + 1]))
                assert_same_bits(alone, one[begin:end])
                assert_same_bits(state[slot], one_state[slot])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, key_dim, value_dim", [(torch.float32, 16, 32), (torch.bfloat16, 64, 64), (torch.bfloat16, 128, 128)])
def test_snapshots_are_the_states_of_the_prefixes(dtype, key_dim, value_dim, device):
    args = on(device, problem([200, 63, 64, 0], 1, 2, key_dim, value_dim, dtype, num_slots=20))
    args["state"].nan_to_num_(9.0)
    snapshot_slots = torch.tensor([[0, -1, 2, 4], [6, 8, 10, -1], [12, 14, -1, -1], [16, -1, -1, -1]], dtype=torch.int32, device=device)
    after, plain = args["state"].clone(), args["state"].clone()
    out = kda_prefill(**args | {"state": after, "snapshot_slots": snapshot_slots})
    assert_same_bits(kda_prefill(**args | {"state": plain}), out)
    expected = plain.clone()
    for n, length, slot in [(0, 64, 0), (0, 192, 2), (2, 64, 12)]:
        prefix, begin = args["state"].clone(), int(args["cu_seqlens"][n])
        kda_prefill(**tokens(args, begin, begin + length, state=prefix, slots=args["slots"][n : n + 1]))
        expected[slot] = prefix[int(args["slots"][n])]
    assert_same_bits(after, expected)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("key_dim, value_dim", [(32, 48), (64, 64)])
def test_skipped_sequences_padding_and_strides(key_dim, value_dim, dtype, device):
    args = on(device, problem([4, 3, 66], 2, 2, key_dim, value_dim, dtype))
    plain_state = args["state"].clone()
    plain = kda_prefill(**args | {"state": plain_state})
    odd = dict(args)
    for name in ("q", "k", "v", "g"):  # rows past the last sequence and gaps between heads hold NaN
        padded = torch.full((80, *args[name].shape[1:]), NAN, dtype=dtype, device=device)
        padded[:73] = args[name]
        odd[name] = strided(padded)
    odd["beta"] = torch.full((80, 2, 3), NAN, dtype=dtype, device=device)[..., 1]  # heads apart too
    odd["beta"][:73] = args["beta"]
    odd["slots"] = args["slots"].clone()
    odd["slots"][1] = -1
    for name in ("q", "k", "v", "g", "beta"):
        odd[name][4:7] = NAN
    pool = torch.full((len(args["state"]), 3, value_dim, key_dim), 7.0, device=device)  # slots apart in a larger pool
    pool[:, :2] = args["state"]
    guarded = Guarded(80, 2, value_dim, dtype=dtype, device=device, fill=5.0)
    kda_prefill(**odd | {"state": pool[:, :2], "out": guarded.tensor})
    guarded.check()
    assert (guarded.tensor[73:] == 5).all() and (guarded.tensor[4:7] == 0).all()
    assert_same_bits(guarded.tensor[:4], plain[:4])
    assert_same_bits(guarded.tensor[7:73], plain[7:])
    skipped = int(args["slots"][1])
    plain_state[skipped] = args["state"][skipped]
    assert_same_bits(pool[:, :2], plain_state)
    assert (pool[:, 2:] == 7).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [32, 64])
def test_views_of_one_packed_tensor(size, device):
    args = on(device, problem([70], 2, 4, size, size, torch.bfloat16))
    expected = kda_prefill(**args | {"state": args["state"].clone()})
    packed = torch.cat([args[name].flatten(1) for name in ("q", "k", "v")], dim=1)
    q, k, v = packed.split([2 * size, 2 * size, 4 * size], dim=1)
    views = {"q": q.unflatten(1, (2, size)), "k": k.unflatten(1, (2, size)), "v": v.unflatten(1, (4, size))}
    assert_same_bits(kda_prefill(**args | views), expected)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("g_dtype", [torch.float32, None])
def test_memory_that_is_not_aligned(g_dtype, dtype, device):
    def shifted(t):
        wide = torch.full((t.numel() + 1,), NAN, dtype=t.dtype, device=t.device)
        wide[1:] = t.flatten()
        return wide[1:].view(t.shape)

    args = on(device, problem([70, 5], 1, 2, 64, 64, dtype))
    args["g"] = args["g"].to(g_dtype or dtype)
    plain_state = args["state"].clone()
    plain = kda_prefill(**args | {"state": plain_state})
    moved = args | {name: shifted(args[name]) for name in ("q", "k", "v", "g", "beta", "state", "A_log", "dt_bias")}
    out = shifted(torch.zeros_like(args["v"]))
    assert_same_bits(kda_prefill(**moved, out=out), plain)
    assert_same_bits(moved["state"], plain_state)


@pytest.mark.parametrize("device", DEVICES)
def test_a_call_in_several_segments(device):
    """The CUDA backend bounds its workspace by going through long inputs in parts: here, an end between two chunks of a sequence."""
    heads = 64  # 1.8 MB of factors a chunk, of 384
    lengths = [1] + [0] * 231 + [200] + [0] * 10
    args = problem(lengths, 1, heads, 64, 64, torch.bfloat16, num_slots=2 * len(lengths) + 1)
    args = {name: a for name, a in args.items() if name != "state"}
    args["state"] = randn(2, heads, 64, 64)
    args["slots"] = torch.full((len(lengths),), -1, dtype=torch.int32)
    args["slots"][232] = 1
    check_against_spec(args, device)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_do(device):
    empty = on(device, problem([], 1, 1, 16, 16, torch.float32))
    assert kda_prefill(**empty).shape == (0, 1, 16)
    for dtype, size in [(torch.float32, 16), (torch.bfloat16, 64)]:
        zero_lengths = on(device, problem([0, 0], 1, 1, size, size, dtype))
        before = zero_lengths["state"].clone()
        assert kda_prefill(**zero_lengths).shape == (0, 1, size)
        assert_same_bits(zero_lengths["state"], before)


@needs_gpu
@pytest.mark.parametrize("dtype, size", [(torch.float32, 48), (torch.bfloat16, 128)])
def test_graph_replay(dtype, size):
    args = on("cuda", problem([130, 0, 7], 2, 4, size, size, dtype))
    state, out = args["state"].clone(), torch.empty_like(args["v"])

    def run():
        state.copy_(args["state"])
        kda_prefill(**args | {"state": state, "out": out})

    graph_replays(run, [out, state])


@needs_gpu
def test_another_stream():
    args = on("cuda", problem([130, 7], 1, 2, 128, 128, torch.bfloat16))
    expected = kda_prefill(**args | {"state": args["state"].clone()})
    state, stream = args["state"].clone(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        v = args["v"] + 0  # on the other stream, after a while
        out = kda_prefill(**args | {"state": state, "v": v})
    stream.synchronize()
    assert_same_bits(out, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_same_as_the_cpu(dtype):
    args = problem([300, 64, 1], 2, 4, 128, 128, dtype)
    gpu = on("cuda", args | {"state": args["state"].clone()})
    out, expected = kda_prefill(**gpu).cpu(), kda_prefill(**args)
    assert_close(out, expected, 1e-6 if dtype == torch.float32 else 4e-3)
    assert_close(gpu["state"].cpu().nan_to_num(0), args["state"].nan_to_num(0), 1e-6 if dtype == torch.float32 else MAX_R_STATE_CHUNKED)


@needs_gpu
@pytest.mark.parametrize("regime", ["remember", "mixed"])
def test_long_sequences(regime):
    args = on("cuda", problem([9000, 70], 1, 2, 128, 128, torch.bfloat16, regime=regime))
    ref, ref_state = reference(args)
    state = args["state"].clone()
    assert_close(kda_prefill(**args | {"state": state}), ref, MAX_R_CHUNKED[torch.bfloat16])
    used = args["slots"].long()
    assert_close(state[used], ref_state[used], MAX_R_STATE_CHUNKED, "state")


@needs_gpu
def test_tensors_past_2_to_the_31_elements():
    num_tokens, last = 2**31 // 128 + 200, 150
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of device memory")
    args = on("cuda", problem([last], 1, 1, 128, 128, torch.bfloat16))
    state = args["state"].clone()
    expected = kda_prefill(**args | {"state": state})
    slot = int(args["slots"][0])
    far = args | {"cu_seqlens": i32(num_tokens - last, num_tokens, device="cuda"), "slots": i32(1, device="cuda")}
    for name in ("q", "k", "v", "g", "beta"):
        far[name] = torch.full((num_tokens, *args[name].shape[1:]), NAN, dtype=torch.bfloat16, device="cuda")
        far[name][-last:] = args[name]
    pool = torch.empty(2**31 + 128 * 128, device="cuda")
    far["state"] = pool.as_strided((2, 1, 128, 128), (2**31, 128 * 128, 128, 1))
    far["state"][1] = args["state"][slot]
    out = kda_prefill(**far)
    assert_same_bits(out[-last:], expected)
    assert_same_bits(far["state"][1], state[slot])


def operator_arguments(args, out, has_initial_state=None, snapshot_slots=None):
    names = ("q", "k", "v", "g", "beta", "state", "slots", "cu_seqlens", "A_log", "dt_bias")
    return (*(args.get(name) for name in names), has_initial_state, snapshot_slots, GATES.index(args["gate"]), -5.0, 0.25, True, True, out)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    args = on(device, problem([4, 66], 1, 2, 16, 16, torch.float32))
    args["state"].nan_to_num_(0)
    out = torch.empty_like(args["v"])
    opcheck(torch.ops.kimi_native.kda_prefill, operator_arguments(args, out))
    flags, snapshots = torch.tensor([True, False], device=device), i32(-1, 0, device=device).view(2, 1)
    opcheck(torch.ops.kimi_native.kda_prefill, operator_arguments(args, out, flags, snapshots))
    opcheck(torch.ops.kimi_native.kda_prefill, (*operator_arguments(args, out), 66))


@pytest.mark.skipif(kimi_native._C is None, reason="built without the pybind11 module")
@pytest.mark.parametrize("device, size", [("cpu", 32), pytest.param("cuda", 64, marks=needs_gpu)])
def test_entry_on_raw_pointers(size, device):
    _C = kimi_native._C
    entry, workspace_bytes = getattr(_C, f"kda_prefill_{device}"), getattr(_C, f"kda_prefill_workspace_bytes_{device}")
    args = on(device, problem([4, 66], 1, 2, size, size, torch.bfloat16))
    args["g"] = args["g"].float()
    expected_state = args["state"].clone()
    expected = kda_prefill(**args | {"state": expected_state})
    out = torch.empty_like(args["v"])
    p = _C.KdaPrefillParams()
    for name in ("q", "k", "v", "g", "beta", "state", "slots", "cu_seqlens", "A_log", "dt_bias"):
        setattr(p, name, args[name].data_ptr())
    p.out = out.data_ptr()
    p.num_tokens, p.num_sequences, p.num_heads, p.num_value_heads, p.key_dim, p.value_dim = 70, 2, 1, 2, size, size
    assert p.max_seqlen == 0
    p.max_seqlen = 66
    for name in ("q", "k", "v", "g", "beta"):
        setattr(p, f"{name}_token_stride", args[name].stride(0))
        setattr(p, f"{name}_head_stride", args[name].stride(1))
    p.out_token_stride, p.out_head_stride, p.state_slot_stride = 2 * size, size, 2 * size * size
    p.scale, p.gate = size**-0.5, 0
    p.dtype = p.beta_dtype = _C.DType.bfloat16
    workspace = torch.empty(workspace_bytes(p), dtype=torch.uint8, device=device)
    p.workspace = workspace.data_ptr()
    entry(p)
    assert_same_bits(out, expected)
    assert_same_bits(args["state"], expected_state)
    p.workspace = 0
    with pytest.raises(RuntimeError, match="workspace must not be null"):
        entry(p)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"k": torch.ones(6, 1, 16)}, "k must have shape \\[6, 2, 16\\]"),
        ({"v": torch.ones(6, 4, 16, dtype=torch.bfloat16)}, "v must have the dtype"),
        ({"v": torch.ones(6, 2, 16)}, "v must have shape \\[6, 4, 16\\]"),
        ({"g": torch.ones(6, 4, 8)}, "g must have shape \\[6, 4, 16\\]"),
        ({"g": torch.ones(6, 4, 16, dtype=torch.bfloat16)}, "g must be float32 or have the dtype of q, float32, got bfloat16"),
        ({"beta": torch.ones(6)}, "beta must have shape \\[6, 4\\]"),
        ({"state": torch.zeros(3, 4, 16)}, "state must have shape \\[slots, num_value_heads, value_dim, key_dim\\]"),
        ({"state": torch.zeros(3, 4, 16, 16, dtype=torch.bfloat16)}, "state must be float32"),
        ({"state": torch.zeros(3, 4, 16, 32)[..., :16]}, "state must be contiguous from dimension 1"),
        ({"slots": torch.zeros(1, dtype=torch.int64)}, "slots must be int32"),
        ({"cu_seqlens": i32(0, 3, 6)}, "cu_seqlens must have shape \\[2\\]"),
        ({"A_log": None}, "A_log must be given with the softplus gate"),
        ({"A_log": torch.ones(1, 1, 4, 1)}, "A_log must have shape \\[4\\]"),
        ({"dt_bias": torch.ones(64)}, "dt_bias must have shape \\[4, 16\\]"),
        ({"gate": "bounded", "lower_bound": 5.0}, "lower_bound must be negative, got 5"),
        ({"has_initial_state": torch.ones(1)}, "has_initial_state must be bool"),
        ({"snapshot_slots": i32(1)}, "snapshot_slots must have shape \\[1, \\*\\]"),
        ({"out": torch.zeros(6, 4, 17)}, "out must have shape"),
        ({"max_seqlen": -1}, "max_seqlen must not be negative, got -1"),
    ],
)
def test_bad_input_is_named(change, text):
    args = problem([6], 2, 4, 16, 16, torch.float32)
    with pytest.raises(RuntimeError, match=text):
        kda_prefill(**args | change)


def test_unsupported_shapes_and_gates_are_named():
    with pytest.raises(RuntimeError, match="key_dim must be a multiple of 16 from 16 to 256, got 24"):
        kda_prefill(**problem([6], 1, 1, 24, 16, torch.float32))
    with pytest.raises(RuntimeError, match="value_dim must be a multiple of 16 from 16 to 256, got 272"):
        kda_prefill(**problem([6], 1, 1, 16, 272, torch.float32))
    with pytest.raises(RuntimeError, match="num_value_heads must be a multiple of num_heads, got 3 and 2"):
        kda_prefill(**problem([6], 2, 3, 16, 16, torch.float32))
    if not cuda_backend("cpu"):
        with pytest.raises(RuntimeError, match="takes float32 and bfloat16, got float16"):
            kda_prefill(**problem([6], 1, 1, 16, 16, torch.float16))
    with pytest.raises(ValueError, match="gate must be one of softplus, bounded, log_decay, got 'sigmoid'"):
        kda_prefill(**problem([6], 1, 1, 16, 16, torch.float32) | {"gate": "sigmoid"})
