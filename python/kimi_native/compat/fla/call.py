"""One call of a KDA function of fla-core, read into our terms: what was asked for, whether it makes sense, and whether we take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_native.ops.kda_prefill import KdaGate

MAX_HEAD_DIM = 256  # of our operators
_HAS_CUDA_KERNELS = torch.ops.kimi_native.cuda_build() not in ("none", "emulated")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class KdaCall:
    """Arguments of a call, with fla's shapes: B sequences of T tokens each, or B = 1 and N sequences packed by ``cu_seqlens``.

    q, k ``[B, T, H, K]``; v ``[B, T, HV, V]``; g ``[B, T, HV, K]``; beta ``[B, T, HV]``; states ``[N, HV, K, V]``, or
    ``[N, HV, V, K]`` with ``state_v_first``.
    """

    function: str  # its name, for messages
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    scale: float | None
    gate: KdaGate
    A_log: Tensor | None
    dt_bias: Tensor | None
    lower_bound: float
    use_qk_l2norm: bool
    use_beta_sigmoid: bool
    allow_neg_eigval: bool
    initial_state: Tensor | None
    output_final_state: bool
    state_v_first: bool
    cu_seqlens: Tensor | None
    result_dtype: torch.dtype
    differentiable: bool  # fla's function has a backward pass
    refused: str | None = None  # an argument that we do not offer at all

    # chunk_kda
    cu_seqlens_cpu: Tensor | None = None
    return_intermediate_states: bool = False

    # fused_recurrent_kda and fused_recurrent_kda_fwd
    recurrent: bool = False  # a few tokens go by kda_decode, and rows of tokens outside of all sequences are zero
    in_place: bool = False  # the final states go to where the initial ones came from
    state_indices: Tensor | None = None  # [N] or [N, M]: rows of initial_state, a pool; one for each new token
    num_accepted_tokens: Tensor | None = None  # [N]: which of the M states to start from, counted from 1
    out: Tensor | None = None

    def __post_init__(self) -> None:
        """ValueError for arguments that contradict each other, whoever computes."""
        self._check_tokens()
        self._check_gate()
        self._check_states()
        if self.allow_neg_eigval and not self.use_beta_sigmoid:
            raise ValueError(f"{self.function}: allow_neg_eigval=True requires use_beta_sigmoid_in_kernel=True")

    @property
    def num_sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def _expect(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{self.function}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")

    def _check_tokens(self) -> None:
        if self.q.dim() != 4 or self.v.dim() != 4:
            raise ValueError(f"{self.function}: q and v must have four dimensions, got {list(self.q.shape)} and {list(self.v.shape)}")
        batch, tokens, heads, key_dim = self.q.shape
        value_heads, value_dim = self.v.shape[2:]
        self._expect("k", self.k, (batch, tokens, heads, key_dim))
        self._expect("v", self.v, (batch, tokens, value_heads, value_dim))
        self._expect("g", self.g, (batch, tokens, value_heads, key_dim))
        if self.beta.shape != self.v.shape:  # a step for each value channel: refused below
            self._expect("beta", self.beta, (batch, tokens, value_heads))
        if heads == 0 or value_heads % heads:
            raise ValueError(f"{self.function}: the {value_heads} heads of v must be a multiple of the {heads} heads of q")
        if self.cu_seqlens is not None and batch != 1:
            raise ValueError(f"{self.function}: with cu_seqlens all tokens must be in one row, got a batch of {batch}")
        if self.out is not None:
            self._expect("out", self.out, tuple(self.v.shape))

    def _check_gate(self) -> None:
        value_heads, key_dim = self.g.shape[2:]
        if self.gate == "softplus" and self.A_log is None:
            raise ValueError(f"{self.function}: A_log must be given with use_gate_in_kernel=True, unless lower_bound is")
        if self.gate == "bounded" and not self.lower_bound < 0:
            raise ValueError(f"{self.function}: lower_bound must be negative, got {self.lower_bound}")
        if self.A_log is not None and self.A_log.numel() != value_heads:
            raise ValueError(f"{self.function}: A_log must have {value_heads} elements, got {self.A_log.numel()}")
        if self.dt_bias is not None and self.dt_bias.numel() != value_heads * key_dim:
            raise ValueError(f"{self.function}: dt_bias must have {value_heads} x {key_dim} elements, got {self.dt_bias.numel()}")

    def _check_states(self) -> None:
        key_dim, value_heads, value_dim = self.q.shape[3], *self.v.shape[2:]
        state, indices = self.initial_state, self.state_indices
        if state is None and (self.in_place or indices is not None):
            raise ValueError(f"{self.function}: initial_state must be given with inplace_final_state or ssm_state_indices")
        if state is not None:
            rows = self.num_sequences if indices is None else state.shape[0]
            inner = (value_dim, key_dim) if self.state_v_first else (key_dim, value_dim)
            self._expect("initial_state", state, (rows, value_heads, *inner))
        if indices is not None:
            tokens = self.q.shape[1] if self.cu_seqlens is None else 1
            width = indices.shape[1] if indices.dim() == 2 else 1
            if indices.dim() not in (1, 2) or indices.shape[0] != self.num_sequences or width < tokens:
                raise ValueError(
                    f"{self.function}: ssm_state_indices must have shape [{self.num_sequences}, tokens] with a row of the pool for each "
                    f"token of a sequence ({tokens} or more; one dimension is one token), got {list(indices.shape)}"
                )
        if self.num_accepted_tokens is not None and (indices is None or indices.dim() != 2):
            raise ValueError(f"{self.function}: num_accepted_tokens requires ssm_state_indices of two dimensions")

    def unsupported(self) -> str | None:
        """Why our operators do not take this call, or None. Reads shapes and dtypes alone: no synchronisation."""
        if self.refused is not None:
            return self.refused
        if self.differentiable and self.needs_gradients():
            return "gradients are not computed: call it under torch.no_grad() or torch.inference_mode()"
        if self.beta.dim() == 4:
            return "beta for each value channel ([B, T, HV, V]) is not supported"
        if (reason := unsupported_device(self.q.device)) is not None:
            return reason
        for name, tensor in (("q", self.q), ("k", self.k), ("v", self.v), ("g", self.g), ("beta", self.beta)):
            if tensor.dtype not in _DTYPES:
                return f"dtype {tensor.dtype} of {name} is not supported"
            if tensor.device != self.q.device:
                return f"{name} is on {tensor.device}, q on {self.q.device}"
        for name, size in (("K", self.q.shape[3]), ("V", self.v.shape[3])):
            if not 1 <= size <= MAX_HEAD_DIM:
                return f"{name} = {size}: head dimensions up to {MAX_HEAD_DIM} are supported"
        if self.state_indices is not None and not self.in_place:
            return "ssm_state_indices is supported with inplace_final_state=True alone"
        return None

    def needs_gradients(self) -> bool:
        """Whether autograd expects a backward pass of this call."""
        tensors = (self.q, self.k, self.v, self.g, self.beta, self.A_log, self.dt_bias, self.initial_state)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def unsupported_device(device: torch.device) -> str | None:
    """Why this build of kimi_native cannot work on `device`, or None."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"device {device} is not supported"
    if not _HAS_CUDA_KERNELS:
        return "this build of kimi_native has no CUDA kernels"
    if torch.cuda.get_device_properties(device).major < 8:
        return f"{device} has a compute capability below 8.0"
    return None
