"""Other people's kernels, found where they are installed and called as their own users call them.

- fla-core (PyPI): `fla.ops.kda`, `fla.modules`. On the path when installed.
- FlashKDA and FlashMLA: the operator libraries `_flashkda_C*.so` and `_flashmla_C*.so` of vLLM's wheel (PyPI). They are built on
  torch's stable ABI and load beside any torch of their age or newer: unpack them into a folder (a file VERSION in it names
  their origin) and name it with --peer-libs.
- torch: scaled_dot_product_attention with the cuDNN backend, grouped_mm, linear.

Everything here returns None, or an empty mapping, for what is not there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_folder: Path | None = None
_loaded: set[str] = set()


def use(folder: Path | None) -> None:
    """Where the operator libraries lie."""
    global _folder
    _folder = folder


def fla(module: str) -> Any | None:
    """A module of fla-core, `fla.<module>`, with its own kernels: it would hand its KDA to ours (kimi_native.compat.fla)."""
    os.environ["FLA_KIMI_NATIVE"] = "0"
    try:
        found = importlib.import_module(f"fla.{module}")
    except ImportError:
        return None
    compile_in_parallel()
    return found


@lru_cache(maxsize=1)
def compile_in_parallel() -> None:
    """Lets Triton's autotuner compile all configurations of a kernel at once, on all cores, and time each for 25 ms.

    Its own way (one after another, 125 ms each) takes longer for fla's kernels than all measurements of a run together.
    """
    try:
        import triton.testing
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return
    executor, prune = ThreadPoolExecutor(os.cpu_count()), Autotuner.prune_configs

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> Any:
        if self._do_bench is None:
            self._do_bench = partial(triton.testing.do_bench, warmup=5, rep=20)
        configs = prune(self, kwargs)
        if not kwargs.get("warmup"):
            with AsyncCompileMode(executor, ignore_errors=True):
                for config in configs:
                    self.fn.run(**self.nargs, **(kwargs | {"warmup": True}), **config.all_kwargs())
        return configs

    Autotuner.prune_configs = prune_configs


def operators(name: str) -> Any | None:
    """`torch.ops.<name>` of a library in the folder of --peer-libs."""
    if _folder is None:
        return None
    if name not in _loaded:
        files = sorted(_folder.glob(f"{name}*.so"))
        if not files:
            return None
        torch.ops.load_library(files[0])
        _loaded.add(name)
    return getattr(torch.ops, name)


def flash_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float, state: Tensor, cu: Tensor
) -> Callable[[], tuple[Tensor, Tensor]] | None:
    """FlashKDA over packed sequences [T, H, 128], raw gate; it reads `state` [N, H, V, K] and returns (out, final state).

    Bounded gates only: it forms exp(-G) over 16 tokens, which the unbounded gate overflows.
    """
    ops = operators("_flashkda_C")
    if ops is None:
        return None
    out, final = torch.empty_like(v).unsqueeze(0), torch.empty_like(state)
    size = ops.get_workspace_size(q.shape[0], q.shape[1], state.shape[0])
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    q, k, v, g, beta = (x.unsqueeze(0) for x in (q, k, v, g, beta))

    def run() -> tuple[Tensor, Tensor]:
        ops.fwd(q, k, v, g, beta, q.shape[-1] ** -0.5, out, workspace, A_log, dt_bias, lower_bound, state, final, cu)
        return out[0], final

    return run


def flash_mla(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, scale: float, latent_dim: int
) -> Callable[[], tuple[Tensor, Tensor]] | None:
    """FlashMLA's dense decoding, q [B, H, 576], cache [pages, 64, 576]; returns (out [B, H, 512], lse [B, H, 1]).

    Its schedule is made in the first call and kept, as its users keep it for all layers of a step.
    """
    ops = operators("_flashmla_C")
    if ops is None:
        return None
    schedule: list[Tensor | None] = [None, None]

    def run() -> tuple[Tensor, Tensor]:
        out, lse, *schedule[:] = ops.dense_decode_fwd(
            q.unsqueeze(1), cache.unsqueeze(2), latent_dim, lengths, table, scale, True, *schedule, None
        )
        return out.squeeze(1), lse

    return run


def cudnn_attention() -> Any:
    """Context in which torch's scaled_dot_product_attention takes cuDNN's kernel or fails."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


def grouped_mm() -> Callable[..., Tensor] | None:
    """rows [M, K], weights [E, K, N], offs [E] int32: the ends of the groups of rows."""
    found = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    return found
