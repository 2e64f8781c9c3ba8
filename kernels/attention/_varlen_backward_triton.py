"""The backward of `varlen_attention` and `segment_attention` in Triton. _varlen_tiles.py has what a program works on.

Two kernels, one owning dq, one dk and dv, each sum in one order, without atomics: it repeats bit for bit, and S is computed
twice (7 products for 5). Keys and queries of another document are not read.
"""

from __future__ import annotations

import torch

from swiftk.kernels._triton import jit, launch, next_power_of_2, ship, tanh, tl
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
    sight,
    write_rows,
)

DELTA_ROWS = 32  # rows per program of D, and per partial sum of dsinks


@jit(varies=VARIES)
def _delta_kernel(
    state, dsinks, dout, out, lse, dlse, sinks, cu, table, dout_token, dout_head, total_q, total_k, documents, tiles, heads,
    dim, GROUP: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_DLSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Three numbers a row, in the order of rows, state (3, kv_heads, total_q, GROUP): lse log2 e, f D - dlse and, with sinks,
    f; the block's part of dsinks (tiles, heads)."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles
    index, tile = find_tile(cu, place, documents, 1, BLOCK, STEPS)
    q_start, q_len, _k_start, _k_len, _q_pos, _k_pos = segment_of(cu, table, index, documents, total_q, total_k, SEGMENTS)
    row = tile * BLOCK + tl.arange(0, BLOCK)
    seen = (row >= 0) & (row < q_len)
    token = (q_start + row).to(tl.int64)
    column = tl.arange(0, WIDTH)
    before = tl.load(lse + head * total_q + token, mask=seen, other=float("-inf"))
    some = tl.where(before > float("-inf"), dim, 0)[:, None] > column[None, :]  # what saw no key is 0, whatever dout is
    g = tl.load(dout + (token * dout_token + head * dout_head)[:, None] + column[None, :], mask=some, other=0.0).to(ACC)
    y = tl.load(out + ((token * heads + head) * dim)[:, None] + column[None, :], mask=some, other=0.0).to(ACC)
    delta = tl.sum(g * y, axis=1)
    size = tl.cast(heads, tl.int64) * total_q
    to_state = state + (head // GROUP * total_q + token) * GROUP + head % GROUP
    tl.store(to_state, before * 1.4426950408889634, mask=seen)
    if HAS_SINKS:
        sink = tl.load(sinks + head)
        f = 1.0 / (1.0 + tl.exp(sink - before))
        part = tl.where(before > float("-inf"), delta / (1.0 + tl.exp(before - sink)), 0.0)
        tl.store(dsinks + place.to(tl.int64) * heads + head, -tl.sum(part, axis=0))
        tl.store(to_state + 2 * size, f, mask=seen)
        delta *= f
    if HAS_DLSE:
        delta -= tl.load(dlse + head * total_q + token, mask=seen, other=0.0)
    tl.store(to_state + size, delta, mask=seen)


@jit
def _p_and_dx(
    s, dp, lse2, delta, f, keep, scale, softcap, factor, MASKED: tl.constexpr, SCALE_FIRST: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """f p and dx of a tile of scores; lse2 is lse log2 e, infinite for a row that is none."""
    if SCALE_FIRST:
        s *= scale
    if SOFTCAP:
        y = tanh(s / softcap)
        s = softcap * y
    p = tl.exp2(tl.fma(s, factor, -lse2))
    if HAS_SINKS:
        dx = p * (f * dp - delta)
        p *= f
    else:
        dx = p * (dp - delta)
    if SOFTCAP:
        dx *= (1.0 - y) * (1.0 + y)
    if MASKED:
        p, dx = tl.where(keep, p, 0.0), tl.where(keep, dx, 0.0)
    return p, dx


@jit
def _dq_tiles(
    dq0, dq1, q0, q1, g0, g1, lse2, delta, f, k, v, shift, k_pos, k_end, low, high, begin, jump, to, end, scale, softcap,
    factor, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_SINKS: tl.constexpr, SCALE_FIRST: tl.constexpr,
    SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq += dx k over the key blocks of [begin, jump) and [to, to + end - jump)."""
    i = tl.arange(0, BLOCK_N)
    for base in tl.range(begin, end, BLOCK_N):
        if MASKED:
            base = tl.where(base < jump, base, base - jump + to)
        at = base + i
        there = (at >= k_pos) & (at < k_end)
        to_k = k + (shift + base).to(tl.int64) * K_TOKEN
        to_v = v + (shift + base).to(tl.int64) * V_TOKEN
        k0, k1 = read_rows(to_k, i * K_TOKEN, there, D0, D1, DIM, MASKED)
        v0, v1 = read_rows(to_v, i * V_TOKEN, there, D0, D1, DIM, MASKED)
        s = product(q0, q1, k0, k1, D1, ACC)
        dp = product(g0, g1, v0, v1, D1, ACC)
        keep = at[None, :] < high[:, None]
        if HAS_LEFT:
            keep = keep & (at[None, :] >= low[:, None])
        _, dx = _p_and_dx(
            s, dp, lse2[:, None], delta[:, None], f[:, None], keep, scale, softcap, factor, MASKED, SCALE_FIRST, SOFTCAP,
            HAS_SINKS,
        )  # fmt: skip
        dq0, dq1 = add_product(dq0, dq1, dx.to(k.dtype.element_ty), k0, k1, D1, ACC)
    return dq0, dq1


@jit(varies=VARIES)
def _dq_kernel(
    dq, dout, q, k, v, state, cu, table, k_head, v_head, total_q, total_k, documents, tiles, heads, left, right, scale, softcap,
    factor, GROUP: tl.constexpr, STEPS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, G_TOKEN: tl.constexpr, G_HEAD: tl.constexpr, K_TOKEN: tl.constexpr,
    V_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_SINKS: tl.constexpr, SCALE_FIRST: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq = scale sum over keys of dx k; added to dq for segments, written for documents."""
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    index, tile = find_tile(cu, tiles - 1 - tl.program_id(0) % tiles, documents, GROUP, BLOCK_M, STEPS)
    q_start, q_len, k_start, k_len, q_pos, k_pos = segment_of(cu, table, index, documents, total_q, total_k, SEGMENTS)
    rows, row0 = q_len * GROUP, tile * BLOCK_M
    if (row0 < 0) | (row0 >= rows):
        return
    row = row0 + tl.arange(0, BLOCK_M)
    seen = row < rows
    token, head = q_start + row // GROUP, kv_head * GROUP + row % GROUP
    low, high = sight(q_pos + row // GROUP, k_pos, k_len, left, right, HAS_LEFT)
    q += q_start.to(tl.int64) * Q_TOKEN + kv_head * GROUP * Q_HEAD
    dout += q_start.to(tl.int64) * G_TOKEN + kv_head * GROUP * G_HEAD
    q0, q1 = read_rows(q, row_offsets(row0, Q_TOKEN, Q_HEAD, GROUP, BLOCK_M), seen, D0, D1, DIM, True)
    g0, g1 = read_rows(dout, row_offsets(row0, G_TOKEN, G_HEAD, GROUP, BLOCK_M), seen, D0, D1, DIM, True)
    state += (kv_head * total_q + q_start) * GROUP
    size = tl.cast(heads, tl.int64) * total_q
    lse2 = tl.load(state + row, mask=seen, other=float("inf"))
    delta = tl.load(state + size + row, mask=seen, other=0.0)
    f = delta
    if HAS_SINKS:
        f = tl.load(state + 2 * size + row, mask=seen, other=0.0)
    dq0, dq1 = tl.zeros((BLOCK_M, D0), ACC), tl.zeros((BLOCK_M, D1 if D1 > 0 else 1), ACC)

    k, v = k + kv_head * k_head, v + kv_head * v_head
    shift = k_start - k_pos
    begin, full, rest, end = key_blocks(q_pos, k_pos, k_len, row0, rows, left, right, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT)
    dq0, dq1 = _dq_tiles(
        dq0, dq1, q0, q1, g0, g1, lse2, delta, f, k, v, shift, k_pos, k_pos + k_len, low, high, full, rest, rest, rest, scale,
        softcap, factor, D0, D1, DIM, K_TOKEN, V_TOKEN, BLOCK_N, False, HAS_LEFT, HAS_SINKS, SCALE_FIRST, SOFTCAP, ACC,
    )  # fmt: skip
    dq0, dq1 = _dq_tiles(
        dq0, dq1, q0, q1, g0, g1, lse2, delta, f, k, v, shift, k_pos, k_pos + k_len, low, high, begin, full, rest,
        full + tl.maximum(end - rest, 0), scale, softcap, factor, D0, D1, DIM, K_TOKEN, V_TOKEN, BLOCK_N, True,
        HAS_LEFT or SEGMENTS, HAS_SINKS, SCALE_FIRST, SOFTCAP, ACC,
    )  # fmt: skip
    to_dq = (token.to(tl.int64) * heads + head) * DIM
    write_rows(dq, to_dq, seen, dq0 * scale, dq1 * scale, D0, D1, DIM, SEGMENTS)


@jit
def _dkv_tiles(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, state, size, low, high, begin, jump, to, end, rows, scale, softcap, factor,
    GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr,
    G_TOKEN: tl.constexpr, G_HEAD: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr,
    SEGMENTS: tl.constexpr, HAS_SINKS: tl.constexpr, SCALE_FIRST: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dv += p^T (f dout), dk += dx^T q over the rows of [begin, jump) and [to, to + end - jump). Scores are held transposed."""
    for base in tl.range(begin, end, BLOCK_M):
        if MASKED:
            base = tl.where(base < jump, base, base - jump + to)
        row = base + tl.arange(0, BLOCK_M)
        seen = row < rows
        q0, q1 = read_rows(q, row_offsets(base, Q_TOKEN, Q_HEAD, GROUP, BLOCK_M), seen, D0, D1, DIM, True)
        g0, g1 = read_rows(dout, row_offsets(base, G_TOKEN, G_HEAD, GROUP, BLOCK_M), seen, D0, D1, DIM, True)
        lse2 = tl.load(state + row, mask=seen, other=float("inf"))
        delta = tl.load(state + size + row, mask=seen, other=0.0)
        f = delta
        if HAS_SINKS:
            f = tl.load(state + 2 * size + row, mask=seen, other=0.0)
        s = product(k0, k1, q0, q1, D1, ACC)
        dp = product(v0, v1, g0, g1, D1, ACC)
        keep = row[None, :] >= low[:, None]
        if HAS_LEFT or SEGMENTS:
            keep = keep & (row[None, :] < high[:, None])
        p, dx = _p_and_dx(
            s, dp, lse2[None, :], delta[None, :], f[None, :], keep, scale, softcap, factor, MASKED, SCALE_FIRST, SOFTCAP,
            HAS_SINKS,
        )  # fmt: skip
        dv0, dv1 = add_product(dv0, dv1, p.to(q.dtype.element_ty), g0, g1, D1, ACC)
        dk0, dk1 = add_product(dk0, dk1, dx.to(q.dtype.element_ty), q0, q1, D1, ACC)
    return dk0, dk1, dv0, dv1


@jit
def _dkv_segment(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, state, size, kv_head, total_q, q_start, q_len, k_start, k_len, q_pos, k_pos,
    key0, left, right, scale, softcap, factor, GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, G_TOKEN: tl.constexpr, G_HEAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_SINKS: tl.constexpr, SCALE_FIRST: tl.constexpr,
    SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The queries of a segment that see some of the keys [key0, key0 + BLOCK_N) of k."""
    first_key, last_key = tl.maximum(key0, k_start), tl.minimum(key0 + BLOCK_N, k_start + k_len) - 1
    many, shift = q_len.to(tl.int64), (k_pos - k_start).to(tl.int64) - q_pos
    none, first, last = many * 0, first_key + shift, last_key + shift  # keys, as the number of the query of their position
    begin, full = tl.minimum(tl.maximum(first - right, none), many), tl.minimum(tl.maximum(last - right, none), many)
    key = key0 + tl.arange(0, BLOCK_N)
    low = (tl.minimum(tl.maximum(key + shift - right, none), many) * GROUP).to(tl.int32)  # rows [low, high) see the key
    high = low * 0 + q_len * GROUP
    end, rest = many, many
    if HAS_LEFT:
        end = tl.minimum(tl.maximum(last + left + 1, none), many)
        rest = tl.minimum(tl.maximum(first + left + 1, none), many)
        high = (tl.minimum(tl.maximum(key + shift + left + 1, none), many) * GROUP).to(tl.int32)
    if SEGMENTS:  # a block that is not wholly of this segment has a mask everywhere
        rest = tl.where((first_key == key0) & (last_key == key0 + BLOCK_N - 1), rest, none)
        high = tl.where((key >= first_key) & (key <= last_key), high, 0)
    end = tl.where(first_key <= last_key, end, begin)
    rows = q_len * GROUP
    q += q_start.to(tl.int64) * Q_TOKEN + kv_head * GROUP * Q_HEAD
    dout += q_start.to(tl.int64) * G_TOKEN + kv_head * GROUP * G_HEAD
    state += (kv_head * total_q + q_start) * GROUP
    begin_row, end_row = (begin * GROUP // BLOCK_M * BLOCK_M).to(tl.int32), (end * GROUP).to(tl.int32)
    last_block = (end_row + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    full_row = tl.minimum(((full * GROUP + BLOCK_M - 1) // BLOCK_M * BLOCK_M).to(tl.int32), tl.maximum(begin_row, last_block))
    rest_row, edge_end = end_row, full_row
    if HAS_LEFT or SEGMENTS:
        rest_row = tl.maximum((rest * GROUP // BLOCK_M * BLOCK_M).to(tl.int32), full_row)
        edge_end = full_row + tl.maximum(end_row - rest_row, 0)
    dk0, dk1, dv0, dv1 = _dkv_tiles(
        dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, state, size, low, high, begin_row, full_row, rest_row, edge_end, rows,
        scale, softcap, factor, GROUP, D0, D1, DIM, Q_TOKEN, Q_HEAD, G_TOKEN, G_HEAD, BLOCK_M, True, HAS_LEFT, SEGMENTS,
        HAS_SINKS, SCALE_FIRST, SOFTCAP, ACC,
    )  # fmt: skip
    return _dkv_tiles(
        dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, state, size, low, high, full_row, rest_row, rest_row, rest_row, rows,
        scale, softcap, factor, GROUP, D0, D1, DIM, Q_TOKEN, Q_HEAD, G_TOKEN, G_HEAD, BLOCK_M, False, HAS_LEFT, SEGMENTS,
        HAS_SINKS, SCALE_FIRST, SOFTCAP, ACC,
    )  # fmt: skip


@jit(varies=VARIES)
def _dkv_kernel(
    dk, dv, dout, q, k, v, state, cu, table, k_head, v_head, total_q, total_k, documents, tiles, heads, kv_heads, left, right,
    scale, softcap, factor, GROUP: tl.constexpr, STEPS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, G_TOKEN: tl.constexpr, G_HEAD: tl.constexpr, K_TOKEN: tl.constexpr,
    V_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_SINKS: tl.constexpr, SCALE_FIRST: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys of one KV head, over all heads of its group. Blocks are a document's and are written; for
    segments, whose keys may overlap, they are cut from k, meet every segment in the table's order, and are added to."""
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles
    if SEGMENTS:
        key0, key_end = place * BLOCK_N, total_k
    else:  # table: cu_seqlens_k, which is searched
        index, tile = find_tile(table, place, documents, 1, BLOCK_N, STEPS)
        k_start, k_len, q_start, q_len, q_pos, _k_pos = segment_of(table, cu, index, documents, total_k, total_q, False)
        q_pos = -q_pos
        key0, key_end = k_start + tl.where(tile < 0, k_len, tile * BLOCK_N), k_start + k_len
    if key0 >= key_end:
        return
    key = key0 + tl.arange(0, BLOCK_N)
    there = key < key_end
    k += kv_head * k_head + tl.cast(key0, tl.int64) * K_TOKEN
    v += kv_head * v_head + tl.cast(key0, tl.int64) * V_TOKEN
    size = tl.cast(heads, tl.int64) * total_q
    k0, k1 = read_rows(k, tl.arange(0, BLOCK_N) * K_TOKEN, there, D0, D1, DIM, True)
    v0, v1 = read_rows(v, tl.arange(0, BLOCK_N) * V_TOKEN, there, D0, D1, DIM, True)
    dk0, dk1 = tl.zeros((BLOCK_N, D0), ACC), tl.zeros((BLOCK_N, D1 if D1 > 0 else 1), ACC)
    dv0, dv1 = tl.zeros((BLOCK_N, D0), ACC), tl.zeros((BLOCK_N, D1 if D1 > 0 else 1), ACC)
    if SEGMENTS:
        for one in tl.range(0, documents, num_stages=1):
            q_start, q_len, k_start, k_len, q_pos, k_pos = segment_of(cu, table, one, documents, total_q, total_k, True)
            dk0, dk1, dv0, dv1 = _dkv_segment(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, state, size, kv_head, total_q, q_start, q_len, k_start, k_len,
                q_pos, k_pos, key0, left, right, scale, softcap, factor, GROUP, D0, D1, DIM, Q_TOKEN, Q_HEAD, G_TOKEN, G_HEAD,
                BLOCK_M, BLOCK_N, True, HAS_LEFT, HAS_SINKS, SCALE_FIRST, SOFTCAP, ACC,
            )  # fmt: skip
    else:
        dk0, dk1, dv0, dv1 = _dkv_segment(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, state, size, kv_head,
            total_q, q_start, q_len, k_start, k_len, q_pos, k_len * 0, key0, left, right, scale, softcap, factor, GROUP, D0, D1,
            DIM, Q_TOKEN, Q_HEAD, G_TOKEN, G_HEAD, BLOCK_M, BLOCK_N, False, HAS_LEFT, HAS_SINKS, SCALE_FIRST, SOFTCAP, ACC,
        )  # fmt: skip
    to_key = (key.to(tl.int64) * kv_heads + kv_head) * DIM
    write_rows(dk, to_key, there, dk0 * scale, dk1 * scale, D0, D1, DIM, SEGMENTS)
    write_rows(dv, to_key, there, dv0, dv1, D0, D1, DIM, SEGMENTS)


# --- launchers ---------------------------------------------------------------------------------------------------


def attention_backward_triton(
    dout, dlse, q, k, v, out, lse, table, sinks, softmax_scale, softcap, left, right, dq, dk, dv, dsinks
) -> None:
    """`attention_backward_out` on a GPU: segments add to dq, dk, dv (accumulate dtype), documents write them, in any dtype.
    dsinks is added to."""
    (total_q, heads, dim), (total_k, kv_heads, _), q, dout = q.shape, k.shape, tiles_of.near(q), tiles_of.near(dout)
    cu, table, documents, segments = tiles_of.where_of(table, total_q)
    options = softmax_scale, softcap, left, right
    scalars, constants = tiles_of.options_of(q, kv_heads, k.stride(0), v.stride(0), *options)
    arch, steps, has_sinks = tiles_of.arch_of(q.device), tiles_of.steps_of(documents), sinks is not None
    state = lse.new_empty(3 if has_sinks else 2, heads, total_q)
    tiles = total_q // DELTA_ROWS + documents + 1
    parts = lse.new_empty(tiles, heads) if has_sinks else lse
    launch(
        _delta_kernel, (tiles * heads,), state, parts, dout, out, lse, lse if dlse is None else dlse,
        sinks if has_sinks else lse, cu, table, dout.stride(0), dout.stride(1), total_q, total_k, documents, tiles, heads, dim,
        GROUP=constants["GROUP"], STEPS=steps, WIDTH=next_power_of_2(dim), BLOCK=DELTA_ROWS, SEGMENTS=segments,
        HAS_SINKS=has_sinks, HAS_DLSE=dlse is not None, ACC=constants["ACC"], fuse=False,
    )  # fmt: skip
    if dsinks is not None:
        # as long as the pack: in fp32 its rounding would grow with it
        dsinks += parts.sum(0, dtype=torch.float64).to(dsinks.dtype)
    constants |= dict(
        G_TOKEN=dout.stride(0), G_HEAD=dout.stride(1), STEPS=steps, SEGMENTS=segments, HAS_SINKS=has_sinks
    )  # fmt: skip
    shape = tiles_of.blocks("dkv", dim, q.dtype, arch, segments)
    tiles = total_k // shape["BLOCK_N"] + 1 + (0 if segments else documents)
    launch(
        _dkv_kernel, (tiles * kv_heads,), dk, dv, dout, q, k, v, state, cu, table, k.stride(1), v.stride(1), total_q,
        total_k, documents, tiles, heads, kv_heads, *scalars, fuse=False, **constants, **shape,
    )  # fmt: skip
    shape = tiles_of.blocks("dq", dim, q.dtype, arch, segments)
    tiles = total_q * constants["GROUP"] // shape["BLOCK_M"] + documents + 1
    launch(
        _dq_kernel, (tiles * kv_heads,), dq, dout, q, k, v, state, cu, table, k.stride(1), v.stride(1), total_q, total_k,
        documents, tiles, heads, *scalars, fuse=False, **constants, **shape,
    )  # fmt: skip


# --- what is shipped ---------------------------------------------------------------------------------------------

_SIZES = "i32:16 i32:16 i32 i32 i32 i32 i32"  # strides of KV heads, total_q, total_k, documents, tiles, heads
for _form in tiles_of.FORMS:
    _x, _dim, _archs = _form.x, _form.constants["DIM"], (_form.arch,)
    _inputs = f"{_x} {_x} {_x} {_x} *fp32 *i32 *i32 {_SIZES}"
    _of_dout = dict(G_TOKEN=_form.constants["Q_TOKEN"], G_HEAD=_dim)
    ship(
        f"varlen_dq {_form.label}", _dq_kernel, f"{_form.state} {_inputs} {tiles_of.SCALARS}", fuse=False, archs=_archs,
        **_of_dout, **_form.constants, **_form.blocks("dq"),
    )  # fmt: skip
    ship(
        f"varlen_dkv {_form.label}", _dkv_kernel, f"{_form.state} {_form.state} {_inputs} i32 {tiles_of.SCALARS}", fuse=False,
        archs=_archs, **_of_dout, **_form.constants, **_form.blocks("dkv"),
    )  # fmt: skip
for _width in (64, 128):
    ship(
        f"varlen_delta bf16 d{_width}", _delta_kernel,
        f"*fp32 *fp32 *bf16 *bf16 *fp32 *fp32 *fp32 *i32 *i32 {_SIZES} i32:16", GROUP=8, STEPS=1, WIDTH=_width,
        BLOCK=DELTA_ROWS, SEGMENTS=False, HAS_SINKS=True, HAS_DLSE=True, ACC=tl.float32, fuse=False,
    )  # fmt: skip
