"""The keys of prefilling sequences, in pieces that bound the memory of expanded keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_native.compat.vllm.step import Step
from kimi_native.model import PREFIX_PIECE_TOKENS, to_device


@dataclass
class Piece:
    """Keys of some prefilling sequences: all of the keys of several short ones, or PREFIX_PIECE_TOKENS of a long one."""

    queries: slice  # of the step's prefill tokens
    pages: Tensor  # [keys] int64: page of each key
    rows: Tensor  # [keys] int64: row in that page
    cu_seqlens_q: Tensor  # [n + 1] int32, from 0
    cu_seqlens_k: Tensor  # [n + 1] int32
    q_begin: Tensor  # [n] int32: position of each sequence's first query relative to the piece's first key
    first: bool  # of its sequences' pieces
    last: bool


def plan_pieces(step: Step, block_table: Tensor, page_size: int, piece_tokens: int = PREFIX_PIECE_TOKENS) -> list[Piece]:
    """Cuts the keys of the prefilling sequences into pieces of at most `piece_tokens`, to bound the memory of expanded keys.

    Sequences are packed together while all of their keys fit one piece; a longer one is cut at multiples of `piece_tokens` counted
    from its first key, so that its chunks do not change where it is cut. `block_table` ``[N, M]`` has the prefilling sequences' rows.
    """
    lengths, contexts = step.prefill_lengths.tolist(), step.prefill_contexts.tolist()
    totals = [length + context for length, context in zip(lengths, contexts)]
    pieces, start, begin = [], 0, 0
    while begin < len(totals):
        end, keys = begin + 1, totals[begin]
        while end < len(totals) and keys + totals[end] <= piece_tokens:
            keys += totals[end]
            end += 1
        queries = slice(start, start + sum(lengths[begin:end]))
        for first_key in range(0, max(totals[begin:end]), piece_tokens):
            counts = torch.tensor([min(total - first_key, piece_tokens) for total in totals[begin:end]])
            pages, rows = _places(block_table[begin:end], counts, first_key, page_size)
            pieces.append(
                Piece(
                    queries=queries,
                    pages=pages,
                    rows=rows,
                    cu_seqlens_q=_ends(step.prefill_lengths[begin:end], block_table.device),
                    cu_seqlens_k=_ends(counts, block_table.device),
                    q_begin=to_device((step.prefill_contexts[begin:end] - first_key).to(torch.int32), block_table.device),
                    first=first_key == 0,
                    last=first_key + piece_tokens >= max(totals[begin:end]),
                )
            )
        start, begin = queries.stop, end
    return pieces


def _ends(lengths: Tensor, device: torch.device) -> Tensor:
    return to_device(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32), device)


def _places(block_table: Tensor, counts: Tensor, first_key: int, page_size: int) -> tuple[Tensor, Tensor]:
    """Page and row of `counts[n]` keys of each sequence from position `first_key` on, on the block table's device."""
    total, device = int(counts.sum()), block_table.device
    ends = to_device(counts.cumsum(0), device)
    lengths = to_device(counts, device)
    sequence = torch.repeat_interleave(torch.arange(len(counts), device=device), lengths, output_size=total)
    position = torch.arange(total, device=device) - (ends - lengths)[sequence] + first_key
    pages = block_table[sequence, position // page_size].long()
    return pages, position % page_size
