from __future__ import annotations

import itertools

import pytest
import torch

from swiftk.kernels._triton import INTERPRETED
from swiftk.kernels.attention import _paged_triton, _varlen_tiles, paged, varlen_attention
from swiftk.kernels.attention.paged import paged_attention, paged_attention_out, paged_attention_ref, store_kv_, store_kv_out
from swiftk.testing.accuracy import assert_accurate
from tests.kernels.test_paged import make, offsets
from tests.triton.conftest import ON_CUDA
from tests.triton.launched import asserts, dots_like_a_gpus, operators_take

EMPTY = float("-inf")
LONG = pytest.mark.long
# lens_q, seqlens, heads, kv_heads, head_dim, block_size, window, softcap, sinks
CASES = [
    ([1, 1], [1, 70], 4, 2, 16, 16, (-1, -1), 0.0, False),
    ([3, 0, 20], [3, 9, 40], 2, 1, 19, 7, (-1, -1), 3.0, True),
    ([2], [70], 3, 1, 8, 128, (33, -1), 0.0, False),
    pytest.param(([70, 1], [131, 40], 4, 2, 40, 1, (-1, -1), 3.0, True), marks=LONG),
    pytest.param(([1, 1], [77, 40], 2, 1, 512, 16, (64, -1), 1.5, False), marks=LONG),
    pytest.param(([2, 1, 1], [2, 40, 67], 7, 7, 1, 3, (-1, -1), 0.0, True), marks=LONG),
    pytest.param(([40, 1], [140, 1], 20, 1, 96, 32, (0, 5), 0.0, False), marks=LONG),
]


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    """Several splits of several tiles of keys for sequences of a hundred."""
    tile, small = _paged_triton._tile, dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2)
    monkeypatch.setattr(_paged_triton, "_tile", lambda *args: tile(*args) | {"KEYS": 16, "SPLIT": 32})
    monkeypatch.setattr(_varlen_tiles, "blocks", lambda *args: small)


def on(device, case, dtype):
    """q, (k_cache, v_cache, block_table, cache_seqlens), cu_seqlens_q, options."""
    with operators_take(dtype):
        q, cache, cu_q, options = make(case, dtype)
    if options["sinks"] is not None:
        options["sinks"] = options["sinks"].to(device)
    return q.to(device), [t.to(device) for t in cache], cu_q.to(device), options


def walk(monkeypatch, walks: bool) -> None:
    monkeypatch.setattr(_paged_triton, "PROGRAMS", 0 if walks else 1 << 30)


@pytest.mark.parametrize("case", CASES)
def test_values_and_that_merged_programs_are_one_that_walks(case, dtype, device, monkeypatch):
    q, cache, cu_q, options = on(device, case, dtype)
    with operators_take(dtype):
        walk(monkeypatch, True)
        got = paged_attention(q, *cache, cu_q, return_lse=True, **options)
        walk(monkeypatch, False)
        split = paged_attention(q, *cache, cu_q, return_lse=True, **options)
    assert torch.equal(got[0], split[0]) and torch.equal(got[1], split[1])
    plain = paged_attention_ref(q, *cache, cu_q, **options)
    k_cache, v_cache, *tables = cache
    options["sinks"] = None if options["sinks"] is None else options["sinks"].double()
    exact = paged_attention_ref(q.double(), k_cache.double(), v_cache.double(), *tables, cu_q, **options)
    for name, *values in zip(("out", "lse"), got, plain, exact, strict=True):
        assert_accurate(*values, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16 if ON_CUDA else torch.float32], ids=str)
@pytest.mark.parametrize("case", [
    ([20, 9], [50, 40], 2, 1, 16, 16, (40, -1), 0.0, False), ([20, 3], [50, 40], 2, 2, 24, 7, (-1, -1), 3.0, True),
], ids=["window", "sinks"])  # fmt: skip
def test_a_prefill_in_any_chunks_has_the_bits_of_varlen_attention(case, dtype, device):
    """A query's row has the same bits in a prefill, in chunks of it, decoded alone, beside another sequence, and where its keys
    lie in a pack."""
    q, cache, cu_q, options = on(device, case, dtype)
    (first_q, second_q), (first_k, second_k) = case[0], case[1]
    k_cache, v_cache, table, lens = cache
    cache[1] = v_cache = v_cache.transpose(1, 2).contiguous().transpose(1, 2)  # of other strides than k_cache
    options |= dict(return_lse=True)
    with operators_take(dtype), dots_like_a_gpus():
        k, v = (paged.gather_ref(x, table, lens) for x in (k_cache, v_cache))
        out, lse = varlen_attention(q, k, v, cu_q, offsets([first_k, second_k]).to(device), causal=True, **options)
        options |= dict(numerics="invariant")
        for got, want in zip(paged_attention(q, *cache, cu_q, **options), (out, lse), strict=True):
            assert torch.equal(got, want)
        begin = first_k - first_q
        for i, (first, last) in enumerate(itertools.pairwise([0, 1, 3, first_q])):
            beside = [second_q, 1, 0, 3][i % 4]  # queries of the other sequence in this step; its length shrinks with them
            rows = torch.cat([q[first_q : first_q + beside], q[first:last]])
            seqlens = torch.tensor([second_k - second_q + beside, begin + last], dtype=torch.int32, device=device)
            cu = offsets([beside, last - first]).to(device)
            part = paged_attention(rows, k_cache, v_cache, table[[1, 0]], seqlens, cu, **options)
            assert torch.equal(part[0][beside:], out[first:last]) and torch.equal(part[1][:, beside:], lse[:, first:last])
            assert torch.equal(part[0][:beside], out[first_q : first_q + beside])


@pytest.mark.parametrize("walks", [False, True])
def test_padding(walks, dtype, device, monkeypatch):
    """Sequences of length 0, without queries, and tokens of no sequence."""
    walk(monkeypatch, walks)
    q, cache, _, options = on(device, ([1, 2, 0, 1], [40, 0, 33, 20], 2, 1, 16, 16, (-1, -1), 0.0, True), dtype)
    with operators_take(dtype):
        out, lse = paged_attention(q, *cache, offsets([1, 1, 0, 1]).to(device), return_lse=True, **options)
        alone = paged_attention(q[:1], *cache[:2], cache[2][:1], cache[3][:1], **options)
        last = paged_attention(q[2:3], *cache[:2], cache[2][3:], cache[3][3:], **options)
        nothing = paged_attention(q[:0], *cache[:2], cache[2][:0], cache[3][:0], return_lse=True, **options)
    assert torch.equal(out[:1], alone) and torch.equal(out[2:3], last)
    assert (out[[1, 3]] == 0).all() and (lse[:, [1, 3]] == EMPTY).all()
    assert nothing[0].shape == (0, 2, 16) and nothing[1].shape == (2, 0)


def test_more_sequences_than_are_looked_at_at_once(device):
    lens = [0] * 128 + [3, 20]
    q, cache, cu_q, options = on(device, ([0] * 128 + [1, 1], lens, 1, 1, 16, 2, (-1, -1), 0.0, False), torch.float32)
    got = paged_attention(q, *cache, cu_q, **options)
    exact = paged_attention_ref(q.double(), cache[0].double(), cache[1].double(), *cache[2:], cu_q, **options)[0]
    assert_accurate(got, paged_attention_ref(q, *cache, cu_q, **options)[0], exact)


def test_more_queries_than_keys_and_no_sequences(device):
    """The first queries see nothing (on the CPU an error); with no sequence no query does."""
    q, cache, _, options = on(device, ([3, 5], [40, 3], 2, 1, 16, 16, (-1, -1), 0.0, True), torch.float32)
    options["numerics"] = "invariant"
    with dots_like_a_gpus():
        out, lse = paged_attention(q, *cache, offsets([3, 5]).to(device), return_lse=True, **options)
        fit = paged_attention(q[[0, 1, 2, 5, 6, 7]], *cache, offsets([3, 3]).to(device), **options)
    assert torch.equal(out[[0, 1, 2, 5, 6, 7]], fit)
    assert (out[3:5] == 0).all() and (lse[:, 3:5] == EMPTY).all()
    out, lse = paged_attention(q, *cache[:2], cache[2][:0], cache[3][:0], offsets([]).to(device), return_lse=True)
    assert (out == 0).all() and (lse == EMPTY).all()


@pytest.mark.parametrize("numerics", ["auto", "invariant"])
def test_strides(numerics, device):
    """q as a slice of a fused projection, a cache with its heads outside of its tokens, a table within a wider one, out inside
    of a wider buffer; the tokens of no sequence are not written."""
    _, cache, cu_q, _ = on(device, ([1, 5], [10, 20], 4, 2, 24, 16, (-1, -1), 0.0, False), torch.float32)
    qkv = torch.randn(8, 8 * 24, device=device)
    q = qkv[:, : 4 * 24].view(8, 4, 24)
    want = paged_attention(q.contiguous(), *cache, cu_q, numerics=numerics)
    k_cache, v_cache = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in cache[:2])
    table = torch.cat([cache[2], torch.full((2, 3), 10**6, dtype=torch.int32, device=device)], 1)[:, :-3]
    wide = qkv.new_full((8, 4 * 24 + 5), torch.nan)
    out = wide[:, : 4 * 24].view(8, 4, 24)
    paged_attention_out(q, k_cache, v_cache, table, cache[3], cu_q, None, 24**-0.5, 0.0, -1, 0, out, numerics=numerics)
    assert torch.equal(out[:6], want[:6]) and wide[:, 4 * 24 :].isnan().all() and wide[6:].isnan().all()


@pytest.mark.parametrize("numerics", ["auto", "invariant"])
def test_blocks_and_lengths_out_of_range_are_cut(numerics, device):
    """What they give means nothing; nothing is read outside of the cache."""
    q, (k_cache, v_cache, table, _), cu_q, _ = on(
        device, ([1, 1], [10, 20], 2, 1, 16, 16, (-1, -1), 0.0, False), torch.float32
    )  # fmt: skip
    k_cache, v_cache = k_cache.nan_to_num(), v_cache.nan_to_num()
    for lens in ((10, 20), (2**31 - 1, -(2**31))):
        for far in (2 * 10**9, -2 * 10**9):
            tables = table.clone().fill_(far), torch.tensor(lens, dtype=torch.int32, device=device)
            assert paged_attention(q, k_cache, v_cache, *tables, cu_q, numerics=numerics).isfinite().all()


@pytest.mark.skipif(not INTERPRETED, reason="an assertion on a device ends the process's use of it")
@pytest.mark.parametrize("numerics", ["auto", "invariant"])
def test_values_are_asserted_in_debug_mode(numerics, device):
    """What is read and belongs to nothing; the table's entries past a sequence are not read."""
    q, cache, cu_q, options = on(device, ([1, 1], [40, 33], 2, 1, 16, 16, (-1, -1), 0.0, False), torch.float32)
    *_, table, lens = cache
    table[1, 3:] = 1 << 30

    def change(of: torch.Tensor, at: tuple[int, ...], value: int, message: str) -> None:
        old, of[at] = of[at].item(), value
        with asserts(f"paged_attention: {message}"):
            paged_attention(q, *cache, cu_q, numerics=numerics, **options)
        of[at] = old

    for bad in (-1, len(cache[0])):
        change(table, (1, 2), bad, "block_table has a block that the cache has not")
    change(lens, (0,), 16 * table.shape[1] + 1, "cache_seqlens is beyond the block table")
    change(cu_q, (2,), 3, "cu_seqlens_q is beyond the tokens of q")
    with pytest.raises(pytest.fail.Exception), asserts("block_table"):
        paged_attention(q, *cache, cu_q, numerics=numerics, **options)


@pytest.mark.skipif(not INTERPRETED, reason="an assertion on a device ends the process's use of it")
@pytest.mark.parametrize("slot", [-2, 21])
def test_slots_are_asserted_in_debug_mode(slot, device):
    k, cache = torch.randn(2, 3, 24, device=device), torch.zeros(7, 3, 3, 24, device=device)
    with asserts("store_kv_: slot_mapping is out of range"):
        store_kv_(k, k, cache, cache.clone(), torch.tensor([0, slot], device=device))


def test_store_writes_its_slots_and_nothing_else(dtype, device):
    qkv = torch.randn(7, 7, 24, device=device).to(dtype)
    k, v = qkv[:, 1:4], qkv[:, 4:]
    slots = torch.tensor([13, -1, 0, 7, -1, 20, 8], device=device)
    for turned in (False, True):
        k_cache, v_cache = (torch.full((7, 3, 3, 24), torch.nan, dtype=dtype, device=device) for _ in range(2))
        if turned:
            k_cache, v_cache = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_cache, v_cache))
        with operators_take(dtype):
            store_kv_(k, v, k_cache, v_cache, slots)
        for cache, rows in ((k_cache, k), (v_cache, v)):
            flat = cache.reshape(-1, 3, 24)
            assert torch.equal(flat[slots[slots >= 0]], rows[slots >= 0])
            flat[slots[slots >= 0]] = torch.nan
            assert flat.isnan().all()


def test_compile(device):
    q, cache, cu_q, _ = on(device, ([1, 2], [10, 20], 2, 2, 16, 16, (-1, -1), 0.0, False), torch.float32)
    k, v = (torch.randn(2, 2, 16, device=device) for _ in range(2))
    slots = torch.tensor([3, 7], device=device)

    def step(k_cache, v_cache):
        store_kv_(k, v, k_cache, v_cache, slots)
        return paged_attention(q, k_cache, v_cache, *cache[2:], cu_q, return_lse=True)

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        caches = [t.clone() for t in cache[:2]]
        results.append((*f(*caches), *(t.nan_to_num() for t in caches)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not ON_CUDA, reason="a CUDA graph")
@pytest.mark.parametrize("walks", [False, True])
def test_a_graph_reads_lengths_tables_and_slots_when_it_runs(walks, monkeypatch):
    walk(monkeypatch, walks)
    device = torch.device("cuda")
    q, cache, cu_q, _ = on(device, ([1, 1, 1], [70, 20, 33], 4, 2, 16, 16, (-1, -1), 0.0, False), torch.bfloat16)
    k, v = (torch.randn(3, 2, 16, device=device, dtype=q.dtype) for _ in range(2))
    slots, out = torch.full((3,), -1, device=device), torch.full_like(q, torch.nan)

    def step():
        store_kv_out(k, v, *cache[:2], slots)
        paged_attention_out(q, *cache, cu_q, None, 0.25, 0.0, -1, 0, out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i, n in enumerate(cache[3].tolist()):  # each sequence grows by one token: the next slot of its last block
        slots[i] = cache[2][i, n // 16] * 16 + n % 16
    cache[3] += 1
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, paged_attention(q, *cache)) and torch.equal(cache[0].view(-1, 2, 16)[slots], k)
