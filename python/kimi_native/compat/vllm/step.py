"""Which sequences of a step decode and which prefill, read from vLLM's metadata; the same for both kinds of layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Step:
    """D decoding sequences with one token each come first, then N prefilling sequences; then padding, if any."""

    num_decodes: int  # D; in a step without prefills this counts padding rows too
    num_prefills: int  # N
    num_tokens: int  # of both
    prefill_lengths: Tensor  # [N] int64 on the CPU: new tokens
    prefill_contexts: Tensor  # [N] int64 on the CPU: tokens before them
    fresh_decodes: list[int]  # rows among the D that have no past: prompts of one token

    @classmethod
    def of(cls, m: Any) -> Step:
        """From a CommonAttentionMetadata. A sequence decodes if it has one new token and a past."""
        starts = m.query_start_loc_cpu[: m.num_reqs + 1].long()
        lengths = starts.diff()
        totals = m.seq_lens_cpu_upper_bound if m.seq_lens_cpu_upper_bound is not None else m.seq_lens.cpu()
        contexts = totals[: lengths.shape[0]].long() - lengths
        fresh = torch.zeros_like(lengths, dtype=torch.bool)
        if m.is_prefilling is not None:
            fresh = m.is_prefilling[: lengths.shape[0]].cpu() & (contexts <= 0) & (lengths > 0)
        if m.max_query_len <= 1:  # what a CUDA graph was captured for: every row decodes
            rows = min(lengths.shape[0], m.num_actual_tokens)
            return cls(rows, 0, rows, lengths[:0], contexts[:0], fresh.nonzero().flatten().tolist())
        prefill = (lengths > 1) | fresh
        first = int(prefill.int().argmax()) if bool(prefill.any()) else lengths.shape[0]
        count = int((lengths[first:] > 0).sum())
        if not count:
            return cls(first, 0, m.num_actual_tokens, lengths[:0], contexts[:0], [])
        part = slice(first, first + count)
        return cls(first, count, int(starts[first + count]), lengths[part], contexts[part].clamp(min=0), [])

    def prefill_cu_seqlens(self, m: Any) -> Tensor:
        """``[N + 1]`` int32 on the device, counted from the first prefill token."""
        starts = m.query_start_loc[self.num_decodes : self.num_decodes + self.num_prefills + 1]
        return (starts - self.num_decodes).to(torch.int32)
