"""The forward of `varlen_attention` and `segment_attention` in Triton, over a paged cache too. _varlen_tiles.py has what a
program works on.

KV blocks start at multiples of BLOCK_N in positions and each row's sums are its own, so a row's bits do not depend on its
neighbours, nor on where its keys lie: in a pack, in segments, in the blocks of a cache. So `paged_attention` with
numerics="invariant", which is this kernel with other addresses, gives the bits of `varlen_attention`.
Within a document a NaN or infinity in V may reach queries that do not see it: 0 times NaN is NaN to a tensor core.
"""

from __future__ import annotations

import torch

from swiftk.kernels._native import acc_dtype
from swiftk.kernels._triton import jit, launch, ship, tanh, tl
from swiftk.kernels.attention import _varlen_tiles as tiles_of
from swiftk.kernels.attention._varlen_tiles import (
    VARIES,
    add_product,
    find_tile,
    key_blocks,
    product,
    read_rows,
    row_offsets,
    segment_of,
    sequence_of,
    sight,
    write_rows,
)


@jit
def _tiles(
    acc0, acc1, m, l, q0, q1, k, v, pages, last_page, k_page, v_page, shift, k_pos, k_end, low, high, begin, end, scale,
    softcap, factor, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, SCALE_FIRST: tl.constexpr,
    SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The online softmax over the key blocks of [begin, end)."""
    i = tl.arange(0, BLOCK_N)
    for base in tl.range(begin, end, BLOCK_N):
        at = base + i
        there = (at >= k_pos) & (at < k_end)
        if PAGE > 0:
            page = tl.load(pages + at // PAGE, mask=at < k_end, other=0)
            known = (page >= 0) & (page <= last_page)
            tl.device_assert(known, "paged_attention: block_table has a block that the cache has not", mask=at < k_end)
            page = tl.minimum(tl.maximum(page, 0), last_page).to(tl.int64)
            from_k, from_v, token = k, v, (at % PAGE).to(tl.int64)
            to_k, to_v = page * k_page + token * K_TOKEN, page * v_page + token * V_TOKEN
        else:
            from_k = k + (shift + base).to(tl.int64) * K_TOKEN
            from_v = v + (shift + base).to(tl.int64) * V_TOKEN
            to_k, to_v = i * K_TOKEN, i * V_TOKEN
        k0, k1 = read_rows(from_k, to_k, there, D0, D1, DIM, MASKED)
        s = product(q0, q1, k0, k1, D1, ACC)
        if SCALE_FIRST:
            s *= scale
        if SOFTCAP:
            s = softcap * tanh(s / softcap)
        if MASKED:
            keep = at[None, :] < high[:, None]
            if HAS_LEFT:
                keep = keep & (at[None, :] >= low[:, None])
            s = tl.where(keep, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, axis=1) * factor)
        base_of = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(tl.fma(s, factor, -base_of[:, None]))
        alpha = tl.exp2(m - base_of)
        l = l * alpha + tl.sum(p, axis=1)
        m = top
        p = p.to(v.dtype.element_ty)
        v0, v1 = read_rows(from_v, to_v, there, D0, D1, DIM, MASKED)
        acc0 *= alpha[:, None]
        if D1 > 0:
            acc1 *= alpha[:, None]
        acc0, acc1 = add_product(acc0, acc1, p, v0, v1, D1, ACC)
    return acc0, acc1, m, l


@jit(varies=(*VARIES, "page_row", "last_page"))
def varlen_fwd_kernel(
    out, lse, q, k, v, sinks, cu, table, pages, page_row, last_page, k_page, v_page, k_head, v_head, out_token, total_q,
    total_k, documents, tiles, left, right, scale, softcap, factor, GROUP: tl.constexpr, STEPS: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DIM: tl.constexpr, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr,
    V_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, SEGMENTS: tl.constexpr,
    RESUME: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_SINKS: tl.constexpr, SCALE_FIRST: tl.constexpr, SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """PAGE: tokens of a block of the cache that k and v are, of which row i of pages names those of document i, and table has
    the lengths; 0: k and v are packed, and pages, page_row, last_page, k_page, v_page are not read."""
    # one KV head after the other, so that its K and V stay in L2; the last blocks of a causal document see the most keys
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    index, tile = find_tile(cu, tiles - 1 - tl.program_id(0) % tiles, documents, GROUP, BLOCK_M, STEPS)
    if PAGE > 0:
        q_start, q_len, k_start, k_len, q_pos, k_pos = sequence_of(cu, table, index, documents, total_q, total_k)
        pages += index.to(tl.int64) * page_row
    else:
        q_start, q_len, k_start, k_len, q_pos, k_pos = segment_of(cu, table, index, documents, total_q, total_k, SEGMENTS)
    rows, row0 = q_len * GROUP, tile * BLOCK_M
    if (row0 < 0) | (row0 >= rows):
        return
    row = row0 + tl.arange(0, BLOCK_M)
    seen = row < rows
    token, head = q_start + row // GROUP, kv_head * GROUP + row % GROUP
    low, high = sight(q_pos + row // GROUP, k_pos, k_len, left, right, HAS_LEFT)
    q += q_start.to(tl.int64) * Q_TOKEN + kv_head * GROUP * Q_HEAD
    q0, q1 = read_rows(q, row_offsets(row0, Q_TOKEN, Q_HEAD, GROUP, BLOCK_M), seen, D0, D1, DIM, True)

    # the state of a row: m the running maximum times log2 e, l = sum exp(s - m), acc = sum exp(s - m) v
    m, l = tl.full((BLOCK_M,), float("-inf"), ACC), tl.zeros((BLOCK_M,), ACC)
    acc0, acc1 = tl.zeros((BLOCK_M, D0), ACC), tl.zeros((BLOCK_M, D1 if D1 > 0 else 1), ACC)
    to_out = token.to(tl.int64) * out_token + head * DIM
    to_lse = lse + head * total_q + token
    if RESUME:  # out and lse are the state m = lse, l = 1
        column = tl.arange(0, D0)
        before = tl.load(to_lse, mask=seen, other=float("-inf"))
        m, l = before * 1.4426950408889634, tl.where(before == float("-inf"), 0.0, l + 1.0)
        old = tl.where(before == float("-inf"), 0, DIM)[:, None]
        acc0 = tl.load(out + to_out[:, None] + column[None, :], mask=column[None, :] < old, other=0.0)
        if D1 > 0:
            column1 = D0 + tl.arange(0, D1)
            acc1 = tl.load(out + to_out[:, None] + column1[None, :], mask=column1[None, :] < old, other=0.0)

    k, v = k + kv_head * k_head, v + kv_head * v_head
    shift = k_start - k_pos
    begin, full, rest, end = key_blocks(q_pos, k_pos, k_len, row0, rows, left, right, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT)
    k_end = k_pos + k_len
    if HAS_LEFT or SEGMENTS:
        acc0, acc1, m, l = _tiles(
            acc0, acc1, m, l, q0, q1, k, v, pages, last_page, k_page, v_page, shift, k_pos, k_end, low, high, begin, full,
            scale, softcap, factor, D0, D1, DIM, K_TOKEN, V_TOKEN, PAGE, BLOCK_N, True, HAS_LEFT or SEGMENTS, SCALE_FIRST,
            SOFTCAP, ACC,
        )  # fmt: skip
    acc0, acc1, m, l = _tiles(
        acc0, acc1, m, l, q0, q1, k, v, pages, last_page, k_page, v_page, shift, k_pos, k_end, low, high, full, rest, scale,
        softcap, factor, D0, D1, DIM, K_TOKEN, V_TOKEN, PAGE, BLOCK_N, False, HAS_LEFT, SCALE_FIRST, SOFTCAP, ACC,
    )  # fmt: skip
    acc0, acc1, m, l = _tiles(
        acc0, acc1, m, l, q0, q1, k, v, pages, last_page, k_page, v_page, shift, k_pos, k_end, low, high, rest, end, scale,
        softcap, factor, D0, D1, DIM, K_TOKEN, V_TOKEN, PAGE, BLOCK_N, True, HAS_LEFT or SEGMENTS, SCALE_FIRST, SOFTCAP, ACC,
    )  # fmt: skip

    none = l == 0.0
    by = 1.0 / tl.where(none, 1.0, l)
    if HAS_SINKS:
        sink = tl.load(sinks + head) * 1.4426950408889634
        sink = tl.where(sink > 3e38, 3e38, sink)  # an infinite one takes everything; NaN stays
        top = tl.maximum(m, sink)
        by = tl.exp2(m - top) / tl.where(none, 1.0, l * tl.exp2(m - top) + tl.exp2(sink - top))
    by = tl.where(none, 0.0, by)
    tl.store(to_lse, tl.where(none, float("-inf"), (m + tl.log2(tl.where(none, 1.0, l))) * 0.6931471805599453), mask=seen)
    by = by[:, None]
    write_rows(out, to_out, seen, acc0 * by, acc1 * by, D0, D1, DIM, False)


# --- launchers ---------------------------------------------------------------------------------------------------


def attention_triton(q, k, v, table, sinks, softmax_scale, softcap, left, right, out, lse, resume: bool) -> None:
    """`attention_out` of varlen.py on a GPU; for documents also the tail, out 0 and lse -inf."""
    (total_q, heads, dim), kv_heads, q = q.shape, k.shape[1], tiles_of.near(q)
    cu, table, documents, segments = tiles_of.where_of(table, total_q)
    options = softmax_scale, softcap, left, right
    scalars, constants = tiles_of.options_of(q, kv_heads, k.stride(0), v.stride(0), *options)
    shape = tiles_of.blocks("fwd", dim, q.dtype, tiles_of.arch_of(q.device), segments)
    tiles = total_q * constants["GROUP"] // shape["BLOCK_M"] + documents + 1
    launch(
        varlen_fwd_kernel, (tiles * kv_heads,), out, lse, q, k, v, lse if sinks is None else sinks, cu, table, cu, 0, 0, 0, 0,
        k.stride(1), v.stride(1), heads * dim, total_q, k.shape[0], documents, tiles, *scalars,
        STEPS=tiles_of.steps_of(documents), PAGE=0, SEGMENTS=segments, RESUME=resume, HAS_SINKS=sinks is not None, fuse=False,
        **constants, **shape,
    )  # fmt: skip


def paged_attention_triton(
    q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, sinks, softmax_scale, softcap, left, right, out, lse
) -> None:
    """`paged_attention_out` of paged.py with the bits of `attention_triton` on the gathered keys."""
    (total_q, heads, dim), (page_count, page, kv_heads, _), q = q.shape, k_cache.shape, tiles_of.near(q)
    batch, max_blocks = block_table.shape[0], block_table.shape[1] if page_count else 0
    options = softmax_scale, softcap, left, right
    scalars, constants = tiles_of.options_of(q, kv_heads, k_cache.stride(1), v_cache.stride(1), *options)
    shape = tiles_of.blocks("fwd", dim, q.dtype, tiles_of.arch_of(q.device))
    tiles = total_q * constants["GROUP"] // shape["BLOCK_M"] + batch + 1
    lse = torch.empty(heads, total_q, dtype=acc_dtype(q.dtype), device=q.device) if lse is None else lse
    launch(
        varlen_fwd_kernel, (tiles * kv_heads,), out, lse, q, k_cache, v_cache, lse if sinks is None else sinks, cu_seqlens_q,
        cache_seqlens, block_table, block_table.stride(0), page_count - 1, k_cache.stride(0), v_cache.stride(0),
        k_cache.stride(2), v_cache.stride(2), out.stride(0), total_q, max_blocks * page, batch, tiles, *scalars,
        STEPS=tiles_of.steps_of(batch), PAGE=page, SEGMENTS=False, RESUME=False, HAS_SINKS=sinks is not None, fuse=False,
        **constants, **shape,
    )  # fmt: skip


# --- what is shipped ---------------------------------------------------------------------------------------------

_STRIDES = 5 * "i32:16 "  # of a page of k and v, of their heads, of tokens of out
for _form in tiles_of.FORMS:
    _pointers = f"{_form.state} *fp32 {_form.x} {_form.x} {_form.x} *fp32 *i32 *i32 *i32"
    _arguments = f"{_pointers} i32 i32 {_STRIDES} i32 i32 i32 i32 {tiles_of.SCALARS}"
    ship(
        f"varlen_fwd {_form.label}", varlen_fwd_kernel, _arguments, fuse=False, archs=(_form.arch,), PAGE=0,
        RESUME=_form.constants["SEGMENTS"], **_form.constants, **_form.blocks("fwd"),
    )  # fmt: skip
    if _form.constants["DIM"] == 128 and not _form.constants["SEGMENTS"] and _form.dtype == torch.bfloat16:
        _cache = _form.constants | {"K_TOKEN": 128, "V_TOKEN": 128}
        ship(
            f"varlen_fwd paged {_form.label}", varlen_fwd_kernel, _arguments, fuse=False, archs=(_form.arch,), PAGE=32,
            RESUME=False, **_cache, **_form.blocks("fwd"),
        )  # fmt: skip
