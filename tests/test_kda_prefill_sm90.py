"""kda_prefill with the Hopper form of its second kernel, which has to be asked for: KIMI_CUDA_PATH=sm90.

The tests of test_kda_prefill.py that reach it, once more. In the emulator they ask for it themselves; on a GPU, where the variable
is read once, the whole run must have it.
"""

import os

import pytest
import torch
from kit import DEVICES, EMULATED, assert_same_bits, needs_gpu
from test_kda_prefill import (  # noqa: F401
    HALF_DTYPES,
    check_against_spec,
    on,
    problem,
    test_a_call_in_several_segments,
    test_correlated_keys_and_large_steps,
    test_fresh_sequences_do_not_read_their_slot,
    test_keys_and_steps_that_are_not_normalized,
    test_many_chunks,
    test_nothing_to_do,
    test_options,
    test_snapshots_are_the_states_of_the_prefixes,
    test_the_same_bits_for_every_split_after_whole_chunks,
    test_the_same_bits_in_a_batch_that_fills_the_device,
    test_values_of_any_magnitude,
    test_values_of_many_magnitudes_in_one_chunk,
    test_views_of_one_packed_tensor,
    tokens,
)

from kimi_native.ops import kda_prefill

pytestmark = pytest.mark.skipif(
    not EMULATED and os.environ.get("KIMI_CUDA_PATH") != "sm90", reason="KIMI_CUDA_PATH=sm90 asks for the Hopper kernels"
)


@pytest.fixture(autouse=True)
def ask_for_sm90(monkeypatch):
    if EMULATED:
        monkeypatch.setenv("KIMI_CUDA_PATH", "sm90")


@pytest.mark.parametrize("device, dtype", HALF_DTYPES)
@pytest.mark.parametrize("heads, value_heads, size", [(1, 3, 64), (1, 1, 128), (1, 2, 128)])
def test_head_shapes(heads, value_heads, size, dtype, device):
    check_against_spec(problem([5, 70, 0, 64], heads, value_heads, size, size, dtype), device)


@pytest.mark.parametrize("device", DEVICES)
def test_halves_and_whole_heads_give_the_same_bits(device):
    """One head of 128 values goes to a cluster of two blocks where there is room for both, else to one block."""
    many = 3 if device == "cpu" else 140
    args = on(device, problem([200] + [64] * (many - 1), 1, 1, 128, 128, torch.bfloat16))
    args["v"][70] *= 1e4  # units other than 1 in one of the chunks
    state = args["state"].clone()
    out = kda_prefill(**args | {"state": state})
    slot, alone_state = int(args["slots"][0]), args["state"].clone()
    alone = kda_prefill(**tokens(args, 0, 200, state=alone_state, slots=args["slots"][:1]))
    assert_same_bits(alone, out[:200])
    assert_same_bits(alone_state[slot], state[slot])


@needs_gpu
@pytest.mark.parametrize("regime", ["remember", "mixed"])
def test_segments_that_overlap(regime):
    """32 chunks of 16 heads are a segment; the kernels of the next one run beside it. Nothing of that may be seen."""
    args = on("cuda", problem([64 * 300 + 5], 16, 16, 128, 128, torch.bfloat16, regime=regime))
    slot, part_state = args["slots"].long(), args["state"].clone()
    cuts = range(0, len(args["q"]), 64 * 30)  # calls of one segment
    parts = [kda_prefill(**tokens(args, a, min(a + 64 * 30, len(args["q"])), state=part_state)) for a in cuts]
    for _ in range(5):
        state = args["state"].clone()
        assert_same_bits(kda_prefill(**args | {"state": state}), torch.cat(parts))
        assert_same_bits(state[slot], part_state[slot])
