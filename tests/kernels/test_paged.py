"""paged_attention and store_kv_: values, bit-equality with varlen_attention, what is never read, padding, tapes, errors."""

from __future__ import annotations

import itertools

import pytest
import torch

from swiftk.kernels._native import native
from swiftk.kernels.attention import paged_attention, store_kv_, varlen_attention
from swiftk.kernels.attention.paged import paged_attention_out, paged_attention_ref, store_kv_out
from swiftk.testing.accuracy import assert_accurate

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
EMPTY = float("-inf")
# lens_q, seqlens, heads, kv_heads, head_dim, block_size, window, softcap, sinks
CASES = [
    ([1, 1, 1], [1, 70, 200], 4, 2, 64, 16, (-1, -1), 0.0, False),
    ([1, 1, 1, 1], [64, 65, 129, 3], 2, 2, 128, 64, (-1, -1), 0.0, True),
    ([5, 1, 0, 70], [5, 131, 9, 70], 4, 2, 40, 7, (-1, -1), 3.0, True),
    ([1, 2, 3], [300, 90, 33], 8, 1, 16, 128, (50, -1), 0.0, False),
    ([1, 4], [100, 140], 3, 3, 256, 1, (-1, -1), 20.0, True),
    ([40, 1], [140, 1], 6, 2, 19, 16, (0, 5), 0.0, False),
    ([1, 1], [77, 128], 2, 1, 512, 16, (64, -1), 1.5, False),
    ([2, 1, 1], [2, 40, 127], 7, 7, 1, 3, (-1, -1), 0.0, True),
    ([1, 3], [250, 67], 5, 1, 96, 32, (-1, -1), 0.0, True),
]


def offsets(lens):
    return torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32)


class Paged:
    """Sequences of random keys, packed and in a cache whose blocks are shuffled, whose unused slots are NaN and whose unused
    table entries point nowhere."""

    def __init__(self, seqlens, kv_heads, dim, size, dtype):
        self.cu = offsets(seqlens)
        self.k, self.v = (torch.randn(sum(seqlens), kv_heads, dim, dtype=torch.float64).to(dtype) for _ in range(2))
        used = [-(-n // size) for n in seqlens]
        ids = torch.randperm(sum(used) + 2).int()
        self.table = torch.full((len(seqlens), max(used, default=0) + 2), -7, dtype=torch.int32)
        slots = []
        for i, (n, first) in enumerate(zip(seqlens, offsets(used).tolist(), strict=False)):
            row = ids[first : first + used[i]]
            self.table[i, : used[i]] = row
            slots.append((row.long()[:, None] * size + torch.arange(size)).flatten()[:n])
        self.slots = torch.cat([torch.empty(0, dtype=torch.int64), *slots])
        self.k_cache, self.v_cache = (torch.full((len(ids), size, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2))
        store_kv_(self.k, self.v, self.k_cache, self.v_cache, self.slots)
        self.lens = torch.tensor(seqlens, dtype=torch.int32)

    def __iter__(self):  # as paged_attention takes them
        return iter((self.k_cache, self.v_cache, self.table, self.lens))


def make(case, dtype):
    lens_q, seqlens, heads, kv_heads, dim, size, window, softcap, with_sinks = case
    q = torch.randn(sum(lens_q), heads, dim, dtype=torch.float64).to(dtype)
    sinks = torch.randn(heads, dtype=torch.float64).to(dtype) if with_sinks else None
    cache = Paged(seqlens, kv_heads, dim, size, dtype)
    return q, cache, offsets(lens_q), dict(window_size=window, softcap=softcap, sinks=sinks)


def same(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def check_equals_varlen(case, dtype, isa, threads):
    q, cache, cu_q, options = make(case, dtype)
    options |= dict(return_lse=True, isa=isa)
    want = varlen_attention(q, cache.k, cache.v, cu_q, cache.cu, causal=True, **options)
    for n in (1, 2):
        same(threads(n, lambda: paged_attention(q, *cache, cu_q, **options)), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values(case, dtype, isa):
    q, cache, cu_q, options = make(case, dtype)
    got = paged_attention(q, *cache, cu_q, return_lse=True, isa=isa, **options)
    plain = paged_attention_ref(q, *cache, cu_q, **options)
    k_cache, v_cache, *tables = cache
    options["sinks"] = None if options["sinks"] is None else options["sinks"].double()
    exact = paged_attention_ref(q.double(), k_cache.double(), v_cache.double(), *tables, cu_q, **options)
    for name, *values in zip(("out", "lse"), got, plain, exact, strict=True):
        assert_accurate(*values, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_varlen_attention(case, dtype, isa, thread_count):
    check_equals_varlen(case, dtype, isa, thread_count)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 40, 64, 96, 128, 256])
def test_full_product(dim, dtype, isa, thread_count):
    lens = [([1, 1, 1], [1, 64, 190]), ([2, 0, 3], [65, 9, 130]), ([70, 1], [131, 200]), ([8, 9], [8, 73])]
    heads = [(1, 1), (4, 2), (3, 1), (4, 1), (5, 1), (8, 1)]
    options = [((-1, -1), 0.0, False), ((20, -1), 0.0, True), ((-1, -1), 5.0, True), ((70, -1), 2.0, False)]
    sizes = itertools.cycle([1, 7, 16, 64, 128])
    for pair, counts, rest in itertools.product(lens, heads, options):
        check_equals_varlen((*pair, *counts, dim, next(sizes), *rest), dtype, isa, thread_count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "window"), [((4, 2), 64, (-1, -1)), ((6, 1), 40, (50, -1))])
def test_a_prefill_in_any_chunks(heads, dim, window, dtype, isa):
    """A query's row has the same bits in a prefill, in chunks of it, decoded alone, and beside any other sequences."""
    q, cache, cu_q, _ = make(([197, 40], [197, 40], *heads, dim, 16, window, 0.0, False), dtype)
    options = dict(window_size=window, return_lse=True, isa=isa)
    out, lse = paged_attention(q, *cache, cu_q, **options)
    for cuts in ([0, 1, 2, 66, 67, 197], [0, 63, 64, 65, 128, 130, 194, 197]):
        for i, (first, last) in enumerate(itertools.pairwise(cuts)):
            beside = [40, 1, 0, 3, 2][i % 5]  # queries of the other sequence in this step; its length shrinks with them
            rows = torch.cat([q[197 : 197 + beside], q[first:last]])
            lens = torch.tensor([beside, last], dtype=torch.int32)
            step = cache.table[[1, 0]], lens, offsets([beside, last - first])
            part = paged_attention(rows, cache.k_cache, cache.v_cache, *step, **options)
            same((part[0][beside:], part[1][:, beside:]), (out[first:last], lse[:, first:last]))
            same((part[0][:beside], part[1][:, :beside]), (out[197 : 197 + beside], lse[:, 197 : 197 + beside]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_a_batch(dtype, isa):
    q, cache, _, _ = make(([1] * 6, [300, 1, 64, 65, 17, 128], 4, 2, 64, 16, (-1, -1), 0.0, False), dtype)
    out, lse = paged_attention(q, *cache, return_lse=True, isa=isa)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    some = paged_attention(q[order], *list(cache)[:2], cache.table[order], cache.lens[order], return_lse=True, isa=isa)
    same(some, (out[order], lse[:, order]))


def test_threads_that_a_long_context_pays_for(isa, thread_count):
    """One sequence, one KV head: its query heads are cut between the threads, and no bit moves."""
    for lens_q, seqlen in (([1], 3000), ([3], 2100), ([1, 1], 1500)):
        case = (lens_q, [seqlen] * len(lens_q), 8, 1, 64, 16, (-1, -1), 0.0, False)
        check_equals_varlen(case, torch.float32, isa, thread_count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding(dtype, isa):
    q, cache, _, options = make(([1, 2, 0], [20, 0, 33], 4, 2, 16, 16, (-1, -1), 0.0, True), dtype)
    cu_q = offsets([1, 1, 0])
    out, lse = paged_attention(q, *cache, cu_q, return_lse=True, isa=isa, **options)
    alone = paged_attention(q[:1], *list(cache)[:2], cache.table[:1], cache.lens[:1], isa=isa, **options)
    assert torch.equal(out[:1], alone) and (out[1:] == 0).all() and (lse[:, 1:] == EMPTY).all()
    nothing = paged_attention(q[:0], *list(cache)[:2], cache.table[:0], cache.lens[:0], return_lse=True, isa=isa)
    assert nothing[0].shape == (0, 4, 16) and nothing[1].shape == (4, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, isa):
    """q, k, v as slices of a fused projection, a cache with its heads outside of its tokens, out inside of a wider buffer."""
    _, cache, cu_q, _ = make(([1, 5], [30, 40], 4, 2, 24, 16, (-1, -1), 0.0, False), dtype)
    qkv = torch.randn(6, 8 * 24, dtype=torch.float64).to(dtype)
    q = qkv[:, : 4 * 24].view(6, 4, 24)
    want, want_lse = paged_attention(q.contiguous(), *cache, cu_q, return_lse=True, isa=isa)
    same([paged_attention(q, *cache, cu_q, isa=isa)], [want])
    k_cache, v_cache = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cache.k_cache, cache.v_cache))
    same([paged_attention(q, k_cache, v_cache, cache.table, cache.lens, cu_q, isa=isa)], [want])
    wide = qkv.new_full((7, 4 * 24 + 5), torch.nan)
    lse = torch.full_like(want_lse, torch.nan)
    tables = cache.table, cache.lens, cu_q
    out = wide[:6, : 4 * 24].view(6, 4, 24)
    for kept in (None, lse):
        wide.fill_(torch.nan)
        paged_attention_out(q, k_cache, v_cache, *tables, None, 24**-0.5, 0.0, -1, 0, out, kept, isa)
        assert torch.equal(out, want) and wide[:6, 4 * 24 :].isnan().all() and wide[6:].isnan().all()
    assert torch.equal(lse, want_lse)


# --- store_kv_ ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [5, 700])
def test_store_writes_its_slots_and_nothing_else(tokens, dtype, thread_count):
    qkv = torch.randn(tokens, 8, 24, dtype=torch.float64).to(dtype)
    k, v = qkv[:, 4:6], qkv[:, 6:]
    slots = torch.randperm(2 * tokens)[:tokens]
    slots[::3] = -1
    kept = slots >= 0
    for turned, n in itertools.product((False, True), (1, 2)):
        shape = (tokens, 2, 2, 24)
        k_cache, v_cache = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        if turned:
            k_cache, v_cache = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_cache, v_cache))
        thread_count(n, lambda: store_kv_(k, v, k_cache, v_cache, slots))  # noqa: B023
        for cache, rows in ((k_cache, k), (v_cache, v)):
            flat = cache.reshape(-1, 2, 24)
            assert torch.equal(flat[slots[kept]], rows[kept])
            flat[slots[kept]] = torch.nan
            assert flat.isnan().all()


# --- contracts ----------------------------------------------------------------------------------------------------


def test_a_tape_reads_lengths_tables_and_slots_when_it_runs():
    q, cache, _, _ = make(([1, 1, 1], [70, 20, 33], 4, 2, 16, 16, (-1, -1), 0.0, False), torch.float32)
    k, v, slots = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.full((3,), -1)
    out, cu_q = torch.full_like(q, torch.nan), offsets([1, 1, 1])
    tape = native().Tape()
    tape.start()
    store_kv_out(k, v, cache.k_cache, cache.v_cache, slots)
    paged_attention_out(q, *cache, cu_q, None, 0.25, 0.0, -1, 0, out)
    tape.stop()
    assert out.isnan().all()
    tape.run()
    assert torch.equal(out, paged_attention(q, *cache))
    for i, n in enumerate(cache.lens.tolist()):  # each sequence grows by one token: the next slot of its last block
        slots[i] = cache.table[i, n // 16] * 16 + n % 16
    cache.lens += 1
    cu_q.copy_(offsets([1, 1, 0]))
    out.fill_(torch.nan)
    tape.run()
    assert torch.equal(cache.k_cache.view(-1, 2, 16)[slots], k) and torch.equal(cache.v_cache.view(-1, 2, 16)[slots], v)
    assert torch.equal(out[:2], paged_attention(q, *cache)[:2]) and out[2:].isnan().all()
    cache.lens[1] = 10**6
    with pytest.raises(ValueError, match="paged_attention: cache_seqlens has 1000000 at index 1"):
        tape.run()


def test_opcheck_and_compile():
    q, cache, cu_q, _ = make(([1, 5], [30, 40], 4, 2, 16, 16, (-1, -1), 0.0, False), torch.float32)
    options = torch.randn(4), 0.25, 0.0, -1, 0, "auto", "auto"
    torch.library.opcheck(torch.ops.swiftk.paged_attention.default, (q, *cache, cu_q, *options))
    k, v = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    caches = torch.zeros(4, 4, 2, 16), torch.zeros(4, 4, 2, 16)
    torch.library.opcheck(torch.ops.swiftk.store_kv_.default, (k, v, *caches, torch.tensor([7, -1, 0])))

    def step(k, v, k_cache, v_cache, slots):
        store_kv_(k, v, k_cache, v_cache, slots)
        return paged_attention(q, k_cache, v_cache, cache.table, cache.lens, cu_q, return_lse=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for f in (step, compiled):
        k_cache, v_cache, *_ = (x.clone() for x in cache)
        results.append((*f(k[:2], v[:2], k_cache, v_cache, cache.slots[[3, 41]]), k_cache.nan_to_num(), v_cache.nan_to_num()))
    same(*results)


# --- errors -------------------------------------------------------------------------------------------------------

Q, C = torch.randn(3, 4, 8), torch.randn(6, 16, 2, 8)
TABLE, LENS = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), torch.tensor([20, 32], dtype=torch.int32)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cache_seqlens=int32(20, 33)), r"cache_seqlens has 33 at index 1, wants 0 .. 32: block_table has 2 blocks of 16"),
        (dict(cache_seqlens=int32(-1, 32)), "cache_seqlens has -1 at index 0, wants 0 .. 32"),
        (dict(cache_seqlens=int32(20, 1)), r"cache_seqlens has 1 at index 1, wants 0 \(padding\) or at least 2, the"),
        (dict(block_table=int32(0, 1, 2, 6).view(2, 2)), r"block_table has 6 at \[1, 1\], wants 0 .. 5, a block of k_cache"),
        (dict(block_table=int32(0, -1, 2, 5).view(2, 2)), r"block_table has -1 at \[0, 1\], wants 0 .. 5"),
        (dict(cu_seqlens_q=int32(0, 2, 1)), "cu_seqlens_q has 1 at index 2, wants at least 2, the value before it"),
        (dict(cu_seqlens_q=int32(1, 2, 3)), "cu_seqlens_q has 1 at index 0, wants 0"),
        (dict(cu_seqlens_q=int32(0, 2, 4)), "cu_seqlens_q has 4 at index 2, wants at most 3, the number of tokens of q"),
        (dict(cu_seqlens_q=int32(0, 3)), r"cu_seqlens_q has shape \(2,\), wants \(3,\): block_table has 2 rows"),
        (dict(cu_seqlens_q=None), "q has 3 tokens, wants 2, one per row of block_table, or cu_seqlens_q"),
        (dict(cache_seqlens=LENS.long()), r"cache_seqlens has dtype torch.int64, wants torch.int32 \(cache_seqlens.int\(\)\)"),
        (dict(cache_seqlens=LENS[:1]), r"cache_seqlens has shape \(1,\), wants \(2,\): block_table has 2 rows"),
        (dict(block_table=TABLE[0]), r"block_table has shape \(2,\), wants \(batch, max_blocks\)"),
        (dict(q=Q[0]), r"q has shape \(4, 8\), wants \(total_q, heads, head_dim\)"),
        (dict(q=Q[:, :3]), "q has 3 heads, wants a multiple of the 2 heads"),
        (dict(q=Q[..., :7]), r"k_cache has shape \(6, 16, 2, 8\), q \(3, 4, 7\) needs \(blocks, block_size, kv_heads, 7\)"),
        (dict(v_cache=C[:5]), r"v_cache has shape \(5, 16, 2, 8\), k_cache \(6, 16, 2, 8\) needs"),
        (dict(k_cache=C.transpose(2, 3).contiguous().transpose(2, 3)), "k_cache has .* strides .* wants .* a contiguous"),
        (dict(k_cache=C[:, :0], v_cache=C[:, :0]), "k_cache has shape .* wants block_size >= 1"),
        (dict(v_cache=C.double()), "v_cache has dtype torch.float64, wants torch.float32 like q"),
        (dict(window_size=(-2, 0)), r"window_size has \(-2, 0\), wants \(left, right\)"),
        (dict(softmax_scale=float("inf")), "softmax_scale has inf, wants a finite number"),
        (dict(softcap=-1.0), "softcap has -1.0, wants a finite number >= 0"),
        (dict(sinks=torch.zeros(2)), r"sinks has shape \(2,\), q \(3, 4, 8\) needs \(4,\)"),
        (dict(q=Q.clone().requires_grad_()), r"has requires_grad, wants torch.no_grad\(\); use varlen_attention"),
        (dict(block_table=[[0]]), "block_table has type list, wants a torch.Tensor"),
        (dict(cache_seqlens=[1, 2]), "cache_seqlens has type list, wants a torch.Tensor"),
        (dict(cu_seqlens_q=[0, 1, 3]), "cu_seqlens_q has type list, wants a torch.Tensor"),
        (dict(isa="sse9"), "isa has 'sse9', wants one of"),
        (dict(numerics="exact"), "numerics has 'exact', wants"),
    ],
)  # fmt: skip
def test_errors(change, message):
    arguments = dict(q=Q, k_cache=C, v_cache=C, block_table=TABLE, cache_seqlens=LENS, cu_seqlens_q=int32(0, 1, 3)) | change
    with pytest.raises(ValueError, match="paged_attention: .*" + message):
        paged_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(slot_mapping=torch.tensor([0, 96, 3])), r"slot_mapping has 96 at token 1, wants -1 \(skip\) or 0 .. 95, block"),
        (dict(slot_mapping=torch.tensor([0, 5, -2])), "slot_mapping has -2 at token 2, wants -1"),
        (dict(slot_mapping=int32(0, 1, 2)), r"slot_mapping has dtype torch.int32, wants torch.int64 \(slot_mapping.long\(\)\)"),
        (dict(slot_mapping=[0, 1, 2]), "slot_mapping has type list, wants a torch.Tensor"),
        (dict(slot_mapping=torch.tensor([0])), r"slot_mapping has shape \(1,\), k \(3, 2, 8\) needs \(3,\)"),
        (dict(k=Q), r"v has shape \(3, 2, 8\), k \(3, 4, 8\) needs \(3, 4, 8\)"),
        (dict(k=Q, v=Q), r"k_cache has shape \(6, 16, 2, 8\), k \(3, 4, 8\) needs \(blocks, block_size, 4, 8\)"),
        (dict(k=Q[0]), r"k has shape \(4, 8\), wants \(tokens, kv_heads, head_dim\)"),
        (dict(k=Q[:, :2].clone().requires_grad_()), r"has requires_grad, wants torch.no_grad\(\)"),
    ],
)
def test_store_errors(change, message):
    before = C.clone()
    arguments = dict(k=Q[:, :2], v=Q[:, 2:], k_cache=C, v_cache=C.clone(), slot_mapping=torch.tensor([0, 1, 2])) | change
    with pytest.raises(ValueError, match="store_kv_: .*" + message):
        store_kv_(**arguments)
    assert torch.equal(C, before)
