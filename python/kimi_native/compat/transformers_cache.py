"""transformers' caches as our operators want them: where the rows of a batch lie, and in which order of memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from kimi_native import ops
from kimi_native.cache import PAGE_TOKENS


class Step:
    """What the layers of one forward pass share: which keys its mask leaves visible, and index tensors made once for all layers.

    Attributes:
        batch_size, num_new: rows of the batch and new tokens of each, padding included.
        pads: for each row how many tokens at its beginning are padding; None: there is none.
        plain: whether the mask is causal with at most left padding, which is what our attention can do.
    """

    def __init__(self, batch_size: int, num_new: int, device: torch.device, pads: tuple[int, ...] | None = None, plain: bool = True):
        self.batch_size, self.num_new, self.device, self.pads, self.plain = batch_size, num_new, device, pads, plain
        self._made: dict[Hashable, Tensor] = {}

    @classmethod
    def of_forward(cls, inputs: dict[str, Any]) -> Step:
        """From the arguments of `KimiLinearModel.forward`. Reads the mask on the host, once."""
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        step = cls(tokens.shape[0], tokens.shape[1], tokens.device)
        mask, positions, cache = inputs.get("attention_mask"), inputs.get("position_ids"), inputs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        if mask is None:
            # Without a cache the library takes positions that start anew for several sequences in one row.
            step.plain = positions is None or cache is not None or _counts_up(positions)
        elif not isinstance(mask, Tensor) or mask.dim() != 2 or torch.compiler.is_compiling() or mask.shape[1] != past + step.num_new:
            step.plain = False
        else:
            visible = mask != 0
            pads = mask.shape[1] - visible.sum(dim=1)
            left = visible == (torch.arange(mask.shape[1], device=mask.device) >= pads[:, None])
            *counts, plain = torch.cat([pads, left.all().to(pads.dtype)[None]]).tolist()
            step.plain = bool(plain)
            step.pads = tuple(counts) if any(counts) else None
        return step

    def made(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def i32(self, *values: int) -> Tensor:
        return self.made(values, lambda: torch.tensor(values, dtype=torch.int32, device=self.device))

    @property
    def slots(self) -> Tensor:
        """``[B]`` int32: row b of the batch is slot b of its cache."""
        return self.made("slots", lambda: torch.arange(self.batch_size, dtype=torch.int32, device=self.device))

    @property
    def cu_seqlens(self) -> Tensor:
        """``[B + 1]`` int32: where the rows begin when they lie one behind the other, padding included."""
        return self.every(self.num_new)

    def every(self, stride: int) -> Tensor:
        """``[B + 1]`` int32: 0, stride, 2 stride, ..."""
        return self.made(("every", stride), lambda: torch.arange(self.batch_size + 1, dtype=torch.int32, device=self.device) * stride)

    def has_state(self, value: bool) -> Tensor:
        """``[B]`` bool."""
        return self.made(("has_state", value), lambda: torch.full((self.batch_size,), value, device=self.device))


def _counts_up(positions: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return bool((positions.diff(dim=-1) == 1).all())


# ---- KDA states ------------------------------------------------------------------------------------------------------------


def inner_transposed(state: Tensor) -> Tensor:
    """The same values and shape, with the last two dimensions the other way round in memory."""
    if state.transpose(-1, -2).is_contiguous():
        return state
    laid_out = torch.empty_like(state.transpose(-1, -2), memory_format=torch.contiguous_format).stride()
    strides = (*laid_out[:-2], laid_out[-1], laid_out[-2])
    return torch.empty_strided(state.shape, strides, dtype=state.dtype, device=state.device).copy_(state)  # no view of anything


def kda_states(layer: LinearAttentionLayer, qkv: Tensor, num_heads: int, head_dim: int, taps: int) -> tuple[Tensor, Tensor, bool]:
    """The states of transformers' own cache layer, as pools that our operators update in place.

    The library's tensors are ``[B, C, 4]`` and ``[B, H, K, V]``; ours are ``[B, 3, C]`` and ``[B, H, V, K]``. Both are served by
    the same memory: the library's tensors are kept with their last two dimensions the other way round. Beam search and whatever
    else makes new tensors of them is followed by one copy here. Of the four inputs that the library keeps the oldest is
    never used by a convolution of 4 taps, and not updated.

    Args:
        qkv: ``[B, Q, C]`` inputs of the convolution; of an unused layer the states are made like it.

    Returns:
        (convolution's last inputs ``[B, 3, C]``, state ``[B, H, V, K]`` float32, whether they hold a past). Raises ValueError
        when the cache is of another batch size.
    """
    batch_size = qkv.shape[0]
    if layer.is_conv_states_initialized[0] and layer.conv_states[0].shape[0] != batch_size:
        raise ValueError(f"the cache holds {layer.conv_states[0].shape[0]} sequences, the input {batch_size}")
    if not layer.is_conv_states_initialized[0]:
        layer.lazy_initialization(conv_states=qkv.transpose(1, 2), conv_kernel_size=taps)
    if not layer.is_recurrent_states_initialized[0]:
        like = torch.empty(1, dtype=torch.float32, device=qkv.device).expand(batch_size, num_heads, head_dim, head_dim)
        layer.lazy_initialization(recurrent_states=like)
    for states in (layer.conv_states, layer.recurrent_states):
        laid_out = inner_transposed(states[0])
        if laid_out is not states[0]:
            states[0] = laid_out
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(laid_out)  # as the library does with its own
    had_past = layer.has_previous_state[0]
    layer.has_previous_state[0] = True
    return layer.conv_states[0].transpose(1, 2)[:, 1:], layer.recurrent_states[0].transpose(2, 3), had_past


# ---- latents ---------------------------------------------------------------------------------------------------------------


class LatentLayer(DynamicLayer):
    """A `DynamicLayer` whose keys (the latents) and values (the shared key parts) lie side by side in one buffer of pages.

    A token is one row ``[latent, key part]``, so that the decode kernel reads it as key and value at once, and appending is a write
    instead of a copy of everything. Row b of the batch has its token t at ``(t - pads[b]) % capacity``: the visible tokens of a
    left-padded row begin at 0, as the kernel wants them, and padding is kept behind the end, since another mask may want it back.

    When the library's own code asks for keys and values (after `restore`, for instance), the layer turns into a plain `DynamicLayer`.
    """

    rows: Tensor | None  # [B, capacity, latent + rope]
    latent_dim: int
    num_tokens: int
    pads: tuple[int, ...] | None  # as in Step

    def __init__(self) -> None:  # not DynamicLayer's, which would set keys and values
        self.reset()

    @classmethod
    def of(cls, cache: Cache, index: int) -> LatentLayer | None:
        """The layer of a cache, turned into ours if it is the plain dynamic one; None when it is of another kind."""
        if cache.offloading or index >= len(cache.layers):
            return None
        layer = cache.layers[index]
        if isinstance(layer, cls):
            return layer
        if type(layer) is not DynamicLayer:
            return None
        latents = cls()
        if layer.get_seq_length():
            latents._fill(layer.keys, layer.values)
        cache.layers[index] = latents
        return latents

    @property
    def is_initialized(self) -> bool:
        return self.rows is not None

    @property
    def device(self) -> torch.device | None:
        return None if self.rows is None else self.rows.device

    @property
    def dtype(self) -> torch.dtype | None:
        return None if self.rows is None else self.rows.dtype

    @property
    def keys(self) -> Tensor | None:
        """``[B, 1, tokens, latent]``, as the library's own layer has them."""
        return None if self.rows is None else self._in_order()[:, None, :, : self.latent_dim]

    @property
    def values(self) -> Tensor | None:
        """``[B, 1, tokens, rope]``."""
        return None if self.rows is None else self._in_order()[:, None, :, self.latent_dim :]

    # ---- ours

    def append(self, kv: Tensor, norm_weight: Tensor, eps: float, step: Step) -> None:
        """Appends ``kv`` (``[B * Q, latent + rope]``), its latents normalised. Raises ValueError for another batch size."""
        batch_size, num_new = step.batch_size, step.num_new
        if self.rows is None:
            self.latent_dim = norm_weight.shape[0]
            self._allocate(batch_size, num_new, kv)
        elif self.rows.shape[0] != batch_size:
            raise ValueError(f"the cache holds {self.rows.shape[0]} sequences, the input {batch_size}")
        self._set_pads(step.pads)
        self._reserve(self.num_tokens + num_new)
        assert self.rows is not None
        key = ("appended", self.num_tokens, self.capacity)
        slots = step.made(key, lambda: self._places(self.num_tokens, self.num_tokens + num_new).flatten())
        ops.mla_cache_write(kv, norm_weight, eps, self.pages, slots)
        self.num_tokens += num_new

    @property
    def capacity(self) -> int:
        assert self.rows is not None
        return self.rows.shape[1]

    @property
    def pages(self) -> Tensor:
        assert self.rows is not None
        return self.rows.view(-1, PAGE_TOKENS, self.rows.shape[2])

    def block_table(self) -> Tensor:
        """``[B, pages of a row]`` int32."""
        assert self.rows is not None
        count = self.rows.shape[0] * self.capacity // PAGE_TOKENS
        return torch.arange(count, dtype=torch.int32, device=self.rows.device).view(self.rows.shape[0], -1)

    def _places(self, start: int, stop: int) -> Tensor:
        """``[B, stop - start]`` int64: rows of the flattened buffer that hold tokens start to stop."""
        assert self.rows is not None
        device, batch_size = self.rows.device, self.rows.shape[0]
        places = torch.arange(start, stop, device=device).expand(batch_size, -1)
        if self.pads is not None:
            places = (places - torch.tensor(self.pads, device=device)[:, None]) % self.capacity
        return places + torch.arange(batch_size, device=device)[:, None] * self.capacity

    def _in_order(self) -> Tensor:
        """``[B, tokens, latent + rope]`` in the order of the tokens; a view where that is possible."""
        assert self.rows is not None
        if self.pads is None:
            return self.rows[:, : self.num_tokens]
        return self.rows.flatten(0, 1)[self._places(0, self.num_tokens)]

    def _allocate(self, batch_size: int, num_tokens: int, like: Tensor) -> None:
        pages = -(-num_tokens // PAGE_TOKENS) + 1
        self.rows = like.new_zeros(batch_size, pages * PAGE_TOKENS, like.shape[-1])  # zeros: what is masked must be finite

    def _refill(self, in_order: Tensor) -> None:
        assert self.rows is not None
        self.rows.flatten(0, 1)[self._places(0, self.num_tokens)] = in_order

    def _fill(self, keys: Tensor, values: Tensor) -> None:
        """From the library's keys ``[B, 1, tokens, latent]`` and values."""
        both = torch.cat([keys, values], dim=-1)[:, 0]
        self.latent_dim, self.num_tokens, self.pads = keys.shape[-1], keys.shape[-2], None
        self._allocate(both.shape[0], self.num_tokens, both)
        self._refill(both)

    def _reserve(self, num_tokens: int) -> None:
        """Room for so many tokens a row; grows by half, so that a token is copied twice on average."""
        if num_tokens <= self.capacity:
            return
        in_order = self._in_order()
        self._allocate(in_order.shape[0], max(num_tokens, self.capacity * 3 // 2), in_order)
        self._refill(in_order)

    def _set_pads(self, pads: tuple[int, ...] | None) -> None:
        if pads == self.pads:
            return
        in_order = self._in_order().clone()
        self.pads = pads
        self._refill(in_order)

    # ---- the library's interface

    def get_seq_length(self) -> int:
        return self.num_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._become_dynamic()
        self.lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._become_dynamic()
        return self.update(key_states, value_states, *args, **kwargs)

    def _become_dynamic(self) -> None:
        keys, values, dtype, device = self.keys, self.values, self.dtype, self.device
        layer: Any = self
        layer.__dict__.clear()
        layer.__class__ = DynamicLayer
        layer.__init__()
        if keys is not None:
            layer.keys, layer.values, layer.dtype, layer.device, layer.is_initialized = keys, values, dtype, device, True

    def reset(self) -> None:
        self.rows, self.latent_dim, self.num_tokens, self.pads = None, 0, 0, None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes how many tokens to remove, as a negative number; got {tokens_to_remove}")
        self.num_tokens = max(0, self.num_tokens + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.rows is None:
            return
        indices = indices.to(self.rows.device)
        if self.pads is not None:
            self.pads = tuple(torch.tensor(self.pads, device=indices.device)[indices].tolist())
        self.rows = self.rows[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is None:
            return
        if self.pads is not None:
            self.pads = tuple(count for count in self.pads for _ in range(repeats))
        self.rows = self.rows.repeat_interleave(repeats, dim=0)

    def offload(self) -> None:
        if self.rows is not None:
            self._home, self.rows = self.rows.device, self.rows.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        if self.rows is not None:
            self.rows = self.rows.to(getattr(self, "_home", self.rows.device), non_blocking=True)
