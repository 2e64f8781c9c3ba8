"""The Triton kernels of `sample` and `adjust_logits_`. sample.py has the formulas.

Seven launches, none of which waits for the host; a program whose row does not ask for its filter ends at once.
  scan   the maximum of each block of a row, +inf where it has a NaN
  weigh  top-k: how many tokens, top-p: what weight, lies in each of 1024 buckets of x, 32 a nat: integers, so the order of
         atomic sums does not matter
  cut    the bucket that the last kept token lies in; the tokens of that bucket; of these the last kept one, bit by bit of the
         logit and then of the id: no sort
  draw   x + g of the kept tokens, the best of each block; then the best of the row
The formula and its order are the CPU's, in fp64; log and exp are those of the device. A token could differ from the CPU's
where two scores, or a weight and its limit, agree to the last bits of fp64: about one draw in 10^13.
Blocks from registers (`make compile-gpu`); no GPU has measured them.
"""

from __future__ import annotations

from typing import Any

import torch

from swiftk.kernels._triton import jit, launch, next_power_of_2, ship, tl
from swiftk.kernels.dropout import philox

BLOCK = 2048  # tokens of a program
BUCKETS = 1024  # as in csrc/cpu/sample.inc


# --- kernels -----------------------------------------------------------------------------------------------------


@jit
def _row_max(tops, row, blocks, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    return tl.max(tl.load(tops + row * blocks + at, mask=at < blocks, other=-float("inf")), axis=0)


@jit
def _ordered(z):
    """int64, in the order of the values; 0 and -0 are one."""
    z = tl.where(z == 0, 0.0, z)
    if z.dtype == tl.float32:
        i = z.to(tl.int32, bitcast=True)
        return (i ^ ((i >> 31) & 0x7FFFFFFF)).to(tl.int64)
    else:
        i = z.to(tl.int64, bitcast=True)
        return i ^ ((i >> 63) & 0x7FFFFFFFFFFFFFFF)


@jit
def _weight(x, WEIGHTED: tl.constexpr):
    """Of top-p 2^44 exp x, to the nearest integer; of top-k 1."""
    if WEIGHTED:
        return (tl.exp(x) * 17592186044416.0 + 4503599627370496.0 - 4503599627370496.0).to(tl.int64)
    else:
        return tl.full(x.shape, 1, tl.int64)


@jit
def _bucket(x):
    return tl.minimum(x * -32.0, 1023.0).to(tl.int32)


@jit
def _asks(row, m, temperature, top_k, top_p, cols, WEIGHTED: tl.constexpr):
    """Whether a row has the filter, its goal (a share or a number of tokens) and the factor of z - max z."""
    t = tl.load(temperature + row).to(tl.float64)
    if WEIGHTED:
        goal = tl.load(top_p + row).to(tl.float64)
        on = goal < 1.0
        factor = 1.0 / tl.where(t == 0.0, 1.0, t)
    else:
        k = tl.load(top_k + row)
        goal = k.to(tl.float64)
        on = (k > 0) & (k < cols)
        factor = tl.full((), 1.0, tl.float64)
    return on & (t != 0.0) & (m < float("inf")) & (m > -float("inf")), goal, factor


@jit
def _sample_scan_kernel(logits, tops, cut_z, cut_id, ld, cols, blocks, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * ld + at, mask=at < cols, other=-float("inf"))
    tl.store(tops + row * blocks + block, tl.max(tl.where(z == z, z, float("inf")), axis=0))
    if block == 0:
        tl.store(cut_z + row, -float("inf"))
        tl.store(cut_id + row, cols)


@jit
def _sample_weigh_kernel(
    logits, tops, cut_z, cut_id, temperature, top_k, top_p, mass, ld, cols, blocks,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m = _row_max(tops, row, blocks, WIDTH)
    on, _, factor = _asks(row, m, temperature, top_k, top_p, cols, WEIGHTED)
    if on:
        at = block * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + row * ld + at, mask=at < cols, other=-float("inf"))
        x = (z.to(tl.float64) - m.to(tl.float64)) * factor
        last, last_id = tl.load(cut_z + row), tl.load(cut_id + row)
        kept = (at < cols) & ((z > last) | ((z == last) & (at <= last_id)))
        weight = _weight(x, WEIGHTED)
        tl.atomic_add(mass + row * 1024 + _bucket(x), weight, mask=kept & (weight > 0))


@jit
def _mass_before(logits, candidates, n, m, factor, key, id, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Of the candidates with a greater logit than `key` has, or the same one and an id below `id`."""
    total = tl.full((), 0, tl.int64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        token = tl.load(candidates + at, mask=at < n, other=0)
        z = tl.load(logits + token, mask=at < n, other=-float("inf"))
        own = _ordered(z)
        weight = _weight((z.to(tl.float64) - m.to(tl.float64)) * factor, WEIGHTED)
        total += tl.sum(tl.where((at < n) & ((own > key) | ((own == key) & (token < id))), weight, 0), axis=0)
    return total


@jit
def _sample_cut_kernel(
    logits, tops, cut_z, cut_id, temperature, top_k, top_p, mass, candidates, ld, cols, blocks,
    WEIGHTED: tl.constexpr, KEY_BITS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    m = _row_max(tops, row, blocks, WIDTH)
    on, goal, factor = _asks(row, m, temperature, top_k, top_p, cols, WEIGHTED)
    if on:
        logits += row * ld
        candidates += row * cols
        b = tl.arange(0, 1024)
        per_bucket = tl.load(mass + row * 1024 + b)
        if WEIGHTED:
            # p = 0 keeps the first token, whose weight is 2^44
            goal = tl.maximum(goal * tl.sum(per_bucket, axis=0).to(tl.float64), 1.0)
        up_to = tl.cumsum(per_bucket, axis=0)
        bucket = tl.minimum(tl.sum((up_to.to(tl.float64) < goal).to(tl.int32), axis=0), 1023)
        before = tl.sum(tl.where(b < bucket, per_bucket, 0), axis=0)
        last, last_id = tl.load(cut_z + row), tl.load(cut_id + row)
        n = tl.full((), 0, tl.int32)
        for first in range(0, cols, BLOCK):
            at = first + tl.arange(0, BLOCK)
            z = tl.load(logits + at, mask=at < cols, other=-float("inf"))
            x = (z.to(tl.float64) - m.to(tl.float64)) * factor
            kept = (at < cols) & ((z > last) | ((z == last) & (at <= last_id))) & (_bucket(x) == bucket)
            place = n + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            tl.store(candidates + place, at, mask=kept)
            n += tl.sum(kept.to(tl.int32), axis=0)
        tl.debug_barrier()  # candidates were written by other threads
        one = tl.full((), 1, tl.int64)
        key = -(one << (KEY_BITS - 1))
        for i in range(0, KEY_BITS):  # the greatest logit that has the goal's mass from it upwards
            higher = key + (one << (KEY_BITS - 1 - i))
            reached = before + _mass_before(logits, candidates, n, m, factor, higher, cols, WEIGHTED, BLOCK)
            key = tl.where(reached.to(tl.float64) >= goal, higher, key)
        id = tl.full((), 0, tl.int32)
        for i in range(0, 19):  # the greatest id before which there is less: MAX_VOCAB is 2^19
            higher_id = id + (tl.full((), 1, tl.int32) << (18 - i))
            reached = before + _mass_before(logits, candidates, n, m, factor, key, higher_id, WEIGHTED, BLOCK)
            id = tl.where(reached.to(tl.float64) < goal, higher_id, id)
        id = tl.minimum(id, cols - 1)
        tl.store(cut_z + row, tl.load(logits + id))
        tl.store(cut_id + row, id)


@jit
def _sample_draw_kernel(
    logits, tops, cut_z, cut_id, temperature, min_p, seeds, positions, best, best_id, ld, cols, blocks,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * ld + at, mask=at < cols, other=-float("inf"))
    score = z.to(tl.float64)
    t = tl.load(temperature + row).to(tl.float64)
    if t != 0.0:
        m = _row_max(tops, row, blocks, WIDTH).to(tl.float64)
        x = (score - m) * (1.0 / t)
        p = tl.load(min_p + row).to(tl.float64)
        floor = tl.where(p > 0.0, tl.log(tl.where(p > 0.0, p, 1.0)), -float("inf"))
        last, last_id = tl.load(cut_z + row), tl.load(cut_id + row)
        kept = ((z > last) | ((z == last) & (at <= last_id))) & (x >= floor)
        seed, position = tl.load(seeds + row), tl.load(positions + row)
        zero = tl.zeros((BLOCK // 4,), tl.uint32)
        call = (block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        p0, p1 = zero + position.to(tl.uint32), zero + (position >> 32).to(tl.uint32)
        k0, k1 = zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32)
        x0, x1, x2, x3 = philox(call, p0, p1, tl.full((BLOCK // 4,), 0xFFFFFFFE, tl.uint32), k0, k1)
        high = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(BLOCK)  # word 2 i + j of a call at [i, j]
        x0, x1, x2, x3 = philox(call, p0, p1, tl.full((BLOCK // 4,), 0xFFFFFFFF, tl.uint32), k0, k1)
        low = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(BLOCK)
        n = (high.to(tl.int64) << 20) | (low >> 12).to(tl.int64)
        rest = 1.0 - (n.to(tl.float64) + 0.5) * 2.220446049250313e-16  # 1 - q, exact: no log1p is needed
        score = tl.where(kept, x - tl.log(-tl.log(rest)), -float("inf"))
    top = tl.max(score, axis=0)
    tl.store(best + row * blocks + block, top)
    tl.store(best_id + row * blocks + block, tl.min(tl.where(score == top, at, cols), axis=0))


@jit
def _sample_pick_kernel(tops, best, best_id, ids, cols, blocks, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = _row_max(tops, row, blocks, WIDTH)
    at = tl.arange(0, WIDTH)
    score = tl.load(best + row * blocks + at, mask=at < blocks, other=-float("inf"))
    token = tl.load(best_id + row * blocks + at, mask=at < blocks, other=cols)
    id = tl.min(tl.where(score == tl.max(score, axis=0), token, cols), axis=0)
    tl.store(ids + row, tl.where((m < float("inf")) & (m > -float("inf")), id, -1))


@jit
def _adjust_kernel(
    logits, offsets, ids, counts, in_prompt, bias, repetition, presence, frequency, ld, cols, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    A: tl.constexpr = logits.dtype.element_ty
    r, a, f = tl.load(repetition + row).to(A), tl.load(presence + row).to(A), tl.load(frequency + row).to(A)
    stop = tl.load(offsets + row + 1)
    for first in range(tl.load(offsets + row), stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        id, count = tl.load(ids + at, mask=at < stop, other=-1), tl.load(counts + at, mask=at < stop, other=0)
        prompt = tl.load(in_prompt + at, mask=at < stop, other=0) != 0
        tl.device_assert((id < cols) & ((id >= 0) | (at >= stop)), "adjust_logits_: ids is out of range")
        inside = (id >= 0) & (id < cols)
        z = tl.load(logits + row * ld + id, mask=inside, other=0.0)
        quotient = tl.div_rn(z, r) if tl.float32 == A else z / r
        z = tl.where((count > 0) | prompt, tl.where(z > 0, quotient, z * r), z)
        z = tl.where(count > 0, z - f * count.to(A) - a, z)
        tl.store(logits + row * ld + id, z + tl.load(bias + at, mask=at < stop, other=0.0).to(A), mask=inside)


# --- launchers ---------------------------------------------------------------------------------------------------


def sample_triton(logits, temperature, top_k, top_p, min_p, seeds, positions, ids) -> None:
    """`sample_out` of sample.py on a GPU."""
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    tops, cut_z, cut_id = new(rows, blocks, dtype=logits.dtype), new(rows, dtype=logits.dtype), new(rows, dtype=torch.int32)
    best, best_id = new(rows, blocks, dtype=torch.float64), new(rows, blocks, dtype=torch.int32)
    candidates, ld = new(rows, vocab, dtype=torch.int32), logits.stride(0)
    mass = torch.zeros(2, rows, BUCKETS, dtype=torch.int64, device=logits.device)
    wide: dict[str, Any] = {"BLOCK": BLOCK, "WIDTH": next_power_of_2(blocks), "fuse": False}
    grid, row = (rows, blocks), (logits, tops, cut_z, cut_id, temperature)
    launch(_sample_scan_kernel, grid, *row[:4], ld, vocab, blocks, BLOCK=BLOCK, fuse=False)
    for weighted in (False, True):
        filters = (*row, top_k, top_p, mass[int(weighted)])
        launch(_sample_weigh_kernel, grid, *filters, ld, vocab, blocks, WEIGHTED=weighted, **wide)
        launch(
            _sample_cut_kernel, (rows,), *filters, candidates, ld, vocab, blocks, WEIGHTED=weighted,
            KEY_BITS=8 * logits.element_size(), num_warps=8, **wide,
        )  # fmt: skip
    launch(_sample_draw_kernel, grid, *row, min_p, seeds, positions, best, best_id, ld, vocab, blocks, num_warps=8, **wide)
    launch(_sample_pick_kernel, (rows,), tops, best, best_id, ids, vocab, blocks, WIDTH=wide["WIDTH"], fuse=False, num_warps=1)


def adjust_logits_triton(logits, *arrays) -> None:
    """`adjust_logits_out` on a GPU."""
    launch(_adjust_kernel, (len(logits),), logits, *arrays, logits.stride(0), logits.shape[1], BLOCK=128, fuse=False)


# --- what is shipped ---------------------------------------------------------------------------------------------

_ROW = "*fp32 *fp32 *fp32 *i32 *fp32"
_WIDE: dict[str, Any] = dict(BLOCK=BLOCK, WIDTH=128, fuse=False)  # a vocabulary of 151,936
ship("sample_scan fp32", _sample_scan_kernel, "*fp32 *fp32 *fp32 *i32 i32:16 i32:16 i32", BLOCK=BLOCK, fuse=False)
for _weighted in (False, True):
    _name = "top-p" if _weighted else "top-k"
    ship(
        f"sample_weigh {_name}", _sample_weigh_kernel, f"{_ROW} *i32 *fp32 *i64 i32:16 i32:16 i32", WEIGHTED=_weighted, **_WIDE
    )
    ship(
        f"sample_cut {_name}", _sample_cut_kernel, f"{_ROW} *i32 *fp32 *i64 *i32 i32:16 i32:16 i32", WEIGHTED=_weighted,
        KEY_BITS=32, num_warps=8, **_WIDE,
    )  # fmt: skip
ship("sample_draw fp32", _sample_draw_kernel, f"{_ROW} *fp32 *i64 *i64 *fp64 *i32 i32:16 i32:16 i32", num_warps=8, **_WIDE)
ship("sample_pick", _sample_pick_kernel, "*fp32 *fp64 *i32 *i64 i32:16 i32", WIDTH=128, fuse=False, num_warps=1)
ship(
    "adjust_logits fp32", _adjust_kernel, "*fp32 *i64 *i64 *i32 *i1 *fp32 *fp32 *fp32 *fp32 i32:16 i32:16", BLOCK=128,
    fuse=False,
)  # fmt: skip
