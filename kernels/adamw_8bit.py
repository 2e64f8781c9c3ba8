"""AdamW with 8-bit moments: one call for all tensors of an optimizer.

With g the gradient, t the step (from 1), all of it fp32, each operation rounded once, nothing fused:
    m <- beta1 m + (1 - beta1) g                v <- beta2 v + (1 - beta2) g^2
    p <- (1 - lr decay) p - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
Loshchilov & Hutter 2019, as torch.optim.AdamW has it. m and v are then stored in blocks of 256 elements of the flattened
tensor: absmax, the block's largest magnitude, in fp32, and for each element the code of x (1 / absmax). Dettmers et al. 2022,
"8-bit Optimizers via Block-wise Quantization"; sizes, maps and the rule below for small tensors are those of bitsandbytes.

The map of m has 0, 1 and +-10^(i - 6) (1/10 + 9/10 (j + 1/2) / 2^i) for i = 0 ... 6, 0 <= j < 2^i; the map of v, which has no
sign, has twice as many j. Each value is the fp32 nearest to that real number (bitsandbytes' own values differ in their last
bits with the machine). The code of x is that of the nearest value, decided exactly; of two equally near ones the lower code.
- exact 0 stays 0: codes 127 and 0;
- a positive v is at least code 1, 3.25e-7 absmax: rounded to 0 it can leave m / eps for the next update. Fifty steps of a small
  network end 1.38 from fp32 AdamW's parameters, no element off by more than 0.27; with zeros allowed 2.96 and 1.74;
- absmax below 2^-126 counts as 0, its block as zeros; a block with NaN or infinity is NaN from the next step on, and p of
  the NaN element is NaN at once; the square of a gradient above 1.8e19 is infinite.
Tensors of fewer than 4096 elements keep m and v in fp32.

Bytes an element: 16 (g, p and two codes read, p and the codes written) for fp32 p, 10 for bf16. State: 2.03 bytes an element
in place of 8. Results are equal bit for bit on every instruction set and thread count, and on CUDA.
Not supported: fp64 and fp16, amsgrad, stochastic rounding (small updates of a bf16 p are lost).
"""

from __future__ import annotations

import functools
import itertools
import math
from array import array
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from swiftk.kernels._checks import check_isa
from swiftk.kernels._native import DTYPE_CODES, native, threads
from swiftk.kernels._triton import jit, launch, on_gpu, ship, tl
from swiftk.kernels.nf4 import dynamic_map

BLOCK = 256  # elements with one absmax, kBlock in csrc/cpu/adamw_8bit.cpp
MIN_8BIT = 4096  # elements; smaller tensors keep fp32 moments
SMALLEST = 2.0**-126  # normal fp32: below it 1 / absmax overflows


class Moments(NamedTuple):
    """exp_avg and exp_avg_sq of one tensor: uint8 codes of its shape with absmax (blocks,) fp32, or fp32 without."""

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    exp_avg_absmax: torch.Tensor | None = None
    exp_avg_sq_absmax: torch.Tensor | None = None


class Update(NamedTuple):
    """One tensor's update; nothing has a default."""

    param: torch.Tensor  # bf16 or fp32, any shape, contiguous
    grad: torch.Tensor  # like param
    moments: Moments  # of new_moments(param)
    step: int  # from 1
    lr: float  # >= 0
    betas: tuple[float, float]  # each in [0, 1)
    eps: float  # >= 0
    weight_decay: float  # >= 0, times lr (decoupled)


# --- reference ---------------------------------------------------------------------------------------------------


def nearest_code(v: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """uint8, in the shape of v: how many of the exact middles between the map's values are below v."""
    code_map = dynamic_map(signed).double().to(v.device)
    return torch.searchsorted((code_map[1:] + code_map[:-1]) / 2, v.double()).to(torch.uint8)


def quantize_8bit_ref(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x fp32 -> codes uint8 in its shape, absmax fp32 (blocks,)."""
    flat = x.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-(-len(flat) // BLOCK), BLOCK)
    absmax = blocks.abs().amax(1)
    v = blocks * (1 / absmax)[:, None]
    codes = nearest_code(v, signed=signed)
    if not signed:
        codes = torch.where(v > 0, codes.clamp(min=1), codes)
    useful = (absmax >= SMALLEST) & (absmax < math.inf)
    codes = torch.where(useful[:, None], codes, 127 if signed else 0)
    return codes.flatten()[: len(flat)].view(x.shape), torch.where(absmax < SMALLEST, 0, absmax)


def dequantize_8bit_ref(codes: torch.Tensor, absmax: torch.Tensor, code_map: torch.Tensor) -> torch.Tensor:
    """fp32 map[code] absmax, in the shape of codes."""
    values = code_map.to(codes.device)[codes.flatten().long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return values.view(codes.shape)


def adamw_8bit_ref(u: Update) -> tuple[torch.Tensor, Moments]:
    """The formula: the new parameter and moments; fp32, in fp64 where u has fp64 moments."""
    m, v, absmax1, absmax2 = u.moments
    if absmax1 is not None and absmax2 is not None:
        m, v = dequantize_8bit_ref(m, absmax1, dynamic_map(True)), dequantize_8bit_ref(v, absmax2, dynamic_map(False))
    decay, beta1, grad1, beta2, grad2, step_size, root_scale, eps = _rates(u)
    p, g = u.param.to(m.dtype), u.grad.to(m.dtype)
    m = m * beta1 + g * grad1
    v = v * beta2 + g * g * grad2
    root = v.double().sqrt().to(v.dtype)  # MKL's fp32 square root, which torch calls, is not always the nearest
    p = p * decay - step_size * (m / (root * root_scale + eps))
    if absmax1 is None:
        return p.to(u.param.dtype), Moments(m, v)
    (codes1, absmax1), (codes2, absmax2) = quantize_8bit_ref(m, True), quantize_8bit_ref(v, False)
    return p.to(u.param.dtype), Moments(codes1, codes2, absmax1, absmax2)


def _rates(u: Update) -> tuple[float, ...]:
    """The numbers of the formula, struct Rates in csrc/cpu/adamw_8bit.cpp; fp64 here, rounded to fp32 where they are used."""
    beta1, beta2 = u.betas
    step_size, root_scale = u.lr / (1 - beta1**u.step), 1 / math.sqrt(1 - beta2**u.step)
    return 1 - u.lr * u.weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, root_scale, u.eps


# --- tables ------------------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """How the kernel finds a code, by one look-up or a line per decade of the map (struct Code in csrc/cpu/adamw_8bit.cpp)."""

    edges: torch.Tensor  # uint32 as int32
    lines: torch.Tensor  # fp32 (6, 8)
    first: int  # bucket of edges[0]
    negative: int  # where the buckets of negative values start
    decades: int  # upper half of the bit pattern, where counting decades starts

    def args(self, signed: bool) -> tuple[int, ...]:
        addresses = (t.data_ptr() for t in (dynamic_map(signed), self.edges, self.lines))
        return *addresses, self.first, self.negative, self.decades


def _bits(x: float) -> int:
    return int(torch.tensor(x, dtype=torch.float32).view(torch.int32))


def _below(x: float) -> float:
    """The largest fp32 number <= x: for fp32 v, v > x is v > _below(x)."""
    near = torch.tensor(x, dtype=torch.float64).float()
    return float(near if float(near) <= x else torch.nextafter(near, torch.tensor(-math.inf)))


@functools.cache
def _table(signed: bool) -> _Table:
    """Per bucket of magnitudes: the code where it starts, and the offset that makes the rest of the bit pattern carry over."""
    shift = 17 if signed else 16  # kShiftSigned, kShiftUnsigned
    code_map = dynamic_map(signed).double()
    middles = ((code_map[1:] + code_map[:-1]) / 2).tolist()  # exact: neighbours are within a factor of 6
    zero = 127 if signed else 0
    # bit patterns of the last fp32 numbers before the code goes up; for negative v, magnitudes of the first that is lower
    up = [_bits(_below(x)) for x in middles if x > 0]
    down = [_bits(-_below(x)) for x in reversed(middles) if x < 0]
    if not signed:
        up[0] = 0  # every positive value is at least code 1
    first, last = (up[0] or up[1]) // 2**shift - 1, _bits(1.0) >> shift
    edges = []
    for bucket in range(first, last + 1):
        inside = [x % 2**shift for x in up if x >> shift == bucket]
        assert len(inside) <= 1
        code = zero + sum(x >> shift < bucket for x in up)
        edges.append((code << 24) + (2**24 - 1 - inside[0] if inside else 0))
    for bucket in range(first, last + 1) if signed else ():  # the rest comes as -1 - rest
        inside = [x % 2**shift for x in down if x >> shift == bucket]
        assert len(inside) <= 1
        code = zero - sum(x >> shift < bucket for x in down)
        edges.append((code << 24) + (inside[0] if inside else 2**24 - 1))
    lines, decades = _lines(signed)
    return _Table(torch.tensor(edges, dtype=torch.int64).to(torch.int32), lines, first, last + 1 - first, decades)


def _lines(signed: bool) -> tuple[torch.Tensor, int]:
    """struct Code's lines and decades, k as there: decade i = 0 ... 6 has k = 2^E ... 2^(E + 1) - 1; E = i, unsigned i + 1."""
    low = 0 if signed else 1
    values = dynamic_map(signed).double().tolist()[127 if signed else 0 :]  # of k = low, low + 1, ...
    middle = [(a + b) / 2 for a, b in itertools.pairwise(values)]  # exact; between k and the next one
    top = 2 ** (7 + low)
    lines, factors = torch.zeros(6, 8), {}
    for i in range(7):
        power = 2 ** (i + low)
        c = Fraction(10) ** (i - 6) / (20 * power)
        slope, start = float(1 / (18 * c)), (16 * power - 9) / 18 + 0.5
        if i == 0:  # the line through its only threshold, from x = 0 on
            slope, start = 0.5 / middle[low], 0.5 + 2 * low
        lines[0, i] = _below(middle[2 * power - 1 - low])
        lines[1, i], lines[2, i], lines[3, i] = slope, start - 2.0**-12, 2 * power - 0.5
        factors[i + low] = c
    lines[0, 7], lines[2, 7], lines[3, 7] = math.inf, top + 0.5, top + 0.5
    factors[7 + low] = Fraction(1, 18 * top + 9 - 16 * top)
    for exponent, c in factors.items():
        lines[4, (exponent - 1) % 8] = float(c)
        lines[5, (exponent - 1) % 8] = float(c - Fraction(float(lines[4, (exponent - 1) % 8])))
    # the kernel counts (pattern - decades) 154 / 2^16 decades: i where decade i ends, so i or i - 1 within it
    ends = [_bits(float(x)) >> 16 for x in lines[0, :7]]
    decades = round(sum(end - 2**16 / 154 * (i + 0.5) for i, end in enumerate(ends)) / 7)
    assert [max(end - decades, 0) * 154 >> 16 for end in ends] == list(range(7))
    return lines, decades


# --- Triton ------------------------------------------------------------------------------------------------------
#
# One launch for all tensors: a program has UNIT blocks of one of them, which it finds in a table that travels to the device
# beside the launch, and the look-ups of codes are those of struct Code, from the first-level cache. Nothing is fused and
# quotient and root are the nearest, so the bits are the CPU's. Where all addresses and sizes are multiples of 16, four
# elements are loaded at once. Bound by memory; no GPU has measured it.

UNIT = 4  # blocks: 4 elements a thread of 8 warps (4 warps spill on sm_90)
COLUMNS = 12  # int64 of a tensor in the table: 6 addresses, size, dtype, and 8 fp32 rates


@jit
def _at(address, T: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(T))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@jit
def _decode(codes, code_map, absmax, inside, ZERO: tl.constexpr):
    return tl.load(code_map + tl.load(codes, mask=inside, other=ZERO).to(tl.int32)) * absmax[:, None]


@jit
def _scale_of(bits):
    """absmax as it is stored, 1 / absmax, and whether that is of use, from the largest magnitude's bits."""
    bits = tl.where(bits < 0x00800000, 0, bits)
    bits = tl.where(bits > 0x7F800000, 0x7FC00000, bits)
    useful = (bits > 0) & (bits < 0x7F800000)
    absmax = bits.to(tl.float32, bitcast=True)
    return absmax, tl.div_rn(tl.full(bits.shape, 1.0, tl.float32), tl.where(useful, absmax, 1.0)), useful


@jit
def _encode(x, edges, first, negative, SHIFT: tl.constexpr, SIGNED: tl.constexpr):
    bits = x.to(tl.uint32, bitcast=True)
    bucket = tl.maximum(((bits & 0x7FFFFFFF) >> SHIFT).to(tl.int32), first) - first
    rest = bits & ((1 << SHIFT) - 1)
    if SIGNED:
        below = (bits >> 31) != 0
        bucket = tl.where(below, bucket + negative, bucket)
        rest = tl.where(below, rest ^ 0xFFFFFFFF, rest)
    return (tl.load(edges + bucket).to(tl.uint32, bitcast=True) + rest) >> 24


@jit(varies=("count",))
def _adamw_8bit_kernel(
    table, starts, map1, edges1, map2, edges2, first1, negative1, first2, count,
    ALIGNED: tl.constexpr, SPAN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    found = 0
    for first in range(0, count, SPAN):
        i = first + tl.arange(0, SPAN)
        start = tl.load(starts + i, mask=i < count, other=0)
        found += tl.sum(((i < count) & (start <= program)).to(tl.int32), axis=0)
    table += (found - 1) * 12
    block = (program - tl.load(starts + found - 1)) * UNIT + tl.arange(0, UNIT)
    at = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    size = tl.load(table + 6)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    inside = at < size
    some = block * 256 < size
    rates = (table + 8).to(tl.pointer_type(tl.float32))
    decay, beta1, grad1, beta2 = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2), tl.load(rates + 3)
    grad2, step_size, root_scale, eps = tl.load(rates + 4), tl.load(rates + 5), tl.load(rates + 6), tl.load(rates + 7)
    bf16 = tl.load(table + 7) == 0
    p_at, g_at, m_at, v_at = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    max1, max2 = tl.load(table + 4), tl.load(table + 5)
    if bf16:
        p = tl.load(_at(p_at, tl.bfloat16, ALIGNED) + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(_at(g_at, tl.bfloat16, ALIGNED) + at, mask=inside, other=0.0).to(tl.float32)
    else:
        p = tl.load(_at(p_at, tl.float32, ALIGNED) + at, mask=inside, other=0.0)
        g = tl.load(_at(g_at, tl.float32, ALIGNED) + at, mask=inside, other=0.0)
    if max1 != 0:
        absmax1 = tl.load(max1.to(tl.pointer_type(tl.float32)) + block, mask=some, other=0.0)
        absmax2 = tl.load(max2.to(tl.pointer_type(tl.float32)) + block, mask=some, other=0.0)
        m = _decode(_at(m_at, tl.uint8, ALIGNED) + at, map1, absmax1, inside, 127)
        v = _decode(_at(v_at, tl.uint8, ALIGNED) + at, map2, absmax2, inside, 0)
    else:
        m = tl.load(_at(m_at, tl.float32, ALIGNED) + at, mask=inside, other=0.0)
        v = tl.load(_at(v_at, tl.float32, ALIGNED) + at, mask=inside, other=0.0)
    m = m * beta1 + g * grad1
    v = v * beta2 + (g * g) * grad2
    p = p * decay - step_size * tl.div_rn(m, tl.sqrt_rn(v) * root_scale + eps)
    if bf16:
        tl.store(_at(p_at, tl.bfloat16, ALIGNED) + at, p.to(tl.bfloat16), mask=inside)
    else:
        tl.store(_at(p_at, tl.float32, ALIGNED) + at, p, mask=inside)
    if max1 != 0:
        most1 = tl.max(tl.where(inside, m.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), axis=1)
        most2 = tl.max(tl.where(inside, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), axis=1)
        absmax1, scale1, useful1 = _scale_of(most1)
        absmax2, scale2, useful2 = _scale_of(most2)
        x1, x2 = tl.where(useful1[:, None], m * scale1[:, None], 0.0), tl.where(useful2[:, None], v * scale2[:, None], 0.0)
        codes1 = tl.where(useful1[:, None], _encode(x1, edges1, first1, negative1, 17, True), 127)
        codes2 = tl.where(x2 != 0.0, _encode(x2, edges2, first2, 0, 16, False), 0)
        tl.store(max1.to(tl.pointer_type(tl.float32)) + block, absmax1, mask=some)
        tl.store(max2.to(tl.pointer_type(tl.float32)) + block, absmax2, mask=some)
        tl.store(_at(m_at, tl.uint8, ALIGNED) + at, codes1.to(tl.uint8), mask=inside)
        tl.store(_at(v_at, tl.uint8, ALIGNED) + at, codes2.to(tl.uint8), mask=inside)
    else:
        tl.store(_at(m_at, tl.float32, ALIGNED) + at, m, mask=inside)
        tl.store(_at(v_at, tl.float32, ALIGNED) + at, v, mask=inside)


@functools.cache
def _tables_on(device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(t.to(device) for signed in (True, False) for t in (dynamic_map(signed), _table(signed).edges))


_CONSTANTS: dict[str, Any] = dict(SPAN=512, UNIT=UNIT, num_warps=8, fuse=False)


def _launch_triton(updates: Sequence[Update]) -> None:
    rows, starts, programs, aligned = bytearray(), array("q"), 0, True
    for u in updates:
        m, v, absmax1, absmax2 = u.moments
        n, addresses = u.param.numel(), [0 if t is None else t.data_ptr() for t in (absmax1, absmax2)]
        tensors = [t.data_ptr() for t in (u.param, u.grad, m, v)]
        rows += array("q", [*tensors, *addresses, n, DTYPE_CODES[u.param.dtype]]).tobytes() + array("f", _rates(u)).tobytes()
        aligned = aligned and not any(x % 16 for x in (*tensors, n))
        starts.append(programs)
        programs += -(-n // (BLOCK * UNIT))
    device = updates[0].param.device
    table = torch.frombuffer(rows + starts.tobytes(), dtype=torch.int64)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # a replay would take addresses from whatever lies there by then
            raise RuntimeError("adamw_8bit_: a CUDA graph is being captured, wants the update outside of it")
        table = table.pin_memory().to(device, non_blocking=True)  # the host waits for nothing; torch keeps the pinned memory
    cut = len(updates) * COLUMNS
    first = _table(True).first, _table(True).negative, _table(False).first
    launch(
        _adamw_8bit_kernel, (programs,), table, table[cut:], *_tables_on(device), *first, len(updates), ALIGNED=aligned,
        **_CONSTANTS,
    )  # fmt: skip


for _aligned in (True, False):
    ship(
        f"adamw_8bit{'' if _aligned else ' unaligned'}", _adamw_8bit_kernel, "*i64 *i64 *fp32 *i32 *fp32 *i32 i32 i32 i32 i32",
        ALIGNED=_aligned, **_CONSTANTS,
    )  # fmt: skip


# --- launcher ----------------------------------------------------------------------------------------------------


def _launch(updates: Sequence[Update], isa: str) -> None:
    """One native call or one kernel; no checks. `updates` without empty tensors, at least one."""
    if on_gpu(updates[0].param):
        _launch_triton(updates)
        return
    tensors, rates, first_block, elements = array("q"), array("f"), 0, 0
    for u in updates:
        m, v, absmax1, absmax2 = u.moments
        n = u.param.numel()
        tensors.extend((
            u.param.data_ptr(), u.grad.data_ptr(), m.data_ptr(), v.data_ptr(), 0 if absmax1 is None else absmax1.data_ptr(),
            0 if absmax2 is None else absmax2.data_ptr(), n, first_block, DTYPE_CODES[u.param.dtype],
        ))  # fmt: skip
        rates.extend(_rates(u))
        first_block += -(-n // BLOCK)
        elements += n
    native().adamw_8bit(
        tensors.buffer_info()[0], rates.buffer_info()[0], len(updates), _table(True).args(True), _table(False).args(False),
        threads(elements), isa,
    )  # fmt: skip


# --- public ------------------------------------------------------------------------------------------------------


def new_moments(param: torch.Tensor, *, min_8bit: int = MIN_8BIT) -> Moments:
    """Zero moments for `param`: codes and absmax, or fp32 where it has fewer than `min_8bit` elements."""
    n = param.numel()
    if n < min_8bit:
        return Moments(*(torch.zeros_like(param, dtype=torch.float32) for _ in range(2)))
    codes = (torch.full_like(param, zero, dtype=torch.uint8) for zero in (127, 0))
    return Moments(*codes, *(param.new_zeros(-(-n // BLOCK), dtype=torch.float32) for _ in range(2)))


@torch.no_grad()
def adamw_8bit_(updates: Sequence[Update], *, isa: str = "auto") -> None:
    """Updates every parameter and its moments in place, in one native call or launch; the gradients are left as they are.

    Args:
        updates: any number; tensors of any size (0 too), each with its own step and rates. `param` and `grad`: bf16 or fp32,
            of one shape and dtype, contiguous; `moments` as new_moments makes them. No two share memory; all on one device.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable"; the result is the same.
    Raises: ValueError for a wrong type, shape, dtype, layout, device, rate or isa; on CUDA ImportError without Triton, and
        RuntimeError where a CUDA graph is being captured.
    """
    check_isa("adamw_8bit_", isa)
    for u in updates:
        if not isinstance(u, Update):
            raise ValueError(f"adamw_8bit_: updates has a {type(u).__name__}, each wants to be an Update")
        if not isinstance(u.moments, Moments):
            have = type(u.moments).__name__
            raise ValueError(f"adamw_8bit_: moments has type {have}, wants a Moments; new_moments(param) makes one")
        p, g, n = u.param, u.grad, u.param.numel()
        devices = {t.device for t in (updates[0].param, p, g, *u.moments) if t is not None}
        if len(devices) > 1:
            have = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"adamw_8bit_: parameters, gradients and moments are on {have}, wants one device a call")
        if p.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"adamw_8bit_: param has dtype {p.dtype}, wants torch.float32 or torch.bfloat16")
        if g.dtype != p.dtype or g.shape != p.shape:
            raise ValueError(f"adamw_8bit_: grad is {g.dtype} {tuple(g.shape)}, param wants {p.dtype} {tuple(p.shape)}")
        m, v, absmax1, absmax2 = u.moments
        want = torch.float32 if absmax1 is None else torch.uint8
        if m.dtype != want or v.dtype != want or m.shape != p.shape or v.shape != p.shape:
            raise ValueError(
                f"adamw_8bit_: moments are {m.dtype} {tuple(m.shape)} and {v.dtype} {tuple(v.shape)}, wants {want} "
                f"{tuple(p.shape)} {'without' if absmax1 is None else 'with'} absmax; new_moments(param) makes them"
            )
        for a in (absmax1, absmax2):
            if (a is None) != (absmax1 is None) or (a is not None and (a.dtype != torch.float32 or len(a) != -(-n // BLOCK))):
                raise ValueError(f"adamw_8bit_: absmax wants two fp32 tensors of {-(-n // BLOCK)} blocks, or none")
        if not all(t is None or t.is_contiguous() for t in (p, g, *u.moments)):
            raise ValueError(f"adamw_8bit_: param {tuple(p.shape)}, its grad or moments are strided; wants .contiguous()")
        if u.step < 1:
            raise ValueError(f"adamw_8bit_: step has {u.step}, wants at least 1")
        for name, rate in (("lr", u.lr), ("eps", u.eps), ("weight_decay", u.weight_decay)):
            if not 0 <= rate < math.inf:
                raise ValueError(f"adamw_8bit_: {name} has {rate}, wants a finite number >= 0")
        if not all(0 <= beta < 1 for beta in u.betas):
            raise ValueError(f"adamw_8bit_: betas has {u.betas}, wants two numbers from 0 to below 1")
    present = [u for u in updates if u.param.numel()]
    if present:
        _launch(present, isa)
        torch.autograd.graph.increment_version([u.param for u in present])  # as torch's own writes do: a decoder looks there
