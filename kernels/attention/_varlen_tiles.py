"""What the Triton kernels of `varlen_attention`, `segment_attention` and `paged_attention` share: which rows and keys a program
works on, how it reads them, and its tiles. varlen.py has the formulas.

As on the CPU a row is a (query token, head of the group) of one KV head: row r of a document is token r // group, head
r % group.
A program takes a block of rows, so K and V are read once for the whole group, and few keys are hidden in a causal block:
128 rows of 8 heads are 16 tokens. Blocks do not cross documents: block t belongs to the document i with the largest
cu[i] * group // BLOCK + i <= t, found on the device. The grid, total * group // BLOCK + documents + 1, is known without reading
cu_seqlens, so nothing waits for the GPU and a captured graph takes other documents. The last, the tail past cu_seqlens[-1],
sees no key.
head_dim is split into at most two powers of two of at least 16 columns, D0 + D1 (96 is 64 + 32, 512 is 256 + 256).
Inputs are multiplied as they are, P and dS rounded to their dtype; sums, exponentials and statistics are fp32.
K and V come by pointers, not by tensor descriptors: a box of a descriptor cannot stop where a document does.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from swiftk.kernels._triton import jit, next_power_of_2, tl, tl_acc

LOG2E = 1.4426950408889634
WIDEST = (1 << 31) - 1  # a window that ends nowhere
VARIES = ("total_q", "total_k", "documents", "tiles")


# --- where a program works ---------------------------------------------------------------------------------------


@jit
def find_tile(cu, tile, documents, GROUP: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """The document of a block and the block's number in it, which is negative where cu is none: 128 probes a step, each of one
    load."""
    index = tile * 0
    for step in tl.static_range(STEPS):
        probe = index + tl.arange(0, 128) * (128 ** (STEPS - 1 - step))
        inside = probe <= documents
        first = tl.load(cu + probe, mask=inside, other=0).to(tl.int64) * GROUP // BLOCK + probe
        index += (tl.sum((inside & (first <= tile)).to(tl.int32), axis=0) - 1) * (128 ** (STEPS - 1 - step))
    index = tl.maximum(index, 0)  # below 0 where cu does not begin with 0
    return index, tile - (tl.load(cu + index).to(tl.int64) * GROUP // BLOCK + index).to(tl.int32)


@jit
def segment_of(cu, table, index, documents, total_q, total_k, SEGMENTS: tl.constexpr):
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
    if not SEGMENTS:
        known = known & ((index > 0) | ((q_start == 0) & (k_start == 0)))
    known = known | (index >= documents)
    tl.device_assert(known, "varlen_attention: cu_seqlens or segments decrease or are beyond the tensors")
    q_start, k_start = tl.minimum(tl.maximum(q_start, 0), total_q), tl.minimum(tl.maximum(k_start, 0), total_k)
    q_len, k_len = tl.minimum(q_len, total_q - q_start), tl.maximum(tl.minimum(k_len, total_k - k_start), 0)
    if SEGMENTS:
        q_pos, k_pos = tl.load(at + 4, mask=inside, other=0), tl.load(at + 5, mask=inside, other=0)
    else:
        q_pos, k_pos = k_len - q_len, k_len * 0
    return q_start, q_len, k_start, k_len, q_pos, k_pos


@jit
def sequence_of(cu, lengths, index, documents, total_q, most):
    """The same of a sequence of a paged cache, whose keys start at position 0 and are at most `most`; the tail has no rows."""
    inside = index < documents
    q_start = tl.load(cu + index)
    q_len = tl.load(cu + index + 1, mask=inside, other=0) - q_start
    k_len = tl.load(lengths + index, mask=inside, other=0)
    if index < documents:
        rises = (q_len >= 0) & ((index > 0) | (q_start == 0))
        tl.device_assert(rises, "paged_attention: cu_seqlens_q decreases or does not begin with 0")
        tl.device_assert(q_start + q_len <= total_q, "paged_attention: cu_seqlens_q is beyond the tokens of q")
        tl.device_assert(k_len <= most, "paged_attention: cache_seqlens is beyond the block table")
        enough = (k_len >= q_len) | (k_len == 0)
        tl.device_assert(enough, "paged_attention: cu_seqlens_q has more tokens than cache_seqlens")
    q_start, k_len = tl.minimum(tl.maximum(q_start, 0), total_q), tl.minimum(tl.maximum(k_len, 0), most)
    q_len = tl.minimum(q_len, total_q - q_start)
    return q_start, q_len, k_len * 0, k_len, k_len - q_len, k_len * 0


@jit
def sight(position, k_pos, k_len, left, right, HAS_LEFT: tl.constexpr):
    """The keys [low, high) that a query at `position` sees, in positions. A window may pass 2^31."""
    end = k_pos.to(tl.int64) + k_len
    high = tl.minimum(tl.maximum(position.to(tl.int64) + right + 1, k_pos), end).to(tl.int32)
    low = high * 0 + k_pos
    if HAS_LEFT:
        low = tl.minimum(tl.maximum(position.to(tl.int64) - left, k_pos), end).to(tl.int32)
    return low, high


@jit
def key_blocks(q_pos, k_pos, k_len, row0, rows, left, right, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr):  # fmt: skip
    """begin, full, rest, end: every valid row of the block sees all keys of [full, rest), and none outside [begin, end)."""
    low, high_first = sight(q_pos + row0 // GROUP, k_pos, k_len, left, right, HAS_LEFT)
    low_last, high = sight(q_pos + (tl.minimum(row0 + BLOCK_M, rows) - 1) // GROUP, k_pos, k_len, left, right, HAS_LEFT)
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
def row_offsets(row0, TOKEN: tl.constexpr, HEAD: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Of rows row0 + i from row 0; where a block is whole tokens, a scalar and what does not change from block to block."""
    i = tl.arange(0, BLOCK)
    if BLOCK % GROUP == 0:
        return tl.cast(row0 // GROUP, tl.int64) * TOKEN + (i // GROUP * TOKEN + i % GROUP * HEAD)
    i += row0
    return (i // GROUP).to(tl.int64) * TOKEN + i % GROUP * HEAD


@jit
def read_rows(x, offset, seen, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Rows of x at `offset`, their first D0 columns and the D1 others (D1 of 0: the first again)."""
    x0 = _read(x, offset, tl.arange(0, D0), DIM, seen, ROWS, D1 == 0 and D0 != DIM)
    x1 = x0
    if D1 > 0:
        x1 = _read(x, offset, D0 + tl.arange(0, D1), DIM, seen, ROWS, D0 + D1 != DIM)
    return x0, x1


@jit
def _write(x, at, column, dim, seen, value, ADD: tl.constexpr):
    keep = tl.where(seen, dim, 0)[:, None] > column[None, :]
    where = x + at[:, None] + column[None, :]
    if ADD:
        value += tl.load(where, mask=keep, other=0.0)
    tl.store(where, value.to(x.dtype.element_ty), mask=keep)


@jit
def write_rows(x, at, seen, x0, x1, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr, ADD: tl.constexpr):
    _write(x, at, tl.arange(0, D0), DIM, seen, x0, ADD)
    if D1 > 0:
        _write(x, at, D0 + tl.arange(0, D1), DIM, seen, x1, ADD)


@jit
def product(a0, a1, b0, b1, D1: tl.constexpr, ACC: tl.constexpr):
    """a b^T."""
    s = tl.dot(a0, tl.trans(b0), input_precision="ieee", out_dtype=ACC)
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision="ieee", out_dtype=ACC)
    return s


@jit
def add_product(x0, x1, p, y0, y1, D1: tl.constexpr, ACC: tl.constexpr):
    """x + p y."""
    x0 = tl.dot(p, y0, x0, input_precision="ieee", out_dtype=ACC)
    if D1 > 0:
        x1 = tl.dot(p, y1, x1, input_precision="ieee", out_dtype=ACC)
    return x0, x1


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


# --- what launchers need ------------------------------------------------------------------------------------------


@functools.cache
def arch_of(device: torch.device) -> int:
    """80, 90 or 100, whose blocks fit the chip: one of compute capability 12 has 99 KiB of shared memory, and 80's need 82."""
    major = 8 if device.type == "cpu" else torch.cuda.get_device_capability(device)[0]
    return 80 if major >= 12 else min(100, major * 10)


def steps_of(documents: int) -> int:
    """Rounds of the search among documents + 1."""
    return next(steps for steps in range(1, 6) if documents < 128**steps)


def where_of(table, total_q: int) -> tuple[torch.Tensor, torch.Tensor, int, bool]:
    """cu, table, documents, whether they are segments: cu has the number of queries before each document or segment."""
    if isinstance(table, tuple):
        return *table, table[0].numel() - 1, False
    cu = torch.zeros(table.shape[0] + 1, dtype=torch.int32, device=table.device)
    torch.cumsum(table[:, 1], 0, dtype=torch.int32, out=cu[1:])
    return cu, table, table.shape[0], True


def near(x: torch.Tensor) -> torch.Tensor:
    """x with the heads of a token beside each other: strides of a block's rows are constants of the kernels, int32 offsets."""
    return x if x.stride(1) <= x.stride(0) < 1 << 22 else x.contiguous()


def options_of(
    q, kv_heads: int, k_token: int, v_token: int, softmax_scale: float, softcap: float, left: int, right: int
) -> tuple[tuple, dict[str, Any]]:
    """(left, right, scale, softcap, factor) and the constants that both directions share. exp(s) is exp2(factor s), and s is
    q k^T itself where nothing forbids it: the scale joins the exponent's multiply-add."""
    has_left = 0 <= left <= WIDEST
    first = softcap != 0.0 or softmax_scale <= 0.0
    scalars = (
        left if has_left else 0, right if 0 <= right <= WIDEST else WIDEST, float(softmax_scale), float(softcap),
        LOG2E if first else LOG2E * softmax_scale,
    )  # fmt: skip
    constants = dict(
        GROUP=q.shape[1] // kv_heads, Q_TOKEN=q.stride(0), Q_HEAD=q.stride(1), K_TOKEN=k_token, V_TOKEN=v_token,
        HAS_LEFT=has_left, SCALE_FIRST=first, SOFTCAP=softcap != 0.0, ACC=tl_acc(q.dtype), **split(q.shape[2]),
    )  # fmt: skip
    return scalars, constants


# --- what is shipped ---------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A kind of attention that `make compile-gpu` compiles the kernels for: causal, 8 heads a group, with changes."""

    label: str
    arch: int
    dtype: torch.dtype
    x: str  # the type of q, k, v
    state: str  # of out and of the gradients
    constants: dict[str, Any]

    def blocks(self, kernel: str) -> dict[str, int]:
        return blocks(kernel, self.constants["DIM"], self.dtype, self.arch, self.constants["SEGMENTS"])


def _form(arch: int, dim: int, name: str = "", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Form:
    constants = dict(
        GROUP=8, STEPS=1, SEGMENTS=False, HAS_LEFT=False, HAS_SINKS=False, SCALE_FIRST=False, SOFTCAP=False, ACC=tl.float32,
        Q_TOKEN=64 * dim, Q_HEAD=dim, K_TOKEN=8 * dim, V_TOKEN=8 * dim, **split(dim),
    ) | changes  # fmt: skip
    short = "fp32" if dtype == torch.float32 else "bf16"
    state = "*fp32" if constants["SEGMENTS"] else f"*{short}"
    return Form(f"{short} d{dim}{name} for sm_{arch}", arch, dtype, f"*{short}", state, constants)


FORMS = [_form(arch, dim) for arch in (80, 90, 100) for dim in (64, 128, 256)]
for _arch in (80, 90, 100):
    FORMS.append(_form(_arch, 128, " segments", SEGMENTS=True, HAS_LEFT=True))
    FORMS.append(_form(_arch, 64, " left sinks", HAS_LEFT=True, HAS_SINKS=True))
    _softcap: dict[str, Any] = dict(HAS_LEFT=True, SOFTCAP=True, SCALE_FIRST=True, GROUP=2, Q_TOKEN=16 * 256)
    FORMS.append(_form(_arch, 256, " left softcap", **_softcap))
FORMS.append(_form(80, 512))  # its blocks are everyone's, as those of fp32 are
FORMS += [_form(90, dim, dtype=torch.float32) for dim in (64, 128)]
SCALARS = "i32 i32:16 fp32 fp32 fp32"  # left, right, scale, softcap, factor
