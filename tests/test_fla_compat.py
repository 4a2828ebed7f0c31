"""The drop-in for fla-core's KDA functions against the fp64 spec. fla itself is not needed; tests/integrations/test_fla_core.py is for
where it is installed."""

from __future__ import annotations

import inspect

import pytest
import torch
from kit import DEVICES, assert_close, assert_same_bits, cuda_backend, graph_replays, needs_gpu, randn, skip_if_emulated, strided
from spec.kda_prefill import MAX_R, MAX_R_CHUNKED, MAX_R_STATE, MAX_R_STATE_CHUNKED, kda

from kimi_native.compat.fla import chunk_kda, fused_recurrent_kda, fused_recurrent_kda_fwd
from kimi_native.compat.fla import run as run_module
from kimi_native.compat.fla.run import padded_sizes

FUNCTIONS = [chunk_kda, fused_recurrent_kda]
BOTH = pytest.mark.parametrize("function", FUNCTIONS, ids=["chunk", "recurrent"])
LAYOUTS = pytest.mark.parametrize("state_v_first", [False, True], ids=["kv", "vk"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # fp16 on a CPU too: in fp32 inside

GATES = {
    "log_decay": {},
    "softplus": {"use_gate_in_kernel": True, "A_log": 1, "dt_bias": 1},
    "softplus, no bias": {"use_gate_in_kernel": True, "A_log": 1},
    "bounded": {"use_gate_in_kernel": True, "A_log": 1, "dt_bias": 1, "lower_bound": -4.0},
    "bounded, no rate": {"use_gate_in_kernel": True, "lower_bound": -5.0},
}
STEPS = {
    "ready": {},
    "logits": {"use_beta_sigmoid_in_kernel": True},
    "doubled": {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True},
}


def problem(
    batch, tokens, heads, value_heads, key_dim, value_dim, dtype=torch.float32, gate="log_decay", step="ready", device="cpu", seed=0
):
    """Arguments of one of fla's functions by name."""
    g = randn(batch, tokens, value_heads, key_dim, seed=seed + 3, scale=3.0)
    beta = randn(batch, tokens, value_heads, dtype=dtype, seed=seed + 4)
    args = {
        "q": randn(batch, tokens, heads, key_dim, dtype=dtype, seed=seed),
        "k": randn(batch, tokens, heads, key_dim, dtype=dtype, seed=seed + 1),
        "v": randn(batch, tokens, value_heads, value_dim, dtype=dtype, seed=seed + 2),
        "g": -torch.exp(g) if gate == "log_decay" else g.to(dtype),
        "beta": beta.sigmoid() if step == "ready" else beta,
        "use_qk_l2norm_in_kernel": True,
        "output_final_state": True,
        **GATES[gate],
        **STEPS[step],
    }
    if "A_log" in args:
        args["A_log"] = randn(value_heads, seed=seed + 5)
    if "dt_bias" in args:
        args["dt_bias"] = randn(value_heads * key_dim, seed=seed + 6)
    return on(device, args)


def states(count, args, state_v_first, seed=20):
    value_heads, value_dim, key_dim = *args["v"].shape[2:], args["q"].shape[3]
    inner = (value_dim, key_dim) if state_v_first else (key_dim, value_dim)
    return randn(count, value_heads, *inner, seed=seed).to(args["q"].device)


def on(device, args):
    return {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in args.items()}


def spec_of(args, begin, end, row=0, state=None):
    """(out [tokens, HV, V], state [HV, V, K]) of tokens begin to end of a row, in fp64; `state` V-first or None."""
    q, k, v, g, beta = (args[name][row, begin:end].cpu() for name in ("q", "k", "v", "g", "beta"))
    raw = args.get("use_gate_in_kernel", False)
    gate = "log_decay" if not raw else "softplus" if args.get("lower_bound") is None else "bounded"
    if args.get("allow_neg_eigval"):
        beta = 2 * beta.double().sigmoid()
    options = {"gate": gate, "lower_bound": args.get("lower_bound"), "scale": args.get("scale")}
    if raw and args.get("A_log") is not None:
        options["A_log"] = args["A_log"].cpu().reshape(-1)
    if raw and args.get("dt_bias") is not None:
        options["dt_bias"] = args["dt_bias"].cpu().reshape(v.shape[1], -1)
    if state is None:
        state = torch.zeros(v.shape[1], v.shape[2], q.shape[2])
    sigmoid = args.get("use_beta_sigmoid_in_kernel", False) and not args.get("allow_neg_eigval", False)
    norm = args.get("use_qk_l2norm_in_kernel", False)
    return kda(q, k, v, g, beta, state.cpu(), use_qk_l2norm=norm, use_beta_sigmoid=sigmoid, **options)


def reference(args, bounds=None, initial=None):
    """(out [B, T, HV, V], states [N, HV, V, K]) in fp64; `bounds` as a list; `initial` V-first."""
    out, finals = torch.zeros(args["v"].shape, dtype=torch.float64), []
    batch, tokens = args["q"].shape[:2]
    spans = [(n, 0, tokens) for n in range(batch)] if bounds is None else [(0, a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    for n, (row, begin, end) in enumerate(spans):
        out[row, begin:end], final = spec_of(args, begin, end, row, None if initial is None else initial[n])
        finals.append(final)
    return out, torch.stack(finals)


def limits(args, device, decodes=False):
    """(of the output, of the state): chunks on tensor cores have fp16 operands."""
    dtype, sizes = args["q"].dtype, padded_sizes(args["q"].shape[3], args["v"].shape[3], device == "cuda")
    chunked = cuda_backend(device) and dtype in (torch.bfloat16, torch.float16) and sizes in [(64, 64), (128, 128)] and not decodes
    return (MAX_R_CHUNKED[dtype], MAX_R_STATE_CHUNKED) if chunked else (MAX_R[dtype], MAX_R_STATE)


def check(function, args, device, state_v_first=True, bounds=None, initial=None, decodes=False):
    """Calls it and compares with the spec; the initial states must stay as they are."""
    v_first = initial if initial is None or state_v_first else initial.mT
    ref, ref_state = reference(args, bounds, v_first)
    kept = None if initial is None else initial.clone()
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)
    out, state = function(**args, initial_state=initial, state_v_first=state_v_first, cu_seqlens=cu_seqlens)
    max_r, max_r_state = limits(args, device, decodes)
    assert out.dtype == args["v"].dtype and out.is_contiguous()
    assert_close(out, ref, max_r)
    if args["output_final_state"]:
        assert state.dtype == torch.float32 and state.is_contiguous()
        assert_close(state, ref_state if state_v_first else ref_state.mT, max_r_state, "state")
    else:
        assert state is None
    if initial is not None:
        assert_same_bits(initial, kept, "initial_state")
    return out, state


# ---- what fla's callers give --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@BOTH
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
def test_gates_and_dtypes(gate, dtype, state_v_first, function, device):
    args = problem(2, 70, 2, 4, 64, 64, dtype, gate, device=device)
    check(function, args, device, state_v_first, initial=states(2, args, state_v_first))


@pytest.mark.parametrize("device", DEVICES)
@BOTH
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("change", [{}, {"scale": 0.3}, {"use_qk_l2norm_in_kernel": False}, {"output_final_state": False}])
def test_steps_and_options(change, step, function, device):
    args = problem(1, 67, 1, 2, 32, 48, torch.bfloat16, "softplus", step, device=device) | change
    if not args["use_qk_l2norm_in_kernel"]:
        args["q"], args["k"] = args["q"] * 0.17, args["k"] * 0.17
    check(function, args, device)


@pytest.mark.parametrize("device", DEVICES)
@BOTH
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key_dim, value_dim", [(60, 60), (100, 36), (12, 7), (250, 130), (128, 64), (1, 1)])
def test_head_sizes(key_dim, value_dim, dtype, state_v_first, function, device):
    args = problem(2, 35, 1, 2, key_dim, value_dim, dtype, "softplus", device=device)
    check(function, args, device, state_v_first, initial=states(2, args, state_v_first))


@pytest.mark.parametrize("device", DEVICES)
@BOTH
@LAYOUTS
@pytest.mark.parametrize("given", [False, True], ids=["zero", "given"])
def test_packed_sequences(given, state_v_first, function, device):
    bounds = [0, 0, 30, 95, 95, 160]  # with empty ones
    args = problem(1, 160, 2, 2, 64, 64, torch.bfloat16, device=device)
    check(function, args, device, state_v_first, bounds, states(5, args, state_v_first) if given else None)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_outside_of_all_sequences(device):
    """What follows the last sequence may be anything, and is zero in the output of the recurrent form."""
    args = problem(1, 50, 1, 1, 32, 32, device=device)
    for name in ("q", "k", "v", "g", "beta"):
        args[name][:, 40:] = float("nan")
    bounds = torch.tensor([0, 25, 40], device=device)
    out, state = fused_recurrent_kda(**args, cu_seqlens=bounds, state_v_first=True)
    ref, ref_state = reference({n: a[:, :40] if isinstance(a, torch.Tensor) else a for n, a in args.items()}, [0, 25, 40])
    assert_close(out[:, :40], ref, MAX_R[torch.float32])
    assert_close(state, ref_state, MAX_R_STATE, "state")
    assert_same_bits(out[:, 40:], torch.zeros_like(out[:, 40:]))
    assert_same_bits(chunk_kda(**args, cu_seqlens=bounds)[0][:, :40], out[:, :40])


@pytest.mark.parametrize("device", DEVICES)
@LAYOUTS
@pytest.mark.parametrize("given", [False, True], ids=["zero", "given"])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9])
def test_a_few_tokens(tokens, given, state_v_first, device):
    args = problem(3, tokens, 2, 4, 64, 64, torch.bfloat16, "softplus", device=device)
    check(fused_recurrent_kda, args, device, state_v_first, initial=states(3, args, state_v_first) if given else None, decodes=tokens <= 8)


@pytest.mark.parametrize("device", DEVICES)
@BOTH
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_strided_inputs(tokens, function, device):
    """Slices of a projection, gaps between rows, another order of dimensions, heads that are one: the bits of contiguous inputs."""
    args = problem(2, tokens, 2, 2, 32, 32, device=device) | {"initial_state": randn(2, 2, 32, 32, seed=9).to(device)}
    args["k"] = args["k"][:, :, :1].expand(-1, -1, 2, -1)
    expected = function(**args | {"k": args["k"].contiguous()})
    together = torch.cat([args["q"], args["v"]], dim=2)
    args["q"], args["v"] = together[:, :, :2], together[:, :, 2:]
    args["g"] = strided(args["g"])
    args["beta"] = args["beta"].transpose(1, 2).contiguous().transpose(1, 2)
    args["initial_state"] = args["initial_state"].mT.contiguous().mT
    for a, b in zip(function(**args), expected, strict=True):
        assert_same_bits(a, b)
    args["q"] = args["q"].mT.contiguous().mT
    args["v"] = args["v"].transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(function(**args), expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("device", DEVICES)
@BOTH
@pytest.mark.parametrize(
    "q_dtype, v_dtype, g_dtype",
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float16),
    ],
)
def test_other_dtypes(q_dtype, v_dtype, g_dtype, function, device):
    args = problem(1, 40, 1, 2, 32, 32, device=device)
    args |= {name: args[name].to(dtype) for name, dtype in (("q", q_dtype), ("k", q_dtype), ("v", v_dtype), ("g", g_dtype))}
    ref, ref_state = reference(args)
    out, state = function(**args, state_v_first=True)
    assert out.dtype == (q_dtype if function is chunk_kda else v_dtype)
    assert_close(out, ref, MAX_R.get(out.dtype, MAX_R[torch.float32]))
    assert_close(state, ref_state, MAX_R_STATE, "state")


@pytest.mark.parametrize("device", DEVICES)
@BOTH
def test_parameters_of_other_shapes_and_dtypes(function, device):
    """A_log as [1, 1, HV, 1], dt_bias as [HV, K], both in bf16, as models keep them."""
    args = problem(1, 20, 1, 2, 32, 32, gate="softplus", device=device)
    args["A_log"], args["dt_bias"] = args["A_log"].bfloat16(), args["dt_bias"].bfloat16()
    expected = function(**args | {"A_log": args["A_log"].float(), "dt_bias": args["dt_bias"].float()})
    shaped = function(**args | {"A_log": args["A_log"].view(1, 1, 2, 1), "dt_bias": args["dt_bias"].view(2, 32)})
    for a, b in zip(shaped, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("device", DEVICES)
@BOTH
def test_nothing_to_do(function, device):
    args = problem(2, 0, 1, 1, 32, 32, device=device)
    out, state = function(**args)
    assert out.shape == (2, 0, 1, 32)
    assert_same_bits(state, torch.zeros_like(state))
    initial = states(2, args, False)
    assert_same_bits(function(**args, initial_state=initial)[1], initial)
    out, state = function(**problem(0, 5, 1, 1, 32, 32, device=device))
    assert out.shape == (0, 5, 1, 32) and state.shape == (0, 1, 32, 32)


@pytest.mark.parametrize("device", DEVICES)
@BOTH
def test_the_old_name_of_the_layout(function, device):
    args = problem(1, 20, 1, 1, 32, 48, device=device)
    with pytest.warns(DeprecationWarning, match="state_v_first") as warned:
        state = function(**args, transpose_state_layout=True)[1]
    assert warned[0].filename == __file__, "the warning points at the caller"
    assert_same_bits(state, function(**args, state_v_first=True)[1])
    with pytest.raises(ValueError, match="the same argument"):
        function(**args, state_v_first=True, transpose_state_layout=True)


# ---- states at the start of each chunk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@LAYOUTS
@pytest.mark.parametrize("given", [False, True], ids=["zero", "given"])
@pytest.mark.parametrize("bounds", [None, [0, 64, 64, 65, 200, 328]], ids=["equal", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_intermediate_states(dtype, bounds, given, state_v_first, device):
    args = problem(2 if bounds is None else 1, 150 if bounds is None else 328, 1, 2, 64, 48, dtype, device=device)
    spans = [(n, 0, 150) for n in range(2)] if bounds is None else [(0, a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    initial = states(len(spans), args, state_v_first) if given else None
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)
    options = {"initial_state": initial, "state_v_first": state_v_first, "cu_seqlens": cu_seqlens}
    out, state, chunks = chunk_kda(**args, **options, return_intermediate_states=True)
    for a, b in zip(chunk_kda(**args, **options), (out, state), strict=True):
        assert_same_bits(a, b)
    expected = []
    for n, (row, begin, end) in enumerate(spans):
        past = None if initial is None else initial[n] if state_v_first else initial[n].mT
        for start in range(begin, end, 64):
            expected.append(spec_of(args, begin, start, row, past)[1])
    expected = torch.stack(expected)
    expected = (expected if state_v_first else expected.mT).unflatten(0, (args["q"].shape[0], -1))
    assert chunks.dtype == dtype
    assert_close(chunks, expected, MAX_R[dtype] if dtype == torch.bfloat16 else limits(args, device)[1])
    if bounds is not None:
        again = chunk_kda(**args, **options, return_intermediate_states=True, cu_seqlens_cpu=torch.tensor(bounds))[2]
        assert_same_bits(again, chunks)


@pytest.mark.parametrize("device", DEVICES)
@BOTH
@pytest.mark.parametrize(
    "batch, cu_seqlens, longest",
    [(2, None, 90), (1, [0, 20, 90], 70), (1, [0, 0], 0), (1, [0], 0)],
    ids=["dense", "packed", "empty", "none"],
)
def test_the_longest_length_is_passed_where_the_host_knows_it(batch, cu_seqlens, longest, function, device, monkeypatch):
    passed = []
    right = run_module.kda_prefill
    monkeypatch.setattr(run_module, "kda_prefill", lambda *args, **kwargs: (passed.append(kwargs["max_seqlen"]), right(*args, **kwargs))[1])
    args = problem(batch, 90, 1, 1, 16, 16, device=device)
    if cu_seqlens is not None:
        args["cu_seqlens"] = torch.tensor(cu_seqlens, device=device)
    function(**args)
    assert passed.pop() == (0 if device == "cuda" and cu_seqlens is not None else longest)
    if function is chunk_kda and cu_seqlens is not None:
        function(**args, cu_seqlens_cpu=torch.tensor(cu_seqlens))
        assert passed.pop() == longest
    if function is chunk_kda:
        function(**args, return_intermediate_states=True)
        assert passed.pop() == longest
    assert not passed


# ---- states in place and in a pool ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@LAYOUTS
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("size, pool_dtype", [(32, torch.float32), (20, torch.float32), (32, torch.bfloat16)])
def test_states_in_place(size, pool_dtype, tokens, state_v_first, device):
    args = problem(2, tokens, 1, 2, size, size, device=device) | {"output_final_state": False}
    pool = states(2, args, state_v_first).to(pool_dtype)
    ref, ref_state = reference(args, initial=pool if state_v_first else pool.mT)
    out, final = fused_recurrent_kda_fwd(**args, initial_state=pool, state_v_first=state_v_first)
    assert final is pool
    assert_close(out, ref, MAX_R[torch.float32])
    assert_close(pool, ref_state if state_v_first else ref_state.mT, MAX_R.get(pool_dtype), "state")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["fits", "other dtype", "strided"])
def test_an_output_of_the_callers(kind, device):
    args = problem(2, 3, 1, 1, 32, 32, device=device)
    expected = fused_recurrent_kda(**args)[0]
    whole = torch.full((2, 3, 1, 64), 7.0, dtype=torch.float64 if kind == "other dtype" else torch.float32, device=device)
    out = whole[..., :32] if kind == "strided" else whole[..., :32].contiguous()
    result, _ = fused_recurrent_kda_fwd(**args, inplace_final_state=False, out=out)
    assert result is out
    assert_same_bits(out.float(), expected)
    assert kind != "strided" or (whole[..., 32:] == 7).all()


def indexed(args, pool, state_v_first, lengths, rows, accepted=None):
    """(out, pool) after each token's state went to its row, in fp64; a sequence whose rows begin with -1 does nothing."""
    out, pool = torch.zeros(args["v"].shape, dtype=torch.float64), pool.double().cpu().clone()
    begin = 0
    for n, length in enumerate(lengths):
        if length and rows[n][0] >= 0:
            state = pool[rows[n][accepted[n] - 1 if accepted else 0]]
            state = state if state_v_first else state.mT
            for t in range(length):
                out[0, begin + t : begin + t + 1], state = spec_of(args, begin + t, begin + t + 1, 0, state)
                pool[rows[n][t]] = state if state_v_first else state.mT
        begin += length
    return out, pool


@pytest.mark.parametrize("device", DEVICES)
@LAYOUTS
@pytest.mark.parametrize("size", [32, 20])
@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 1], [0, 0]])
@pytest.mark.parametrize(
    "dtype, pool_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_one_token_of_a_pool(pool_dtype, dtype, lengths, size, state_v_first, device):
    """Rows out of order; empty sequences name rows that others use, as padding does; the third sequence is skipped."""
    args = problem(1, 6, 1, 2, size, size, dtype, "softplus", device=device) | {"output_final_state": False}
    rows = [[n] for n in (7, 2, -1, 7, 2)[: len(lengths)]]
    pool = states(9, args, state_v_first).to(pool_dtype)
    if len(lengths) == 4:
        rows[3] = [0]
    untouched = [r for r in range(9) if not any(length and [r] == row for length, row in zip(lengths, rows, strict=True))]
    pool[untouched] = 1e30
    before = pool.clone()
    ref, ref_pool = indexed(args, pool, state_v_first, lengths, rows)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=device, dtype=torch.int32)
    indices = torch.tensor(rows, device=device, dtype=torch.int32)[:, 0]
    out, final = fused_recurrent_kda_fwd(
        **args, initial_state=pool, state_v_first=state_v_first, cu_seqlens=cu_seqlens, ssm_state_indices=indices
    )
    assert final is pool
    assert_close(out, ref, MAX_R[dtype])
    touched = [r for r in range(9) if r not in untouched]
    assert_close(pool[touched], ref_pool[touched], MAX_R[pool_dtype] if pool_dtype == torch.bfloat16 else MAX_R_STATE, "pool")
    assert_same_bits(pool[untouched], before[untouched], "other rows")


@pytest.mark.parametrize("device", DEVICES)
@LAYOUTS
def test_a_batch_of_single_tokens_of_a_pool(state_v_first, device):
    args = problem(3, 1, 1, 2, 32, 32, device=device) | {"output_final_state": False}
    pool, rows = states(5, args, state_v_first), [4, 0, 2]
    initial = pool[rows] if state_v_first else pool[rows].mT
    ref, ref_state = reference(args, initial=initial)
    indices = torch.tensor(rows, device=device)
    out, _ = fused_recurrent_kda_fwd(**args, initial_state=pool, state_v_first=state_v_first, ssm_state_indices=indices)
    assert_close(out, ref, MAX_R[torch.float32])
    assert_close(pool[rows], ref_state if state_v_first else ref_state.mT, MAX_R_STATE, "pool")


@pytest.mark.parametrize("device", DEVICES)
@LAYOUTS
@pytest.mark.parametrize("accepted", [None, [1, 3, 2, 1]])
def test_drafts_of_a_pool(accepted, state_v_first, device):
    """Speculative decoding: a row for the state after each token, and a start from the one that was accepted last time."""
    lengths, rows = [3, 2, 0, 1], [[0, 1, 2], [5, 4, 3], [0, 1, 2], [8, -1, -1]]
    args = problem(1, 6, 2, 2, 32, 48, device=device) | {"output_final_state": False}
    pool = states(10, args, state_v_first)
    before = pool.clone()
    ref, ref_pool = indexed(args, pool, state_v_first, lengths, rows, accepted)
    out, _ = fused_recurrent_kda_fwd(
        **args,
        initial_state=pool,
        state_v_first=state_v_first,
        cu_seqlens=torch.tensor([0, 3, 5, 5, 6], device=device),
        ssm_state_indices=torch.tensor(rows, device=device, dtype=torch.int32),
        num_accepted_tokens=None if accepted is None else torch.tensor(accepted, device=device, dtype=torch.int32),
    )
    assert_close(out, ref, MAX_R[torch.float32])
    touched = [0, 1, 2, 5, 4, 8]
    assert_close(pool[touched], ref_pool[touched], MAX_R_STATE, "pool")
    assert_same_bits(pool[[3, 6, 7, 9]], before[[3, 6, 7, 9]], "other rows")


# ---- on a GPU: asynchronous, capturable ---------------------------------------------------------------------------------------------


def every_kind(device):
    """(name, call) of each way through the drop-in that promises not to synchronise."""
    dense = problem(2, 70, 1, 2, 64, 64, torch.bfloat16, "softplus", "doubled", device)
    one = problem(3, 1, 1, 2, 64, 64, torch.bfloat16, device=device)
    packed = problem(1, 90, 1, 2, 60, 60, torch.bfloat16, device=device) | {"cu_seqlens": torch.tensor([0, 20, 90], device=device)}
    pool = states(6, one, True)
    indices = torch.tensor([4, 0, 2], device=device)
    drafts = {
        **problem(1, 4, 1, 2, 64, 64, torch.bfloat16, device=device),
        "initial_state": states(6, one, False),
        "cu_seqlens": torch.tensor([0, 2, 2, 4], device=device),
        "ssm_state_indices": torch.tensor([[0, 1], [2, 3], [4, 5]], device=device),
    }
    return [
        ("chunk", lambda: chunk_kda(**dense)),
        ("chunk, packed", lambda: chunk_kda(**packed)),
        ("chunk, intermediate", lambda: chunk_kda(**dense, return_intermediate_states=True)),
        ("recurrent, one token", lambda: fused_recurrent_kda(**one)),
        ("recurrent, packed", lambda: fused_recurrent_kda(**packed)),
        ("pool", lambda: fused_recurrent_kda_fwd(**one, initial_state=pool.clone(), state_v_first=True, ssm_state_indices=indices)),
        ("drafts", lambda: fused_recurrent_kda_fwd(**drafts | {"initial_state": drafts["initial_state"].clone()})),
    ]


@needs_gpu
def test_no_synchronisation():
    for name, call in every_kind("cuda"):
        call()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            raise AssertionError(f"{name}: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode(before)


@needs_gpu
@pytest.mark.parametrize("name", ["chunk", "chunk, packed", "recurrent, one token", "recurrent, packed", "pool", "drafts"])
def test_graph_capture(name):
    call, results = dict(every_kind("cuda"))[name], {}

    def run():
        for i, result in enumerate(call()):
            results.setdefault(i, torch.empty_like(result)).copy_(result)

    run()
    graph_replays(run, list(results.values()))


# ---- autograd and the compiler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_gradients(device):
    args = problem(1, 20, 1, 1, 32, 32, device=device)
    expected = chunk_kda(**args)
    for name in ("q", "g", "beta"):
        needing = args | {name: args[name].clone().requires_grad_()}
        with pytest.raises(NotImplementedError, match="chunk_kda: gradients are not computed"):
            chunk_kda(**needing)
        with torch.no_grad():
            assert_same_bits(chunk_kda(**needing)[0], expected[0])
        with torch.inference_mode():
            assert_same_bits(chunk_kda(**needing)[0], expected[0])
        out, state = fused_recurrent_kda(**needing)  # like fla's, it has no backward pass
        assert not out.requires_grad and not state.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@BOTH
@pytest.mark.parametrize(
    "batch, tokens, cu_seqlens", [(2, 1, None), (2, 70, None), (1, 70, [0, 20, 70])], ids=["decode", "dense", "packed"]
)
def test_compile(batch, tokens, cu_seqlens, function, device):
    skip_if_emulated("torch.compile")
    torch._dynamo.reset()
    args = problem(batch, tokens, 1, 2, 32, 20, gate="softplus", step="doubled", device=device)
    if cu_seqlens is not None:
        args["cu_seqlens"] = torch.tensor(cu_seqlens, device=device)
    compiled = torch.compile(lambda **more: function(**args, **more), fullgraph=True, backend="aot_eager")
    initial = states(2, args, False)
    for a, b in zip(compiled(initial_state=initial), function(**args, initial_state=initial), strict=True):
        assert_same_bits(a, b)


# ---- errors ----------------------------------------------------------------------------------------------------------------------


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


@BOTH
@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"mask": ones(2)}, TypeError, "unknown arguments mask"),
        ({"k": ones(1, 4, 2, 32)}, ValueError, r"k must have shape \[1, 5, 2, 32\], got \[1, 4, 2, 32\]"),
        ({"g": ones(1, 5, 2, 32)}, ValueError, r"g must have shape \[1, 5, 4, 32\]"),
        ({"beta": ones(1, 5, 2)}, ValueError, r"beta must have shape \[1, 5, 4\]"),
        ({"v": ones(1, 5, 3, 32)}, ValueError, "g must have shape|multiple of the 2 heads"),
        ({"q": ones(5, 2, 32)}, ValueError, "q and v must have four dimensions"),
        ({"beta": ones(1, 5, 4, 32)}, NotImplementedError, "beta for each value channel"),
        ({"q": ones(1, 5, 2, 32, dtype=torch.int32)}, NotImplementedError, "dtype torch.int32 of q"),
        ({"v": ones(1, 5, 4, 288)}, NotImplementedError, "V = 288: head dimensions up to 256"),
        ({"allow_neg_eigval": True}, ValueError, "requires use_beta_sigmoid_in_kernel=True"),
        ({"use_gate_in_kernel": True}, ValueError, "A_log must be given"),
        ({"use_gate_in_kernel": True, "A_log": ones(3)}, ValueError, "A_log must have 4 elements, got 3"),
        ({"use_gate_in_kernel": True, "A_log": ones(4), "dt_bias": ones(4)}, ValueError, "dt_bias must have 4 x 32 elements"),
        ({"use_gate_in_kernel": True, "lower_bound": 1.0}, ValueError, "lower_bound must be negative"),
        ({"initial_state": ones(2, 4, 32, 32)}, ValueError, r"initial_state must have shape \[1, 4, 32, 32\]"),
        ({"cu_seqlens": torch.tensor([0, 2, 5]), "initial_state": ones(1, 4, 32, 32)}, ValueError, r"shape \[2, 4, 32, 32\]"),
        ({"q": ones(1, 5, 2, 32).to("meta")}, NotImplementedError, "device meta"),
        ({"v": ones(1, 5, 4, 32).to("meta")}, NotImplementedError, "v is on meta, q on cpu"),
    ],
)
def test_bad_input_is_named(change, error, text, function):
    with pytest.raises(error, match=text) as raised:
        function(**problem(1, 5, 2, 4, 32, 32) | change)
    assert str(raised.value).startswith(("chunk_kda: ", "fused_recurrent_kda"))


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"chunk_size": 16}, ValueError, "`chunk_size` must be either 32 or 64"),
        ({"cp_context": object()}, NotImplementedError, "cp_context: context parallelism"),
        ({"chunk_size": 32, "return_intermediate_states": True}, NotImplementedError, "chunk_size=64 alone"),
        ({"initial_state": ones(2, 4, 32, 32, dtype=torch.bfloat16)}, ValueError, "initial_state must be float32"),
        ({"safe_gate": True, "use_gate_in_kernel": True, "A_log": ones(4)}, ValueError, r"lower_bound in \[-5, 0\), got None"),
        ({"safe_gate": True, "use_gate_in_kernel": True, "lower_bound": -6.0}, ValueError, r"in \[-5, 0\), got -6"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "all tokens must be in one row, got a batch of 2"),
    ],
)
def test_bad_input_of_the_chunk_form_is_named(change, error, text):
    with pytest.raises(error, match=text):
        chunk_kda(**problem(2, 5, 2, 4, 32, 32) | change)


def test_a_graph_needs_all_sequences():
    args = problem(1, 5, 1, 1, 32, 32) | {"cu_seqlens": torch.tensor([0, 2, 5]), "use_graph": True}
    chunk_kda(**args, max_num_seqs=2)
    with pytest.raises(ValueError, match="max_num_seqs=4 requires as many sequences, got 2"):
        chunk_kda(**args, max_num_seqs=4)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({}, ValueError, "initial_state must be given with inplace_final_state"),
        ({"inplace_final_state": False, "ssm_state_indices": torch.tensor([0])}, ValueError, "initial_state must be given"),
        (
            {"initial_state": ones(3, 4, 32, 32), "ssm_state_indices": torch.tensor([0])},
            ValueError,
            "a row of the pool for each token",
        ),
        ({"initial_state": ones(1, 4, 32, 32), "num_accepted_tokens": torch.tensor([1])}, ValueError, "num_accepted_tokens requires"),
        ({"initial_state": ones(1, 4, 32, 32), "out": ones(5, 4, 32)}, ValueError, "out must have shape"),
        (
            {"initial_state": ones(3, 4, 32, 32), "ssm_state_indices": torch.tensor([[0, 1, 2, 0, 1]]), "inplace_final_state": False},
            NotImplementedError,
            "ssm_state_indices is supported with inplace_final_state=True alone",
        ),
        (
            {"initial_state": ones(3, 4, 32, 32), "ssm_state_indices": torch.tensor([0, 1]), "cu_seqlens": torch.tensor([0, 1, 5])},
            ValueError,
            "has 1 rows a sequence, one has 4 tokens",
        ),
    ],
)
def test_bad_input_of_the_serving_form_is_named(change, error, text):
    with pytest.raises(error, match=text):
        fused_recurrent_kda_fwd(**problem(1, 5, 2, 4, 32, 32) | change)


# ---- the interface itself ----------------------------------------------------------------------------------------------------------

# Parameters of fla-core 0.6.0, in order; those without a default first.
TOKENS = ("q", "k", "v", "g", "beta")
KERNEL_FLAGS = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval")
SIGNATURES = {
    chunk_kda: {
        **dict.fromkeys(TOKENS, inspect.Parameter.empty),
        **{"scale": None, "initial_state": None, "output_final_state": False},
        **dict.fromkeys(KERNEL_FLAGS, False),
        **{"safe_gate": False, "lower_bound": None, "disable_recompute": False, "return_intermediate_states": False},
        **{
            "state_v_first": False,
            "cu_seqlens": None,
            "cu_seqlens_cpu": None,
            "cp_context": None,
            "use_graph": False,
            "max_num_seqs": None,
        },
    },
    fused_recurrent_kda: {
        **dict.fromkeys(TOKENS, inspect.Parameter.empty),
        **{"A_log": None, "dt_bias": None, "scale": None, "initial_state": None, "output_final_state": False},
        **dict.fromkeys(KERNEL_FLAGS, False),
        **{"lower_bound": None, "state_v_first": False, "cu_seqlens": None},
    },
    fused_recurrent_kda_fwd: {
        **dict.fromkeys(TOKENS, inspect.Parameter.empty),
        **{"A_log": None, "dt_bias": None, "initial_state": None, "scale": None, "output_final_state": False},
        **{"inplace_final_state": True, "state_v_first": False, "cu_seqlens": None, "ssm_state_indices": None, "num_accepted_tokens": None},
        **dict.fromkeys(KERNEL_FLAGS, False),
        **{"lower_bound": None, "out": None},
    },
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signature(function):
    parameters = inspect.signature(function).parameters
    named = {p.name: p.default for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(named.items()) == list(SIGNATURES[function].items())
    assert list(parameters)[-1] == "kwargs" and len(parameters) == len(named) + 1
