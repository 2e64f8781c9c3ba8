"""The Triton kernels of `varlen_attention` and `segment_attention`, and how they are launched. varlen.py has the formulas.

As on the CPU a row is a (query token, head of the group) of one KV head: row r of a document is token r // group, head
r % group.
A program takes a block of rows, so K and V are read once for the whole group, and few keys are hidden in a causal block:
128 rows of 8 heads are 16 tokens. Blocks do not cross documents: block t belongs to the document i with the largest
cu[i] * group // BLOCK + i <= t, found on the device. The grid, total * group // BLOCK + documents + 1, is known without reading
cu_seqlens, so nothing waits for the GPU and a captured graph takes other documents. The last, the tail past cu_seqlens[-1],
sees no key.

Forward: KV blocks start at multiples of BLOCK_N in positions and each row's sums are its own, so a row's bits do not depend on
its neighbours. Backward: two kernels, one owning dq, one dk and dv, each sum in one order, without atomics: it repeats bit
for bit, and S is computed twice (7 products for 5). Keys and queries of another document are not read. Within a document
a NaN or infinity in V may reach queries that do not see it: 0 times NaN is NaN to a tensor core.
head_dim is split into at most two powers of two of at least 16 columns, D0 + D1 (96 is 64 + 32, 512 is 256 + 256).
Inputs are multiplied as they are, P and dS rounded to their dtype; sums, exponentials and statistics are fp32.
K and V come by pointers, not by tensor descriptors: a box of a descriptor cannot stop where a document does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from swiftk.kernels._triton import jit, launch, next_power_of_2, ship, tl, tl_acc

LOG2E = 1.4426950408889634
DELTA_ROWS = 32  # rows per program of D, and per partial sum of dsinks
WIDEST = (1 << 31) - 1  # a window that ends nowhere
_VARIES = ("total_q", "total_k", "documents", "tiles")


# --- where a program works ---------------------------------------------------------------------------------------


@jit
def _find(cu, tile, documents, GROUP: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """The document of a block and the block's number in it: 128 probes a step, each of one load."""
    index = tile * 0
    for step in tl.static_range(STEPS):
        probe = index + tl.arange(0, 128) * (128 ** (STEPS - 1 - step))
        inside = probe <= documents
        first = tl.load(cu + probe, mask=inside, other=0).to(tl.int64) * GROUP // BLOCK + probe
        index += (tl.sum((inside & (first <= tile)).to(tl.int32), axis=0) - 1) * (128 ** (STEPS - 1 - step))
    return index, tile - (tl.load(cu + index).to(tl.int64) * GROUP // BLOCK + index).to(tl.int32)


@jit
def _segment(cu, table, index, documents, total_q, total_k, SEGMENTS: tl.constexpr):
    """q_start, q_len, k_start, k_len, q_pos, k_pos of a document or segment, cut to the tensors; documents: the tail."""
    inside = index < documents
    if SEGMENTS:
        at = table + index * 6
        q_start, q_len = tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0)
        k_start, k_len = tl.load(at + 2, mask=inside, other=0), tl.load(at + 3, mask=inside, other=0)
    else:
        q_start, k_start = tl.load(cu + index), tl.load(table + index)
        q_len = tl.load(cu + index + 1, mask=inside, other=total_q) - q_start
        k_len = tl.load(table + index + 1, mask=inside, other=0) - k_start
    known = (q_start >= 0) & (q_len >= 0) & (q_start + q_len <= total_q)
    known = known & (k_start >= 0) & (k_len >= 0) & (k_start + k_len <= total_k)
    tl.device_assert(known, "varlen_attention: cu_seqlens or segments decrease or are beyond the tensors")
    q_start, k_start = tl.minimum(tl.maximum(q_start, 0), total_q), tl.minimum(tl.maximum(k_start, 0), total_k)
    q_len, k_len = tl.minimum(q_len, total_q - q_start), tl.maximum(tl.minimum(k_len, total_k - k_start), 0)
    if SEGMENTS:
        q_pos, k_pos = tl.load(at + 4, mask=inside, other=0), tl.load(at + 5, mask=inside, other=0)
    else:
        q_pos, k_pos = k_len - q_len, k_len * 0
    return q_start, q_len, k_start, k_len, q_pos, k_pos


@jit
def _sight(position, k_pos, k_len, left, right, HAS_LEFT: tl.constexpr):
    """The keys [low, high) that a query at `position` sees, in positions. A window may pass 2^31."""
    end = k_pos.to(tl.int64) + k_len
    high = tl.minimum(tl.maximum(position.to(tl.int64) + right + 1, k_pos), end).to(tl.int32)
    low = high * 0 + k_pos
    if HAS_LEFT:
        low = tl.minimum(tl.maximum(position.to(tl.int64) - left, k_pos), end).to(tl.int32)
    return low, high


@jit
def _key_blocks(q_pos, k_pos, k_len, row0, rows, left, right, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr):  # fmt: skip
    """begin, full, rest, end: every valid row of the block sees all keys of [full, rest), and none outside [begin, end)."""
    low, high_first = _sight(q_pos + row0 // GROUP, k_pos, k_len, left, right, HAS_LEFT)
    low_last, high = _sight(q_pos + (tl.minimum(row0 + BLOCK_M, rows) - 1) // GROUP, k_pos, k_len, left, right, HAS_LEFT)
    begin = low // BLOCK_N * BLOCK_N
    end = tl.where(high > low, high, begin)
    full = tl.minimum((low_last + BLOCK_N - 1) // BLOCK_N, (end + BLOCK_N - 1) // BLOCK_N) * BLOCK_N
    return begin, full, tl.maximum(full, high_first // BLOCK_N * BLOCK_N), end


@jit
def _read(x, offset, column, dim, seen, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of x at `offset`; with ROWS 0 where a row is not seen, with COLUMNS 0 past dim."""
    at = x + offset[:, None] + column[None, :]
    if ROWS and COLUMNS:
        return tl.load(at, mask=tl.where(seen, dim, 0)[:, None] > column[None, :], other=0.0)
    if ROWS:  # a mask that is one along a row, which the compiler sees: it copies whole rows asynchronously
        return tl.load(at, mask=tl.broadcast_to(seen[:, None], at.shape), other=0.0)
    if COLUMNS:
        return tl.load(at, mask=column[None, :] < dim, other=0.0)
    return tl.load(at)


@jit
def _row_offsets(row0, TOKEN: tl.constexpr, HEAD: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Of rows row0 + i from row 0; where a block is whole tokens, a scalar and what does not change from block to block."""
    i = tl.arange(0, BLOCK)
    if BLOCK % GROUP == 0:
        return tl.cast(row0 // GROUP, tl.int64) * TOKEN + (i // GROUP * TOKEN + i % GROUP * HEAD)
    i += row0
    return (i // GROUP).to(tl.int64) * TOKEN + i % GROUP * HEAD


@jit
def _write(x, at, column, dim, seen, value, ADD: tl.constexpr):
    keep = tl.where(seen, dim, 0)[:, None] > column[None, :]
    where = x + at[:, None] + column[None, :]
    if ADD:
        value += tl.load(where, mask=keep, other=0.0)
    tl.store(where, value.to(x.dtype.element_ty), mask=keep)


@jit
def _tanh(x):
    """Relative error below 4e-7: the series below 0.3, where 1 - exp(-2 |x|) would cancel."""
    e = tl.exp2(tl.abs(x) * -2.885390081777927)
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    near = x + x * z * (z * (z * (z * 0.021869488536155203 - 0.05396825396825397) + 0.13333333333333333) - 0.3333333333333333)
    return tl.where(z < 0.09, near, tl.where(x < 0, -far, far))


# --- forward -----------------------------------------------------------------------------------------------------


@jit
def _fwd_tiles(
    acc0, acc1, m, l, q0, q1, k, v, shift, k_pos, k_end, low, high, begin, end, scale, softcap, factor, D0: tl.constexpr,
    D1: tl.constexpr, DIM: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, SCALE_FIRST: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The online softmax over the key blocks of [begin, end)."""
    column, i = tl.arange(0, D0), tl.arange(0, BLOCK_N)
    for base in tl.range(begin, end, BLOCK_N):
        at = base + i
        there = (at >= k_pos) & (at < k_end)
        to_k = k + (shift + base).to(tl.int64) * K_TOKEN
        to_v = v + (shift + base).to(tl.int64) * V_TOKEN
        k0 = _read(to_k, i * K_TOKEN, column, DIM, there, MASKED, D1 == 0 and D0 != DIM)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee", out_dtype=ACC)
        if D1 > 0:
            k1 = _read(to_k, i * K_TOKEN, D0 + tl.arange(0, D1), DIM, there, MASKED, D0 + D1 != DIM)
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee", out_dtype=ACC)
        if SCALE_FIRST:
            s *= scale
        if SOFTCAP:
            s = softcap * _tanh(s / softcap)
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
        v0 = _read(to_v, i * V_TOKEN, column, DIM, there, MASKED, D1 == 0 and D0 != DIM)
        acc0 = tl.dot(p, v0, acc0 * alpha[:, None], input_precision="ieee", out_dtype=ACC)
        if D1 > 0:
            v1 = _read(to_v, i * V_TOKEN, D0 + tl.arange(0, D1), DIM, there, MASKED, D0 + D1 != DIM)
            acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="ieee", out_dtype=ACC)
    return acc0, acc1, m, l


@jit(varies=_VARIES)
def _varlen_fwd_kernel(
    out, lse, q, k, v, sinks, cu, table, k_head, v_head, total_q, total_k, documents, tiles, heads, left, right, scale, softcap,
    factor, GROUP: tl.constexpr, STEPS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr, RESUME: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_SINKS: tl.constexpr,
    SCALE_FIRST: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # one KV head after the other, so that its K and V stay in L2; the last blocks of a causal document see the most keys
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    index, tile = _find(cu, tiles - 1 - tl.program_id(0) % tiles, documents, GROUP, BLOCK_M, STEPS)
    q_start, q_len, k_start, k_len, q_pos, k_pos = _segment(cu, table, index, documents, total_q, total_k, SEGMENTS)
    rows, row0 = q_len * GROUP, tile * BLOCK_M
    if row0 >= rows:
        return
    row = row0 + tl.arange(0, BLOCK_M)
    seen = row < rows
    token, head = q_start + row // GROUP, kv_head * GROUP + row % GROUP
    low, high = _sight(q_pos + row // GROUP, k_pos, k_len, left, right, HAS_LEFT)
    column = tl.arange(0, D0)
    q += q_start.to(tl.int64) * Q_TOKEN + kv_head * GROUP * Q_HEAD
    to_q = _row_offsets(row0, Q_TOKEN, Q_HEAD, GROUP, BLOCK_M)
    q0 = _read(q, to_q, column, DIM, seen, True, D1 == 0 and D0 != DIM)
    q1 = q0
    if D1 > 0:
        q1 = _read(q, to_q, D0 + tl.arange(0, D1), DIM, seen, True, D0 + D1 != DIM)

    # the state of a row: m the running maximum times log2 e, l = sum exp(s - m), acc = sum exp(s - m) v
    m, l = tl.full((BLOCK_M,), float("-inf"), ACC), tl.zeros((BLOCK_M,), ACC)
    acc0, acc1 = tl.zeros((BLOCK_M, D0), ACC), tl.zeros((BLOCK_M, D1 if D1 > 0 else 1), ACC)
    to_out = (token.to(tl.int64) * heads + head) * DIM
    to_lse = lse + head * total_q + token
    if RESUME:  # out and lse are the state m = lse, l = 1
        before = tl.load(to_lse, mask=seen, other=float("-inf"))
        m, l = before * 1.4426950408889634, tl.where(before == float("-inf"), 0.0, l + 1.0)
        old = tl.where(before == float("-inf"), 0, DIM)[:, None]
        acc0 = tl.load(out + to_out[:, None] + column[None, :], mask=column[None, :] < old, other=0.0)
        if D1 > 0:
            column1 = D0 + tl.arange(0, D1)
            acc1 = tl.load(out + to_out[:, None] + column1[None, :], mask=column1[None, :] < old, other=0.0)

    k, v = k + kv_head * k_head, v + kv_head * v_head
    shift = k_start - k_pos
    begin, full, rest, end = _key_blocks(q_pos, k_pos, k_len, row0, rows, left, right, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT)
    if HAS_LEFT or SEGMENTS:
        acc0, acc1, m, l = _fwd_tiles(
            acc0, acc1, m, l, q0, q1, k, v, shift, k_pos, k_pos + k_len, low, high, begin, full, scale,
            softcap, factor, D0, D1, DIM, K_TOKEN, V_TOKEN, BLOCK_N, True, HAS_LEFT or SEGMENTS, SCALE_FIRST, SOFTCAP, ACC,
        )  # fmt: skip
    acc0, acc1, m, l = _fwd_tiles(
        acc0, acc1, m, l, q0, q1, k, v, shift, k_pos, k_pos + k_len, low, high, full, rest, scale,
        softcap, factor, D0, D1, DIM, K_TOKEN, V_TOKEN, BLOCK_N, False, HAS_LEFT, SCALE_FIRST, SOFTCAP, ACC,
    )  # fmt: skip
    acc0, acc1, m, l = _fwd_tiles(
        acc0, acc1, m, l, q0, q1, k, v, shift, k_pos, k_pos + k_len, low, high, rest, end, scale,
        softcap, factor, D0, D1, DIM, K_TOKEN, V_TOKEN, BLOCK_N, True, HAS_LEFT or SEGMENTS, SCALE_FIRST, SOFTCAP, ACC,
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
    _write(out, to_out, column, DIM, seen, acc0 * by[:, None], False)
    if D1 > 0:
        _write(out, to_out, D0 + tl.arange(0, D1), DIM, seen, acc1 * by[:, None], False)


# --- backward ----------------------------------------------------------------------------------------------------


@jit(varies=_VARIES)
def _varlen_delta_kernel(
    state, dsinks, dout, out, lse, dlse, sinks, cu, table, dout_token, dout_head, total_q, total_k, documents, tiles, heads,
    dim, GROUP: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_DLSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Three numbers a row, in the order of rows, state (3, kv_heads, total_q, GROUP): lse log2 e, f D - dlse and, with sinks,
    f; the block's part of dsinks (tiles, heads)."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles
    index, tile = _find(cu, place, documents, 1, BLOCK, STEPS)
    q_start, q_len, _k_start, _k_len, _q_pos, _k_pos = _segment(cu, table, index, documents, total_q, total_k, SEGMENTS)
    row = tile * BLOCK + tl.arange(0, BLOCK)
    seen = row < q_len
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
        y = _tanh(s / softcap)
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
    column, i = tl.arange(0, D0), tl.arange(0, BLOCK_N)
    for base in tl.range(begin, end, BLOCK_N):
        if MASKED:
            base = tl.where(base < jump, base, base - jump + to)
        at = base + i
        there = (at >= k_pos) & (at < k_end)
        to_k = k + (shift + base).to(tl.int64) * K_TOKEN
        to_v = v + (shift + base).to(tl.int64) * V_TOKEN
        k0 = _read(to_k, i * K_TOKEN, column, DIM, there, MASKED, D1 == 0 and D0 != DIM)
        v0 = _read(to_v, i * V_TOKEN, column, DIM, there, MASKED, D1 == 0 and D0 != DIM)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee", out_dtype=ACC)
        dp = tl.dot(g0, tl.trans(v0), input_precision="ieee", out_dtype=ACC)
        if D1 > 0:
            k1 = _read(to_k, i * K_TOKEN, D0 + tl.arange(0, D1), DIM, there, MASKED, D0 + D1 != DIM)
            v1 = _read(to_v, i * V_TOKEN, D0 + tl.arange(0, D1), DIM, there, MASKED, D0 + D1 != DIM)
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee", out_dtype=ACC)
            dp = tl.dot(g1, tl.trans(v1), dp, input_precision="ieee", out_dtype=ACC)
        keep = at[None, :] < high[:, None]
        if HAS_LEFT:
            keep = keep & (at[None, :] >= low[:, None])
        _, dx = _p_and_dx(
            s, dp, lse2[:, None], delta[:, None], f[:, None], keep, scale, softcap, factor, MASKED, SCALE_FIRST, SOFTCAP,
            HAS_SINKS,
        )  # fmt: skip
        dx = dx.to(k.dtype.element_ty)
        dq0 = tl.dot(dx, k0, dq0, input_precision="ieee", out_dtype=ACC)
        if D1 > 0:
            dq1 = tl.dot(dx, k1, dq1, input_precision="ieee", out_dtype=ACC)
    return dq0, dq1


@jit(varies=_VARIES)
def _varlen_dq_kernel(
    dq, dout, q, k, v, state, cu, table, k_head, v_head, total_q, total_k, documents, tiles, heads, left, right, scale, softcap,
    factor, GROUP: tl.constexpr, STEPS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, G_TOKEN: tl.constexpr, G_HEAD: tl.constexpr, K_TOKEN: tl.constexpr,
    V_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_SINKS: tl.constexpr, SCALE_FIRST: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq = scale sum over keys of dx k; added to dq for segments, written for documents."""
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    index, tile = _find(cu, tiles - 1 - tl.program_id(0) % tiles, documents, GROUP, BLOCK_M, STEPS)
    q_start, q_len, k_start, k_len, q_pos, k_pos = _segment(cu, table, index, documents, total_q, total_k, SEGMENTS)
    rows, row0 = q_len * GROUP, tile * BLOCK_M
    if row0 >= rows:
        return
    row = row0 + tl.arange(0, BLOCK_M)
    seen = row < rows
    token, head = q_start + row // GROUP, kv_head * GROUP + row % GROUP
    low, high = _sight(q_pos + row // GROUP, k_pos, k_len, left, right, HAS_LEFT)
    column = tl.arange(0, D0)
    q += q_start.to(tl.int64) * Q_TOKEN + kv_head * GROUP * Q_HEAD
    dout += q_start.to(tl.int64) * G_TOKEN + kv_head * GROUP * G_HEAD
    to_q = _row_offsets(row0, Q_TOKEN, Q_HEAD, GROUP, BLOCK_M)
    to_g = _row_offsets(row0, G_TOKEN, G_HEAD, GROUP, BLOCK_M)
    q0 = _read(q, to_q, column, DIM, seen, True, D1 == 0 and D0 != DIM)
    g0 = _read(dout, to_g, column, DIM, seen, True, D1 == 0 and D0 != DIM)
    q1, g1 = q0, g0
    if D1 > 0:
        q1 = _read(q, to_q, D0 + tl.arange(0, D1), DIM, seen, True, D0 + D1 != DIM)
        g1 = _read(dout, to_g, D0 + tl.arange(0, D1), DIM, seen, True, D0 + D1 != DIM)
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
    begin, full, rest, end = _key_blocks(q_pos, k_pos, k_len, row0, rows, left, right, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT)
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
    _write(dq, to_dq, column, DIM, seen, dq0 * scale, SEGMENTS)
    if D1 > 0:
        _write(dq, to_dq, D0 + tl.arange(0, D1), DIM, seen, dq1 * scale, SEGMENTS)


@jit
def _dkv_tiles(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, state, size, low, high, begin, jump, to, end, rows, scale, softcap, factor,
    GROUP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr,
    G_TOKEN: tl.constexpr, G_HEAD: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr,
    SEGMENTS: tl.constexpr, HAS_SINKS: tl.constexpr, SCALE_FIRST: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dv += p^T (f dout), dk += dx^T q over the rows of [begin, jump) and [to, to + end - jump). Scores are held transposed."""
    column = tl.arange(0, D0)
    for base in tl.range(begin, end, BLOCK_M):
        if MASKED:
            base = tl.where(base < jump, base, base - jump + to)
        row = base + tl.arange(0, BLOCK_M)
        seen = row < rows
        to_q = _row_offsets(base, Q_TOKEN, Q_HEAD, GROUP, BLOCK_M)
        to_g = _row_offsets(base, G_TOKEN, G_HEAD, GROUP, BLOCK_M)
        q0 = _read(q, to_q, column, DIM, seen, True, D1 == 0 and D0 != DIM)
        g0 = _read(dout, to_g, column, DIM, seen, True, D1 == 0 and D0 != DIM)
        lse2 = tl.load(state + row, mask=seen, other=float("inf"))
        delta = tl.load(state + size + row, mask=seen, other=0.0)
        f = delta
        if HAS_SINKS:
            f = tl.load(state + 2 * size + row, mask=seen, other=0.0)
        s = tl.dot(k0, tl.trans(q0), input_precision="ieee", out_dtype=ACC)
        dp = tl.dot(v0, tl.trans(g0), input_precision="ieee", out_dtype=ACC)
        if D1 > 0:
            q1 = _read(q, to_q, D0 + tl.arange(0, D1), DIM, seen, True, D0 + D1 != DIM)
            g1 = _read(dout, to_g, D0 + tl.arange(0, D1), DIM, seen, True, D0 + D1 != DIM)
            s = tl.dot(k1, tl.trans(q1), s, input_precision="ieee", out_dtype=ACC)
            dp = tl.dot(v1, tl.trans(g1), dp, input_precision="ieee", out_dtype=ACC)
        keep = row[None, :] >= low[:, None]
        if HAS_LEFT or SEGMENTS:
            keep = keep & (row[None, :] < high[:, None])
        p, dx = _p_and_dx(
            s, dp, lse2[None, :], delta[None, :], f[None, :], keep, scale, softcap, factor, MASKED, SCALE_FIRST, SOFTCAP,
            HAS_SINKS,
        )  # fmt: skip
        p, dx = p.to(q.dtype.element_ty), dx.to(q.dtype.element_ty)
        dv0 = tl.dot(p, g0, dv0, input_precision="ieee", out_dtype=ACC)
        dk0 = tl.dot(dx, q0, dk0, input_precision="ieee", out_dtype=ACC)
        if D1 > 0:
            dv1 = tl.dot(p, g1, dv1, input_precision="ieee", out_dtype=ACC)
            dk1 = tl.dot(dx, q1, dk1, input_precision="ieee", out_dtype=ACC)
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


@jit(varies=_VARIES)
def _varlen_dkv_kernel(
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
        index, tile = _find(table, place, documents, 1, BLOCK_N, STEPS)
        k_start, k_len, q_start, q_len, q_pos, _k_pos = _segment(table, cu, index, documents, total_k, total_q, False)
        q_pos = -q_pos
        key0, key_end = k_start + tile * BLOCK_N, k_start + k_len
    if key0 >= key_end:
        return
    key = key0 + tl.arange(0, BLOCK_N)
    there = key < key_end
    column = tl.arange(0, D0)
    k += kv_head * k_head + tl.cast(key0, tl.int64) * K_TOKEN
    v += kv_head * v_head + tl.cast(key0, tl.int64) * V_TOKEN
    size = tl.cast(heads, tl.int64) * total_q
    to_k, to_v = tl.arange(0, BLOCK_N) * K_TOKEN, tl.arange(0, BLOCK_N) * V_TOKEN
    k0 = _read(k, to_k, column, DIM, there, True, D1 == 0 and D0 != DIM)
    v0 = _read(v, to_v, column, DIM, there, True, D1 == 0 and D0 != DIM)
    k1, v1 = k0, v0
    if D1 > 0:
        k1 = _read(k, to_k, D0 + tl.arange(0, D1), DIM, there, True, D0 + D1 != DIM)
        v1 = _read(v, to_v, D0 + tl.arange(0, D1), DIM, there, True, D0 + D1 != DIM)
    dk0, dk1 = tl.zeros((BLOCK_N, D0), ACC), tl.zeros((BLOCK_N, D1 if D1 > 0 else 1), ACC)
    dv0, dv1 = tl.zeros((BLOCK_N, D0), ACC), tl.zeros((BLOCK_N, D1 if D1 > 0 else 1), ACC)
    if SEGMENTS:
        for one in tl.range(0, documents, num_stages=1):
            q_start, q_len, k_start, k_len, q_pos, k_pos = _segment(cu, table, one, documents, total_q, total_k, True)
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
    _write(dk, to_key, column, DIM, there, dk0 * scale, SEGMENTS)
    _write(dv, to_key, column, DIM, there, dv0, SEGMENTS)
    if D1 > 0:
        _write(dk, to_key, D0 + tl.arange(0, D1), DIM, there, dk1 * scale, SEGMENTS)
        _write(dv, to_key, D0 + tl.arange(0, D1), DIM, there, dv1, SEGMENTS)


# --- tuning ------------------------------------------------------------------------------------------------------


def blocks(kernel: str, head_dim: int, dtype: torch.dtype, arch: int, segments: bool = False) -> dict[str, int]:
    """BLOCK_M rows, BLOCK_N keys, num_warps, num_stages of kernel "fwd", "dq" or "dkv"; arch: 80, 90, 100.

    From registers, spills and shared memory (`make compile-gpu`); no GPU has measured them. The largest blocks without spills
    whose products Hopper's wgmma can take: 64 rows a warp group (keys, in dkv), P and dS from registers. A query's bits depend
    on the forward's BLOCK_N, which is the same for documents and segments.
    """
    if dtype in (torch.float32, torch.float64):  # no tensor cores: each thread sums its own elements, and at 128 32 x 32 spill
        at = (32, 32, 4, 1) if head_dim <= 64 else (16, 16, 4, 1)
    else:
        width = next(i for i, most in enumerate((64, 128, 256, 512)) if head_dim <= most)
        if arch == 80:
            of = {
                "fwd": [(128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)],
                "dq": [(64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1)],
                "dkv": [(32, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1)],
            }
        else:
            of = {
                "fwd": [(128, 128, 8, 2), (128, 64, 8, 2 if segments else 3), (64, 64, 8, 2), (32, 32, 8, 1)],
                "dq": [(128, 64, 8, 2), (64 if segments else 128, 64, 8, 2), (64, 32, 8, 2), (16, 32, 8, 1)],
                "dkv": [(64, 128, 8, 2), (32, 64, 8, 2) if segments else (32, 128, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1)],
            }
            if arch == 100 and not segments:  # no wgmma there
                of["dkv"][1] = (64, 64, 8, 2)
        at = of[kernel][width]
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), at, strict=True))


def split(head_dim: int) -> dict[str, Any]:
    """D0, D1 and whether they are head_dim without a rest: powers of two, 0 or at least 16, with the smallest sum."""
    high = max(16, next_power_of_2(head_dim))
    low = high // 2
    rest = max(16, next_power_of_2(max(1, head_dim - low)))
    d0, d1 = (low, rest) if low >= 16 and (rest < low or high > 256) else (high, 0)
    return {"D0": d0, "D1": d1, "DIM": head_dim}


# --- launchers ---------------------------------------------------------------------------------------------------


@functools.cache
def _arch(device: torch.device) -> int:
    """80, 90 or 100, whose blocks fit the chip: one of compute capability 12 has 99 KiB of shared memory, and 80's need 82."""
    major = 8 if device.type == "cpu" else torch.cuda.get_device_capability(device)[0]
    return 80 if major >= 12 else min(100, major * 10)


def _steps(documents: int) -> int:
    """Rounds of the search among documents + 1."""
    return next(steps for steps in range(1, 6) if documents < 128**steps)


def _where(table, total_q: int) -> tuple[torch.Tensor, torch.Tensor, int, bool]:
    """cu, table, documents, whether they are segments: cu has the number of queries before each document or segment."""
    if isinstance(table, tuple):
        return *table, table[0].numel() - 1, False
    cu = torch.zeros(table.shape[0] + 1, dtype=torch.int32, device=table.device)
    torch.cumsum(table[:, 1], 0, dtype=torch.int32, out=cu[1:])
    return cu, table, table.shape[0], True


def _near(x: torch.Tensor) -> torch.Tensor:
    """x with the heads of a token beside each other: strides of a block's rows are constants of the kernels, int32 offsets."""
    return x if x.stride(1) <= x.stride(0) < 1 << 22 else x.contiguous()


def _options(q, k, v, softmax_scale: float, softcap: float, left: int, right: int) -> tuple[tuple, dict[str, Any]]:
    """(left, right, scale, softcap, factor) and the constants that both directions share. exp(s) is exp2(factor s), and s is
    q k^T itself where nothing forbids it: the scale joins the exponent's multiply-add."""
    has_left = 0 <= left <= WIDEST
    first = softcap != 0.0 or softmax_scale <= 0.0
    scalars = (
        left if has_left else 0, right if 0 <= right <= WIDEST else WIDEST, float(softmax_scale), float(softcap),
        LOG2E if first else LOG2E * softmax_scale,
    )  # fmt: skip
    constants = dict(
        GROUP=q.shape[1] // k.shape[1], Q_TOKEN=q.stride(0), Q_HEAD=q.stride(1), K_TOKEN=k.stride(0), V_TOKEN=v.stride(0),
        HAS_LEFT=has_left, SCALE_FIRST=first, SOFTCAP=softcap != 0.0, ACC=tl_acc(q.dtype), **split(q.shape[2]),
    )  # fmt: skip
    return scalars, constants


def attention_triton(q, k, v, table, sinks, softmax_scale, softcap, left, right, out, lse, resume: bool) -> None:
    """`attention_out` of varlen.py on a GPU; for documents also the tail, out 0 and lse -inf."""
    (total_q, heads, dim), q = q.shape, _near(q)
    cu, table, documents, segments = _where(table, total_q)
    scalars, constants = _options(q, k, v, softmax_scale, softcap, left, right)
    shape = blocks("fwd", dim, q.dtype, _arch(q.device), segments)
    tiles = total_q * constants["GROUP"] // shape["BLOCK_M"] + documents + 1
    launch(
        _varlen_fwd_kernel, (tiles * k.shape[1],), out, lse, q, k, v, lse if sinks is None else sinks, cu, table, k.stride(1),
        v.stride(1), total_q, k.shape[0], documents, tiles, heads, *scalars, STEPS=_steps(documents), SEGMENTS=segments,
        RESUME=resume, HAS_SINKS=sinks is not None, fuse=False, **constants, **shape,
    )  # fmt: skip


def attention_backward_triton(
    dout, dlse, q, k, v, out, lse, table, sinks, softmax_scale, softcap, left, right, dq, dk, dv, dsinks
) -> None:
    """`attention_backward_out` on a GPU: segments add to dq, dk, dv (accumulate dtype), documents write them, in any dtype.
    dsinks is added to."""
    (total_q, heads, dim), (total_k, kv_heads, _), q, dout = q.shape, k.shape, _near(q), _near(dout)
    cu, table, documents, segments = _where(table, total_q)
    scalars, constants = _options(q, k, v, softmax_scale, softcap, left, right)
    arch, has_sinks = _arch(q.device), sinks is not None
    state = lse.new_empty(3 if has_sinks else 2, heads, total_q)
    tiles = total_q // DELTA_ROWS + documents + 1
    parts = lse.new_empty(tiles, heads) if has_sinks else lse
    launch(
        _varlen_delta_kernel, (tiles * heads,), state, parts, dout, out, lse, lse if dlse is None else dlse,
        sinks if has_sinks else lse, cu, table, dout.stride(0), dout.stride(1), total_q, total_k, documents, tiles, heads, dim,
        GROUP=constants["GROUP"], STEPS=_steps(documents), WIDTH=next_power_of_2(dim), BLOCK=DELTA_ROWS, SEGMENTS=segments,
        HAS_SINKS=has_sinks, HAS_DLSE=dlse is not None, ACC=constants["ACC"], fuse=False,
    )  # fmt: skip
    if dsinks is not None:
        # as long as the pack: in fp32 its rounding would grow with it
        dsinks += parts.sum(0, dtype=torch.float64).to(dsinks.dtype)
    constants |= dict(
        G_TOKEN=dout.stride(0), G_HEAD=dout.stride(1), STEPS=_steps(documents), SEGMENTS=segments, HAS_SINKS=has_sinks
    )
    shape = blocks("dkv", dim, q.dtype, arch, segments)
    tiles = total_k // shape["BLOCK_N"] + 1 + (0 if segments else documents)
    launch(
        _varlen_dkv_kernel, (tiles * kv_heads,), dk, dv, dout, q, k, v, state, cu, table, k.stride(1), v.stride(1), total_q,
        total_k, documents, tiles, heads, kv_heads, *scalars, fuse=False, **constants, **shape,
    )  # fmt: skip
    shape = blocks("dq", dim, q.dtype, arch, segments)
    tiles = total_q * constants["GROUP"] // shape["BLOCK_M"] + documents + 1
    launch(
        _varlen_dq_kernel, (tiles * kv_heads,), dq, dout, q, k, v, state, cu, table, k.stride(1), v.stride(1), total_q, total_k,
        documents, tiles, heads, *scalars, fuse=False, **constants, **shape,
    )  # fmt: skip


# --- what is shipped ---------------------------------------------------------------------------------------------

_WHERE = "*i32 *i32"
_SIZES = "i32:16 i32:16 i32 i32 i32 i32 i32"  # strides of KV heads, total_q, total_k, documents, tiles, heads
_SCALARS = "i32 i32:16 fp32 fp32 fp32"


def _ship(arch: int, dim: int, name: str, dtype: torch.dtype = torch.bfloat16, dq_spills: int = 0, **changes: Any) -> None:
    """Causal attention of 8 heads a group, with changes."""
    constants = dict(
        GROUP=8, STEPS=1, SEGMENTS=False, HAS_LEFT=False, HAS_SINKS=False, SCALE_FIRST=False, SOFTCAP=False, ACC=tl.float32,
        Q_TOKEN=64 * dim, Q_HEAD=dim, K_TOKEN=8 * dim, V_TOKEN=8 * dim, **split(dim),
    ) | changes  # fmt: skip
    segments = constants["SEGMENTS"]
    of = {kernel: blocks(kernel, dim, dtype, arch, segments) | constants for kernel in ("fwd", "dq", "dkv")}
    short = "fp32" if dtype == torch.float32 else "bf16"
    x, state = f"*{short}", "*fp32" if segments else f"*{short}"
    label = f"{short} d{dim}{name} for sm_{arch}"
    ship(
        f"varlen_fwd {label}", _varlen_fwd_kernel, f"{state} *fp32 {x} {x} {x} *fp32 {_WHERE} {_SIZES} {_SCALARS}",
        fuse=False, archs=(arch,), RESUME=segments, **of["fwd"],
    )  # fmt: skip
    ship(
        f"varlen_dq {label}", _varlen_dq_kernel,
        f"{state} {x} {x} {x} {x} *fp32 {_WHERE} {_SIZES} {_SCALARS}", fuse=False,
        archs=(arch,), spills=dq_spills, G_TOKEN=64 * dim, G_HEAD=dim, **of["dq"],
    )  # fmt: skip
    ship(
        f"varlen_dkv {label}", _varlen_dkv_kernel,
        f"{state} {state} {x} {x} {x} {x} *fp32 {_WHERE} {_SIZES} i32 {_SCALARS}", fuse=False,
        archs=(arch,), G_TOKEN=64 * dim, G_HEAD=dim, **of["dkv"],
    )  # fmt: skip


for _arch_of in (80, 90, 100):
    for _dim in (64, 128, 256):
        _ship(_arch_of, _dim, "")
    _ship(_arch_of, 128, " segments", SEGMENTS=True, HAS_LEFT=True)
    _ship(_arch_of, 64, " left sinks", HAS_LEFT=True, HAS_SINKS=True)
    _softcap: dict[str, Any] = dict(HAS_LEFT=True, SOFTCAP=True, SCALE_FIRST=True, GROUP=2, Q_TOKEN=16 * 256)
    _ship(_arch_of, 256, " left softcap", dq_spills=8 if _arch_of == 100 else 0, **_softcap)  # one register, there
_ship(80, 512, "")  # its blocks are everyone's, as those of fp32 are
for _dim in (64, 128):
    _ship(90, _dim, "", torch.float32)
for _width in (64, 128):
    ship(
        f"varlen_delta bf16 d{_width}", _varlen_delta_kernel,
        f"*fp32 *fp32 *bf16 *bf16 *fp32 *fp32 *fp32 {_WHERE} {_SIZES} i32:16", GROUP=8, STEPS=1, WIDTH=_width, BLOCK=DELTA_ROWS,
        SEGMENTS=False, HAS_SINKS=True, HAS_DLSE=True, ACC=tl.float32, fuse=False,
    )  # fmt: skip
