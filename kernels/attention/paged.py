"""Attention over a paged cache: `varlen_attention` (causal) whose keys and values lie in blocks that a table names, and
`store_kv_`, which writes them there.

Sources: Kwon et al. 2023 (block tables); the formula, its masks and its tiles are those of varlen.py, in the same C++ body.
Position p of sequence i is token p % block_size of block block_table[i, p / block_size]; the queries of a sequence are its last
positions. A query's out and lse depend on that query and the keys it sees alone, bit for bit: they equal varlen_attention's on
the gathered keys for any block size, order of the blocks, chunks of a prefill, mix of sequences and thread count.
Bytes: q and out once, K and V of every sequence once per 192 rows (query heads of a KV head times its queries): at decoding,
2 seqlen kv_heads head_dim elements a sequence. FLOPs: 4 d per query head and visible key.
A cache whose tokens of a head lie together, torch.empty(blocks, kv_heads, block_size, head_dim).transpose(1, 2), decodes
fastest: tokens 2 or 4 KiB apart share sets of the first-level cache.
Not supported: gradients (use varlen_attention), a quantised cache, keys beyond a query (no padding inside a sequence), fp64 on
CUDA.
"""

from __future__ import annotations

from typing import Any

import torch

from swiftk.kernels._checks import check_floating, check_shape, check_tensor
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import jit, launch, next_power_of_2, on_gpu, ship, tl, tl_acc
from swiftk.kernels.attention.varlen import _address, _check, _check_int32, _rows, _strides, _window, varlen_attention_ref
from swiftk.kernels.linear import check_numerics

# --- reference ---------------------------------------------------------------------------------------------------


def gather_ref(cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor) -> torch.Tensor:
    """(blocks, block_size, kv_heads, d) -> (sum of cache_seqlens, kv_heads, d): the sequences one after the other."""
    size = cache.shape[1]
    lens = cache_seqlens.tolist()
    rows = [cache[table[: -(-n // size)].long()].flatten(0, 1)[:n] for table, n in zip(block_table, lens, strict=True)]
    return torch.cat([cache.new_empty(0, *cache.shape[2:]), *rows])


def paged_attention_ref(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None, **options,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """varlen_attention's reference on the gathered keys and values; shapes as in `paged_attention` -> out, lse."""
    cu_q = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) if cu_seqlens_q is None else cu_seqlens_q
    cu_k = torch.cat([cache_seqlens.new_zeros(1), cache_seqlens.cumsum(0)]).int()
    k, v = (gather_ref(cache, block_table, cache_seqlens) for cache in (k_cache, v_cache))
    return varlen_attention_ref(q, k, v, cu_q, cu_k, causal=True, **options)


# --- Triton ------------------------------------------------------------------------------------------------------
#
# The keys of a sequence are cut into splits of SPLIT positions. A program has the query heads of one KV head and of some tokens
# as the ROWS of its products, and gives of each split the state (top, sum, acc): out = acc / sum, lse = top + log sum, the top
# in units of log 2. States are merged in the order of the splits. Where there are few tiles of rows each split is a program of
# its own and a second kernel merges, else a program walks through its splits: the same operations one by one (nothing is
# fused), so the choice, which shapes alone decide, changes no bit. A split that a row does not see is a state of weight 0.
# Nothing is read on the host: tiles and splits past the real ones end at once, so a CUDA graph stays right as lengths change.
# Tiles from registers and shared memory (`make compile-gpu`); no GPU has measured them.

SPLIT = 512  # positions: at head_dim 128 in bf16 256 KiB of K and V are read for each 2 KiB of a group's partial results
PROGRAMS = 2048  # about 15 for each multiprocessor of an H200: with as many tiles, splitting the keys gains nothing
PARTIAL_BYTES = 256 << 20  # of partial results, at most; above it programs walk through the splits


def _tile(group: int, dim: int, itemsize: int, total_q: int, batch: int, numerics: str) -> dict[str, Any]:
    """ROWS and KEYS of a tile. With numerics "auto" calls that have many queries a sequence take more rows: K and V are then
    read less often, but the multiply instruction and so the order of its sums may be another than for a decoded token."""
    width = max(16, next_power_of_2(dim))
    few = max(16, next_power_of_2(group))
    many = max(few, min(64, 8192 // width))  # two accumulators (ROWS, width) of at most 64 registers a thread each
    rows = many if numerics == "auto" and total_q * group > 16 * batch else few
    return {
        "ROWS": rows, "KEYS": max(16, min(64, 16384 // (width * itemsize))), "WIDTH": width, "SPLIT": SPLIT,
        "num_warps": 4 if rows * width <= 4096 else 8, "num_stages": 3,
    }  # fmt: skip


@jit
def _tanh(x):
    """1 - 2 / (exp(2 |x|) + 1), and near 0, where that cancels, the Taylor series to x^11: 2e-8 off at 0.4."""
    a = tl.abs(x)
    y = x * x
    t = tl.exp2(-2.885390081777927 * a)
    far = (1.0 - t) / (1.0 + t)
    near = 62.0 / 2835.0 - y * (1382.0 / 155925.0)
    near = a * (1.0 - y * (1.0 / 3.0 - y * (2.0 / 15.0 - y * (17.0 / 315.0 - y * near))))
    far = tl.where(a < 0.4, near, far)
    return tl.where(x < 0, -far, far)


@jit
def _sequence_of(cu_seqlens, batch, at, TOKENS: tl.constexpr, EACH: tl.constexpr):
    """The last i with cu_seqlens[i] // TOKENS + i EACH <= at: every comparison at once, 128 sequences at a time."""
    count = 0
    for first in range(0, batch, 128):
        i = first + tl.arange(0, 128)
        start = tl.load(cu_seqlens + i, mask=i < batch, other=0) // TOKENS + i * EACH
        count += tl.sum(tl.where(i < batch, start, at + 1) <= at, axis=0).to(tl.int32)
    return count - 1


@jit
def _merged(top, total, acc, top2, total2, acc2):
    both = tl.maximum(top, top2)
    reference = tl.where(both == float("-inf"), 0.0, both)
    a, b = tl.exp2(top - reference), tl.exp2(top2 - reference)
    return both, total * a + total2 * b, acc * a[:, None] + acc2 * b[:, None]


@jit
def _split_state(
    q, k_cache, v_cache, table, position, first, begin, end, k_len, blocks, k_block, k_token, v_block, v_token,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The state of the keys at positions [begin, end), begin a multiple of KEYS, of which row r sees [first, position] of r."""
    d = tl.arange(0, WIDTH)
    top = tl.full((ROWS,), float("-inf"), ACC)
    total = tl.zeros((ROWS,), ACC)
    acc = tl.zeros((ROWS, WIDTH), ACC)
    for base in range(begin, end, KEYS):
        at = base + tl.arange(0, KEYS)
        block = tl.load(table + at // BLOCK_SIZE, mask=at < k_len, other=0)
        block = tl.minimum(tl.maximum(block, 0), blocks - 1).to(tl.int64)
        inside = (at < k_len)[:, None] & (d < DIM)[None, :]
        k_rows = block * k_block + (at % BLOCK_SIZE).to(tl.int64) * k_token
        v_rows = block * v_block + (at % BLOCK_SIZE).to(tl.int64) * v_token
        k = tl.load(k_cache + k_rows[:, None] + d[None, :], mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        if SOFTCAP > 0:
            s = _tanh(s * (1.0 / SOFTCAP)) * SOFTCAP
        seen = (at[None, :] <= position[:, None]) & (at[None, :] >= first[:, None])
        s = tl.where(seen, s * 1.4426950408889634, float("-inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        reference = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - reference[:, None])
        alpha = tl.exp2(top - reference)
        total = total * alpha + tl.sum(p, axis=1)
        v = tl.load(v_cache + v_rows[:, None] + d[None, :], mask=inside, other=0.0)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = new
    return top, total, acc


@jit
def _finish(top, total, acc, sinks, out, lse, out_at, lse_at, head, rows, cols, DIM: tl.constexpr, HAS_SINKS: tl.constexpr,
            HAS_LSE: tl.constexpr):  # fmt: skip
    """out and lse of rows; rows and cols: which of them are there."""
    empty = total == 0.0
    log_sum = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    factor = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=rows, other=0.0) * 1.4426950408889634
        factor = factor / (1.0 + tl.exp2(sink - log_sum))
        factor = tl.where(empty, 0.0, factor)
    y = acc * factor[:, None]
    tl.store(out + out_at[:, None] + cols[None, :], y.to(out.dtype.element_ty), mask=rows[:, None] & (cols < DIM)[None, :])
    if HAS_LSE:
        tl.store(lse + lse_at, log_sum * 0.6931471805599453, mask=rows)


@jit(varies=("total_q", "batch", "max_blocks", "blocks", "table_row", "left", "splits"))
def _paged_kernel(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens, sinks, out, lse, partial, stats,
    total_q, batch, max_blocks, blocks, q_token, q_head, k_block, k_token, k_head, v_block, v_token, v_head, table_row,
    out_token, left, splits,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, WALK: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)  # a cache with its heads outside of its blocks is past 2^31 elements
    i = _sequence_of(cu_seqlens, batch, tile, TOKENS, 1)
    q_begin = tl.load(cu_seqlens + i)
    q_end = tl.load(cu_seqlens + i + 1)
    start = q_begin + (tile - (q_begin // TOKENS + i)) * TOKENS
    tl.device_assert(q_end >= q_begin, "paged_attention: cu_seqlens_q decreases")
    tl.device_assert(q_end <= total_q, "paged_attention: cu_seqlens_q is beyond the tokens of q")
    if start < tl.minimum(q_end, total_q):
        row = tl.arange(0, ROWS)
        token = start + row // GROUP
        rows = (row < TOKENS * GROUP) & (token < tl.minimum(q_end, total_q))
        head = kv_head * GROUP + row % GROUP
        k_len = tl.load(cache_seqlens + i)
        tl.device_assert(k_len <= max_blocks * BLOCK_SIZE, "paged_attention: cache_seqlens is beyond the block table")
        of_keys = (k_len >= q_end - q_begin) | (k_len == 0)
        tl.device_assert(of_keys, "paged_attention: cu_seqlens_q has more tokens than cache_seqlens")
        k_len = tl.minimum(k_len, max_blocks * BLOCK_SIZE)
        position = k_len - q_end + token
        first = tl.maximum(position - left, 0)
        begin = tl.maximum(k_len - q_end + start - left, 0)  # keys of the tile's first row ... of its last
        end = tl.minimum(k_len, k_len - q_end + tl.minimum(start + TOKENS, q_end))
        d = tl.arange(0, WIDTH)
        wide = token.to(tl.int64)
        x = tl.load(
            q + (wide * q_token + head * q_head)[:, None] + d[None, :], mask=rows[:, None] & (d < DIM)[None, :], other=0.0
        )
        table = block_table + i.to(tl.int64) * table_row
        if WALK:
            top = tl.full((ROWS,), float("-inf"), ACC)
            total = tl.zeros((ROWS,), ACC)
            acc = tl.zeros((ROWS, WIDTH), ACC)
            for split in range(begin // SPLIT, tl.cdiv(end, SPLIT)):
                top2, total2, acc2 = _split_state(
                    x, k_cache + kv_head * k_head, v_cache + kv_head * v_head, table, position, first,
                    tl.maximum(split * SPLIT, begin // KEYS * KEYS), tl.minimum(split * SPLIT + SPLIT, end), k_len, blocks,
                    k_block, k_token, v_block, v_token, SCALE, SOFTCAP, DIM, BLOCK_SIZE, ACC, ROWS, KEYS, WIDTH,
                )  # fmt: skip
                top, total, acc = _merged(top, total, acc, top2, total2, acc2)
            _finish(
                top, total, acc, sinks, out, lse, wide * out_token + head * DIM, head.to(tl.int64) * total_q + token, head,
                rows, d, DIM, HAS_SINKS, HAS_LSE,
            )  # fmt: skip
        else:
            split = tl.program_id(2)
            if (split * SPLIT < end) & (split * SPLIT + SPLIT > begin):
                top, total, acc = _split_state(
                    x, k_cache + kv_head * k_head, v_cache + kv_head * v_head, table, position, first,
                    tl.maximum(split * SPLIT, begin // KEYS * KEYS), tl.minimum(split * SPLIT + SPLIT, end), k_len, blocks,
                    k_block, k_token, v_block, v_token, SCALE, SOFTCAP, DIM, BLOCK_SIZE, ACC, ROWS, KEYS, WIDTH,
                )  # fmt: skip
                at = (wide * HEADS + head) * splits + split
                tl.store(stats + at * 2, top, mask=rows)
                tl.store(stats + at * 2 + 1, total, mask=rows)
                tl.store(partial + at[:, None] * DIM + d[None, :], acc, mask=rows[:, None] & (d < DIM)[None, :])


@jit(varies=("total_q", "batch", "max_len", "left", "splits"))
def _merge_kernel(
    partial, stats, cache_seqlens, cu_seqlens, sinks, out, lse, total_q, batch, max_len, out_token, left, splits,
    HEADS: tl.constexpr, DIM: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, ACC: tl.constexpr,
    WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1) + tl.arange(0, 1)
    i = _sequence_of(cu_seqlens, batch, token, 1, 0)
    q_end = tl.load(cu_seqlens + i + 1)
    if token < q_end:
        position = tl.minimum(tl.load(cache_seqlens + i), max_len) - q_end + token
        d = tl.arange(0, WIDTH)
        top = tl.full((1,), float("-inf"), ACC)
        total = tl.zeros((1,), ACC)
        acc = tl.zeros((1, WIDTH), ACC)
        at = (token.to(tl.int64) * HEADS + head) * splits
        for split in range(tl.maximum(position - left, 0) // SPLIT, tl.cdiv(position + 1, SPLIT)):
            top2, total2 = tl.load(stats + (at + split) * 2), tl.load(stats + (at + split) * 2 + 1)
            acc2 = tl.load(partial + (at + split)[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0)
            top, total, acc = _merged(top, total, acc, top2, total2, acc2)
        _finish(
            top, total, acc, sinks, out, lse, token.to(tl.int64) * out_token + head * DIM, head.to(tl.int64) * total_q + token,
            head, head >= 0, d, DIM, HAS_SINKS, HAS_LSE,
        )  # fmt: skip


@jit
def _store_kv_kernel(
    k, v, k_cache, v_cache, slots, heads, dim, slots_in_cache, k_token, k_head, v_token, v_head, kc_block, kc_token, kc_head,
    vc_block, vc_token, vc_head, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    tl.device_assert((slot >= -1) & (slot < slots_in_cache), "store_kv_: slot_mapping is out of range")
    if (slot >= 0) & (slot < slots_in_cache):
        h, d = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, WIDTH)[None, :]
        inside = (h < heads) & (d < dim)
        block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        x = tl.load(k + token * k_token + h * k_head + d, mask=inside, other=0.0)
        tl.store(k_cache + block * kc_block + place * kc_token + h * kc_head + d, x, mask=inside)
        x = tl.load(v + token * v_token + h * v_head + d, mask=inside, other=0.0)
        tl.store(v_cache + block * vc_block + place * vc_token + h * vc_head + d, x, mask=inside)


def _paged_triton(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, sinks, scale, softcap, left, out, lse, numerics
) -> None:  # fmt: skip
    total_q, heads, dim = q.shape
    kv_heads, batch, max_blocks, size = k_cache.shape[2], cache_seqlens.numel(), block_table.shape[1], k_cache.shape[1]
    if batch == 0:
        return  # tokens of no sequence
    group = heads // kv_heads
    tile = _tile(group, dim, q.element_size(), total_q, batch, numerics)
    tiles = total_q // (tile["ROWS"] // group) + batch
    splits = -(-max_blocks * size // tile["SPLIT"])
    acc = acc_dtype(q.dtype)
    partial_bytes = total_q * heads * splits * (dim + 2) * acc.itemsize
    walk = splits == 1 or tiles * kv_heads >= PROGRAMS or partial_bytes > PARTIAL_BYTES
    partial = stats = out
    if not walk:
        partial = torch.empty(total_q, heads, splits, dim, dtype=acc, device=q.device)
        stats = torch.empty(total_q, heads, splits, 2, dtype=acc, device=q.device)
    left = max_blocks * size if left < 0 else min(left, max_blocks * size)  # all there is: position - left stays an int32
    common: dict[str, Any] = dict(DIM=dim, HAS_SINKS=sinks is not None, HAS_LSE=lse is not None, ACC=tl_acc(q.dtype))
    sinks, lse = out if sinks is None else sinks, out if lse is None else lse
    launch(
        _paged_kernel, (tiles, kv_heads, 1 if walk else splits), q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q,
        sinks, out, lse, partial, stats, total_q, batch, max_blocks, k_cache.shape[0], *q.stride()[:2], *k_cache.stride()[:3],
        *v_cache.stride()[:3], block_table.stride(0), out.stride(0), left, splits, SCALE=scale, SOFTCAP=softcap, HEADS=heads,
        GROUP=group, BLOCK_SIZE=size, WALK=walk, fuse=False, **tile, **common,
    )  # fmt: skip
    if not walk:
        launch(
            _merge_kernel, (total_q, heads), partial, stats, cache_seqlens, cu_seqlens_q, sinks, out, lse, total_q, batch,
            max_blocks * size, out.stride(0), left, splits, HEADS=heads, WIDTH=tile["WIDTH"], SPLIT=tile["SPLIT"], fuse=False,
            num_warps=1, **common,
        )  # fmt: skip


_CACHE = "*bf16 *bf16 *bf16 *i32 *i32 *i32 *fp32 *bf16 *fp32 *fp32 *fp32 i32 i32 i32 i32" + 8 * " i32:16"
_CACHE += " i32 i32:16 i32 i32"  # strides of the table and of out, left, splits
_LLAMA: dict[str, Any] = dict(
    SCALE=128**-0.5, SOFTCAP=0.0, HEADS=32, GROUP=4, DIM=128, BLOCK_SIZE=32, HAS_SINKS=False, HAS_LSE=False, ACC=tl.float32
)
_GEMMA = _LLAMA | dict(SCALE=256**-0.5, SOFTCAP=50.0, HEADS=16, GROUP=2, DIM=256)
for _name, _shape, _tokens in (("llama", _LLAMA, 1), ("llama", _LLAMA, 64), ("gemma", _GEMMA, 1), ("gemma", _GEMMA, 64)):
    _tiled = _tile(_shape["GROUP"], _shape["DIM"], 2, _tokens, 1, "auto")
    for _walk in (False, True) if _tokens == 1 else (True,):
        _label = f"paged {'walk' if _walk else 'split'} {_tiled['ROWS']} rows bf16 {_name}"
        ship(_label, _paged_kernel, _CACHE, WALK=_walk, fuse=False, **_tiled, **_shape)
ship(
    "paged merge 128", _merge_kernel, "*fp32 *fp32 *i32 *i32 *fp32 *bf16 *fp32 i32 i32 i32 i32:16 i32 i32",
    HEADS=32, DIM=128, HAS_SINKS=False, HAS_LSE=False, ACC=tl.float32, WIDTH=128, SPLIT=SPLIT, fuse=False, num_warps=1,
)  # fmt: skip
ship(
    "store_kv bf16 8 x 128", _store_kv_kernel, "*bf16 *bf16 *bf16 *bf16 *i64 i32 i32:16 i32:16" + 10 * " i32:16", BLOCK_SIZE=32,
    HEADS=8, WIDTH=128, fuse=False,
)  # fmt: skip


# --- launchers ---------------------------------------------------------------------------------------------------


def _cache(k_cache: torch.Tensor, v_cache: torch.Tensor):
    k, v = ((x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)) for x in (k_cache, v_cache))
    return k, v, k_cache.shape[0], k_cache.shape[1]


def paged_attention_out(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, sinks, softmax_scale, softcap, left, right, out, lse=None,
    isa="auto", numerics="auto",
) -> None:  # fmt: skip
    """Writes the rows of out (and of lse, if given) that cu_seqlens_q covers; checks the values of the three int32 tensors,
    which are read when the kernel runs, and nothing else (on CUDA these only under TRITON_DEBUG=1).

    q, out (total_q, heads, head_dim): head_dim contiguous, and of out heads too; k_cache, v_cache: head_dim contiguous;
    block_table: its rows contiguous; cache_seqlens, cu_seqlens_q contiguous; lse (heads, total_q) and sinks in the accumulate
    dtype, contiguous. left, right: the window, -1 for unlimited, right = 0 for causal.
    """
    if on_gpu(q):
        tables = block_table, cache_seqlens, cu_seqlens_q
        _paged_triton(q, k_cache, v_cache, *tables, sinks, softmax_scale, softcap, left, out, lse, numerics)
        return
    options = (q.shape[1], k_cache.shape[2], q.shape[2], softmax_scale, softcap, left, right)
    native().paged_fwd(
        DTYPE_CODES[q.dtype], _strides(q), q.shape[0], _cache(k_cache, v_cache), options, cu_seqlens_q.data_ptr(),
        cache_seqlens.data_ptr(), (block_table.data_ptr(), block_table.stride(0), block_table.shape[1]), cache_seqlens.numel(),
        out.data_ptr(), out.stride(0), _address(lse), _address(sinks), threads(), isa,
    )  # fmt: skip


def store_kv_out(k, v, k_cache, v_cache, slot_mapping) -> None:
    """Writes tokens into the cache; checks the slots, which are read when the kernel runs, and nothing else (on CUDA under
    TRITON_DEBUG=1; a slot out of range is skipped). All with a contiguous head_dim, slot_mapping contiguous."""
    if on_gpu(k):
        tokens, heads, dim = k.shape
        blocks, size = k_cache.shape[:2]
        launch(
            _store_kv_kernel, (tokens,), k, v, k_cache, v_cache, slot_mapping, heads, dim, blocks * size, *k.stride()[:2],
            *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], BLOCK_SIZE=size, HEADS=next_power_of_2(heads),
            WIDTH=next_power_of_2(dim), fuse=False,
        )  # fmt: skip
        return
    native().store_kv(
        DTYPE_CODES[k.dtype], _strides(k), _strides(v), _cache(k_cache, v_cache), slot_mapping.data_ptr(), *k.shape,
        threads(2 * k.numel()),
    )  # fmt: skip


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define(
    "swiftk::paged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cache_seqlens, Tensor cu_seqlens_q, Tensor? sinks, "
    "float softmax_scale, float softcap, int left, int right, str numerics, str isa) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "swiftk::store_kv_", "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()"
)


@torch.library.register_kernel("swiftk::paged_attention", ("cpu", "cuda"))
def _paged(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, sinks, softmax_scale, softcap, left, right, numerics, isa
):  # fmt: skip
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)  # tokens of no sequence: out 0, lse -inf
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=acc_dtype(q.dtype))
    wide_sinks = None if sinks is None else sinks.to(lse.dtype).contiguous()
    tables = block_table.contiguous(), cache_seqlens.contiguous(), cu_seqlens_q.contiguous()
    paged_attention_out(
        _rows(q), k_cache, v_cache, *tables, wide_sinks, softmax_scale, softcap, left, right, out, lse, isa, numerics
    )
    return out, lse


@torch.library.register_kernel("swiftk::store_kv_", ("cpu", "cuda"))
def _store(k, v, k_cache, v_cache, slot_mapping):
    store_kv_out(_rows(k), _rows(v), k_cache, v_cache, slot_mapping.contiguous())


@torch.library.register_fake("swiftk::paged_attention")
def _paged_fake(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, sinks, softmax_scale, softcap, left, right, numerics, isa
):  # fmt: skip
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=acc_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.register_fake("swiftk::store_kv_")
def _store_fake(k, v, k_cache, v_cache, slot_mapping):
    pass


# --- public ------------------------------------------------------------------------------------------------------


def _check_cache(op: str, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_heads: int | None, head_dim: int, why: str) -> None:
    heads = "kv_heads" if kv_heads is None else kv_heads
    if k_cache.dim() != 4 or k_cache.shape[3] != head_dim or kv_heads not in (None, k_cache.shape[2]):
        raise ValueError(
            f"{op}: k_cache has shape {tuple(k_cache.shape)}, {why} needs (blocks, block_size, {heads}, {head_dim})"
        )
    check_shape(op, "v_cache", v_cache, tuple(k_cache.shape), f"k_cache {tuple(k_cache.shape)}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[1] == 0 or (cache.stride(3) != 1 and head_dim > 1):
            have = f"shape {tuple(cache.shape)}, strides {cache.stride()}"
            raise ValueError(f"{op}: {name} has {have}, wants block_size >= 1 and a contiguous head_dim")


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None, *, softmax_scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, sinks: torch.Tensor | None = None, return_lse: bool = False, numerics: str = "auto",
    isa: str = "auto",
):  # fmt: skip
    """Attention of the last tokens of each sequence to all of it, keys and values in a paged cache. No autograd.

    Args:
        q: (total_q, heads, head_dim), bf16, fp32 or fp64, head_dim 1 to 512; any strides (last one 1: no copy).
        k_cache, v_cache: (blocks, block_size, kv_heads, head_dim) like q, head_dim contiguous, any other strides, any
            block_size >= 1; query head h reads KV head h // (heads / kv_heads).
        block_table: int32 (batch, max_blocks); row i holds the blocks of sequence i in order. Entries past
            ceil(cache_seqlens[i] / block_size) are not read, nor are the tokens past cache_seqlens[i] in the last block.
        cache_seqlens: int32 (batch,): keys of each sequence, those of its queries included (`store_kv_` comes first). 0 pads
            the batch: the sequence's queries get out 0, lse -inf.
        cu_seqlens_q: int32 (batch + 1,), from 0, not decreasing; sequence i has the queries q[cu[i] : cu[i + 1]], possibly
            none, at its last positions. None: one query each, total_q = batch. Tokens past cu[-1]: out 0, lse -inf.
        softmax_scale, window_size, softcap, sinks, isa: as in `varlen_attention`, causal (window_size[1] has no effect).
        return_lse: also return lse (heads, total_q): natural log, without the sink, fp32 (fp64 for fp64).
        numerics: on CUDA, "invariant" multiplies in one tile shape whatever the number of queries, so a query's bits are the
            same in a prefill, in chunks and decoded alone; "auto" takes a larger one for many queries. No effect on the CPU.
    Returns: out like q, contiguous; with return_lse (out, lse).
    Raises: ValueError for a wrong shape, dtype, device or option, for a length or block that is out of range (on CUDA seen
        under TRITON_DEBUG=1 alone), for fp64 on CUDA, or where autograd would record; on CUDA ImportError without Triton.
    """
    op = "paged_attention"
    check_floating(op, q=q, k_cache=k_cache, v_cache=v_cache)
    if q.dim() != 3:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}, wants (total_q, heads, head_dim)")
    _check_cache(op, k_cache, v_cache, None, q.shape[2], f"q {tuple(q.shape)}")
    _check(op, q, k_cache[:, 0], v_cache[:, 0], window_size, softcap, sinks, isa)
    check_numerics(op, numerics)
    if q.is_cuda and q.dtype == torch.float64:
        raise ValueError(f"{op}: q has dtype torch.float64, wants torch.bfloat16 or torch.float32 on CUDA; move it to the CPU")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_cache, v_cache, sinks)):
        raise ValueError(f"{op}: q, k_cache, v_cache or sinks has requires_grad, wants torch.no_grad(); use varlen_attention")
    _check_int32(op, "block_table", block_table, q, "(batch, max_blocks)", lambda shape: len(shape) == 2)
    batch = block_table.shape[0]
    rows = f"block_table has {batch} rows"
    _check_int32(op, "cache_seqlens", cache_seqlens, q, f"({batch},): {rows}", lambda shape: shape == (batch,))
    if cu_seqlens_q is None:
        if q.shape[0] != batch:
            raise ValueError(f"{op}: q has {q.shape[0]} tokens, wants {batch}, one per row of block_table, or cu_seqlens_q")
        cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    _check_int32(op, "cu_seqlens_q", cu_seqlens_q, q, f"({batch + 1},): {rows}", lambda shape: shape == (batch + 1,))
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    left, right = _window(True, window_size)
    out, lse = torch.ops.swiftk.paged_attention(
        q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, sinks, scale, float(softcap), left, right, numerics, isa
    )
    return (out, lse) if return_lse else out


def store_kv_(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Writes the keys and values of tokens into a paged cache, in place. No autograd.

    Args:
        k, v: (tokens, kv_heads, head_dim), bf16, fp32 or fp64; any strides (last one 1: no copy).
        k_cache, v_cache: (blocks, block_size, kv_heads, head_dim) like k, head_dim contiguous.
        slot_mapping: int64 (tokens,): block * block_size + offset, or -1 to skip the token. Slots of two tokens differ.
    Raises: ValueError for a wrong shape, dtype, device or slot (then nothing is written; on CUDA a wrong slot is skipped, and
        seen under TRITON_DEBUG=1), or where autograd would record; on CUDA ImportError without Triton.
    """
    op = "store_kv_"
    check_floating(op, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    if k.dim() != 3:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, wants (tokens, kv_heads, head_dim)")
    check_shape(op, "v", v, tuple(k.shape), f"k {tuple(k.shape)}")
    _check_cache(op, k_cache, v_cache, k.shape[1], k.shape[2], f"k {tuple(k.shape)}")
    check_tensor(op, "slot_mapping", slot_mapping)
    if slot_mapping.dtype != torch.int64 or slot_mapping.device != k.device:
        have = f"{slot_mapping.dtype} on {slot_mapping.device}"
        raise ValueError(f"{op}: slot_mapping has {have}, wants torch.int64 on {k.device}")
    check_shape(op, "slot_mapping", slot_mapping, (k.shape[0],), f"k {tuple(k.shape)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, k_cache, v_cache)):
        raise ValueError(f"{op}: k, v, k_cache or v_cache has requires_grad, wants torch.no_grad()")
    torch.ops.swiftk.store_kv_(k, v, k_cache, v_cache, slot_mapping)
