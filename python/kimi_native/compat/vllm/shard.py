"""Which part of a weight a rank holds, and the dense projections over such parts.

The projections are plain parameters and not vLLM's linear layers, because ours are fused where vLLM's are not (rows of the latent or of
the gates' low-rank part are held whole by every rank, beside rows that are split by heads), and because a GEMM of ours takes the few
rows of a decode step on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_native import ops
from kimi_native.model import FEW_ROWS


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size` that share a dimension."""

    rank: int
    size: int

    def part(self, length: int) -> slice:
        """This rank's part of a dimension of `length`: equal parts where it divides, else parts that differ by one."""
        return slice(self.rank * length // self.size, (self.rank + 1) * length // self.size)

    def count(self, length: int) -> int:
        part = self.part(length)
        return part.stop - part.start


def tensor_parallel() -> Shard:
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return Shard(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())


def sum_over_ranks(x: Tensor, shard: Shard) -> Tensor:
    """The sum over the tensor parallel ranks; on one rank `x` itself."""
    if shard.size == 1:
        return x
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(x)


def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised weight on vLLM's current device, in the model's dtype unless another is given."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``."""
    if x.shape[0] <= FEW_ROWS[x.device.type]:
        return ops.batch_invariant_linear(x, weight)
    return F.linear(x, weight)


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x ``[T, G, K]``, weight ``[G, N, K]``; out ``[T, G, N]``, with strides of its own."""
    if x.shape[0] <= FEW_ROWS[x.device.type]:
        return ops.batch_invariant_linear(x, weight)
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
