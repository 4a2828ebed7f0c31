import pytest
import torch
from kit import (
    DEVICE_DTYPES,
    DEVICES,
    Guarded,
    assert_close,
    assert_same_bits,
    cuda_backend,
    graph_replays,
    needs_cpu_backend,
    needs_gpu,
    opcheck,
    randn,
    strided,
    threads,
)
from spec.mla_cache_write import MAX_R
from spec.mla_cache_write import mla_cache_write as spec

import kimi_native
from kimi_native.ops import mla_cache_write, rms_norm

EPS = 1e-5


def slots_of(num_tokens, num_slots, seed=0, skip=()):
    slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed))[:num_tokens].contiguous()
    slots[list(skip)] = -1
    return slots


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("latent_dim, rope_dim", [(32, 8), (7, 3), (33, 0), (512, 64), (1100, 5)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_against_spec(latent_dim, rope_dim, scale, dtype, device):
    if dtype == torch.float16:
        scale = min(scale, 1e3)  # its largest value is 65504
    kv = randn(37, latent_dim + rope_dim, dtype=dtype, device=device, scale=scale)
    weight = randn(latent_dim, dtype=dtype, device=device, seed=1)
    cache = randn(3, 64, latent_dim + rope_dim, dtype=dtype, device=device, seed=2)
    slots = slots_of(37, 192, skip=(0, 5, 36)).to(device)
    before, ref = cache.clone(), spec(kv, weight, EPS, cache, slots)
    mla_cache_write(kv, weight, EPS, cache, slots)
    assert_close(cache[..., :latent_dim], ref[..., :latent_dim], MAX_R[dtype], "latent")
    assert_same_bits(cache[..., latent_dim:], ref[..., latent_dim:].to(dtype), "rope part")
    untouched = torch.ones(192, dtype=torch.bool).index_fill(0, slots[slots >= 0].cpu(), False)
    rows = (3 * 64, latent_dim + rope_dim)
    assert_same_bits(cache.view(rows)[untouched], before.view(rows)[untouched], "other rows")


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_the_latent_has_the_bits_of_rms_norm(dtype, device):
    kv, weight = randn(20, 576, dtype=dtype, device=device), randn(512, dtype=dtype, device=device, seed=1)
    cache = torch.zeros(1, 64, 576, dtype=dtype, device=device)
    mla_cache_write(kv, weight, EPS, cache, torch.arange(20, device=device))
    assert_same_bits(cache[0, :20, :512], rms_norm(kv[:, :512], weight, EPS))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("page_size", [16, 64])
def test_strides_and_nothing_outside(page_size, dtype, device):
    kv, weight = randn(30, 41, dtype=dtype, device=device), randn(33, dtype=dtype, device=device, seed=1)
    slots = slots_of(30, 2 * page_size, skip=(3,)).to(device)
    plain = torch.zeros(2, page_size, 41, dtype=dtype, device=device)
    mla_cache_write(kv, weight, EPS, plain, slots)
    guarded = Guarded(2, 3, page_size, 41, dtype=dtype, device=device, fill=0.0)  # page p of three layers side by side
    mla_cache_write(strided(kv), weight, EPS, guarded.tensor[:, 1], slots)
    guarded.check()
    assert_same_bits(guarded.tensor[:, 1], plain)
    assert (guarded.tensor[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_skipped_tokens_may_hold_anything(device):
    kv, weight = randn(4, 40, device=device), randn(32, device=device, seed=1)
    kv[1] = torch.nan
    cache = torch.zeros(1, 64, 40, device=device)
    mla_cache_write(kv, weight, EPS, cache, torch.tensor([-1, -1, 63, -1], device=device))
    assert torch.isfinite(cache).all() and (cache[0, :63] == 0).all() and (cache[0, 63, :32] != 0).all()
    mla_cache_write(kv[:0], weight, EPS, cache, torch.empty(0, dtype=torch.int64, device=device))


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_memory_that_is_not_aligned(device, dtype):
    kv = randn(5 * 40 + 1, dtype=dtype, device=device)[1:].view(5, 40)
    weight, cache = randn(32, dtype=dtype, device=device, seed=1), torch.zeros(1, 16, 40, dtype=dtype, device=device)
    slots = slots_of(5, 16).to(device)
    ref = spec(kv, weight, EPS, cache, slots)
    mla_cache_write(kv, weight, EPS, cache, slots)
    assert_close(cache, ref, MAX_R[dtype])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_rows_are_independent_of_neighbours(device, dtype):
    kv, weight = randn(37, 576, dtype=dtype, device=device), randn(512, dtype=dtype, device=device, seed=1)
    slots = slots_of(37, 64).to(device)
    whole, alone = (torch.zeros(1, 64, 576, dtype=dtype, device=device) for _ in range(2))
    mla_cache_write(kv, weight, EPS, whole, slots)
    for t in range(0, 37, 5):
        mla_cache_write(kv[t : t + 5], weight, EPS, alone, slots[t : t + 5])
    assert_same_bits(alone, whole)


@needs_gpu
def test_graph_replay():
    kv, weight = randn(5, 576, dtype=torch.bfloat16, device="cuda"), randn(512, dtype=torch.bfloat16, device="cuda", seed=1)
    cache, slots = torch.zeros(1, 64, 576, dtype=torch.bfloat16, device="cuda"), torch.arange(5, device="cuda")
    graph_replays(lambda: mla_cache_write(kv, weight, EPS, cache, slots), [cache[:, :5]])


@needs_gpu
def test_a_cache_past_2_to_the_31_elements():
    pages = 2**31 // (64 * 576) + 2
    cache = torch.zeros(pages, 64, 576, dtype=torch.bfloat16, device="cuda")
    kv, weight = randn(2, 576, dtype=torch.bfloat16, device="cuda"), randn(512, dtype=torch.bfloat16, device="cuda", seed=1)
    mla_cache_write(kv, weight, EPS, cache, torch.tensor([pages * 64 - 1, 3], device="cuda"))
    small = torch.zeros(1, 64, 576, dtype=torch.bfloat16, device="cuda")
    mla_cache_write(kv, weight, EPS, small, torch.tensor([63, 3], device="cuda"))
    assert_same_bits(cache[-1, 63], small[0, 63])
    assert_same_bits(cache[0], small[0].index_fill(0, torch.tensor([63], device="cuda"), 0))


@needs_cpu_backend
def test_rows_are_independent_of_neighbours_and_threads():
    kv, weight, slots = randn(600, 200), randn(150, seed=1), slots_of(600, 640)
    caches = []
    for count in (1, 2):
        with threads(count):
            caches.append(torch.zeros(10, 64, 200))
            mla_cache_write(kv, weight, EPS, caches[-1], slots)
    alone = torch.zeros(10, 64, 200)
    for t in range(0, 600, 7):
        mla_cache_write(kv[t : t + 7], weight, EPS, alone, slots[t : t + 7])
    assert_same_bits(caches[1], caches[0], "2 threads")
    assert_same_bits(alone, caches[0], "in several calls")


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    cache, slots = torch.zeros(2, 64, 40, device=device), torch.tensor([1, -1, 64, 127], device=device)
    args = (randn(4, 40, device=device), randn(32, device=device, seed=1), EPS, cache, slots)
    opcheck(torch.ops.kimi_native.mla_cache_write, args)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(kv=torch.ones(4, 5, 40)), "kv must have shape"),
        (dict(norm_weight=torch.ones(41)), "norm_weight has 41 values and kv only 40"),
        (dict(norm_weight=torch.ones(32, dtype=torch.bfloat16)), "norm_weight must have the dtype"),
        (dict(cache=torch.ones(2, 64, 39)), "cache must have shape"),
        (dict(cache=torch.ones(2, 64, 40).transpose(0, 1)), "cache must be contiguous from dimension 1"),
        (dict(cache=torch.ones(2, 17, 40)), "page_size must be a positive multiple of 16, got 17"),
        (dict(slot_mapping=torch.zeros(3, dtype=torch.int64)), "slot_mapping must have shape"),
        (dict(slot_mapping=torch.zeros(4, dtype=torch.int32)), "slot_mapping must be int64"),
        (dict(eps=-1.0), "eps must not be negative"),
    ],
)
def test_bad_input_is_named(change, text):
    args = (
        dict(kv=torch.ones(4, 40), norm_weight=torch.ones(32), eps=EPS, cache=torch.ones(2, 64, 40), slot_mapping=torch.arange(4)) | change
    )
    with pytest.raises(RuntimeError, match=text):
        mla_cache_write(**args)


@pytest.mark.parametrize("device", DEVICES)
def test_raw_pointers_give_the_same_bits(device):
    c = kimi_native._C
    if c is None:
        pytest.skip("built without the pybind11 module")
    kv, weight, slots = randn(9, 40, device=device), randn(32, device=device, seed=1), slots_of(9, 64).to(device)
    want, got = torch.zeros(1, 64, 40, device=device), torch.zeros(1, 64, 40, device=device)
    mla_cache_write(kv, weight, EPS, want, slots)
    p = c.MlaCacheWriteParams()
    p.kv, p.weight, p.slot_mapping, p.cache = kv.data_ptr(), weight.data_ptr(), slots.data_ptr(), got.data_ptr()
    p.num_tokens, p.latent_dim, p.rope_dim, p.kv_stride, p.page_stride = 9, 32, 8, 40, 64 * 40
    getattr(c, "mla_cache_write_cuda" if cuda_backend(device) else "mla_cache_write_cpu")(p)
    assert_same_bits(got, want)
