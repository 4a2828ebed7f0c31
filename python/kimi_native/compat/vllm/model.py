"""The model class that vLLM loads for `KimiLinearForCausalLM`, built of our layers.

    x = embed(tokens)
    27 times:  x += attention(rms_norm(x));  x += ffn(rms_norm(x))        attention: KDA or MLA; ffn: MLP or MoE
    logits = lm_head(rms_norm(x))

Embedding, head and logits are vLLM's (they split the vocabulary over ranks), and so are the parallel groups. Where support.py has
something against a configuration, this class makes vLLM's own instead, as if it had never been registered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsPP, SupportsReplaySSM
from vllm.model_executor.models.utils import PPMissingLayer, make_layers
from vllm.sequence import IntermediateTensors

from kimi_native import __version__, ops
from kimi_native.compat.vllm import SWITCH, support
from kimi_native.compat.vllm.kda import KimiDeltaAttention, state_dtypes, state_shapes
from kimi_native.compat.vllm.loading import Place, attention_places, ffn_places, load
from kimi_native.compat.vllm.mla import MultiHeadLatentAttention
from kimi_native.compat.vllm.moe import Mlp, MoE
from kimi_native.compat.vllm.shard import Shard, parameter, tensor_parallel
from kimi_native.config import KimiLinearConfig
from kimi_native.weights import CheckpointError

logger = init_logger("vllm.plugins.kimi_native")


def own_class() -> Any:
    """vLLM's own class of this architecture."""
    from vllm.models.kimi_k3 import KimiLinearForCausalLM as Own

    return Own


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind its norm."""

    def __init__(self, config: KimiLinearConfig, vllm_config: Any, shard: Shard, prefix: str):
        super().__init__()
        self.index = int(prefix.rsplit(".", 1)[1])
        self.eps = config.rms_norm_eps
        attention = MultiHeadLatentAttention if self.index in config.full_attn_layers else KimiDeltaAttention
        self.self_attn = attention(config, vllm_config, shard, prefix + ".self_attn")
        self.ffn: nn.Module = (
            MoE(config, shard, vllm_config.parallel_config.enable_expert_parallel) if config.is_moe(self.index) else Mlp(config, shard)
        )
        self.attention_norm = parameter(config.hidden_size)
        self.ffn_norm = parameter(config.hidden_size)

    def forward(self, update: Tensor, residual: Tensor) -> Tensor:
        """Adds `update` to `residual` in place; returns the next update."""
        update = self.self_attn(ops.rms_norm(update, self.attention_norm, self.eps, residual=residual))
        return self.ffn(ops.rms_norm(update, self.ffn_norm, self.eps, residual=residual))


class KimiLinearForCausalLM(nn.Module, HasInnerState, SupportsPP, IsHybrid, SupportsReplaySSM):
    """Kimi-Linear with kimi_native's operators."""

    # SupportsReplaySSM is for vLLM's own class, which this one may turn into.

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        if not support.supported(vllm_config):
            return own_class()(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        self.config = c = support.sizes(vllm_config)
        self.shard = tensor_parallel()
        self.prefix = prefix + "." if prefix else ""
        group = get_pp_group()
        self.embed_tokens = PPMissingLayer()
        if group.is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(c.vocab_size, c.hidden_size, prefix=self.prefix + "model.embed_tokens")
        self.start_layer, self.end_layer, self.layers = make_layers(
            c.num_hidden_layers, lambda prefix: DecoderLayer(c, vllm_config, self.shard, prefix), prefix=self.prefix + "model.layers"
        )
        self.norm: nn.Parameter | None = None
        self.lm_head = PPMissingLayer()
        if group.is_last_rank:
            self.norm = parameter(c.hidden_size)
            self.lm_head = ParallelLMHead(c.vocab_size, c.hidden_size, prefix=self.prefix + "lm_head")
        self.logits_processor = LogitsProcessor(c.vocab_size)
        self._loaded: set[str] = set()
        if group.is_first_rank and self.shard.rank == 0:
            logger.info_once(
                "kimi_native %s runs this model: KDA, MLA, MoE and the norms are its operators, in place of vLLM's own model class "
                "(vllm.models.kimi_k3). %s=0 turns this off.",
                __version__,
                SWITCH,
            )

    # ---- forward ----

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """Hidden states after the last norm, or what the next pipeline rank goes on with."""
        if intermediate_tensors is not None and not get_pp_group().is_first_rank:
            update, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        else:
            residual = inputs_embeds.clone() if inputs_embeds is not None else self.embed_tokens(input_ids)
            update = torch.zeros_like(residual)
        for layer in self.layers[self.start_layer : self.end_layer]:
            update = layer(update, residual)
        if self.norm is None:  # not the last pipeline rank
            return IntermediateTensors({"hidden_states": update, "residual": residual})
        return ops.rms_norm(update, self.norm, self.config.rms_norm_eps, residual=residual)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def make_empty_intermediate_tensors(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        shape = (batch_size, self.config.hidden_size)
        return IntermediateTensors({name: torch.zeros(shape, dtype=dtype, device=device) for name in ("hidden_states", "residual")})

    # ---- what vLLM asks of a model with states ----

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> Any:
        if not support.supported(vllm_config):
            return own_class().get_mamba_state_shape_from_config(vllm_config)
        return state_shapes(support.sizes(vllm_config), vllm_config.parallel_config.tensor_parallel_size)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> Any:
        if not support.supported(vllm_config):
            return own_class().get_mamba_state_dtype_from_config(vllm_config)
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return get_temporal_copy_spec, get_temporal_copy_spec  # without drafts, both states are copied whole

    # ---- weights ----

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a checkpoint, or, once one is loaded, some tensors of another.

        Raises CheckpointError that names the tensor: missing, unexpected, wrongly shaped or quantised.
        """
        places = dict(self._places())
        whole = {"model.embed_tokens.weight": self.embed_tokens, "lm_head.weight": self.lm_head}
        others = frozenset(
            {f"model.layers.{i}." for i in range(self.config.num_hidden_layers) if not self.start_layer <= i < self.end_layer}
            | {name for name, module in whole.items() if isinstance(module, PPMissingLayer)}
            | ({"model.norm."} if self.norm is None else set())
        )
        done: set[str] = set()

        def ours() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                module = whole.get(name)
                if module is None or isinstance(module, PPMissingLayer):
                    yield name, tensor
                    continue
                expected = [self.config.vocab_size, self.config.hidden_size]
                if list(tensor.shape) != expected:
                    raise CheckpointError(f"tensor {name!r} has shape {list(tensor.shape)}; this model needs {expected}")
                module.weight.weight_loader(module.weight, tensor)
                done.add(name)

        load(ours(), places, self.config, done, others)
        wanted = set(places) | {name for name, module in whole.items() if not isinstance(module, PPMissingLayer)}
        missing = wanted - done - self._loaded
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(f"missing tensor {min(missing)!r}{more} in the checkpoint")
        self._loaded |= done
        return {name for name, _ in self.named_parameters()}

    def _places(self) -> Iterator[tuple[str, Place]]:
        hidden = (self.config.hidden_size,)
        for layer in self.layers[self.start_layer : self.end_layer]:
            prefix = f"model.layers.{layer.index}."
            yield prefix + "input_layernorm.weight", Place(hidden, layer, "attention_norm")
            yield prefix + "post_attention_layernorm.weight", Place(hidden, layer, "ffn_norm")
            yield from chain(
                attention_places(layer.self_attn, prefix + "self_attn.", self.config), ffn_places(layer.ffn, prefix, self.config)
            )
        if self.norm is not None:
            yield "model.norm.weight", Place(hidden, self, "norm")
