"""What a sequence remembers: a slot of KDA states and pages of MLA latents, as explicit objects that count their bytes.

`KdaCache` and `LatentCache` are the two pools; `SequenceCache` is one sequence's share of both. A page holds 64 tokens, and the
KDA kernels keep their snapshots on the same grid, so at a multiple of 64 tokens a sequence can be snapshot and forked: the
state slot is copied, full pages are shared (they are never written again) and counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_native.config import KimiLinearConfig

PAGE_TOKENS = 64  # tokens of a latent page, and the grid on which KDA states may be snapshot


class CacheError(RuntimeError):
    """Misuse of a cache (a double free, a snapshot off the grid), or one of the two below."""


class OutOfSlots(CacheError):
    """No free KDA state slot."""


class OutOfPages(CacheError):
    """Not enough free latent pages."""


class KdaCache:
    """Pool of state slots for all KDA layers: recurrent states and the last 3 inputs of the short convolution.

    Attributes:
        recurrent: ``[layers, slots, heads, V, K]``, `state_dtype`: float32, or bfloat16 for half the bytes (beside a model in 16 bits).
            A bfloat16 state is rounded after every call of an operator; docs/kda.md measures what that costs.
        conv: ``[layers, slots, 3, 3 * heads * head_dim]`` in the model's dtype; row 0 is the oldest input.

    A fresh slot holds stale values: the first prefill of a sequence must say that it has no initial state.
    """

    def __init__(
        self,
        config: KimiLinearConfig,
        num_slots: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
    ):
        dtype = dtype or getattr(torch, config.dtype)
        if state_dtype != torch.float32 and (state_dtype != torch.bfloat16 or dtype == torch.float32):
            raise ValueError(f"KDA states must be float32, or bfloat16 beside a model in 16 bits, got {state_dtype} beside {dtype}")
        layers, heads, dim = len(config.kda_layers), config.kda_num_heads, config.kda_head_dim
        self.recurrent = torch.empty(layers, num_slots, heads, dim, dim, dtype=state_dtype, device=device)
        self.conv = torch.empty(layers, num_slots, config.short_conv_kernel_size - 1, 3 * config.kda_dim, dtype=dtype, device=device)
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._used: set[int] = set()

    def alloc(self) -> int:
        """A free slot. Raises OutOfSlots."""
        if not self._free:
            raise OutOfSlots(f"out of KDA state slots: all {self.num_slots} are in use")
        slot = self._free.pop()
        self._used.add(slot)
        return slot

    def free(self, slot: int) -> None:
        """Gives a slot back. Raises CacheError when it is not in use (a double free)."""
        self._check(slot)
        self._used.remove(slot)
        self._free.append(slot)

    def fork(self, slot: int) -> int:
        """A new slot with a copy of `slot`'s states. Raises OutOfSlots, and CacheError when `slot` is not in use."""
        self._check(slot)
        new = self.alloc()
        self.recurrent[:, new].copy_(self.recurrent[:, slot])
        self.conv[:, new].copy_(self.conv[:, slot])
        return new

    def _check(self, slot: int) -> None:
        if slot not in self._used:
            raise CacheError(f"KDA state slot {slot} is not in use (freed twice?)")

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def bytes(self) -> int:
        return _bytes(self.recurrent) + _bytes(self.conv)

    @property
    def bytes_per_slot(self) -> int:
        return self.bytes // self.num_slots if self.num_slots else 0


class LatentCache:
    """Pool of latent pages for all MLA layers. A page of a sequence has the same id in every layer.

    Attributes:
        pages: ``[layers, pages, 64, kv_lora_rank + rope]`` in the model's dtype; a row is the normalised latent, then the shared
            part of the key.
    """

    def __init__(self, config: KimiLinearConfig, num_pages: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None):
        dtype = dtype or getattr(torch, config.dtype)
        self.pages = torch.empty(len(config.full_attn_layers), num_pages, PAGE_TOKENS, config.latent_dim, dtype=dtype, device=device)
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners = [0] * num_pages

    def alloc(self, count: int) -> list[int]:
        """`count` free pages, or none of them: raises OutOfPages and changes nothing when there are fewer."""
        if count > len(self._free):
            raise OutOfPages(f"out of latent pages: {count} wanted, {len(self._free)} of {self.num_pages} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """One more owner for each of these pages; each owner frees them once."""
        self._check(pages)
        for page in pages:
            self._owners[page] += 1

    def free(self, pages: list[int]) -> None:
        """Drops one owner of each page; a page without owners is free. Raises CacheError (and frees nothing) on a double free."""
        self._check(pages)
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)

    def _check(self, pages: list[int]) -> None:
        for page in set(pages):
            owners = self._owners[page] if 0 <= page < self.num_pages else 0
            if pages.count(page) > owners:
                raise CacheError(f"latent page {page} is not in use (freed twice?)")

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def bytes(self) -> int:
        return _bytes(self.pages)

    @property
    def bytes_per_page(self) -> int:
        return self.bytes // self.num_pages if self.num_pages else 0


class SequenceCache:
    """One sequence's share of both pools: a state slot, the pages of its tokens, and how many tokens they hold."""

    def __init__(self, kda: KdaCache, latent: LatentCache):
        """An empty sequence. Raises OutOfSlots."""
        self.kda, self.latent = kda, latent
        self.slot = kda.alloc()
        self.pages: list[int] = []
        self.num_tokens = 0
        self._freed = False

    def reserve(self, num_tokens: int) -> None:
        """Makes room for `num_tokens` tokens in all. Raises OutOfPages; what the sequence holds stays as it was."""
        self._check()
        short = -(-num_tokens // PAGE_TOKENS) - len(self.pages)
        if short > 0:
            self.pages += self.latent.alloc(short)

    def snapshot(self) -> SequenceCache:
        """A second sequence with the same past: states copied, pages shared. Only at a multiple of 64 tokens.

        Raises CacheError off the grid and OutOfSlots. A snapshot is kept to be forked from, or continued itself.
        """
        self._check()
        if self.num_tokens % PAGE_TOKENS:
            raise CacheError(f"a snapshot needs a multiple of {PAGE_TOKENS} tokens; this sequence has {self.num_tokens}")
        copy = object.__new__(SequenceCache)
        copy.kda, copy.latent = self.kda, self.latent
        copy.slot = self.kda.fork(self.slot)
        copy.pages = self.pages[: self.num_tokens // PAGE_TOKENS]
        self.latent.share(copy.pages)
        copy.num_tokens = self.num_tokens
        copy._freed = False
        return copy

    fork = snapshot  # continuing from a snapshot is taking a copy of it

    def free(self) -> None:
        """Gives slot and pages back. Raises CacheError the second time."""
        self._check()
        self._freed = True
        self.kda.free(self.slot)
        self.latent.free(self.pages)
        self.pages = []

    def _check(self) -> None:
        if self._freed:
            raise CacheError("this sequence's cache was freed already")

    @property
    def bytes(self) -> int:
        """Bytes that this sequence holds; shared pages count for each of their owners."""
        return self.kda.bytes_per_slot + len(self.pages) * self.latent.bytes_per_page


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
