"""`paged_attention` and `store_kv_` in Triton. paged.py has the formulas.

Many queries a sequence, and any with numerics="invariant": varlen_attention's own kernel over the blocks of the cache
(_varlen_triton.py), with its bits; one program has all keys that its block of rows sees.

Decoding with "auto", this file: the keys of a sequence are cut into splits of SPLIT positions. A program has the query heads of
one KV head and of some tokens as the ROWS of its products, and gives of each split the state (top, sum, acc): out = acc / sum,
lse = top + log sum, the top in units of log 2. States are merged in the order of the splits. Where there are few tiles of rows
each split is a program of its own and a second kernel merges, else a program walks through its splits: the same operations one
by one (nothing is fused), so the choice, which shapes alone decide, changes no bit. A split that a row does not see is a state
of weight 0.
Nothing is read on the host: tiles and splits past the real ones end at once, so a CUDA graph stays right as lengths change.
Tiles from registers and shared memory (`make compile-gpu`); no GPU has measured them.
"""

from __future__ import annotations

from typing import Any

import torch

from swiftk.kernels._native import acc_dtype
from swiftk.kernels._triton import jit, launch, next_power_of_2, ship, tanh, tl, tl_acc
from swiftk.kernels.attention._varlen_triton import paged_attention_triton

# --- decoding ----------------------------------------------------------------------------------------------------

SPLIT = 512  # positions: at head_dim 128 in bf16 256 KiB of K and V are read for each 2 KiB of a group's partial results
PROGRAMS = 2048  # about 15 for each multiprocessor of an H200: with as many tiles, splitting the keys gains nothing
PARTIAL_BYTES = 256 << 20  # of partial results, at most; above it programs walk through the splits


def _tile(group: int, dim: int, itemsize: int) -> dict[str, Any]:
    """ROWS and KEYS of a tile."""
    width, rows = max(16, next_power_of_2(dim)), max(16, next_power_of_2(group))
    return {
        "ROWS": rows, "KEYS": max(16, min(64, 16384 // (width * itemsize))), "WIDTH": width, "SPLIT": SPLIT,
        "num_warps": 4 if rows * width <= 4096 else 8, "num_stages": 3,
    }  # fmt: skip


@jit
def _sequence_of(cu_seqlens, batch, at, TOKENS: tl.constexpr, EACH: tl.constexpr):
    """The last i with cu_seqlens[i] // TOKENS + i EACH <= at: every comparison at once, 128 sequences at a time."""
    count = 0
    for first in range(0, batch, 128):
        i = first + tl.arange(0, 128)
        start = tl.load(cu_seqlens + i, mask=i < batch, other=0) // TOKENS + i * EACH
        count += tl.sum(tl.where(i < batch, start, at + 1) <= at, axis=0).to(tl.int32)
    return tl.maximum(count - 1, 0)  # none where cu_seqlens does not begin with 0


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
        known = (block >= 0) & (block < blocks)
        tl.device_assert(known, "paged_attention: block_table has a block that the cache has not", mask=at < k_len)
        block = tl.minimum(tl.maximum(block, 0), blocks - 1).to(tl.int64)
        inside = (at < k_len)[:, None] & (d < DIM)[None, :]
        k_rows = block * k_block + (at % BLOCK_SIZE).to(tl.int64) * k_token
        v_rows = block * v_block + (at % BLOCK_SIZE).to(tl.int64) * v_token
        k = tl.load(k_cache + k_rows[:, None] + d[None, :], mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        if SOFTCAP > 0:
            s = tanh(s * (1.0 / SOFTCAP)) * SOFTCAP
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
    rises = (q_end >= q_begin) & ((i > 0) | (q_begin == 0))
    tl.device_assert(rises, "paged_attention: cu_seqlens_q decreases or does not begin with 0")
    tl.device_assert(q_end <= total_q, "paged_attention: cu_seqlens_q is beyond the tokens of q")
    if (start >= q_begin) & (start < tl.minimum(q_end, total_q)):
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


# --- launchers ---------------------------------------------------------------------------------------------------


def paged_triton(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, sinks, scale, softcap, left, right, out, lse, numerics
) -> None:
    """`paged_attention_out` on a GPU."""
    total_q, heads, dim = q.shape
    (pages, size, kv_heads, _), batch = k_cache.shape, cache_seqlens.numel()
    max_blocks = block_table.shape[1] if pages else 0
    if batch == 0:
        return  # tokens of no sequence
    group = heads // kv_heads
    tile = _tile(group, dim, q.element_size())
    if numerics == "invariant" or total_q * group > tile["ROWS"] * batch:
        tables = block_table, cache_seqlens, cu_seqlens_q
        return paged_attention_triton(q, k_cache, v_cache, *tables, sinks, scale, softcap, left, right, out, lse)
    tiles = total_q // (tile["ROWS"] // group) + batch
    splits = -(-max_blocks * size // tile["SPLIT"])
    acc = acc_dtype(q.dtype)
    partial_bytes = total_q * heads * splits * (dim + 2) * acc.itemsize
    walk = splits <= 1 or tiles * kv_heads >= PROGRAMS or partial_bytes > PARTIAL_BYTES
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


def store_kv_triton(k, v, k_cache, v_cache, slot_mapping) -> None:
    """`store_kv_out` on a GPU."""
    tokens, heads, dim = k.shape
    blocks, size = k_cache.shape[:2]
    launch(
        _store_kv_kernel, (tokens,), k, v, k_cache, v_cache, slot_mapping, heads, dim, blocks * size, *k.stride()[:2],
        *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], BLOCK_SIZE=size, HEADS=next_power_of_2(heads),
        WIDTH=next_power_of_2(dim), fuse=False,
    )  # fmt: skip


# --- what is shipped ---------------------------------------------------------------------------------------------

_CACHE = "*bf16 *bf16 *bf16 *i32 *i32 *i32 *fp32 *bf16 *fp32 *fp32 *fp32 i32 i32 i32 i32" + 8 * " i32:16"
_CACHE += " i32 i32:16 i32 i32"  # strides of the table and of out, left, splits
_LLAMA: dict[str, Any] = dict(
    SCALE=128**-0.5, SOFTCAP=0.0, HEADS=32, GROUP=4, DIM=128, BLOCK_SIZE=32, HAS_SINKS=False, HAS_LSE=False, ACC=tl.float32
)
_GEMMA = _LLAMA | dict(SCALE=256**-0.5, SOFTCAP=50.0, HEADS=16, GROUP=2, DIM=256)
for _name, _shape in (("llama", _LLAMA), ("gemma", _GEMMA)):
    for _walk in (False, True):
        _label = f"paged {'walk' if _walk else 'split'} bf16 {_name}"
        ship(_label, _paged_kernel, _CACHE, WALK=_walk, fuse=False, **_tile(_shape["GROUP"], _shape["DIM"], 2), **_shape)
ship(
    "paged merge 128", _merge_kernel, "*fp32 *fp32 *i32 *i32 *fp32 *bf16 *fp32 i32 i32 i32 i32:16 i32 i32",
    HEADS=32, DIM=128, HAS_SINKS=False, HAS_LSE=False, ACC=tl.float32, WIDTH=128, SPLIT=SPLIT, fuse=False, num_warps=1,
)  # fmt: skip
ship(
    "store_kv bf16 8 x 128", _store_kv_kernel, "*bf16 *bf16 *bf16 *bf16 *i64 i32 i32:16 i32:16" + 10 * " i32:16", BLOCK_SIZE=32,
    HEADS=8, WIDTH=128, fuse=False,
)  # fmt: skip
