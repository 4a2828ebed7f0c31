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
    needs_cpu_backend,
    needs_gpu,
    opcheck,
    randn,
    strided,
    threads,
)
from spec.kda_decode import MAX_R, MAX_R_FUSED, MAX_R_STATE
from spec.kda_decode import kda_decode as spec
from spec.kda_decode import kda_decode_fused as spec_fused
from test_kda_prefill import GATES, HALF_DTYPES, NAN, gates, i32, on

import kimi_native
from kimi_native.ops import gated_rms_norm, kda_decode, kda_decode_fused, kda_prefill, short_conv

TOKENS = ("q", "k", "v", "g", "beta")
OPTIONS = ("gate", "A_log", "dt_bias", "lower_bound", "scale", "use_qk_l2norm", "use_beta_sigmoid")


def problem(batch, steps, heads, value_heads, key_dim, value_dim, dtype, gate="softplus", regime="mixed", seed=0):
    """Arguments of kda_decode by name; slots out of order, those that no sequence has hold NaN."""
    g, options = gates(regime, gate, batch * steps, value_heads, key_dim, dtype, seed + 10)
    slots = i32(*[2 * batch - 1 - 2 * i for i in range(batch)])
    state = torch.full((2 * batch + 1, value_heads, value_dim, key_dim), NAN)
    state[slots.long()] = randn(batch, value_heads, value_dim, key_dim, seed=seed + 1)
    return {
        "q": randn(batch, steps, heads, key_dim, dtype=dtype, seed=seed + 2),
        "k": randn(batch, steps, heads, key_dim, dtype=dtype, seed=seed + 3),
        "v": randn(batch, steps, value_heads, value_dim, dtype=dtype, seed=seed + 4),
        "g": g.view(batch, steps, value_heads, key_dim),
        "beta": randn(batch, steps, value_heads, dtype=dtype, seed=seed + 5, scale=2.0),
        "state": state,
        "slots": slots,
        "gate": gate,
        **options,
    }


def fused_problem(batch, steps, heads, value_heads, key_dim, value_dim, dtype, gate="softplus", regime="mixed"):
    """Arguments of kda_decode_fused by name, with the norm."""
    args = problem(batch, steps, heads, value_heads, key_dim, value_dim, dtype, gate, regime)
    channels = 2 * heads * key_dim + value_heads * value_dim
    conv_state = torch.full((len(args["state"]), 3, channels), NAN, dtype=dtype)
    conv_state[args["slots"].long()] = randn(batch, 3, channels, dtype=dtype, seed=21)
    return {name: a for name, a in args.items() if name not in ("q", "k", "v")} | {
        "qkv": randn(batch, steps, channels, dtype=dtype, seed=22),
        "conv_weight": randn(channels, 4, dtype=dtype, seed=23),
        "conv_state": conv_state,
        "num_heads": heads,
        "head_dim": key_dim,
        "norm_gate": randn(batch, steps, value_heads, value_dim, dtype=dtype, seed=24, scale=2.0),
        "norm_weight": randn(value_dim, dtype=dtype, seed=25),
    }


def check_against_spec(args, device, num_commit=None):
    dtype = args["q"].dtype
    options = {name: args[name] for name in OPTIONS if name in args}
    ref, ref_state = torch.zeros(args["v"].shape, dtype=torch.float64), args["state"].double()
    for b, slot in enumerate(args["slots"].tolist()):
        commit = None if num_commit is None else int(num_commit[b])
        ref[b], ref_state[slot] = spec(*(args[name][b] for name in TOKENS), args["state"][slot], commit, **options)
    ours = on(device, args | {"state": args["state"].clone(), "num_commit": num_commit})
    assert_close(kda_decode(**ours), ref, MAX_R[dtype])
    used = args["slots"].long()
    state = ours["state"].cpu()
    assert_close(state[used], ref_state[used], MAX_R_STATE, "state")
    assert state[[s for s in range(len(state)) if s not in used.tolist()]].isnan().all()


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("regime", ["remember", "forget", "mixed"])
def test_regimes(regime, gate, dtype, device):
    args = problem(3, 4, 2, 4, 32, 48, dtype, gate, regime)
    if gate == "log_decay":
        args["g"] = args["g"].float()
    check_against_spec(args, device)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("batch, steps", [(1, 1), (5, 1), (2, 8)])
@pytest.mark.parametrize("heads, value_heads, key_dim, value_dim", [(1, 1, 16, 16), (2, 6, 64, 112), (1, 1, 256, 256), (4, 4, 128, 128)])
def test_shapes(heads, value_heads, key_dim, value_dim, batch, steps, dtype, device):
    check_against_spec(problem(batch, steps, heads, value_heads, key_dim, value_dim, dtype), device)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_real_shape_and_large_values(dtype, device):
    args = problem(2, 1, 32, 32, 128, 128, dtype)
    check_against_spec(args, device)
    large = 1e30 if dtype != torch.float16 else 1e3  # its largest value is 65504
    check_against_spec(args | {"v": args["v"] * large, "state": args["state"] * large, "q": args["q"] * large}, device)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_num_commit_governs_the_state_and_not_the_outputs(dtype, device):
    args = on(device, problem(4, 3, 1, 2, 32, 32, dtype))
    commit = i32(0, 1, 2, 3, device=device)
    check_against_spec(on("cpu", args), device, commit.cpu())
    all_state, state = args["state"].clone(), args["state"].clone()
    whole = kda_decode(**args | {"state": all_state})
    assert_same_bits(kda_decode(**args | {"state": state, "num_commit": commit}), whole)
    for b, slot in enumerate(args["slots"].tolist()):
        expected = args["state"].clone()
        for t in range(b):
            kda_decode(
                **args
                | {name: args[name][b : b + 1, t : t + 1] for name in TOKENS}
                | {"slots": args["slots"][b : b + 1], "state": expected}
            )
        assert_same_bits(state[slot], expected[slot], f"state after {b} tokens")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_any_number_of_steps_gives_the_same_bits(device, dtype):
    length = 24
    args = on(device, problem(1, length, 2, 4, 32, 16, dtype, regime="remember"))
    results = []
    for steps in (1, 3, 8):
        state = args["state"].clone()
        calls = [args | {name: args[name][:, t : t + steps] for name in TOKENS} | {"state": state} for t in range(0, length, steps)]
        results.append((torch.cat([kda_decode(**call)[0] for call in calls]), state))
    for out, state in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(state, results[0][1])


@needs_cpu_backend
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_and_prefill_give_the_same_bits(steps, dtype):
    length, device = 72, "cpu"
    args = on(device, problem(1, length, 2, 4, 32, 16, dtype, regime="remember"))
    packed = {name: args[name][0] for name in TOKENS}
    prefill_state = args["state"].clone()
    whole = kda_prefill(**args | packed | {"state": prefill_state, "cu_seqlens": i32(0, length, device=device)})
    state = args["state"].clone()
    parts = [
        kda_decode(**args | {name: args[name][:, t : t + steps] for name in TOKENS} | {"state": state})[0] for t in range(0, length, steps)
    ]
    assert_same_bits(torch.cat(parts), whole)
    assert_same_bits(state, prefill_state)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("key_dim, value_dim", [(48, 80), (128, 128), (144, 144)])
def test_neighbours_and_repeats(key_dim, value_dim, device, dtype):
    """On a GPU a head is cut into slices by the number of sequences: differently alone and in company."""
    args = on(device, problem(9, 2, 1, 2, key_dim, value_dim, dtype))
    together_state, again_state = args["state"].clone(), args["state"].clone()
    together = kda_decode(**args | {"state": together_state})
    assert_same_bits(kda_decode(**args | {"state": again_state}), together)
    assert_same_bits(again_state, together_state)
    for b in (4, 0, 8):
        alone_state = args["state"].clone()
        alone = {name: args[name][b : b + 1] for name in (*TOKENS, "slots")}
        assert_same_bits(kda_decode(**args | alone | {"state": alone_state})[0], together[b])
        slot = int(args["slots"][b])
        assert_same_bits(alone_state[slot], together_state[slot])
        alone_state[slot] = args["state"][slot]
        assert_same_bits(alone_state, args["state"])


@needs_cpu_backend
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("value_heads", [1, 6])
def test_neighbours_threads_and_repeats(value_heads, dtype):
    args = problem(9, 2, 1, value_heads, 64, 80, dtype)
    with threads(1):
        one_state = args["state"].clone()
        one = kda_decode(**args | {"state": one_state})
    for threads_now in (2, 5):
        with threads(threads_now):
            for _ in range(2):
                state = args["state"].clone()
                assert_same_bits(kda_decode(**args | {"state": state}), one)
                assert_same_bits(state, one_state)
            state = args["state"].clone()
            for b in (4, 0, 8):
                alone = {name: args[name][b : b + 1] for name in (*TOKENS, "slots")}
                assert_same_bits(kda_decode(**args | alone | {"state": state})[0], one[b])
                slot = int(args["slots"][b])
                assert_same_bits(state[slot], one_state[slot])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_skipped_sequences_and_strides(dtype, device):
    args = on(device, problem(3, 2, 2, 2, 32, 48, dtype))
    plain_state = args["state"].clone()
    plain = kda_decode(**args | {"state": plain_state})
    skipped = int(args["slots"][1])
    odd = dict(args) | {name: strided(args[name].clone()) for name in ("q", "k", "v", "g")}
    odd["slots"] = args["slots"].clone()
    odd["slots"][1] = -1
    for name in ("q", "k", "v", "g"):
        odd[name][1] = NAN
    pool = torch.full((len(args["state"]), 3, 48, 32), 7.0, device=device)
    pool[:, :2] = args["state"]
    guarded = Guarded(3, 2, 2, 48, dtype=dtype, device=device)
    kda_decode(**odd | {"state": pool[:, :2], "out": guarded.tensor})
    guarded.check()
    assert (guarded.tensor[1] == 0).all()
    assert_same_bits(guarded.tensor[[0, 2]], plain[[0, 2]])
    plain_state[skipped] = args["state"][skipped]
    assert_same_bits(pool[:, :2], plain_state)
    assert (pool[:, 2:] == 7).all()


def check_fused_against_spec(args, device, num_commit=None):
    dtype, heads = args["qkv"].dtype, args["num_heads"]
    options = {name: args[name] for name in OPTIONS if name in args}
    ours = on(device, args | {"state": args["state"].clone(), "conv_state": args["conv_state"].clone(), "num_commit": num_commit})
    out = kda_decode_fused(**ours).cpu()
    refs, states = [], []
    for b, slot in enumerate(args["slots"].tolist()):
        commit = None if num_commit is None else int(num_commit[b])
        norm_gate = None if args["norm_gate"] is None else args["norm_gate"][b]
        ref, past, state = spec_fused(
            *(args["qkv"][b], args["conv_weight"], args["conv_state"][slot], args["g"][b], args["beta"][b], args["state"][slot]),
            *(heads, commit, norm_gate, args["norm_weight"]),
            **options,
        )
        refs.append(ref)
        states.append(state)
        assert_same_bits(ours["conv_state"][slot].cpu(), past, "conv state")
    used = args["slots"].long()
    state = ours["state"].cpu()
    assert_close(out, torch.stack(refs), MAX_R[dtype] if cuda_backend(device) else MAX_R_FUSED[dtype])
    assert_close(state[used], torch.stack(states), MAX_R_STATE if cuda_backend(device) else MAX_R_FUSED[dtype], "state")
    others = [s for s in range(len(state)) if s not in used.tolist()]
    assert state[others].isnan().all() and ours["conv_state"].cpu()[others].isnan().all()


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("heads", [2, 4])
def test_fused_against_spec(heads, with_norm, gate, dtype, device):
    args = fused_problem(3, 2, heads, 4, 32, 48, dtype, gate)
    if not with_norm:
        args |= {"norm_gate": None, "norm_weight": None}
    check_fused_against_spec(args, device, i32(2, 0, 1))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("batch, steps", [(1, 1), (2, 5), (1, 8)])
@pytest.mark.parametrize("heads, value_heads, key_dim, value_dim", [(1, 1, 16, 16), (1, 3, 64, 112), (2, 2, 256, 256), (1, 2, 80, 144)])
def test_fused_shapes(heads, value_heads, key_dim, value_dim, batch, steps, dtype, device):
    check_fused_against_spec(fused_problem(batch, steps, heads, value_heads, key_dim, value_dim, dtype), device)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_fused_real_shape(device, dtype):
    check_fused_against_spec(fused_problem(2, 1, 32, 32, 128, 128, dtype), device)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("heads, key_dim, value_dim", [(1, 48, 80), (2, 48, 80), (2, 128, 128), (1, 64, 256)])
def test_fused_neighbours_and_repeats(heads, key_dim, value_dim, device, dtype):
    """On a GPU many heads go to smaller blocks, which take their rows one part after the other."""
    args = on(device, fused_problem(5, 3, heads, 2, key_dim, value_dim, dtype))
    pools = ("state", "conv_state")
    together_args = args | {name: args[name].clone() for name in pools}
    together = kda_decode_fused(**together_args)
    again_args = args | {name: args[name].clone() for name in pools}
    assert_same_bits(kda_decode_fused(**again_args), together)
    for name in pools:
        assert_same_bits(again_args[name], together_args[name], name)
    for b in (2, 0, 4):
        alone = {name: args[name][b : b + 1] for name in ("qkv", "g", "beta", "norm_gate", "slots")}
        alone = args | alone | {name: args[name].clone() for name in pools}
        assert_same_bits(kda_decode_fused(**alone)[0], together[b])
        slot = int(args["slots"][b])
        for name in pools:
            assert_same_bits(alone[name][slot], together_args[name][slot], name)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("key_dim, value_dim", [(32, 48), (128, 128)])
def test_memory_that_is_not_aligned(key_dim, value_dim, device, dtype):
    """Other accesses, the same bits: how a sum is ordered does not depend on them."""

    def shifted(args):
        """The same values, every tensor one element off and with odd strides between slots."""
        moved = {}
        for name, t in args.items():
            if not isinstance(t, torch.Tensor) or t.dtype == torch.int32:
                moved[name] = t
            elif name in ("state", "conv_state"):
                pool = torch.empty(len(t), t[0].numel() + 1, dtype=t.dtype, device=device)
                moved[name] = pool[:, 1:].unflatten(1, t.shape[1:]).copy_(t)
            else:
                moved[name] = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:].view(t.shape).copy_(t)
        return moved

    for problem_of, op, read in [(problem, kda_decode, "v"), (fused_problem, kda_decode_fused, "norm_gate")]:
        args = on(device, problem_of(2, 2, 1, 2, key_dim, value_dim, dtype))
        odd = shifted(args)
        expected = op(**args)
        out = Guarded(args[read].numel() + 1, dtype=dtype, device=device)
        result = op(**odd, out=out.tensor[1:].view(expected.shape))
        out.check()
        if cuda_backend(device):
            assert_same_bits(result, expected)
            assert_same_bits(odd["state"], args["state"])
        assert_close(result, expected, MAX_R[dtype])
        assert out.tensor[0].isnan()


@pytest.mark.parametrize("device, dtype", HALF_DTYPES)
@pytest.mark.parametrize("key_dim, value_dim", [(64, 48), (80, 144), (128, 128), (256, 32)])
def test_a_bfloat16_state_is_the_float32_state_rounded(key_dim, value_dim, device, dtype):
    for problem_of, op in [(problem, kda_decode), (fused_problem, kda_decode_fused)]:
        args = on(device, problem_of(3, 2, 1, 2, key_dim, value_dim, dtype)) | {"num_commit": i32(2, 0, 1, device=device)}
        pool = torch.empty(len(args["state"]), args["state"][0].numel() + 4, dtype=torch.bfloat16, device=device)  # 8 bytes off
        half = args | {"state": pool[:, :-4].unflatten(1, args["state"].shape[1:]).copy_(args["state"])}
        full = args | {"state": half["state"].float()}
        if "conv_state" in args:
            full["conv_state"] = args["conv_state"].clone()
        assert_same_bits(op(**half), op(**full))
        assert_same_bits(half["state"], full["state"].bfloat16(), "state")


def test_a_bfloat16_state_needs_inputs_of_16_bits():
    args = problem(1, 1, 1, 1, 16, 16, torch.float32)
    with pytest.raises(RuntimeError, match="state must be float32, or bfloat16 with inputs of 16 bits"):
        kda_decode(**args | {"state": args["state"].bfloat16()})
    with pytest.raises(RuntimeError, match="state must be float32, or bfloat16"):
        kda_decode(**args | {"state": args["state"].half()})


def pools_of(args):
    return [args[name] for name in ("state", "conv_state") if name in args]


@needs_gpu
@pytest.mark.parametrize("batch, heads", [(1, 32), (3, 16)])
def test_graph_replay(batch, heads):
    for problem_of, op in [(problem, kda_decode), (fused_problem, kda_decode_fused)]:
        args = on("cuda", problem_of(batch, 1, heads, 32, 128, 128, torch.bfloat16))
        work = args | {name: args[name].clone() for name in ("state", "conv_state") if name in args}
        out = torch.empty(batch, 1, 32, 128, dtype=torch.bfloat16, device="cuda")

        def run(args=args, work=work, op=op, out=out):
            for to, start in zip(pools_of(work), pools_of(args), strict=True):
                to.copy_(start)
            op(**work, out=out)

        graph_replays(run, [out, *pools_of(work)])


@needs_gpu
def test_another_stream():
    args = on("cuda", fused_problem(3, 2, 4, 4, 128, 128, torch.bfloat16))
    expected_args = args | {"state": args["state"].clone(), "conv_state": args["conv_state"].clone()}
    expected, stream = kda_decode_fused(**expected_args), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        out = kda_decode_fused(**args | {"qkv": args["qkv"] * 1})
    stream.synchronize()
    assert_same_bits(out, expected)
    assert_same_bits(args["state"], expected_args["state"])


@needs_gpu
def test_a_pool_past_2_to_the_31_elements():
    args = on("cuda", fused_problem(2, 1, 32, 32, 128, 128, torch.bfloat16))
    expected_args = args | {"state": args["state"].clone(), "conv_state": args["conv_state"].clone()}
    expected = kda_decode_fused(**expected_args)
    slots = 2**31 // (32 * 128 * 128) + 2
    state = torch.empty(slots, 32, 128, 128, device="cuda")
    conv_state = torch.empty(slots, 3, 12288, dtype=torch.bfloat16, device="cuda")
    far = i32(slots - 1, 0, device="cuda")
    for pool, name in [(state, "state"), (conv_state, "conv_state")]:
        pool[far.long()] = args[name][args["slots"].long()]
    assert_same_bits(kda_decode_fused(**args | {"state": state, "conv_state": conv_state, "slots": far}), expected)
    for pool, name in [(state, "state"), (conv_state, "conv_state")]:
        assert_same_bits(pool[far.long()], expected_args[name][args["slots"].long()], name)


@needs_cpu_backend
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("batch, steps, heads, value_heads, key_dim, value_dim", [(2, 1, 32, 32, 128, 128), (3, 4, 1, 3, 16, 48)])
def test_fused_is_the_three_operators_to_the_bit_on_a_cpu(batch, steps, heads, value_heads, key_dim, value_dim, dtype):
    args = fused_problem(batch, steps, heads, value_heads, key_dim, value_dim, dtype)
    state, conv_state = args["state"].clone(), args["conv_state"].clone()
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * steps
    qkv = short_conv(args["qkv"].flatten(0, 1), args["conv_weight"], conv_state, args["slots"], cu_seqlens).view(batch, steps, -1)
    q, k, v = qkv.split([heads * key_dim, heads * key_dim, value_heads * value_dim], dim=2)
    shared = {name: args[name] for name in ("g", "beta", "slots", "gate", "A_log", "dt_bias")}
    q, k, v = q.unflatten(2, (heads, key_dim)), k.unflatten(2, (heads, key_dim)), v.unflatten(2, (value_heads, value_dim))
    o = kda_decode(q, k, v, state=state, **shared)
    expected = gated_rms_norm(o, args["norm_gate"], args["norm_weight"])
    for threads_now in (1, 2):
        with threads(threads_now):
            ours = args | {"state": args["state"].clone(), "conv_state": args["conv_state"].clone()}
            assert_same_bits(kda_decode_fused(**ours), expected)
            assert_same_bits(ours["state"], state)
            assert_same_bits(ours["conv_state"], conv_state)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_fused_skipped_sequences_and_strides(dtype, device):
    args = on(device, fused_problem(3, 2, 1, 2, 16, 32, dtype))
    plain_args = args | {"state": args["state"].clone(), "conv_state": args["conv_state"].clone()}
    plain = kda_decode_fused(**plain_args)
    skipped = int(args["slots"][1])
    odd = args | {name: strided(args[name].clone()) for name in ("qkv", "g", "norm_gate")}
    odd["slots"] = args["slots"].clone()
    odd["slots"][1] = -1
    for name in ("qkv", "g", "norm_gate"):
        odd[name][1] = NAN
    guarded = Guarded(3, 2, 2, 32, dtype=dtype, device=device)
    odd |= {"state": args["state"].clone(), "conv_state": args["conv_state"].clone(), "out": guarded.tensor}
    kda_decode_fused(**odd)
    guarded.check()
    assert (guarded.tensor[1] == 0).all()
    assert_same_bits(guarded.tensor[[0, 2]], plain[[0, 2]])
    for name in ("state", "conv_state"):
        plain_args[name][skipped] = args[name][skipped]
        assert_same_bits(odd[name], plain_args[name], name)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_do(device):
    args = on(device, problem(1, 1, 1, 2, 16, 32, torch.float32))
    empty = args | {name: args[name][:0] for name in (*TOKENS, "slots")}
    assert kda_decode(**empty).shape == (0, 1, 2, 32)
    args = on(device, fused_problem(1, 1, 1, 2, 16, 32, torch.float32))
    empty = args | {name: args[name][:0] for name in ("qkv", "g", "beta", "norm_gate", "slots")}
    assert kda_decode_fused(**empty).shape == (0, 1, 2, 32)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    args = on(device, problem(2, 2, 1, 2, 16, 16, torch.float32))
    args["state"].nan_to_num_(0)
    names = (*TOKENS, "state", "slots", "A_log", "dt_bias")
    out = torch.empty_like(args["v"])
    opcheck(torch.ops.kimi_native.kda_decode, (*(args[name] for name in names), i32(1, 2, device=device), 0, -5.0, 0.25, True, True, out))
    args = on(device, fused_problem(2, 1, 1, 2, 16, 16, torch.float32))
    args["state"].nan_to_num_(0)
    args["conv_state"].nan_to_num_(0)
    names = ("qkv", "conv_weight", "conv_state", "g", "beta", "state", "slots", "A_log", "dt_bias")
    tail = (None, args["norm_gate"], args["norm_weight"], 1, 0, -5.0, 0.25, True, True, 1e-5, torch.empty(2, 1, 2, 16, device=device))
    opcheck(torch.ops.kimi_native.kda_decode_fused, (*(args[name] for name in names), *tail))


@pytest.mark.skipif(kimi_native._C is None, reason="built without the pybind11 module")
@pytest.mark.parametrize("device", DEVICES)
def test_entries_on_raw_pointers(device):
    _C = kimi_native._C
    backend = "cuda" if cuda_backend(device) else "cpu"
    args = on(device, fused_problem(3, 2, 1, 2, 16, 32, torch.bfloat16))
    expected_args = args | {"state": args["state"].clone(), "conv_state": args["conv_state"].clone()}
    expected = kda_decode_fused(**expected_args)
    out = torch.empty_like(expected)
    f = _C.KdaDecodeFusedParams()
    for name in ("g", "beta", "state", "slots", "A_log", "dt_bias"):
        setattr(f, name, args[name].data_ptr())
    for name in ("qkv", "conv_weight", "conv_state", "norm_gate", "norm_weight"):
        setattr(f, name, args[name].data_ptr())
    f.out = out.data_ptr()
    f.num_sequences, f.tokens_per_sequence, f.num_heads, f.num_value_heads, f.key_dim, f.value_dim = 3, 2, 1, 2, 16, 32
    f.g_token_stride, f.g_head_stride, f.beta_token_stride, f.beta_head_stride = 32, 16, 2, 1
    f.out_token_stride = f.norm_gate_token_stride = 64
    f.out_head_stride = f.norm_gate_head_stride = 32
    f.state_slot_stride, f.conv_state_slot_stride, f.qkv_token_stride = 2 * 32 * 16, 3 * 96, 96
    f.num_slots, f.scale = len(args["state"]), 0.25
    f.dtype = f.g_dtype = f.beta_dtype = _C.DType.bfloat16
    workspace = torch.empty(getattr(_C, f"kda_decode_fused_workspace_bytes_{backend}")(f), dtype=torch.uint8, device=device)
    f.workspace = workspace.data_ptr()
    getattr(_C, f"kda_decode_fused_{backend}")(f)
    assert_same_bits(out, expected)
    assert_same_bits(args["state"], expected_args["state"])
    assert_same_bits(args["conv_state"], expected_args["conv_state"])

    args = on(device, problem(3, 2, 1, 2, 16, 32, torch.float32))
    expected_state = args["state"].clone()
    expected = kda_decode(**args | {"state": expected_state})
    out = torch.empty_like(expected)
    p = _C.KdaDecodeParams()
    p.num_sequences, p.tokens_per_sequence, p.num_heads, p.num_value_heads, p.key_dim, p.value_dim = 3, 2, 1, 2, 16, 32
    p.out_token_stride, p.out_head_stride, p.state_slot_stride, p.scale = 64, 32, 2 * 32 * 16, 0.25
    for name in (*TOKENS, "state", "slots", "A_log", "dt_bias"):
        setattr(p, name, args[name].data_ptr())
    for name in TOKENS:
        setattr(p, f"{name}_token_stride", args[name].stride(1))
        setattr(p, f"{name}_head_stride", args[name].stride(2))
    p.out = out.data_ptr()
    p.dtype = p.g_dtype = p.beta_dtype = _C.DType.float32
    workspace = torch.empty(getattr(_C, f"kda_decode_workspace_bytes_{backend}")(p), dtype=torch.uint8, device=device)
    p.workspace = workspace.data_ptr()
    getattr(_C, f"kda_decode_{backend}")(p)
    assert_same_bits(out, expected)
    assert_same_bits(args["state"], expected_state)
    p.num_slots = -1
    with pytest.raises(RuntimeError, match="num_slots must not be negative, got -1"):
        getattr(_C, f"kda_decode_{backend}")(p)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"k": torch.ones(2, 3, 1, 16)}, "k must have shape \\[2, 3, 2, 16\\]"),
        ({"v": torch.ones(2, 3, 2, 16)}, "v must have shape \\[2, 3, 4, 16\\]"),
        ({"beta": torch.ones(2, 3, 5)}, "beta must have shape \\[2, 3, 4\\]"),
        ({"slots": i32(0)}, "slots must have shape \\[2\\]"),
        ({"num_commit": i32(0)}, "num_commit must have shape \\[2\\]"),
        ({"num_commit": torch.zeros(2)}, "num_commit must be int32"),
        ({"state": torch.zeros(3, 4, 16, 16).double()}, "state must be float32"),
        ({"A_log": None}, "kda_decode: A_log must be given"),
        ({"v": torch.ones(2, 5, 4, 16)[:, :3]}, "v must have evenly spaced tokens"),
        ({"q": torch.ones(2, 2, 16)}, "q must have shape \\[batch, tokens, num_heads, key_dim\\]"),
    ],
)
def test_bad_input_is_named(change, text):
    args = problem(2, 3, 2, 4, 16, 16, torch.float32)
    with pytest.raises(RuntimeError, match=text):
        kda_decode(**args | change)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"qkv": torch.ones(2, 3, 100)}, RuntimeError, "qkv must have shape \\[\\*, \\*, 128\\]"),
        ({"conv_weight": torch.ones(128, 3)}, RuntimeError, "conv_weight must have shape \\[128, 4\\]"),
        ({"conv_state": torch.ones(5, 4, 128)}, RuntimeError, "conv_state must have shape \\[\\*, 3, 128\\]"),
        ({"conv_state": torch.ones(5, 3, 128).bfloat16()}, RuntimeError, "conv_state must have the dtype"),
        ({"norm_gate": torch.ones(2, 3, 4, 17)}, RuntimeError, "norm_gate must have shape"),
        ({"norm_weight": None}, RuntimeError, "norm_weight must be given with norm_gate"),
        ({"norm_eps": -1.0}, RuntimeError, "norm_eps must not be negative"),
        ({"num_heads": 3}, RuntimeError, "qkv must have shape"),
        ({"head_dim": 32}, ValueError, "head_dim is 32"),
        ({"gate": "none"}, ValueError, "gate must be one of"),
    ],
)
def test_bad_input_of_the_fused_form_is_named(change, error, text):
    args = fused_problem(2, 3, 2, 4, 16, 16, torch.float32)
    with pytest.raises(error, match=text):
        kda_decode_fused(**args | change)


def test_unsupported_numbers_of_tokens_are_named():
    with pytest.raises(RuntimeError, match="takes 1 to 8 tokens of each sequence, got 9"):
        kda_decode(**problem(1, 9, 1, 1, 16, 16, torch.float32))
