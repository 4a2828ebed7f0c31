"""Sizes of Kimi-Linear-48B-A3B, and the loads that the GPU benchmarks put on its operators."""

import torch
from torch import Tensor

HIDDEN = 2304
HEADS, DIM = 32, 128  # of KDA, keys and values alike; also the value heads of MLA
NOPE, ROPE, LATENT = 128, 64, 512
EXPERTS, TOP_K, INNER = 256, 8, 1024
VOCABULARY = 163840

DECODE_BATCHES = (1, 4, 16, 64, 128, 256)
PREFILL_TOKENS = (512, 2048, 8192, 32768, 131072)
RAGGED = (1300, 547, 2048, 963, 271, 3063)  # 8,192 tokens in six sequences


def packed(lengths: "list[int] | tuple[int, ...]", device: str) -> Tensor:
    """cu_seqlens of sequences packed one after another."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)


def name_of_lengths(lengths: "list[int] | tuple[int, ...]") -> str:
    """T=512, 8x1024, or ragged 6 (8192)."""
    if len(lengths) == 1:
        return f"T={lengths[0]}"
    if len(set(lengths)) == 1:
        return f"{len(lengths)}x{lengths[0]}"
    return f"ragged {len(lengths)} ({sum(lengths)})"
