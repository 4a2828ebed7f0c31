"""Decode steps as CUDA graphs: one replay instead of a launch for every operator of every layer.

A graph is captured for a number of rows, over input tensors of its own that each step fills in; a step of fewer sequences is
padded with rows of slot -1, which cost no memory traffic and write nothing. All of a model's weights and both cache pools are
part of the graphs by address, so an engine captures its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_native.cache import PAGE_TOKENS, KdaCache, LatentCache, SequenceCache
from kimi_native.model import Batch, KimiLinear, greedy, to_device

# Token, latent row, state slot and length of a row of padding.
_NOBODY = (0, -1, -1, 0)
MAX_ROWS = 512  # steps of more sequences run without a graph


def padded_rows(rows: int) -> int:
    """The number of rows that a step of `rows` sequences is padded to: 1, 2, 4, then multiples of 8, of 16 from 64 on."""
    if rows <= 2:
        return rows
    step = 4 if rows <= 4 else 8 if rows <= 64 else 16
    return -(-rows // step) * step


class DecodeGraphs:
    """Runs decode steps of a model over one pair of caches; captures each size on its first use.

    Args:
        max_rows: sequences of a step, at most.
    """

    def __init__(self, model: KimiLinear, kda: KdaCache, latent: LatentCache, max_rows: int):
        self._model, self._kda, self._latent = model, kda, latent
        self.max_rows = min(padded_rows(max_rows), MAX_ROWS)
        width = min(latent.num_pages, -(-model.config.model_max_length // PAGE_TOKENS))
        # token, latent row, state slot, length: one copy to the device a step
        self._inputs = torch.zeros(4, self.max_rows, dtype=torch.int64, device=model.device)
        self._block_table = torch.full((self.max_rows, max(1, width)), -1, dtype=torch.int32, device=model.device)
        # What the table's rows hold: a sequence's own list of pages (which only ever grows) and how many of them.
        self._rows: list[tuple[list[int], int]] = [([], 0) for _ in range(self.max_rows)]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def run(self, sequences: list[tuple[SequenceCache, int]]) -> tuple[Tensor, Tensor]:
        """One step of (sequence, its last token) pairs; reserves pages but does not advance the sequences.

        Returns logits ``[rows, vocab]`` float32 and `greedy` of them. Both are overwritten by the next step.
        """
        count = len(sequences)
        rows = padded_rows(count)
        self.capture(count)
        padding = rows - count
        inputs: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
        for sequence, token in sequences:
            at = sequence.num_tokens
            sequence.reserve(at + 1)
            row = (token, sequence.pages[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS, sequence.slot, at + 1)
            for values, value in zip(inputs, row):
                values.append(value)
        padded = torch.tensor([values + [nobody] * padding for values, nobody in zip(inputs, _NOBODY)], dtype=torch.int64)
        self._inputs[:, :rows].copy_(padded.pin_memory(), non_blocking=True)
        self._write_block_table([sequence.pages for sequence, _ in sequences])
        graph, logits, best = self._graphs[rows]
        graph.replay()
        return logits[:count], best[:count]

    def _write_block_table(self, tables: list[list[int]]) -> None:
        """Writes what differs from the last step: mostly nothing, or a new page."""
        where: list[int] = []
        what: list[int] = []
        width = self._block_table.shape[1]
        for row, pages in enumerate(tables):
            held, count = self._rows[row]
            same = count if held is pages else 0
            if same < len(pages):
                where += range(row * width + same, row * width + len(pages))
                what += pages[same:]
                self._rows[row] = pages, len(pages)
        if where:
            changes = to_device(torch.tensor([where, what], dtype=torch.int64), self._block_table.device)
            self._block_table.view(-1).index_copy_(0, changes[0], changes[1].to(torch.int32))

    @torch.inference_mode()
    def capture(self, count: int) -> None:
        """Makes sure that the graph for steps of `count` sequences is there."""
        rows = padded_rows(count)
        if rows in self._graphs:
            return

        def step() -> tuple[Tensor, Tensor]:
            tokens, latent_rows, slots, lengths = self._inputs[:, :rows].unbind()
            logits = self._model.forward(
                Batch.of_decode(tokens, latent_rows, slots.to(torch.int32), self._block_table[:rows], lengths.to(torch.int32)),
                self._kda,
                self._latent,
            )
            return logits, greedy(logits)

        self._inputs[:, :rows].copy_(torch.tensor(_NOBODY)[:, None])  # padding alone: the run below changes no cache
        stream = torch.cuda.Stream(self._model.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # loads kernels and makes the library's workspaces, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize(self._model.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            logits, best = step()
        self._graphs[rows] = graph, logits, best
