"""How a step of vLLM is read (which sequences decode, which keys a prefill expands), without vLLM."""

from dataclasses import dataclass

import pytest
import torch

from kimi_native.compat.vllm import versions
from kimi_native.compat.vllm.pieces import plan_pieces
from kimi_native.compat.vllm.step import Step


@dataclass
class Metadata:
    """The fields of vLLM's CommonAttentionMetadata that are read."""

    query_start_loc_cpu: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor | None
    seq_lens: torch.Tensor
    is_prefilling: torch.Tensor | None
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int


def metadata(*sequences: tuple[int, int], prompts: tuple[int, ...] | None = None, padding: int = 0) -> Metadata:
    """`sequences` are (past, new) tokens; `prompts` the length of each one's prompt (default: long)."""
    past = torch.tensor([p for p, _ in sequences], dtype=torch.int32)
    new = torch.tensor([n for _, n in sequences], dtype=torch.int32)
    starts = torch.cat([new.new_zeros(1), new.cumsum(0).to(torch.int32)])
    totals = past + new
    return Metadata(
        query_start_loc_cpu=starts,
        query_start_loc=starts,
        seq_lens_cpu_upper_bound=totals,
        seq_lens=totals,
        is_prefilling=None if prompts is None else past < torch.tensor(prompts),
        num_reqs=len(sequences),
        num_actual_tokens=int(new.sum()) + padding,
        max_query_len=max(int(new.max()), 1),
    )


def test_decodes_come_first_then_prefills():
    step = Step.of(metadata((10, 1), (700, 1), (64, 30), (0, 5), (0, 1), prompts=(4, 600, 200, 5, 1)))
    assert (step.num_decodes, step.num_prefills, step.num_tokens, step.fresh_decodes) == (2, 3, 38, [])
    assert step.prefill_lengths.tolist() == [30, 5, 1]
    assert step.prefill_contexts.tolist() == [64, 0, 0]  # the prompt of one token has no past: it prefills
    assert step.prefill_cu_seqlens(metadata((10, 1), (700, 1), (64, 30), (0, 5), (0, 1))).tolist() == [0, 30, 35, 36]


def test_the_last_token_of_a_prompt_continues_a_state():
    step = Step.of(metadata((128, 1), (0, 7), prompts=(129, 7)))
    assert (step.num_decodes, step.num_prefills) == (1, 1)


def test_a_step_of_single_tokens_is_all_decode():
    step = Step.of(metadata((10, 1), (0, 1), (3, 1), (0, 0), prompts=(4, 1, 2, 0), padding=1))
    assert (step.num_decodes, step.num_prefills, step.num_tokens) == (4, 0, 4)
    assert step.fresh_decodes == [1]  # its state must be cleared; the padding row has none


def test_padding_after_prefills_is_no_sequence():
    step = Step.of(metadata((10, 1), (0, 9), (0, 0), (0, 0), prompts=(4, 9, 0, 0)))
    assert (step.num_decodes, step.num_prefills, step.num_tokens) == (1, 1, 10)


def test_the_host_may_hold_more_starts_than_requests():
    m = metadata((10, 1), (0, 9), prompts=(4, 9))
    m.query_start_loc_cpu = torch.cat([m.query_start_loc_cpu, torch.full((3,), 10, dtype=torch.int32)])
    step = Step.of(m)
    assert (step.num_decodes, step.num_prefills, step.num_tokens) == (1, 1, 10)


def test_without_host_lengths_the_devices_are_read():
    m = metadata((5, 3), prompts=(8,))
    m.seq_lens_cpu_upper_bound = None
    assert Step.of(m).prefill_contexts.tolist() == [5]


def places(pieces):
    return [list(zip(p.pages.tolist(), p.rows.tolist())) for p in pieces]


def test_short_sequences_share_a_piece():
    step = Step.of(metadata((2, 3), (0, 4), prompts=(5, 4)))
    table = torch.tensor([[7, 3], [5, -1]], dtype=torch.int32)
    (piece,) = plan_pieces(step, table, page_size=4, piece_tokens=16)
    assert places([piece]) == [[(7, 0), (7, 1), (7, 2), (7, 3), (3, 0), (5, 0), (5, 1), (5, 2), (5, 3)]]
    assert piece.queries == slice(0, 7) and piece.first and piece.last
    assert piece.cu_seqlens_q.tolist() == [0, 3, 7]
    assert piece.cu_seqlens_k.tolist() == [0, 5, 9]
    assert piece.q_begin.tolist() == [2, 0]


def test_a_long_sequence_is_cut_at_multiples_of_the_piece():
    step = Step.of(metadata((9, 2), (0, 3), prompts=(11, 3)))
    table = torch.tensor([[1, 2, 3], [9, -1, -1]], dtype=torch.int32)
    pieces = plan_pieces(step, table, page_size=4, piece_tokens=4)
    assert places(pieces[:3]) == [[(page, row) for row in range(4)] for page in (1, 2)] + [[(3, 0), (3, 1), (3, 2)]]
    assert [(p.first, p.last) for p in pieces] == [(True, False), (False, False), (False, True), (True, True)]
    assert [p.queries for p in pieces] == [slice(0, 2)] * 3 + [slice(2, 5)]
    assert [p.q_begin.tolist() for p in pieces] == [[9], [5], [1], [0]]
    assert places(pieces[3:]) == [[(9, 0), (9, 1), (9, 2)]]


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.32.0", True), ("0.33.1+cpu", True), ("0.32", True), ("0.31.9", False), ("0.34.0", False), ("0.3.2", False), ("1.0", False)],
)
def test_known_versions(version, known):
    assert versions.supported(version) is known
