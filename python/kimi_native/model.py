"""Kimi-Linear: the whole forward pass, top to bottom.

    x = embed(tokens)
    27 times:  x += attention(rms_norm(x));  x += ffn(rms_norm(x))        attention: 20 KDA and 7 MLA layers; ffn: MLP or MoE
    logits = lm_head(rms_norm(x))

A step works on the packed tokens of many sequences: first those being prefilled (one chunk each), then one token of each
decoding sequence. Dense layers see all tokens at once; the attention operators see the two parts separately, so that a decoding
row always takes the decode kernels, whatever else is in the step. What belongs to whom is in `Batch`; caches are arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_native import ops
from kimi_native.cache import PAGE_TOKENS, KdaCache, LatentCache, SequenceCache
from kimi_native.config import KimiLinearConfig
from kimi_native.weights import KdaWeights, MlaWeights, MlpWeights, MoeWeights, Weights, load_weights

if TYPE_CHECKING:
    from kimi_native.generate import Completion
    from kimi_native.text import Tokenizer

# Keys that a prefill expands from latents at a time: bounds the memory of a long prefix. A multiple of the page; the pieces are
# anchored at position 0, so that how a prompt is split into chunks does not change in which order a row meets its keys.
PREFIX_PIECE_TOKENS = 8192

# Up to so many rows a projection is bound by reading its weights, and our GEMM reads them 1.6 to 2 times faster than torch's on the
# CPUs that it was measured on (docs/moe.md); with more rows, and on a GPU, the library's is the default.
FEW_ROWS = {"cpu": 16, "cuda": 0}

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without waiting for the copy."""
    return t if device.type == "cpu" else t.pin_memory().to(device, non_blocking=True)


def default_device() -> str:
    """ "cuda" where torch sees a GPU that this build has kernels for, else "cpu"."""
    return "cuda" if torch.cuda.is_available() and torch.ops.kimi_native.cuda_build() != "none" else "cpu"


def check_device(device: torch.device | str, dtype: torch.dtype | str | None) -> None:
    """Raises ValueError unless this build and this machine can compute in `dtype` on `device`."""
    kind = torch.device(device).type
    if kind not in DTYPES:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
    if kind == "cuda" and torch.ops.kimi_native.cuda_build() == "none":
        raise ValueError("device 'cuda': this build of kimi_native has no CUDA kernels; build it where nvcc is")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': torch sees no CUDA device")
    if dtype not in DTYPES[kind]:
        names = " or ".join(str(d).removeprefix("torch.") for d in DTYPES[kind])
        raise ValueError(f"dtype must be {names} on device {kind!r}, got {dtype!r}")


@dataclass
class Batch:
    """Which tokens of a step belong to whom. Prefill sequences first, then one row per decoding sequence."""

    tokens: Tensor  # [T] int64
    latent_rows: Tensor  # [T] int64: row of each token in the flattened latent pages
    logit_rows: Tensor | None  # [R] int64: rows whose logits are wanted; None means all
    # prefill, N sequences of P tokens in all
    num_prefill_tokens: int
    prefill_slots: Tensor  # [N] int32
    prefill_cu_seqlens: Tensor  # [N + 1] int32
    prefill_max_seqlen: int  # tokens of the longest of these sequences in this step
    prefill_has_state: Tensor  # [N] bool: continues from its slot
    prefill_pieces: list[PrefixPiece]  # the keys of these sequences
    # decode, B sequences of one token
    decode_slots: Tensor  # [B] int32
    decode_block_table: Tensor  # [B, M] int32
    decode_lengths: Tensor  # [B] int32: keys that each row sees, itself included
    padding: Tensor | None = None  # [T, 1] bool: rows that belong to no sequence; None: there are none

    @property
    def num_decode(self) -> int:
        return self.decode_slots.shape[0]

    @classmethod
    def of_decode(cls, tokens: Tensor, latent_rows: Tensor, slots: Tensor, block_table: Tensor, lengths: Tensor) -> Batch:
        """A step of decoding sequences alone, from tensors on the device; rows of slot -1 are padding."""
        nobody = slots[:0]
        return cls(
            tokens=tokens,
            latent_rows=latent_rows,
            logit_rows=None,
            num_prefill_tokens=0,
            prefill_slots=nobody,
            prefill_cu_seqlens=nobody,
            prefill_max_seqlen=0,
            prefill_has_state=nobody.bool(),
            prefill_pieces=[],
            decode_slots=slots,
            decode_block_table=block_table,
            decode_lengths=lengths,
            padding=(slots < 0).unsqueeze(1) if slots.shape[0] > 1 else None,
        )


@dataclass
class PrefixPiece:
    """Keys [start, start + PREFIX_PIECE_TOKENS) of every prefill sequence, as far as they exist."""

    latent_rows: Tensor  # [keys] int64: rows of the flattened latent pages
    cu_seqlens: Tensor  # [N + 1] int32
    q_begin: Tensor  # [N] int32: position of each sequence's first query relative to the piece's first key

    @classmethod
    def of(cls, sequences: list[tuple[SequenceCache, int]], device: torch.device) -> list[PrefixPiece]:
        """For (sequence, new tokens) pairs whose pages already have room for the new tokens."""
        totals = [s.num_tokens + new for s, new in sequences]
        pieces = []
        for start in range(0, max(totals, default=0), PREFIX_PIECE_TOKENS):
            rows, ends = [], [0]
            for (sequence, _), total in zip(sequences, totals, strict=True):
                stop = min(total, start + PREFIX_PIECE_TOKENS)
                if stop > start:
                    pages = torch.tensor(sequence.pages[start // PAGE_TOKENS : -(-stop // PAGE_TOKENS)], dtype=torch.int64)
                    every = pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
                    rows.append(every.flatten()[: stop - start])
                ends.append(ends[-1] + max(0, stop - start))
            pieces.append(
                cls(
                    latent_rows=to_device(torch.cat(rows), device),
                    cu_seqlens=to_device(torch.tensor(ends, dtype=torch.int32), device),
                    q_begin=to_device(torch.tensor([s.num_tokens - start for s, _ in sequences], dtype=torch.int32), device),
                )
            )
        return pieces


def make_batch(
    prefill: list[tuple[SequenceCache, list[int]]],
    decode: list[tuple[SequenceCache, int]],
    device: torch.device,
    logits: str | list[int] = "all",
) -> Batch:
    """The batch of a step: chunks of prompts, and one token for each decoding sequence.

    Reserves the pages (raises OutOfPages) but does not advance the sequences: the caller adds to `num_tokens` after the step.

    Args:
        logits: "all" for every position, "last" for the last position of every sequence, or the wanted rows.
    """
    for sequence, chunk in prefill:
        sequence.reserve(sequence.num_tokens + len(chunk))
    for sequence, _ in decode:
        sequence.reserve(sequence.num_tokens + 1)

    def rows_of(sequence: SequenceCache, count: int) -> list[int]:
        pages, positions = sequence.pages, range(sequence.num_tokens, sequence.num_tokens + count)
        return [pages[t // PAGE_TOKENS] * PAGE_TOKENS + t % PAGE_TOKENS for t in positions]

    tokens, rows, ends = [], [], [0]
    for sequence, chunk in prefill:
        tokens += chunk
        rows += rows_of(sequence, len(chunk))
        ends.append(len(tokens))
    for sequence, token in decode:
        tokens.append(token)
        rows += rows_of(sequence, 1)
    if logits == "last":
        logits = [end - 1 for end in ends[1:]] + list(range(ends[-1], len(tokens)))
    width = max((len(s.pages) for s, _ in decode), default=0)
    block_table = [s.pages + [-1] * (width - len(s.pages)) for s, _ in decode]

    def there(values: Any, dtype: torch.dtype) -> Tensor:
        return to_device(torch.tensor(values, dtype=dtype), device)

    def i32(values: Any) -> Tensor:
        return there(values, torch.int32)

    return Batch(
        tokens=there(tokens, torch.int64),
        latent_rows=there(rows, torch.int64),
        logit_rows=None if isinstance(logits, str) else there(logits, torch.int64),
        num_prefill_tokens=ends[-1],
        prefill_slots=i32([s.slot for s, _ in prefill]),
        prefill_cu_seqlens=i32(ends),
        prefill_max_seqlen=max((len(chunk) for _, chunk in prefill), default=0),
        prefill_has_state=there([s.num_tokens > 0 for s, _ in prefill], torch.bool),
        prefill_pieces=PrefixPiece.of([(s, len(chunk)) for s, chunk in prefill], device),
        decode_slots=i32([s.slot for s, _ in decode]),
        decode_block_table=i32(block_table).view(len(decode), width),
        decode_lengths=i32([s.num_tokens + 1 for s, _ in decode]),
    )


def greedy(logits: Tensor) -> Tensor:
    """Of each row of logits ``[R, vocab]``: the likeliest token (of equal ones the first), its log-probability, and whether the row
    has a NaN. ``[R, 3]`` float64, on the device of the logits: one small copy tells the host all three."""
    best, token = logits.max(dim=-1)
    logprob = logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0]
    return torch.stack([token.double(), logprob.double(), best.isnan().double()], dim=1)


class KimiLinear:
    """A Kimi-Linear model. `from_pretrained` loads one; `generate` and `score` use it; `forward` is one step of an engine."""

    def __init__(
        self,
        config: KimiLinearConfig,
        weights: Weights,
        tokenizer: Tokenizer | None = None,
        *,
        batch_invariant: bool = False,
    ):
        """
        Args:
            batch_invariant: every dense projection takes a GEMM of fixed order, so that a request's bits do not depend on the
                other requests of a step or on how its prompt is cut into chunks. Slower; docs/model.md has the figure.
        """
        self.config, self.weights, self.tokenizer = config, weights, tokenizer
        self.batch_invariant = batch_invariant
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self._few_rows = FEW_ROWS[self.device.type]
        # W_UK as [heads, L, nope], rows to project on; 4 MB a layer at the released size
        self._absorb = [
            a.kv_b[:, : config.qk_nope_head_dim].transpose(1, 2).contiguous()
            for a in (layer.attention for layer in weights.layers)
            if isinstance(a, MlaWeights)
        ]

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        batch_invariant: bool = False,
        progress: bool = False,
    ) -> KimiLinear:
        """Loads a checkpoint in the hub's format.

        Args:
            path_or_hub_id: a directory with `config.json` and safetensors, or a hub id such as
                "moonshotai/Kimi-Linear-48B-A3B-Instruct", downloaded through `huggingface_hub` into its cache.
            device: "cpu" or "cuda". Tensors stream from the files to the device: for a GPU the host holds one shard at a
                time, never the whole model.
            dtype: of weights and activations: torch.float32, torch.bfloat16 or, on a GPU, torch.float16 (default: the config's).
            batch_invariant: see `__init__`.
            progress: show a progress bar on stderr.

        Raises:
            FileNotFoundError: no such directory or no config.json.
            ConfigError: a config value that is not implemented, by key.
            CheckpointError: missing, unexpected, wrongly shaped or unreadable tensors, by name.
        """
        from kimi_native.text import Tokenizer

        directory = find_checkpoint(path_or_hub_id)
        config = KimiLinearConfig.from_pretrained(directory)
        wanted = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype or getattr(torch, config.dtype)
        check_device(device, wanted)
        with _progress_bar(progress, "loading") as report:
            weights = load_weights(directory, config, device, wanted, report)  # type: ignore[arg-type]  # check_device has seen it
        return cls(config, weights, Tokenizer.from_pretrained(directory), batch_invariant=batch_invariant)

    @classmethod
    def random(
        cls,
        config: KimiLinearConfig | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        gates: str = "real",
        batch_invariant: bool = False,
    ) -> KimiLinear:
        """A model with random weights, drawn on the device itself as `make_tiny` draws them; no tokenizer.

        Args:
            config: its sizes (default: the released model: 98 GB in bfloat16).
            dtype, device, batch_invariant: as in `from_pretrained`.
            seed, gates: as in `make_tiny`. On the CPU the values are those of its checkpoint.

        Raises ValueError as `from_pretrained` does.
        """
        from kimi_native.tiny import random_weights

        config = config or KimiLinearConfig()
        wanted = dtype or getattr(torch, config.dtype)
        check_device(device, wanted)
        return cls(config, random_weights(config, device, wanted, seed=seed, gates=gates), batch_invariant=batch_invariant)

    # ---- use -------------------------------------------------------------------------------------------------------------

    def generate(self, prompts: Any, **options: Any) -> Completion | list[Completion]:
        """Continues one or many prompts of any lengths.

        Args:
            prompts: text, a list of token ids, or a list of either. One prompt gives one Completion, a list gives a list.
            max_new_tokens (int): default 128.
            temperature (float): 0 (the default) takes the likeliest token.
            top_k (int), top_p (float): sample among the `top_k` likeliest (0: all) and the smallest set of probability `top_p`.
            seed (int): of the sampling; the same seed gives the same tokens whatever else runs beside.
            stop: strings and/or token ids that end a completion, besides the model's own end tokens.
            ignore_eos (bool): go on past end tokens.
            stream: called with every TokenEvent as it happens; `request_id` is the prompt's index.
            prefill_chunk (int): tokens of prompts computed at a time, a multiple of 64; default 2048, on a GPU 8192.
            max_num_seqs (int): prompts that run side by side; default 64.
            progress (bool): show a bar while prompts are prefilled.

        Returns:
            Completions with token ids, text (None without a tokenizer), logprobs and the reason each one stopped.

        Raises:
            ValueError: an empty prompt, ids out of range, a prompt past the model's limit, text without a tokenizer.
        """
        from kimi_native.generate import generate

        return generate(self, prompts, **options)

    def score(self, token_ids: list[int], *, prefill_chunk: int = 2048) -> Tensor:
        """Logits of every position: ``[len(token_ids), vocab]`` float32; row t predicts token t + 1.

        Raises ValueError on an empty list, ids out of range or more tokens than the model's limit.
        """
        from kimi_native.generate import check_prompt

        check_prompt(self.config, token_ids)
        check_prefill_chunk(prefill_chunk)
        kda, latent = self.make_caches(1, -(-len(token_ids) // PAGE_TOKENS))
        sequence = SequenceCache(kda, latent)
        parts = []
        for start in range(0, len(token_ids), prefill_chunk):
            chunk = token_ids[start : start + prefill_chunk]
            parts.append(self.forward(make_batch([(sequence, chunk)], [], self.device), kda, latent))
            sequence.num_tokens += len(chunk)
        return torch.cat(parts)

    def make_caches(self, num_slots: int, num_pages: int, kda_state_dtype: torch.dtype = torch.float32) -> tuple[KdaCache, LatentCache]:
        """Pools for this model on its device and in its dtype. Raises ValueError for a `kda_state_dtype` that `KdaCache` does not take."""
        return (
            KdaCache(self.config, num_slots, self.device, self.dtype, kda_state_dtype),
            LatentCache(self.config, num_pages, self.device, self.dtype),
        )

    @property
    def weights_bytes(self) -> int:
        return self.weights.num_bytes

    # ---- forward ---------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, batch: Batch, kda: KdaCache, latent: LatentCache) -> Tensor:
        """One step: writes the caches and returns the wanted logits, ``[R, vocab]`` float32."""
        eps = self.config.rms_norm_eps
        residual = self.weights.embedding[batch.tokens]
        update = torch.zeros_like(residual)  # what the previous half-layer adds to the residual stream
        kda_index = mla_index = 0
        for layer in self.weights.layers:
            x = ops.rms_norm(update, layer.attention_norm, eps, residual=residual)
            if isinstance(layer.attention, KdaWeights):
                update = self._kda(x, layer.attention, batch, kda.recurrent[kda_index], kda.conv[kda_index])
                kda_index += 1
            else:
                update = self._mla(x, layer.attention, batch, latent.pages[mla_index], mla_index)
                mla_index += 1
            x = ops.rms_norm(update, layer.ffn_norm, eps, residual=residual)
            update = self._mlp(x, layer.ffn) if isinstance(layer.ffn, MlpWeights) else self._moe(x, layer.ffn, batch.padding)
        x = residual + update
        if batch.logit_rows is not None:
            x = x[batch.logit_rows]
        x = ops.rms_norm(x, self.weights.norm, eps)
        return self._linear(x, self.weights.lm_head).float()

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.batch_invariant or x.shape[0] <= self._few_rows:
            return ops.batch_invariant_linear(x, weight)
        return F.linear(x, weight)

    def _grouped_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, G, K], weight [G, N, K]; out [T, G, N], with strides of its own."""
        if self.batch_invariant or x.shape[0] <= self._few_rows:
            return ops.batch_invariant_linear(x, weight)
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)

    def _kda(self, x: Tensor, w: KdaWeights, batch: Batch, states: Tensor, conv_states: Tensor) -> Tensor:
        """Kimi Delta Attention: short convolutions on q, k, v; gated delta rule; per-head norm with an output gate."""
        c, p, split = self.config, self.config.kda_dim, batch.num_prefill_tokens
        heads, dim = c.kda_num_heads, c.kda_head_dim
        qkv, gates_a, beta = self._linear(x, w.in_proj).split([3 * p, 2 * dim, heads], dim=-1)
        forget, gate = self._grouped_linear(gates_a.unflatten(-1, (2, dim)), w.gates_b).unflatten(-1, (heads, dim)).unbind(1)
        out = x.new_empty(x.shape[0], heads, dim)
        if split:
            mixed = ops.short_conv(
                qkv[:split], w.conv, conv_states, batch.prefill_slots, batch.prefill_cu_seqlens, has_initial_state=batch.prefill_has_state
            )
            q, k, v = mixed.view(split, 3, heads, dim).unbind(1)
            o = ops.kda_prefill(
                q, k, v, forget[:split], beta[:split], states, batch.prefill_slots, batch.prefill_cu_seqlens,
                gate="softplus", A_log=w.A_log, dt_bias=w.dt_bias, has_initial_state=batch.prefill_has_state,
                max_seqlen=batch.prefill_max_seqlen,
            )  # fmt: skip
            ops.gated_rms_norm(o, gate[:split], w.o_norm, c.rms_norm_eps, out=out[:split])
        if batch.num_decode:
            ops.kda_decode_fused(
                qkv[split:, None], w.conv, conv_states, forget[split:, None], beta[split:, None], states, batch.decode_slots,
                num_heads=heads, head_dim=dim, gate="softplus", A_log=w.A_log, dt_bias=w.dt_bias,
                norm_gate=gate[split:, None], norm_weight=w.o_norm, norm_eps=c.rms_norm_eps, out=out[split:, None],
            )  # fmt: skip
        return self._linear(out.view(-1, p), w.o_proj)

    def _mla(self, x: Tensor, w: MlaWeights, batch: Batch, pages: Tensor, index: int) -> Tensor:
        """Multi-head latent attention without positions: expanded keys and values for prefill, absorbed for decode."""
        c, split = self.config, batch.num_prefill_tokens
        heads, scale = c.num_attention_heads, c.qk_head_dim**-0.5
        q, kv = self._linear(x, w.in_proj).split([heads * c.qk_head_dim, c.latent_dim], dim=-1)
        q = q.unflatten(-1, (heads, c.qk_head_dim))
        ops.mla_cache_write(kv, w.kv_a_norm, c.kv_a_norm_eps, pages, batch.latent_rows)
        out = x.new_empty(x.shape[0], heads, c.v_head_dim)
        if split:
            self._mla_prefill(q[:split], w, batch, pages, scale, out[:split])
        if batch.num_decode:
            out[split:] = self._mla_decode(q[split:], w, batch, pages, scale, index)
        return self._linear(out.view(x.shape[0], -1), w.o_proj)

    def _mla_prefill(self, q: Tensor, w: MlaWeights, batch: Batch, pages: Tensor, scale: float, out: Tensor) -> None:
        """Keys and values are expanded from the cached latents, a long prefix piece by piece."""
        first, *others = batch.prefill_pieces
        if not others:
            self._mla_piece(q, w, batch, first, pages, scale, out, None)
            return
        merged, part = (out.new_empty(out.shape, dtype=torch.float32) for _ in range(2))
        merged_lse, part_lse = (out.new_empty(out.shape[:2], dtype=torch.float32) for _ in range(2))
        self._mla_piece(q, w, batch, first, pages, scale, merged, merged_lse)
        for piece in others:
            self._mla_piece(q, w, batch, piece, pages, scale, part, part_lse)
            ops.mla_merge(merged, merged_lse, part, part_lse)
        out.copy_(merged)

    def _mla_piece(
        self, q: Tensor, w: MlaWeights, batch: Batch, piece: PrefixPiece, pages: Tensor, scale: float, out: Tensor, lse: Tensor | None
    ) -> None:
        """Attention of the prefill tokens to one piece of their keys."""
        c = self.config
        latents = pages.view(-1, c.latent_dim)[piece.latent_rows]
        expanded = self._linear(latents[:, : c.kv_lora_rank], w.kv_b.flatten(0, 1)).unflatten(-1, (c.num_attention_heads, -1))
        k_nope, v = expanded.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        ops.mla_prefill(
            q, k_nope, latents[:, c.kv_lora_rank :], v, batch.prefill_cu_seqlens, piece.cu_seqlens, scale,
            q_begin=piece.q_begin, out=out, lse=lse,
        )  # fmt: skip

    def _mla_decode(self, q: Tensor, w: MlaWeights, batch: Batch, pages: Tensor, scale: float, index: int) -> Tensor:
        """The query is projected into the latent space, so that the cache rows are keys and values themselves."""
        c = self.config
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        w_uv = w.kv_b[:, c.qk_nope_head_dim :]
        absorbed = self._grouped_linear(q_nope, self._absorb[index])
        o = ops.mla_decode(
            torch.cat([absorbed, q_rope], dim=-1), pages, batch.decode_block_table, batch.decode_lengths, scale, latent_dim=c.kv_lora_rank
        )
        return self._grouped_linear(o, w_uv)

    def _mlp(self, x: Tensor, w: MlpWeights) -> Tensor:
        if self.batch_invariant:  # one expert that takes every token: the fixed-order GEMMs of moe_experts, SwiGLU included
            return ops.moe_experts(
                x, w.gate_up[None], w.down[None], x.new_ones(x.shape[0], 1, dtype=torch.float32),
                torch.zeros(x.shape[0], 1, dtype=torch.int32, device=x.device),
            )  # fmt: skip
        gate, up = self._linear(x, w.gate_up).chunk(2, dim=-1)
        return self._linear(F.silu(gate) * up, w.down)

    def _moe(self, x: Tensor, w: MoeWeights, padding: Tensor | None = None) -> Tensor:
        c = self.config
        weights, ids = ops.moe_router(
            x, w.router, w.router_bias, top_k=c.num_experts_per_token, scale=c.routed_scaling_factor, renormalize=c.moe_renormalize
        )
        if padding is not None:
            ids.masked_fill_(padding, -1)  # rows of nobody must not make anyone read an expert
        return ops.moe_experts(x, w.w13, w.w2, weights, ids, shared_w13=w.shared_w13, shared_w2=w.shared_w2)


def check_prefill_chunk(prefill_chunk: int) -> None:
    """Raises ValueError unless chunks end on the KDA grid."""
    if prefill_chunk < PAGE_TOKENS or prefill_chunk % PAGE_TOKENS:
        raise ValueError(f"prefill_chunk must be a positive multiple of {PAGE_TOKENS}, got {prefill_chunk}")


def find_checkpoint(path_or_hub_id: str | Path) -> Path:
    """A local directory as it is; a hub id through `huggingface_hub` and its cache (config, safetensors and tokenizer files only).

    Raises FileNotFoundError when it is neither.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file; a checkpoint is a directory with config.json and safetensors")
    parts = str(path_or_hub_id).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", ".."):
        raise FileNotFoundError(f"no directory {path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors", "tiktoken.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"no directory {path}, and the hub gave nothing under that id: {error}") from error


class _progress_bar:
    """A bar on stderr while the body runs; gives the function to report (done, total) bytes to, or None when it is off."""

    def __init__(self, enabled: bool, label: str, unit: str = "B"):
        self._bar: Any = None
        if enabled:
            from tqdm import tqdm

            self._bar = tqdm(desc=label, unit=unit, unit_scale=True, leave=False, delay=0.5)  # what is quick shows no bar

    def __enter__(self) -> Callable[[int, int], None] | None:
        return self._report if self._bar is not None else None

    def _report(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()  # takes the bar away, so that streamed text has the line

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
