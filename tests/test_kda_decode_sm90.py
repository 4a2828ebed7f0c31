"""kda_decode and kda_decode_fused launched as on Hopper, where a kernel's launch overlaps the kernel in front: the tests of
test_kda_decode.py that launch kernels, once more in the emulator, which must be asked for it, and calls that follow each other closely."""

import pytest
import torch
from kit import EMULATED, assert_same_bits, hopper_kernels, needs_gpu
from test_kda_decode import (  # noqa: F401
    HALF_DTYPES,
    fused_problem,
    on,
    pools_of,
    problem,
    test_a_bfloat16_state_is_the_float32_state_rounded,
    test_any_number_of_steps_gives_the_same_bits,
    test_fused_against_spec,
    test_fused_neighbours_and_repeats,
    test_fused_real_shape,
    test_fused_skipped_sequences_and_strides,
    test_graph_replay,
    test_memory_that_is_not_aligned,
    test_nothing_to_do,
    test_real_shape_and_large_values,
    test_skipped_sequences_and_strides,
)

from kimi_native.ops import kda_decode, kda_decode_fused

pytestmark = hopper_kernels


@pytest.mark.parametrize("device, dtype", HALF_DTYPES)
@pytest.mark.parametrize("batch, heads, value_heads", [(2, 4, 4), (3, 2, 4)])
def test_calls_that_follow_each_other_closely(batch, heads, value_heads, device, dtype):
    """Every call reads what the one in front wrote: the states, and as its input the output."""
    for problem_of, op in [(problem, kda_decode), (fused_problem, kda_decode_fused)]:
        args = on(device, problem_of(batch, 1, heads, value_heads, 128, 128, dtype))
        read = "v" if op is kda_decode else "norm_gate"
        results = []
        for apart in (True, False):
            work = args | {name: args[name].clone() for name in ("state", "conv_state") if name in args}
            given, out = args[read].clone(), torch.empty_like(args[read])
            for _ in range(4 if EMULATED else 200):
                op(**work | {read: given}, out=out)
                given, out = out, given
                if apart and device == "cuda":
                    torch.cuda.synchronize()
            results.append([given, *pools_of(work)])
        for one, other in zip(*results, strict=True):
            assert_same_bits(one, other)
        assert not results[0][0].isnan().any()


@needs_gpu
def test_calls_in_a_graph_that_follow_each_other_closely():
    args = on("cuda", fused_problem(9, 1, 32, 32, 128, 128, torch.bfloat16))
    expected = args | {name: args[name].clone() for name in ("state", "conv_state")}
    work = args | {name: args[name].clone() for name in ("state", "conv_state")}
    out = torch.empty(9, 1, 32, 128, dtype=torch.bfloat16, device="cuda")
    kda_decode_fused(**work, out=out)  # what is set up once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            kda_decode_fused(**work, out=out)
    for to, start in zip(pools_of(work), pools_of(args), strict=True):
        to.copy_(start)
    graph.replay()
    torch.cuda.synchronize()
    for _ in range(20):
        last = kda_decode_fused(**expected)
        torch.cuda.synchronize()
    assert_same_bits(out, last)
    for ours, theirs in zip(pools_of(work), pools_of(expected), strict=True):
        assert_same_bits(ours, theirs)
