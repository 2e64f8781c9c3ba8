"""Writes nf4_golden.json: NF4 by exact rational arithmetic, one element at a time; torch and the kernels are not used.

    python tests/kernels/nf4_golden.py

Every fp32 or bf16 operation is done on fractions and rounded once, to nearest even, by `rounded`. Sources are given by their
bits, or are drawn by the generator below from a seed.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from fractions import Fraction
from pathlib import Path

FP32, BF16 = 24, 8  # bits of the significand; both have the exponents of fp32
VALUES = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
)


def leading_bit(x: Fraction) -> int:
    """The exponent e with 2^e <= |x| < 2^(e + 1)."""
    n, d = abs(x.numerator), x.denominator
    e = n.bit_length() - d.bit_length()
    return e if (n >= d << e if e >= 0 else n << -e >= d) else e - 1


def rounded(x: Fraction, digits: int) -> Fraction | str:
    """x in a binary format with fp32's exponents: nearest, ties to even, subnormals; "inf" or "-inf" past the largest."""
    if x == 0:
        return Fraction(0)
    exponent = leading_bit(x)
    unit = Fraction(2) ** (max(exponent, -126) - digits + 1)
    y = round(x / unit) * unit  # Python rounds a fraction's half to even
    if abs(y) >= Fraction(2) ** 128:
        return "inf" if y > 0 else "-inf"
    return y


def fp32(x: Fraction) -> Fraction:
    y = rounded(x, FP32)
    assert isinstance(y, Fraction), "fp32 overflow"
    return y


def to_bits(x: Fraction | str, negative: bool = False) -> int:
    """The fp32 bits of a value that fp32 has; `negative` is the sign of a zero."""
    if isinstance(x, str):
        return 0xFF800000 if x == "-inf" else 0x7F800000
    sign = int(x < 0 or (x == 0 and negative)) << 31
    if x == 0:
        return sign
    exponent = max(leading_bit(x), -126)
    significand = abs(x) / Fraction(2) ** (exponent - 23)
    assert significand.denominator == 1
    return sign | int(significand) + ((exponent + 126) << 23 if significand >= 1 << 23 else 0)


def from_bits(u: int) -> Fraction:
    exponent, fraction = u >> 23 & 255, u & 0x7FFFFF
    assert exponent < 255, "not finite"
    magnitude = Fraction(fraction + (1 << 23 if exponent else 0)) * Fraction(2) ** (max(exponent, 1) - 150)
    return -magnitude if u >> 31 else magnitude


TABLE = [fp32(Fraction(v)) for v in VALUES.split()]
SMALLEST = Fraction(2) ** -126


def scaled(block: list[Fraction]) -> tuple[Fraction, list[Fraction]]:
    """absmax (0 below 2^-126), and x * (1 / absmax) or 0 for each x."""
    absmax = max(abs(x) for x in block)
    if absmax < SMALLEST:
        return Fraction(0), [Fraction(0)] * len(block)
    inverse = fp32(1 / absmax)
    return absmax, [fp32(x * inverse) for x in block]


def thresholds(table: list[Fraction]) -> list[Fraction]:
    return [fp32(fp32(a + b) / 2) for a, b in itertools.pairwise(table)]


def code_of(v: Fraction, limits: list[Fraction]) -> int:
    return bisect.bisect_left(limits, v)  # how many are below v


def quantize_row(row: list[Fraction], blocksize: int) -> tuple[list[int], list[Fraction]]:
    """(bytes, absmax) of one row."""
    codes, absmax, limits = [], [], thresholds(TABLE)
    for start in range(0, len(row), blocksize):
        a, vs = scaled(row[start : start + blocksize])
        absmax.append(a)
        codes += [code_of(v, limits) if a else 7 for v in vs]
    codes += [7] * (len(codes) % 2)
    return [high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True)], absmax


def dequantize_row(packed: list[int], absmax: list[Fraction], columns: int, blocksize: int) -> tuple[list[int], list[int]]:
    """bf16 bits, and the fp32 bits before that rounding."""
    narrow, wide = [], []
    for k in range(columns):
        code = packed[k // 2] & 15 if k % 2 else packed[k // 2] >> 4
        product = fp32(TABLE[code] * absmax[k // blocksize])
        negative = TABLE[code] < 0
        wide.append(to_bits(product, negative))
        narrow.append(to_bits(rounded(product, BF16), negative) >> 16)
    return narrow, wide


def dynamic_map() -> list[Fraction]:
    values = [Fraction(0), Fraction(1)]
    for i in range(7):
        edges = [Fraction(1, 10) + Fraction(9, 10) * Fraction(j, 2**i) for j in range(2**i + 1)]
        for a, b in itertools.pairwise(edges):
            values += [sign * Fraction(10) ** (i - 6) * (a + b) / 2 for sign in (1, -1)]
    return sorted(fp32(v) for v in values)


def fp64(x: Fraction) -> Fraction:
    return Fraction(float(x))  # Python's division of integers is correctly rounded


def nest(absmax: list[Fraction]) -> dict:
    """The nested form of all absmax of a tensor: codes, second absmax, offset, and the decoded absmax."""
    total = [fp64(a) for a in absmax]
    while len(total) > 1:
        total += [Fraction(0)] * (len(total) % 2)
        half = len(total) // 2
        total = [fp64(a + b) for a, b in zip(total[:half], total[half:], strict=True)]
    offset = fp32(fp64(total[0] / len(absmax)))
    table, codes, scales, decoded = dynamic_map(), [], [], []
    limits = thresholds(table)
    d = [fp32(a - offset) for a in absmax]
    for start in range(0, len(d), 256):
        scale, vs = scaled(d[start : start + 256])
        scales.append(scale)
        for v in vs:
            codes.append(code_of(v, limits))
            decoded.append(fp32(fp32(table[codes[-1]] * scale) + offset))
    return {
        "codes": bytes(codes).hex(), "absmax": hex32(scales), "offset": hex32([offset]), "decoded": hex32(decoded),
    }  # fmt: skip


def hex32(values: list[Fraction]) -> str:
    return "".join(f"{to_bits(v):08x}" for v in values)


def draw(seed: int, n: int, dtype: str) -> list[int]:
    """fp32 bits of n pseudo-random values of magnitudes from 2^-8 to 1."""
    state, bits = seed, []
    for _ in range(n):
        state = (1664525 * state + 1013904223) % 2**32
        u = (state & 0x80000000) | (119 + (state >> 28 & 7)) << 23 | (state >> 5 & 0x7FFFFF)
        bits.append(u & 0xFFFF0000 if dtype == "bf16" else u)
    return bits


def case(
    name: str, bits: list[int], columns: int, blocksize: int, dtype: str = "fp32", seed: int = 0, nested: bool = False
) -> dict:
    rows = [[from_bits(u) for u in bits[i : i + columns]] for i in range(0, len(bits), columns)]
    codes, absmax, narrow, wide = [], [], [], []
    for row in rows:
        c, a = quantize_row(row, blocksize)
        n, w = dequantize_row(c, a, columns, blocksize)
        codes += c
        absmax += a
        narrow += n
        wide += w
    out: dict = {"name": name, "dtype": dtype, "shape": [len(rows), columns], "blocksize": blocksize}
    out["source"] = {"seed": seed} if seed else "".join(f"{u:08x}" for u in bits)
    out |= {"codes": bytes(codes).hex(), "absmax": hex32(absmax)}
    for name, digits in (("bf16", "".join(f"{u:04x}" for u in narrow)), ("fp32", "".join(f"{u:08x}" for u in wide))):
        if len(bits) <= 130:
            out[name] = digits
        else:
            out[f"{name}_sha256"] = hashlib.sha256(digits.encode()).hexdigest()
    if nested:
        out["nested"] = nest(absmax)
    return out


def cases() -> list[dict]:
    one, big = 0x3F800000, 0x7F000000
    found = []
    ties = []  # absmax 1: each threshold, and its neighbours of one ulp
    for a, b in itertools.pairwise(TABLE):
        u = to_bits(fp32(fp32(a + b) / 2))
        ties += [u - 1, u, u + 1]
    for blocksize in (32, 64):
        row = [one, *ties[:22], 0x80000000] if blocksize == 32 else [one, *ties]
        found.append(case(f"ties, blocksize {blocksize}", row, len(row), blocksize))
    found.append(case("ties, scaled by 2^127", [u + (127 << 23) for u in (one, *ties) if u & 0x7F800000], 46, 64))
    special = [
        ("zeros", [0] * 5),
        ("negative zeros", [0x80000000] * 4),
        ("subnormals", [0x007FFFFF, 0x80000001, 0x00400000]),
        ("the smallest normal", [0x00800000, 0x80400000, 0x00000001]),
        ("2^126: the last normal reciprocal", [0x7E800000, 0x7E000000, 0xFE400000]),
        ("2^127: a subnormal reciprocal", [big, 0x7E800000, 0xFEC00000, 0x3F800000]),
        ("the largest fp32: bf16 rounds to infinity", [0x7F7FFFFF, 0xFF7F8000, 0x7F000000]),
        ("subnormal products", [0x00812345, 0x80712345, 0x00312345]),
        ("one element", [0xC0490FDB]),
        ("negative absmax", [0xC0000000, 0x3F000000]),
        ("v above 1", [0x3F7FFFFF, 0x3F7FFFFE, 0xBF7FFFFF, 0x40490FDB]),
    ]
    found += [case(name, bits, len(bits), 32) for name, bits in special]
    found.append(case("zero block between others", [one] * 32 + [0] * 32 + [0xBF000000] * 7, 71, 32))
    for i, blocksize in enumerate((32, 64, 128, 256, 512, 1024, 2048, 4096)):
        columns = blocksize + 33 - i % 2  # one full block and a tail, of an odd and of an even number of elements
        dtype = "bf16" if i % 3 == 1 else "fp32"
        found.append(case(f"blocksize {blocksize}", draw(i + 1, columns, dtype), columns, blocksize, dtype, seed=i + 1))
    found.append(case("rows", draw(20, 3 * 97, "bf16"), 97, 64, "bf16", seed=20))
    found.append(case("nested", draw(30, 9 * 960, "fp32"), 960, 32, seed=30, nested=True))  # 270 absmax: a second block
    return found


if __name__ == "__main__":
    path = Path(__file__).with_suffix(".json")
    lines = ",\n".join(json.dumps(c) for c in cases())
    path.write_text(f'{{"dynamic_map": "{hex32(dynamic_map())}", "cases": [\n{lines}\n]}}\n')
