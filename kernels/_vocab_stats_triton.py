"""The Triton kernels of `vocab_stats` and `linear_cross_entropy`. vocab_stats.py has the formulas.

A program walks one row of logits in steps of STEP, as the CPU does, and merges each into what the row had before: the bits
do not depend on how many columns a buffer holds. The gradient is elementwise. Both are bound by memory: 8 KiB of fp32 in
flight per program of 4 warps, from arithmetic; no GPU has measured it.
"""

from __future__ import annotations

from swiftk.kernels._head import STEP
from swiftk.kernels._triton import jit, launch, ship, tanh, tl

# --- kernels -----------------------------------------------------------------------------------------------------


# cols keeps its kernels: of a mask whose end is a multiple of 16 Triton makes loads of 16 bytes
@jit(varies=("first_id",))
def _stats_kernel(
    logits, labels, m, l, e, total, label, argmax, g, out, ld, ld_g, cols, width, first_id, softcap, STEP: tl.constexpr,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, SUM: tl.constexpr, EXP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, STEP)
    logits += row * ld
    own = tl.load(labels + row) - first_id
    before = tl.load(m + row)
    top, sums, best, s_label = before, tl.load(l + row), tl.load(argmax + row), tl.load(label + row)
    inverse = tl.full((), 1.0, logits.dtype.element_ty) / softcap if CAPPED else 0.0
    ent = tl.load(e + row) if ENTROPY else top
    tot = tl.load(total + row) if SUM else top
    for j in range(0, cols, STEP):
        inside = at < cols - j
        s = tl.load(logits + j + at, mask=inside, other=-float("inf"))
        if CAPPED:
            s = tl.where(inside, softcap * tanh(s * inverse), -float("inf"))
        highest = tl.max(s, axis=0)
        first = tl.min(tl.where(s == highest, at, STEP), axis=0)
        best = tl.where(highest > top, (first + j).to(tl.int64) + first_id, best)
        new = tl.maximum(top, highest)
        base = tl.where(new == -float("inf"), 0.0, new)  # so far every token is banned: -inf - -inf is NaN
        scale = tl.exp(top - base)  # 0 in the first step
        d = s - base
        p = tl.exp(d)
        if ENTROPY:  # sum of exp(s - m) (s - m), moved to the new m
            moved = tl.where(sums > 0, (ent + sums * (top - base)) * scale, 0.0)
            ent = moved + tl.sum(tl.where(s == -float("inf"), 0.0, p * d), axis=0)
        if SUM:
            tot += tl.sum(tl.where(inside, s, 0.0), axis=0)
        sums = sums * scale + tl.sum(p, axis=0)
        s_label += tl.sum(tl.where(inside & (at == own - j), s, 0.0), axis=0)
        top = new
    tl.store(m + row, top)
    tl.store(l + row, sums)
    tl.store(argmax + row, best)
    tl.store(label + row, s_label)
    if ENTROPY:
        tl.store(e + row, ent)
    if SUM:
        tl.store(total + row, tot)
    if EXP:
        # g = exp(s - m) (1 - (s / c)^2), 0 for the label, and out *= exp(m before - m): see vocab_stats_exp in csrc/cpu
        for j in range(0, cols, STEP):
            inside = at < cols - j
            s = tl.load(logits + j + at, mask=inside, other=0.0)
            if CAPPED:
                s = softcap * tanh(s * inverse)
            p = tl.exp(s - tl.where(top == -float("inf"), 0.0, top))
            if CAPPED:
                p *= ((softcap - s) * inverse) * ((softcap + s) * inverse)
            tl.store(g + row * ld_g + j + at, tl.where(at == own - j, 0.0, p).to(g.dtype.element_ty), mask=inside)
        if before != top:
            scale = tl.exp(before - top)
            for k in range(0, width, STEP):
                inside = at < width - k
                v = tl.load(out + row * width + k + at, mask=inside, other=0.0)
                tl.store(out + row * width + k + at, v * scale, mask=inside)


@jit(varies=("first_id",))
def _grad_kernel(
    logits, labels, m, log_l, entropy, dlse, dlabel, dsum, dentropy, g, ld, ld_g, cols, first_id, softcap, STEP: tl.constexpr,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * STEP + tl.arange(0, STEP)
    inside = at < cols
    own = tl.load(labels + row) - first_id
    s = tl.load(logits + row * ld + at, mask=inside, other=0.0)
    inverse = tl.full((), 1.0, logits.dtype.element_ty) / softcap if CAPPED else 0.0
    if CAPPED:
        s = softcap * tanh(s * inverse)
    below, log_sum = s - tl.load(m + row), tl.load(log_l + row)
    log_p = below - log_sum
    p = tl.exp(below) * tl.exp(-log_sum)  # half the error of exp(log_p), whose argument is rounded twice
    a = tl.load(dlse + row)
    less = p - 1.0  # of the label, where p is near 1: the series of exp(x) - 1
    if s.dtype == tl.float32:
        x = log_p
        series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.008333334 + x * 0.0013888889)))))
        less = tl.where(tl.abs(x) < 0.125, series, less)
    ds = tl.where(at == own, a * less + (a + tl.load(dlabel + row)), a * p)
    if SUM:
        ds += tl.load(dsum + row)
    if ENTROPY:
        ds -= p * tl.load(dentropy + row) * (log_p + tl.load(entropy + row))
    if CAPPED:
        ds *= ((softcap - s) * inverse) * ((softcap + s) * inverse)
    tl.store(g + row * ld_g + at, ds.to(g.dtype.element_ty), mask=inside)


# --- launchers ---------------------------------------------------------------------------------------------------


def stats_triton(logits, labels, first_id: int, softcap: float, running, exp) -> None:
    """`update_stats` of vocab_stats.py on a GPU."""
    g, out = exp or (logits, logits)
    m, l, e, total, label, argmax = running
    launch(
        _stats_kernel, (len(logits),), logits, labels, m, l, m if e is None else e, m if total is None else total, label,
        argmax, g, out, logits.stride(0), g.stride(0), logits.shape[1], out.shape[1], first_id, softcap, STEP=STEP,
        CAPPED=softcap > 0, ENTROPY=e is not None, SUM=total is not None, EXP=exp is not None, num_warps=4,
    )  # fmt: skip


def grad_triton(logits, labels, first_id: int, softcap: float, m, log_l, entropy, d, g) -> None:
    """`logits_grad` on a GPU: writes g, which may be logits."""
    grid = (len(logits), -(-logits.shape[1] // STEP))
    rest = (m if t is None else t for t in (entropy, *d))
    launch(
        _grad_kernel, grid, logits, labels, m, log_l, *rest, g, logits.stride(0), g.stride(0), logits.shape[1], first_id,
        softcap, STEP=STEP, CAPPED=softcap > 0, ENTROPY=d.dentropy is not None, SUM=d.dsum is not None, num_warps=4,
    )  # fmt: skip


# --- what is shipped ---------------------------------------------------------------------------------------------

_ROWS = "*fp32 *fp32 *fp32 *fp32 *fp32"
for _exp, _rest in ((False, False), (False, True), (True, False), (True, True)):
    ship(
        f"vocab_stats{'_exp bf16' if _exp else ' fp32'}{' softcap entropy sum' if _rest else ''}", _stats_kernel,
        f"*fp32 *i64 {_ROWS} *i64 *bf16 *fp32 i32:16 i32:16 i32:16 i32:16 i32 fp32", STEP=STEP, CAPPED=_rest, ENTROPY=_rest,
        SUM=_rest, EXP=_exp,
    )  # fmt: skip
for _rest in (False, True):
    ship(
        f"vocab_grad bf16{' softcap entropy sum' if _rest else ''}", _grad_kernel,
        f"*fp32 *i64 *fp32 *fp32 {_ROWS} *bf16 i32:16 i32:16 i32:16 i32 fp32", STEP=STEP, CAPPED=_rest, ENTROPY=_rest,
        SUM=_rest,
    )  # fmt: skip
