"""Our operators inside someone else's module under torch.compile(fullgraph=True) and torch.export: no graph break, the results of
eager mode, and the same states afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kit import DEVICES, assert_close, assert_same_bits, randn
from torch import Tensor, nn

from kimi_native import ops

HIDDEN, HEADS, DIM, SLOTS, PAGES = 48, 2, 64, 4, 6
LATENT, ROPE, NOPE, V = 32, 8, 16, 16
EXPERTS, TOP_K, INNER = 6, 2, 24


def parameter(*shape: int, seed: int, scale: float | None = None) -> nn.Parameter:
    return nn.Parameter(randn(*shape, seed=seed, scale=shape[-1] ** -0.5 if scale is None else scale), requires_grad=False)


class Hybrid(nn.Module):
    """One KDA, one MLA and one MoE block; states and latent pages are buffers that a call changes in place."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * DIM
        self.norm = nn.ParameterList([nn.Parameter(1 + 0.1 * randn(HIDDEN, seed=i), requires_grad=False) for i in range(3)])
        self.qkv = parameter(3 * width, HIDDEN, seed=10)
        self.conv = parameter(3 * width, 4, seed=11)
        self.forget = parameter(width, HIDDEN, seed=12)
        self.beta = parameter(HEADS, HIDDEN, seed=13)
        self.gate = parameter(width, HIDDEN, seed=14)
        self.A_log = parameter(HEADS, seed=15, scale=1.0)
        self.dt_bias = parameter(HEADS, DIM, seed=16, scale=1.0)
        self.o_norm = nn.Parameter(torch.ones(DIM), requires_grad=False)
        self.o_proj = parameter(HIDDEN, width, seed=17)
        self.q_proj = parameter(HEADS * (NOPE + ROPE), HIDDEN, seed=18)
        self.kv_a = parameter(LATENT + ROPE, HIDDEN, seed=19)
        self.kv_norm = nn.Parameter(torch.ones(LATENT), requires_grad=False)
        self.kv_b = parameter(HEADS, NOPE + V, LATENT, seed=20)
        self.mla_out = parameter(HIDDEN, HEADS * V, seed=21)
        self.router = parameter(EXPERTS, HIDDEN, seed=22, scale=1.0)
        self.bias = parameter(EXPERTS, seed=23, scale=0.1)
        self.w13 = parameter(EXPERTS, 2 * INNER, HIDDEN, seed=24)
        self.w2 = parameter(EXPERTS, HIDDEN, INNER, seed=25)
        self.shared_w13 = parameter(2 * INNER, HIDDEN, seed=26)
        self.shared_w2 = parameter(HIDDEN, INNER, seed=27)
        self.register_buffer("conv_state", randn(SLOTS, 3, 3 * width, seed=28))
        self.register_buffer("state", randn(SLOTS, HEADS, DIM, DIM, seed=29, scale=0.1))
        self.register_buffer("pages", randn(PAGES, 64, LATENT + ROPE, seed=30))

    def moe(self, x: Tensor) -> Tensor:
        y = ops.rms_norm(x, self.norm[2])
        weights, ids = ops.moe_router(y, self.router, self.bias, top_k=TOP_K, scale=2.0)
        return x + ops.moe_experts(y, self.w13, self.w2, weights, ids, shared_w13=self.shared_w13, shared_w2=self.shared_w2)


class Prefill(Hybrid):
    def forward(self, x: Tensor, slots: Tensor, cu_seqlens: Tensor, has_state: Tensor, rows: Tensor) -> Tensor:
        y = ops.rms_norm(x, self.norm[0])
        mixed = ops.short_conv(F.linear(y, self.qkv), self.conv, self.conv_state, slots, cu_seqlens, has_initial_state=has_state)
        q, k, v = mixed.view(-1, 3, HEADS, DIM).unbind(1)
        forget, beta = F.linear(y, self.forget).view(-1, HEADS, DIM), F.linear(y, self.beta)
        o = ops.kda_prefill(
            q, k, v, forget, beta, self.state, slots, cu_seqlens, A_log=self.A_log, dt_bias=self.dt_bias, has_initial_state=has_state,
            max_seqlen=x.shape[0],  # a length that stays symbolic where tracing makes it so
        )  # fmt: skip
        o = ops.gated_rms_norm(o, F.linear(y, self.gate).view(-1, HEADS, DIM), self.o_norm)
        x = x + ops.batch_invariant_linear(o.flatten(1), self.o_proj)

        y = ops.rms_norm(x, self.norm[1])
        ops.mla_cache_write(F.linear(y, self.kv_a), self.kv_norm, 1e-6, self.pages, rows)
        latents = self.pages.view(-1, LATENT + ROPE)[rows]
        k_nope, v = F.linear(latents[:, :LATENT], self.kv_b.flatten(0, 1)).view(-1, HEADS, NOPE + V).split([NOPE, V], -1)
        q = F.linear(y, self.q_proj).view(-1, HEADS, NOPE + ROPE)
        o = ops.mla_prefill(q, k_nope, latents[:, LATENT:], v, cu_seqlens, cu_seqlens, 0.2)
        return self.moe(x + F.linear(o.flatten(1), self.mla_out))

    @staticmethod
    def inputs(lengths: list[int]) -> tuple[Tensor, ...]:
        total = sum(lengths)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        slots = torch.arange(len(lengths), dtype=torch.int32)
        has_state = torch.arange(len(lengths)) % 2 == 0
        return randn(total, HIDDEN, seed=40), slots, cu_seqlens, has_state, torch.arange(total) + 3


class Decode(Hybrid):
    def forward(self, x: Tensor, slots: Tensor, block_table: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        batch = x.shape[0]
        y = ops.rms_norm(x, self.norm[0])
        forget, beta = F.linear(y, self.forget).view(batch, 1, HEADS, DIM), F.linear(y, self.beta)[:, None]
        gate = F.linear(y, self.gate).view(batch, 1, HEADS, DIM)
        qkv = F.linear(y, self.qkv)
        o = ops.kda_decode_fused(
            qkv[:, None], self.conv, self.conv_state, forget, beta, self.state, slots,
            num_heads=HEADS, head_dim=DIM, A_log=self.A_log, dt_bias=self.dt_bias, norm_gate=gate, norm_weight=self.o_norm,
        )  # fmt: skip
        x = x + F.linear(o.flatten(1), self.o_proj)
        # once more, from the operators that the fused one is made of
        q, k, v = ops.short_conv_update(qkv, self.conv, self.conv_state, slots).view(batch, 3, 1, HEADS, DIM).unbind(1)
        o = ops.kda_decode(q, k, v, forget, beta, self.state, slots, A_log=self.A_log, dt_bias=self.dt_bias)
        x = x + F.linear(ops.gated_rms_norm(o, gate, self.o_norm).flatten(1), self.o_proj)

        y = ops.rms_norm(x, self.norm[1])
        ops.mla_cache_write(F.linear(y, self.kv_a), self.kv_norm, 1e-6, self.pages, rows)
        q_nope, q_rope = F.linear(y, self.q_proj).view(batch, HEADS, NOPE + ROPE).split([NOPE, ROPE], -1)
        w_uk, w_uv = self.kv_b.split([NOPE, V], dim=1)
        q = torch.cat([torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1), q_rope], -1)
        o = ops.mla_decode(q, self.pages, block_table, lengths, 0.2, latent_dim=LATENT)
        o = ops.batch_invariant_linear(o, w_uv)
        return self.moe(x + F.linear(o.flatten(1), self.mla_out))

    @staticmethod
    def inputs(lengths: list[int]) -> tuple[Tensor, ...]:
        batch = len(lengths)
        pages = torch.arange(batch, dtype=torch.int32)
        rows = torch.tensor([64 * i + n - 1 for i, n in enumerate(lengths)])
        return randn(batch, HIDDEN, seed=41), torch.arange(batch, dtype=torch.int32), pages[:, None], torch.tensor(lengths).int(), rows


MODULES = pytest.mark.parametrize("kind, lengths", [(Prefill, [70, 1, 33]), (Decode, [5, 64, 1])], ids=["prefill", "decode"])
BUFFERS = ("conv_state", "state", "pages")
ON_DEVICES = pytest.mark.parametrize("device", DEVICES)
# Where tracing turns a linear layer into another call of a matrix product: cuBLAS may choose another kernel for it.
MAX_R = {"cpu": 1e-6, "cuda": 1e-5}


def inputs_on(device: str, kind: type[Hybrid], lengths: list[int]) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in kind.inputs(lengths))


def check(module: nn.Module, reference: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], max_r: float | None) -> None:
    """Two calls (the second from the states that the first left) equal eager mode's; to the bit unless `max_r` is given."""
    before = {name: getattr(reference, name).clone() for name in BUFFERS}
    for _ in range(2):
        with torch.no_grad():
            out, expected = call(*inputs), reference(*inputs)
        for name, a, b in [("output", out, expected), *[(n, getattr(module, n), getattr(reference, n)) for n in BUFFERS]]:
            if max_r is None:
                assert_same_bits(a, b, name)
            else:
                assert_close(a, b, max_r, name)
    assert all(not torch.equal(before[name], getattr(reference, name)) for name in BUFFERS), "these calls change every state"


@ON_DEVICES
@MODULES
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend, kind, lengths, device):
    if backend == "inductor" and kind is Prefill:
        pytest.skip("inductor once is enough: it compiles C++")
    if backend == "inductor" and device == "cuda":
        pytest.importorskip("triton", reason="inductor needs triton on a GPU")
    torch._dynamo.reset()
    reference = kind().to(device)
    module = copy.deepcopy(reference)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    check(module, reference, compiled, inputs_on(device, kind, lengths), {"eager": None, "inductor": 1e-5}.get(backend, MAX_R[device]))


@ON_DEVICES
def test_compile_with_dynamic_lengths(device):
    """One graph for any number of tokens."""
    torch._dynamo.reset()
    reference, graphs = Prefill().to(device), []
    module = copy.deepcopy(reference)

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    for lengths in ([70, 3, 33], [5, 64, 9], [128, 2, 7]):
        with torch.no_grad():
            inputs = inputs_on(device, Prefill, lengths)
            assert_same_bits(compiled(*inputs), reference(*inputs))
    assert len(graphs) == 1
    assert_same_bits(module.state, reference.state)


@ON_DEVICES
@MODULES
def test_export(kind, lengths, device):
    torch._dynamo.reset()
    reference, inputs = kind().to(device), inputs_on(device, kind, lengths)
    program = torch.export.export(copy.deepcopy(reference), inputs)
    assert any("kimi_native" in str(node.target) for node in program.graph.nodes)
    module = program.module()
    check(module, reference, module, inputs, MAX_R[device])


@ON_DEVICES
def test_export_with_dynamic_lengths(device, tmp_path):
    """Saved, loaded and run with another number of tokens than it was exported with."""
    torch._dynamo.reset()
    reference = Prefill().to(device)
    total = torch.export.Dim("total", min=2, max=1024)
    shapes = ({0: total}, None, None, None, {0: total})
    inputs = inputs_on(device, Prefill, [70, 1, 33])
    program = torch.export.export(copy.deepcopy(reference), inputs, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "prefill.pt2")
    module = torch.export.load(tmp_path / "prefill.pt2").module()
    for lengths in ([70, 1, 33], [5, 64, 130]):
        check(module, reference, module, inputs_on(device, Prefill, lengths), MAX_R[device])
