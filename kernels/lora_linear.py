"""LoRA linear: y = g (x W^T + s drop(x) A^T B^T) + bias, W frozen, g = 1 (LoRA) or m / ||W + s B A|| per row of W (DoRA).

Sources: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA: s = alpha / sqrt(r)); Liu et al. 2024 (DoRA, the norm detached).

Forward, with D the 0/1 mask of dropout (kernels/dropout.py) and s' = s / (1 - p):
    S = round(s' (D x) A^T)                       by the row-invariant linear; saved, never computed again
    y = round(g (x W^T + S B^T) + bias)           one GEMM: the r columns of S go on in the accumulators of K, g scales the sum
so row t of y depends on row t of x, its token index and the weights alone, for any number of rows, threads or adapters.
Several adapters (a, b with a leading dimension): S has r columns per adapter, rounded up to 32, zero except for the row's own.
Per row ||W + s B A||^2 = ||W||^2 + 2 s B . (W A^T) + s^2 B (A A^T) . B; ||W||^2 once, by row_norm_sq; W A^T reads W again.

Backward, dy' = g dy, all sums in at least fp32:
    dS = s' dy' B      dA = dS^T (D x)      dB = dy'^T S      dx = dy' W + D (dS A)
    dm = sum of dy (y - bias) / m over rows      dbias = sum of dy over rows
FLOPs beside the 4 M N K of a frozen linear: 4 M r (N + K) forward and twice that backward. Bytes beside it: x is read once more
forward; x and dy once (dm: y too), dx read and written once backward. Saved: x, S (M r), y for DoRA's dm.

On CUDA the dense products are the vendor's (forward with numerics="invariant": linear.py's) and the small term comes first:
S B^T is written to y, D (dS A) to dx, and the dense product adds to them, so what is rounded twice is small. dS is rounded to
x's dtype, as peft's is. dS and dB are two vendor products that read dy each: one kernel for both would save 16 us of 350 at
M 8192, N = K = 4096 (arithmetic) and writes as much in partial sums from r = 64 on. Triton does what meets the mask of dropout,
which is drawn in registers: S, dA and D (dS A) read or write x's shape once each. Saved for DoRA's dm: x W^T + S B^T, not y.

An NF4 base is `nf4_linear` (forward) and slices of dequantised columns (dx): the same numbers as its dequantised weight.

Unlike peft: dropout is drawn per adapted linear (peft too) and from (seed, step, layer, token, column) (peft: the global
generator); DoRA with dropout keeps x in the base product, where peft drops x there too (a second dense GEMM): equal to peft
at p = 0 and in evaluation. A row of W + s B A that is zero gives 0 and dm = 0 (peft: NaN); one below
about 3e-4 of its row of W may, since the expansion above cancels there.
Not supported: a trainable W, DoRA with several adapters, the gradient of the gradient. On CUDA the values of segment_ids and of
a stack are not checked, which would wait for the device: an id outside the stack is no adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from swiftk.kernels._checks import check_floating, check_isa, check_shape, refuse_double_backward
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import jit, launch, next_power_of_2, on_gpu, ship, tl, tl_acc
from swiftk.kernels.dropout import Dropout, check_dropout, dropout_keys, dropout_out, dropout_ref, keep_tile
from swiftk.kernels.linear import (
    Product,
    as_matrix,
    check_numerics,
    linear_group_out,
    matmul_dtype,
    row_args,
    vendor_mm,
    with_rows,
)
from swiftk.kernels.nf4 import NF4Tensor, check_nf4, nf4_dequantize, nf4_dequantize_ref, plain_absmax, take_rows
from swiftk.kernels.nf4_linear import matmul_weight, nf4_linear_group_out

ALIGN = 32  # columns of one of several adapters: a multiple of every Dot<T>::step, so lanes do not depend on the others
NORM_ROWS = 1024  # rows of an NF4 weight that row_norm_sq dequantises at a time
MASK_BYTES = 1 << 20  # rows of x that are masked at a time, so that the copy stays in the L2 cache


class Adapter(NamedTuple):
    """What is trained beside W (N, K). a and b in x's dtype, or in the accumulate dtype (fp32 masters under bf16 x)."""

    a: torch.Tensor  # (r, K), or (adapters, r, K)
    b: torch.Tensor  # (N, r), or (adapters, N, r)
    scale: float | tuple[float, ...]  # s; one per adapter where there are several (a float: for all)
    magnitude: torch.Tensor | None = None  # DoRA's m (N,); one adapter only
    weight_norm_sq: torch.Tensor | None = None  # row_norm_sq(W) (N,); needed with magnitude


def lora_scale(alpha: float, r: int, rslora: bool = False) -> float:
    """s of LoRA, alpha / r, or of rsLoRA, alpha / sqrt(r)."""
    return alpha / (math.sqrt(r) if rslora else r)


def row_norm_sq(weight: torch.Tensor | NF4Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """||W_n||^2, (N,), in dtype: the accumulate dtype of a plain weight where None, fp32 of an NF4 one."""
    if not isinstance(weight, NF4Tensor):
        return torch.linalg.vector_norm(weight, dim=1, dtype=dtype or acc_dtype(weight.dtype)).square()
    weight, norms = plain_absmax(weight), weight.absmax.new_empty(len(weight.codes), dtype=dtype or torch.float32)
    for n in range(0, len(norms), NORM_ROWS):
        rows = nf4_dequantize(take_rows(weight, slice(n, n + NORM_ROWS)))
        norms[n : n + NORM_ROWS] = torch.linalg.vector_norm(rows, dim=1, dtype=norms.dtype).square()
    return norms


# --- reference ---------------------------------------------------------------------------------------------------


def lora_linear_ref(
    x: torch.Tensor, weight: torch.Tensor | NF4Tensor, adapter: Adapter, bias: torch.Tensor | None = None, *,
    dropout: Dropout | None = None, segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The formula in at least fp32, rounded once; a and b are those of x's dtype. x (..., K) -> (..., N)."""
    acc = acc_dtype(x.dtype)
    xf, w = x.to(acc), (nf4_dequantize_ref(weight) if isinstance(weight, NF4Tensor) else weight).to(acc)
    a, b = (t.to(x.dtype).to(acc) for t in (adapter.a, adapter.b))
    a, b = (t if t.dim() == 3 else t[None] for t in (a, b))
    scales = scales_of(adapter, len(a))
    dx = xf if dropout is None else dropout_ref(xf, dropout)
    y = xf @ w.t()
    for e in range(len(a)):
        delta = scales[e] * (dx @ a[e].t()) @ b[e].t()
        y = y + (delta if segment_ids is None else torch.where((segment_ids == e).view(*x.shape[:-1], 1), delta, 0))
    if adapter.magnitude is not None:
        norm = (w + scales[0] * b[0] @ a[0]).norm(dim=1).detach()
        y = y * torch.where(norm == 0, 0, adapter.magnitude.to(acc) / norm)
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


# --- Triton ------------------------------------------------------------------------------------------------------
#
# The three low-rank products that meet dropout's mask. They are bound by x's bytes and by Philox: 8 integer operations an
# element, about what reading it takes (arithmetic; no GPU has measured it). The order of every sum is that of the tiles, which
# are the same for any M. dA is summed over TRITON_ROWS rows per program, then over those in their order.

TRITON_ROWS = 1024


@jit(varies=("rows", "layer", "threshold"))
def _masked_product_kernel(
    x, a, scale, out, seed_step, token_index, rows, cols, R, x_row, a_row, out_row, layer, threshold, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # out = scale (D x) a^T: x (rows, cols), a (R, cols)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = tl.arange(0, BLOCK_K)
    tokens = tl.load(token_index + tl.minimum(row, rows - 1))
    x_at = x + tl.minimum(row, rows - 1)[:, None] * x_row + at[None, :]
    a_at = a + tl.minimum(r, R - 1)[None, :] * a_row + at[:, None]
    x_k, a_k = row[:, None] * 0 + at[None, :], r[None, :] * 0 + at[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    for k in range(0, cols, BLOCK_K):
        keep = keep_tile(seed_step, layer, tokens, k // 8, threshold, BLOCK_M, BLOCK_K // 8)
        u = tl.load(x_at + k, mask=x_k < cols - k, other=0.0)
        v = tl.load(a_at + k, mask=a_k < cols - k, other=0.0)
        acc = tl.dot(tl.where(keep, u, 0.0).to(x.dtype.element_ty), v, acc, input_precision="ieee", out_dtype=ACC)
    acc = acc * tl.load(scale + tl.minimum(r, R - 1))[None, :]
    inside = (row[:, None] < rows) & (r[None, :] < R)
    tl.store(out + row[:, None] * out_row + r[None, :], acc.to(out.dtype.element_ty), mask=inside)


@jit(varies=("rows", "layer", "threshold"))
def _masked_gram_kernel(
    p, q, out, seed_step, token_index, rows, cols, R, p_row, q_row, layer, threshold, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # out[block of ROWS rows] (R, cols) = p^T (D q): p (rows, R), q (rows, cols)
    block, column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, col = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R), column * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=ACC)
    for m in range(0, ROWS, BLOCK_M):
        row = block * ROWS + m + tl.arange(0, BLOCK_M)
        tokens = tl.load(token_index + tl.minimum(row, rows - 1))
        keep = keep_tile(seed_step, layer, tokens, column * (BLOCK_C // 8), threshold, BLOCK_M, BLOCK_C // 8)
        u = tl.load(p + row[None, :] * p_row + r[:, None], mask=(row[None, :] < rows) & (r[:, None] < R), other=0.0)
        v = tl.load(q + row[:, None] * q_row + col[None, :], mask=(row[:, None] < rows) & (col[None, :] < cols), other=0.0)
        acc = tl.dot(u, tl.where(keep, v, 0.0).to(q.dtype.element_ty), acc, input_precision="ieee", out_dtype=ACC)
    at = (block * R + r[:, None]) * cols + col[None, :]
    tl.store(out + at, acc, mask=(r[:, None] < R) & (col[None, :] < cols))


@jit(varies=("rows", "layer", "threshold"))
def _masked_update_kernel(
    p, a, q, seed_step, token_index, rows, cols, R, p_row, a_row, q_row, layer, threshold, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    # q = D (p a), or q += : p (rows, R), a (R, cols)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col, at = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    for first in range(0, R, BLOCK_R):
        r = first + at
        u = tl.load(p + row[:, None] * p_row + r[None, :], mask=(row[:, None] < rows) & (r[None, :] < R), other=0.0)
        v = tl.load(a + r[:, None] * a_row + col[None, :], mask=(r[:, None] < R) & (col[None, :] < cols), other=0.0)
        acc = tl.dot(u, v, acc, input_precision="ieee", out_dtype=ACC)
    tokens = tl.load(token_index + tl.minimum(row, rows - 1))
    keep = keep_tile(seed_step, layer, tokens, tl.program_id(1) * (BLOCK_C // 8), threshold, BLOCK_M, BLOCK_C // 8)
    acc = tl.where(keep, acc, 0.0)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    q += row[:, None] * q_row + col[None, :]
    if ADD:
        acc += tl.load(q, mask=inside, other=0.0).to(ACC)
    tl.store(q, acc.to(q.dtype.element_ty), mask=inside)


@jit(varies=("rows",))
def _column_dot_kernel(p, q, out, rows, cols, p_row, q_row, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_C: tl.constexpr):  # fmt: skip
    block, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    for m in range(0, ROWS, BLOCK_M):
        row = block * ROWS + m + tl.arange(0, BLOCK_M)
        inside = (row[:, None] < rows) & (col[None, :] < cols)
        u = tl.load(p + row[:, None] * p_row + col[None, :], mask=inside, other=0.0).to(ACC)
        acc += u * tl.load(q + row[:, None] * q_row + col[None, :], mask=inside, other=0.0).to(ACC)
    tl.store(out + block * cols + col, tl.sum(acc, axis=0), mask=col < cols)


def _rank_tile(R: int) -> int:
    return min(64, max(16, next_power_of_2(R)))


PRODUCT_TILE: dict[str, Any] = {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
GRAM_TILE: dict[str, Any] = {"BLOCK_M": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2}
UPDATE_TILE: dict[str, Any] = {"BLOCK_M": 64, "BLOCK_C": 64, "num_warps": 4}
DOT_TILE: dict[str, Any] = {"BLOCK_M": 16, "BLOCK_C": 128, "num_warps": 4}

for _r in (16, 64):
    ship(
        f"lora S dropout bf16 r={_r}", _masked_product_kernel,
        "*bf16 *bf16 *fp32 *bf16 *i64 *i64 i32 i32:16 i32:16 i32:16 i32:16 i32:16 i32 i32", ACC=tl.float32, BLOCK_R=_r,
        **PRODUCT_TILE,
    )  # fmt: skip
    ship(
        f"lora dA dropout bf16 r={_r}", _masked_gram_kernel,
        "*bf16 *bf16 *fp32 *i64 *i64 i32 i32:16 i32:16 i32:16 i32:16 i32 i32", ACC=tl.float32, ROWS=TRITON_ROWS, BLOCK_R=_r,
        **GRAM_TILE,
    )  # fmt: skip
    ship(
        f"lora dx dropout bf16 r={_r}", _masked_update_kernel,
        "*bf16 *bf16 *bf16 *i64 *i64 i32 i32:16 i32:16 i32:16 i32:16 i32:16 i32 i32", ACC=tl.float32, BLOCK_R=_r, ADD=False,
        **UPDATE_TILE,
    )  # fmt: skip
ship(
    "lora dm bf16", _column_dot_kernel, "*bf16 *bf16 *fp32 i32 i32:16 i32:16 i32:16", ACC=tl.float32, ROWS=TRITON_ROWS,
    **DOT_TILE,
)  # fmt: skip


# --- launchers ---------------------------------------------------------------------------------------------------


class Mask(NamedTuple):
    """Dropout of one linear as the native calls take it; threshold 0 drops nothing."""

    threshold: int
    seed_step: torch.Tensor | None
    layer: int
    token_index: torch.Tensor | None

    def rows(self, m: slice) -> Mask:
        return self if self.token_index is None else self._replace(token_index=self.token_index[m])

    def args(self) -> tuple[int, int, int, int]:
        if self.seed_step is None or self.token_index is None:
            return 0, 0, 0, 0
        return self.threshold, self.seed_step.data_ptr(), self.layer, self.token_index.data_ptr()


def rank_gram(p: torch.Tensor, q: torch.Tensor, mask: Mask, out: torch.Tensor, isa: str) -> None:
    """out (r, C) = p^T mask(q). p (M, r) and out in q's accumulate dtype, q (M, C); on CUDA p is rounded to q's dtype."""
    if on_gpu(q):
        p = p.to(q.dtype)
        if mask.threshold == 0:
            vendor_mm(p.t(), q, out)
            return
        (M, C), R, tile = q.shape, p.shape[1], _rank_tile(p.shape[1])
        if M == 0:
            out.zero_()
            return
        blocks = -(-M // TRITON_ROWS)
        parts = out if blocks == 1 else out.new_empty(blocks, R, C)
        launch(
            _masked_gram_kernel, (blocks, -(-C // GRAM_TILE["BLOCK_C"]), -(-R // tile)), p, q, parts, mask.seed_step,
            mask.token_index, M, C, R, p.stride(0), q.stride(0), mask.layer, mask.threshold, ACC=tl_acc(q.dtype),
            ROWS=TRITON_ROWS, BLOCK_R=tile, **GRAM_TILE,
        )  # fmt: skip
        if blocks > 1:
            torch.sum(parts, 0, out=out)
        return
    native().rank_gram(
        DTYPE_CODES[q.dtype], p.data_ptr(), p.stride(0), p.shape[1], q.data_ptr(), q.stride(0), *q.shape, out.data_ptr(),
        *mask.args(), threads(q.numel()), isa,
    )  # fmt: skip


def rank_update(p: torch.Tensor, r: torch.Tensor, q: torch.Tensor, mask: Mask, isa: str, beta: float = 1.0) -> None:
    """q (M, C) = mask(p r) + beta q; beta 0 on CUDA alone. p (M, r) and r (r, C) in q's accumulate dtype, or q's on CUDA."""
    if on_gpu(q):
        if mask.threshold == 0:
            vendor_mm(p, r, q, beta)
            return
        (M, C), R, tile = q.shape, p.shape[1], UPDATE_TILE
        launch(
            _masked_update_kernel, (-(-M // tile["BLOCK_M"]), -(-C // tile["BLOCK_C"])), p, r, q, mask.seed_step,
            mask.token_index, M, C, R, p.stride(0), r.stride(0), q.stride(0), mask.layer, mask.threshold, ACC=tl_acc(q.dtype),
            BLOCK_R=_rank_tile(R), ADD=beta != 0.0, **tile,
        )  # fmt: skip
        return
    native().rank_update(
        DTYPE_CODES[q.dtype], p.data_ptr(), p.stride(0), p.shape[1], r.data_ptr(), q.data_ptr(), q.stride(0), *q.shape,
        *mask.args(), threads(q.numel()), isa,
    )  # fmt: skip


def _column_dot(p: torch.Tensor, q: torch.Tensor, isa: str) -> torch.Tensor:
    """Sum over rows of p q in the accumulate dtype. p, q (M, C) -> (C,)."""
    if on_gpu(p):
        M, C = p.shape
        blocks = max(1, -(-M // TRITON_ROWS))
        parts = p.new_empty(blocks, C, dtype=acc_dtype(p.dtype))
        launch(
            _column_dot_kernel, (blocks, -(-C // DOT_TILE["BLOCK_C"])), p, q, parts, M, C, p.stride(0), q.stride(0),
            ACC=tl_acc(p.dtype), ROWS=TRITON_ROWS, **DOT_TILE,
        )  # fmt: skip
        return parts.sum(0)
    out = p.new_empty(p.shape[1], dtype=acc_dtype(p.dtype))
    native().column_dot(
        DTYPE_CODES[p.dtype], p.data_ptr(), p.stride(0), q.data_ptr(), q.stride(0), *p.shape, out.data_ptr(),
        threads(p.numel()), isa,
    )  # fmt: skip
    return out


def low_rank(x, a, factor: torch.Tensor, mask: Mask, out, isa, numerics="auto") -> None:
    """out (M, R) = factor (D x) a^T. factor (R,) in the accumulate dtype, a (R, K) and out (any row stride) in x's dtype."""
    if mask.threshold == 0:
        base_product(x, a, None, out, isa, scale=factor, numerics=numerics)
    elif on_gpu(x):
        tile = _rank_tile(len(a))
        launch(
            _masked_product_kernel, (-(-len(x) // PRODUCT_TILE["BLOCK_M"]), -(-len(a) // tile)), x, a, factor, out,
            mask.seed_step, mask.token_index, *x.shape, len(a), x.stride(0), a.stride(0), out.stride(0), mask.layer,
            mask.threshold, ACC=tl_acc(x.dtype), BLOCK_R=tile, **PRODUCT_TILE,
        )  # fmt: skip
    elif mask.seed_step is not None and mask.token_index is not None:
        masked = x.new_empty(x.shape)
        dropout_out(x, mask.threshold, mask.seed_step, mask.layer, mask.token_index, masked, isa=isa)
        base_product(masked, a, None, out, isa, scale=factor)


def mask_blocks(x: torch.Tensor) -> Iterator[slice]:
    """The rows of x that `low_rank` masks at a time: a copy of them on the CPU, which stays in the cache; none on CUDA."""
    height = max(1, len(x) if on_gpu(x) else MASK_BYTES // max(1, x.shape[1] * x.element_size()))
    return (slice(m, min(m + height, len(x))) for m in range(0, len(x), height))


def base_product(x, weight, bias, y, isa, tail=None, scale=None, numerics="auto") -> None:
    """linear_out or nf4_linear_out: y = scale (x W^T + s t^T) + bias with tail = (s, t)."""
    base_products(x, [Product(weight, bias, y, tail, scale)], isa, numerics)


def base_products(x: torch.Tensor, products: Sequence[Product], isa: str, numerics: str = "auto") -> None:
    """Several of one x, the plain and the NF4 ones in one call each."""
    for nf4, out in ((False, linear_group_out), (True, nf4_linear_group_out)):
        if group := [p for p in products if isinstance(p.weight, NF4Tensor) == nf4]:
            out(x, group, isa, numerics)


# --- operator ----------------------------------------------------------------------------------------------------
# One operator for one linear and for a group that reads the same x. A list has one entry per linear, or none where no linear of
# the group has it; an empty tensor is a linear without (a bias, an absmax). Returns y per linear, S of all, then per linear
# (y - bias) where DoRA's dm needs it beside y, then the row norms of DoRA.

_ARGS = (
    "Tensor x, Tensor[] weights, Tensor[] absmax, int[] blocksizes, Tensor[] biases, Tensor[] a, Tensor[] b, float[] scales, "
    "Tensor[] magnitudes, Tensor[] norms_sq, int[] thresholds, SymInt[] layers, Tensor? seed_step, Tensor? token_index, "
    "Tensor? segment_ids, str numerics, str isa"
)
torch.library.define("swiftk::lora_linear_fwd", f"({_ARGS}) -> Tensor[]")
torch.library.define(
    "swiftk::lora_linear_bwd",
    "(Tensor[] dy, Tensor? x, Tensor[] weights, Tensor[] absmax, int[] blocksizes, Tensor[] a, Tensor[] b, float[] scales, "
    "Tensor[] magnitudes, Tensor[] norms, Tensor? s, Tensor[] unbiased, int[] thresholds, SymInt[] layers, Tensor? seed_step, "
    "Tensor? token_index, Tensor? segment_ids, bool needs_dx, bool needs_adapters, str isa) -> Tensor[]",
)


def _weights(weights, absmax, blocksizes, in_features: int) -> list[torch.Tensor | NF4Tensor]:
    """What the operator's lists stand for; blocksize 0 is a plain weight."""
    plain = [with_rows(w) for w in weights]
    scales = absmax or [None] * len(plain)
    return [
        NF4Tensor(w, with_rows(scale), in_features, size) if size else w
        for w, scale, size in zip(plain, scales, blocksizes, strict=True)
    ]


def _columns(a: torch.Tensor) -> int:
    """Columns of S that an adapter (r, K) or a stack (adapters, r, K) takes."""
    return a.shape[0] if a.dim() == 2 else a.shape[0] * (-(-a.shape[1] // ALIGN) * ALIGN)


def _flat(a: torch.Tensor, b: torch.Tensor, scales: Sequence[float], dtype: torch.dtype):
    """a (R, K), b (N, R) and s (R,) over the columns of S: a stack padded with zeros to ALIGN columns per adapter."""
    a, b = a.to(dtype), b.to(dtype)
    if a.dim() == 2:
        return a.contiguous(), b.contiguous(), a.new_full((len(a),), scales[0], dtype=acc_dtype(dtype))
    pad = -a.shape[1] % ALIGN
    a, b = torch.nn.functional.pad(a, (0, 0, 0, pad)), torch.nn.functional.pad(b, (0, pad))
    s = torch.cat([a.new_full((a.shape[1],), scale, dtype=acc_dtype(dtype)) for scale in scales])
    return a.flatten(0, 1).contiguous(), b.transpose(0, 1).flatten(1).contiguous(), s


def keep_own(s: torch.Tensor, segment_ids: torch.Tensor, adapters: int) -> None:
    """Zero in the columns of other adapters than the row's own; s (M, R) of a stack; int64 ids, -1 keeps none."""
    columns = s.shape[1] // adapters
    if on_gpu(s):
        other = segment_ids[:, None] != torch.arange(adapters, device=s.device)
        s.unflatten(1, (adapters, columns)).masked_fill_(other[:, :, None], 0)
        return
    native().keep_own(DTYPE_CODES[s.dtype], *row_args(s), len(s), adapters, columns, segment_ids.data_ptr())


def _check_values(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], segment_ids: torch.Tensor | None, dtype) -> None:
    """Of a stack: ids in range, values finite in x's dtype: 0 times infinity of one would be NaN in rows of the others."""
    if segment_ids is None or on_gpu(segment_ids):
        return
    for pair in zip(a, b, strict=True):
        adapters = len(pair[0])
        if len(segment_ids) and not (segment_ids.min() >= -1 and segment_ids.max() < adapters):
            worst = int(segment_ids.max() if segment_ids.max() >= adapters else segment_ids.min())
            raise ValueError(f"lora_linear: segment_ids has {worst}, wants -1 to {adapters - 1}")
        for name, t in zip("ab", pair, strict=True):
            if not (finite := t.detach().to(dtype).isfinite().flatten(1).all(1)).all():
                bad = int(finite.logical_not().nonzero()[0])
                raise ValueError(
                    f"lora_linear: adapter {bad} of {adapters} has values in {name} that are not finite in {dtype}"
                )


def adapted_norm(weight, a, b, s, norm_sq, isa):
    """||W + s B A|| per row, (N,) in the accumulate dtype; a (r, K), b (N, r) in x's dtype, s (r,)."""
    acc = acc_dtype(a.dtype)
    wa, aa, baa = (a.new_empty(size, dtype=acc) for size in ((len(a), len(b)), (len(a), len(a)), b.shape))
    bs = b.to(acc) * s
    base_product(a, weight, None, wa, isa)  # (r, N)
    base_product(a, a, None, aa, isa)
    base_product(bs, aa, None, baa, isa)  # A A^T is symmetric
    return (norm_sq + (bs * (2 * wa.t() + baa)).sum(1)).clamp_(min=0).sqrt_()


def _gain(magnitude, norm):
    """g = m / norm, 0 where the norm is 0; a NaN stays one."""
    return torch.where(norm == 0, 0, magnitude.to(norm.dtype) / norm)


def _groups(a: Sequence[torch.Tensor], scales: Sequence[float]):
    """Per linear: its range of columns of S and its scales."""
    column = first = 0
    for t in a:
        adapters = 1 if t.dim() == 2 else t.shape[0]
        yield slice(column, column + _columns(t)), scales[first : first + adapters]
        column, first = column + _columns(t), first + adapters


@torch.library.register_kernel("swiftk::lora_linear_fwd", ("cpu", "cuda"))
def _lora_linear_fwd(
    x, weights, absmax, blocksizes, biases, a, b, scales, magnitudes, norms_sq, thresholds, layers, seed_step, token_index,
    segment_ids, numerics, isa,
):  # fmt: skip
    _check_values(a, b, segment_ids, x.dtype)
    seed_step, token_index = dropout_keys(seed_step, token_index)
    acc, x2 = acc_dtype(x.dtype), as_matrix(x)
    M, K = x2.shape
    columns, per_linear = zip(*_groups(a, scales), strict=True)
    flat = [_flat(*abs_, x.dtype) for abs_ in zip(a, b, per_linear, strict=True)]
    masks = [Mask(t, seed_step, layer, token_index) for t, layer in zip(thresholds, layers, strict=True)]
    factors = [s * (65536 / (65536 - t)) for (_, _, s), t in zip(flat, thresholds, strict=True)]
    s = x.new_empty(M, columns[-1].stop)
    if not any(thresholds):
        low_rank(x2, torch.cat([f[0] for f in flat]), torch.cat(factors), masks[0], s, isa, numerics)
    else:
        for m in mask_blocks(x2):
            for mask, cols, (A, _, _), factor in zip(masks, columns, flat, factors, strict=True):
                low_rank(x2[m], A, factor, mask.rows(m), s[m, cols], isa, numerics)
    ys, unbiased, norms = [], [], []
    for i, (weight, (A, B, scale)) in enumerate(zip(_weights(weights, absmax, blocksizes, K), flat, strict=True)):
        if a[i].dim() == 3:
            keep_own(s[:, columns[i]], segment_ids.to(torch.int64).contiguous(), a[i].shape[0])
        bias = biases[i].contiguous() if biases and len(biases[i]) else None
        ys.append(x.new_empty(*x.shape[:-1], len(B)))  # not a view, which autograd would not let be changed in place
        y, gain = ys[-1].view(M, len(B)), None
        if magnitudes:
            norms.append(adapted_norm(weight, A, B, scale, norms_sq[i], isa))
            gain = _gain(magnitudes[i], norms[-1])
        tail = (s[:, columns[i]], B)
        if gain is not None and on_gpu(x):
            # x W^T + S B^T is what dm needs, for an m of 0 too; "invariant" rounds as one product with a factor does
            sums = x.new_empty(y.shape, dtype=acc if numerics == "invariant" else x.dtype)
            base_product(x2, weight, None, sums, isa, tail, numerics=numerics)
            unbiased.append(sums.to(x.dtype))
            if bias is None:
                torch.mul(sums, gain, out=y)
            elif numerics == "invariant":
                torch.add(sums * gain, bias, out=y)
            else:
                torch.addcmul(bias, sums, gain, out=y)
        elif gain is None or bias is None:
            base_product(x2, weight, bias, y, isa, tail, gain, numerics)
            if magnitudes:
                unbiased.append(x.new_empty(0))
        else:  # dm needs y - bias without the rounding of y, which is coarse where the bias is large
            sums = x.new_empty(y.shape, dtype=acc)
            base_product(x2, weight, None, sums, isa, tail, gain)
            torch.add(sums, bias, out=y)
            unbiased.append(sums.to(x.dtype))
    return [*ys, s, *unbiased, *norms]


def _unflat(grad: torch.Tensor, like: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The gradient (R, C) over the columns of S in the shape and dtype of a, or of b where transposed; a copy."""
    if like.dim() == 3:
        grad = grad.view(like.shape[0], -1, grad.shape[1])[:, : like.shape[2 if transposed else 1]]
    grad = grad.transpose(-1, -2) if transposed else grad
    return grad.to(like.dtype, copy=True, memory_format=torch.contiguous_format)


def _dm(dy, unbiased, magnitude, norm, x, weight, s, b, isa):
    """dm = sum over rows of dy (y - bias) / m, the second factor as x W^T + S B^T over the norm where m is 0."""
    if on_gpu(dy):  # unbiased is x W^T + S B^T there
        return torch.where(norm == 0, 0, _column_dot(dy, unbiased, isa) / norm).to(magnitude.dtype)
    dm = torch.where(norm == 0, 0, _column_dot(dy, unbiased, isa) / magnitude)
    zero = ((magnitude == 0) & (norm != 0)).nonzero()[:, 0]
    if len(zero):
        u = dy.new_empty(len(dy), len(zero))
        base_product(x, take_rows(weight, zero), None, u, isa, tail=(s, b[zero]))
        dm[zero] = _column_dot(dy[:, zero], u, isa) / norm[zero]
    return dm.to(magnitude.dtype)


def _dense_dx(dys, weights, gains, dx=None):
    """dx plus the sum over the linears of g dy W, in the dtype that torch multiplies in (linear.py, `matmul_dtype`)."""
    dtype = matmul_dtype(dys[0])
    for dy, weight, gain in zip(dys, weights, gains, strict=True):
        d = dy.to(dtype) if gain is None else torch.mul(dy, gain, out=dy.new_empty(dy.shape, dtype=dtype))
        if isinstance(weight, NF4Tensor):
            part = matmul_weight(d, weight)
            dx = part if dx is None else dx.add_(part)
        else:
            dx = d @ weight.to(dtype) if dx is None else dx.addmm_(d, weight.to(dtype))
    return dx


def _dx(dys, weights, gains, ds, flat, columns, masks, isa):
    """Sum over the linears of g dy W + D (dS A): on CUDA the small term first, which the dense product adds to."""
    alone = masks if any(m.threshold for m in masks) else masks[:1]
    cuda = on_gpu(ds)
    dx = dys[0].new_empty(len(ds), flat[0][0].shape[1]) if cuda else _dense_dx(dys, weights, gains)
    for i, mask in enumerate(alone):
        p, A = (ds, torch.cat([f[0] for f in flat])) if len(alone) < len(masks) else (ds[:, columns[i]], flat[i][0])
        rank_update(p, A if cuda else A.to(ds.dtype), dx, mask, isa, *([float(i > 0)] if cuda else []))
    return _dense_dx(dys, weights, gains, dx) if cuda else dx.to(dys[0].dtype)


@torch.library.register_kernel("swiftk::lora_linear_bwd", ("cpu", "cuda"))
def _lora_linear_bwd(
    dy, x, weights, absmax, blocksizes, a, b, scales, magnitudes, norms, s, unbiased, thresholds, layers, seed_step,
    token_index, segment_ids, needs_dx, needs_adapters, isa,
):  # fmt: skip
    dtype, acc = dy[0].dtype, acc_dtype(dy[0].dtype)
    seed_step, token_index = dropout_keys(seed_step, token_index)
    dys = [as_matrix(d) for d in dy]
    M, K = len(dys[0]), a[0].shape[-1]
    weights = _weights(weights, absmax, blocksizes, K)
    columns, per_linear = zip(*_groups(a, scales), strict=True)
    flat = [_flat(*abs_, dtype) for abs_ in zip(a, b, per_linear, strict=True)]
    masks = [Mask(t, seed_step, layer, token_index) for t, layer in zip(thresholds, layers, strict=True)]
    gains = [_gain(m, n) for m, n in zip(magnitudes, norms, strict=True)] or [None] * len(a)
    ds = dys[0].new_empty(M, columns[-1].stop, dtype=dtype if on_gpu(dys[0]) else acc)
    da, db, dm = [], [], []
    for i, ((_, B, scale), mask, gain) in enumerate(zip(flat, masks, gains, strict=True)):
        bt = (B if gain is None else B * gain[:, None]).t().to(dtype).contiguous()  # (R, N)
        base_product(dys[i], bt, None, ds[:, columns[i]], isa, scale=scale * (65536 / (65536 - mask.threshold)))
        if a[i].dim() == 3:
            keep_own(ds[:, columns[i]], segment_ids.to(torch.int64).contiguous(), a[i].shape[0])
        if needs_adapters:
            own, grad = s[:, columns[i]], dys[i].new_empty(bt.shape, dtype=acc)  # S, dB^T
            rank_gram(own if on_gpu(own) else own.to(acc), dys[i], Mask(0, None, 0, None), grad, isa)
            db.append(_unflat(grad if gain is None else grad * gain, b[i], True))
            if gain is not None:
                dm.append(_dm(dys[i], as_matrix(unbiased[i]), magnitudes[i], norms[i], as_matrix(x), weights[i], own, B, isa))
    if needs_adapters:
        x2 = as_matrix(x)
        if any(thresholds):
            for i, mask in enumerate(masks):
                grad = ds.new_empty(columns[i].stop - columns[i].start, K, dtype=acc)
                rank_gram(ds[:, columns[i]], x2, mask, grad, isa)
                da.append(_unflat(grad, a[i], False))
        else:
            grad = ds.new_empty(ds.shape[1], K, dtype=acc)
            rank_gram(ds, x2, Mask(0, None, 0, None), grad, isa)
            da = [_unflat(grad[cols], t, False) for cols, t in zip(columns, a, strict=True)]
    dx = _dx(dys, weights, gains, ds, flat, columns, masks, isa) if needs_dx else dys[0].new_empty(0)
    return [dx, *da, *db, *dm]


@torch.library.register_fake("swiftk::lora_linear_fwd")
def _lora_linear_fwd_fake(
    x, weights, absmax, blocksizes, biases, a, b, scales, magnitudes, norms_sq, thresholds, layers, seed_step, token_index,
    segment_ids, numerics, isa,
):  # fmt: skip
    M, acc = math.prod(x.shape[:-1]), acc_dtype(x.dtype)
    ys = [x.new_empty(*x.shape[:-1], t.shape[-2]) for t in b]
    wide = [on_gpu(x) or (len(biases) > 0 and biases[i].shape[0] > 0) for i in range(len(magnitudes))]
    unbiased = [x.new_empty(M, b[i].shape[-2]) if wide[i] else x.new_empty(0) for i in range(len(magnitudes))]
    norms = [x.new_empty(t.shape, dtype=acc) for t in magnitudes]
    return [*ys, x.new_empty(M, sum(_columns(t) for t in a)), *unbiased, *norms]


@torch.library.register_fake("swiftk::lora_linear_bwd")
def _lora_linear_bwd_fake(
    dy, x, weights, absmax, blocksizes, a, b, scales, magnitudes, norms, s, unbiased, thresholds, layers, seed_step,
    token_index, segment_ids, needs_dx, needs_adapters, isa,
):  # fmt: skip
    dx = dy[0].new_empty(math.prod(dy[0].shape[:-1]), a[0].shape[-1]) if needs_dx else dy[0].new_empty(0)
    return [dx, *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*a, *b, *magnitudes) if needs_adapters)]


# --- autograd ----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    (x, weights, absmax, ctx.blocksizes, biases, a, b, ctx.scales, magnitudes, norms_sq, ctx.thresholds, ctx.layers, seed_step,
     token_index, segment_ids, _, ctx.isa) = inputs  # fmt: skip
    n, dora = len(weights), len(magnitudes)
    ctx.needs_adapters = any(t.requires_grad for t in (*a, *b, *magnitudes))
    ctx.mark_non_differentiable(*output[n:])
    ctx.set_materialize_grads(False)
    # what no gradient needs is not kept; DoRA keeps y itself where there is no bias
    kept = [output[n + 1 + i] if output[n + 1 + i].numel() else output[i] for i in range(dora)] if ctx.needs_adapters else []
    ctx.lengths = len(absmax), len(biases), dora, len(norms_sq), len(kept)
    ctx.save_for_backward(
        x if ctx.needs_adapters else None, output[n] if ctx.needs_adapters else None, seed_step, token_index, segment_ids,
        *weights, *a, *b, *absmax, *magnitudes, *output[len(output) - dora :], *kept,
    )  # fmt: skip


def _backward(ctx, grads):
    x, s, seed_step, token_index, segment_ids, *rest = ctx.saved_tensors
    absmax_n, biases_n, dora, norms_sq_n, kept_n = ctx.lengths
    n, rest = len(ctx.layers), iter(rest)
    weights, a, b, absmax, magnitudes, norms, kept = (
        [next(rest) for _ in range(size)] for size in (n, n, n, absmax_n, dora, dora, kept_n)
    )
    given = next((dy for dy in grads[:n] if dy is not None), None)
    if given is None:
        sizes = (None, n, absmax_n, None, biases_n, n, n, None, dora, norms_sq_n, *[None] * 7)
        return tuple(None if size is None else [None] * size for size in sizes)
    shape = given.shape[:-1]
    dys = [given.new_zeros(*shape, t.shape[-2]) if dy is None else dy for dy, t in zip(grads, b, strict=False)]
    needs_dx, needs_bias, acc = ctx.needs_input_grad[0], ctx.needs_input_grad[4], acc_dtype(dys[0].dtype)
    dx, *rest = torch.ops.swiftk.lora_linear_bwd(
        dys, x, weights, absmax, ctx.blocksizes, a, b, ctx.scales, magnitudes, norms, s, kept, ctx.thresholds, ctx.layers,
        seed_step, token_index, segment_ids, needs_dx, ctx.needs_adapters, ctx.isa,
    )  # fmt: skip
    da, db, dm = (rest[:n], rest[n : 2 * n], rest[2 * n :]) if ctx.needs_adapters else ([None] * n, [None] * n, [None] * dora)
    dbias = [as_matrix(dys[i]).sum(0, dtype=acc).to(dys[i].dtype) if need else None for i, need in enumerate(needs_bias)]
    return (
        dx.view(*shape, a[0].shape[-1]) if needs_dx else None, [None] * n, [None] * absmax_n, None, dbias, da, db, None, dm,
        [None] * norms_sq_n, None, None, None, None, None, None, None,
    )  # fmt: skip


torch.library.register_autograd("swiftk::lora_linear_fwd", _backward, setup_context=_setup_context)
refuse_double_backward("lora_linear", "swiftk::lora_linear_bwd")


# --- public ------------------------------------------------------------------------------------------------------


def scales_of(adapter: Adapter, adapters: int) -> list[float]:
    scale = adapter.scale
    return [float(s) for s in scale] if isinstance(scale, (tuple, list)) else [float(scale)] * adapters


def check_lora(op, x, weight, adapter, bias, dropout, segment_ids) -> None:
    nf4 = isinstance(weight, NF4Tensor)
    check_floating(op, x=x, **({} if nf4 else {"weight": weight}), **({} if bias is None else {"bias": bias}))
    if nf4:
        check_nf4(op, weight)
        if weight.device != x.device:
            raise ValueError(f"{op}: weight has device {weight.device}, wants {x.device} like x")
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, wants (N, K)")
    if not nf4 and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: weight requires a gradient, but the base is frozen here; call weight.requires_grad_(False), "
            "or train it whole with swiftk.kernels.linear.linear"
        )
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(f"{op}: weight has shape {(N, K)}, x {tuple(x.shape)} needs {(N, x.shape[-1])}")
    if bias is not None:
        check_shape(op, "bias", bias, (N,), f"weight {tuple(weight.shape)}")
    a, b, _, magnitude, norm_sq = adapter
    acc = acc_dtype(x.dtype)
    for name, t in (("a", a), ("b", b), ("magnitude", magnitude)):
        if t is None and name == "magnitude":
            continue
        if not isinstance(t, torch.Tensor) or t.dtype not in (x.dtype, acc) or t.device != x.device:
            have = f"{t.dtype} on {t.device}" if isinstance(t, torch.Tensor) else type(t).__name__
            raise ValueError(f"{op}: adapter.{name} has {have}, wants a tensor of {x.dtype} or {acc} on {x.device}")
    if a.dim() not in (2, 3):
        raise ValueError(f"{op}: adapter.a has shape {tuple(a.shape)}, wants (r, K) or (adapters, r, K)")
    check_shape(op, "adapter.a", a, (*a.shape[:-1], K), f"weight {tuple(weight.shape)}")
    check_shape(op, "adapter.b", b, (*a.shape[:-2], N, a.shape[-2]), f"adapter.a {tuple(a.shape)}")
    adapters = 1 if a.dim() == 2 else a.shape[0]
    if (given := len(scales_of(adapter, adapters))) != adapters:
        raise ValueError(f"{op}: adapter.scale has {given} entries, wants {adapters} like adapter.a")
    if (segment_ids is None) != (a.dim() == 2):
        want = "(adapters, r, K) with segment_ids" if a.dim() == 2 else "segment_ids (T,), the adapter of each row"
        raise ValueError(f"{op}: adapter.a has shape {tuple(a.shape)}, wants {want}")
    if segment_ids is not None:
        if segment_ids.dtype not in (torch.int32, torch.int64) or segment_ids.device != x.device:
            have = f"{segment_ids.dtype} on {segment_ids.device}"
            raise ValueError(f"{op}: segment_ids has {have}, wants torch.int32 or torch.int64 on {x.device}")
        check_shape(op, "segment_ids", segment_ids, (math.prod(x.shape[:-1]),), f"x {tuple(x.shape)}")
    if magnitude is not None:
        if a.dim() == 3:
            raise ValueError(f"{op}: adapter.magnitude with several adapters is not supported; call once per adapter")
        check_shape(op, "adapter.magnitude", magnitude, (N,), f"weight {tuple(weight.shape)}")
        if norm_sq is None or norm_sq.dtype != acc or norm_sq.device != x.device:
            have = "None" if norm_sq is None else f"{norm_sq.dtype} on {norm_sq.device}"
            call = "row_norm_sq(weight, torch.float64)" if nf4 and acc == torch.float64 else "row_norm_sq(weight)"
            raise ValueError(f"{op}: adapter.weight_norm_sq has {have}, wants {acc} on {x.device}: {call}, once per base")
        check_shape(op, "adapter.weight_norm_sq", norm_sq, (N,), f"weight {tuple(weight.shape)}")
    if dropout is not None:
        check_dropout(op, dropout, x)


def _apply(op, x, weights, adapters, biases, dropouts, segment_ids, numerics, isa) -> list[torch.Tensor]:
    if not isinstance(x, torch.Tensor) or x.dim() == 0:
        raise ValueError(f"{op}: x has {tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__}, wants (..., K)")
    for args in zip(weights, adapters, biases, dropouts, strict=True):
        check_lora(op, x, *args, segment_ids)
    check_numerics(op, numerics)
    check_isa(op, isa)
    drawn = [d for d in dropouts if d is not None]
    if any(d.seed_step is not drawn[0].seed_step or d.token_index is not drawn[0].token_index for d in drawn):
        raise ValueError(f"{op}: dropouts of one group have several seed_step or token_index, wants the same tensors")
    dora = [a.magnitude for a in adapters if a.magnitude is not None]
    norms = [a.weight_norm_sq for a in adapters if a.magnitude is not None and a.weight_norm_sq is not None]
    if len(dora) not in (0, len(adapters)):
        raise ValueError(f"{op}: {len(dora)} of {len(adapters)} adapters have a magnitude, wants all or none")
    given = [x.new_empty(0) if t is None else t for t in biases] if any(t is not None for t in biases) else []
    scales = [s for t in adapters for s in scales_of(t, 1 if t.a.dim() == 2 else t.a.shape[0])]
    bases = [plain_absmax(w) if isinstance(w, NF4Tensor) else w for w in weights]
    packed = [isinstance(w, NF4Tensor) for w in bases]
    absmax = [w.absmax if nf4 else x.new_empty(0) for w, nf4 in zip(bases, packed, strict=True)] if any(packed) else []
    return torch.ops.swiftk.lora_linear_fwd(
        x, [w.codes if nf4 else w for w, nf4 in zip(bases, packed, strict=True)], absmax,
        [w.blocksize if nf4 else 0 for w, nf4 in zip(bases, packed, strict=True)], given,
        [t.a for t in adapters], [t.b for t in adapters], scales, dora, norms,
        [0 if d is None else d.threshold for d in dropouts], [0 if d is None else d.layer for d in dropouts],
        drawn[0].seed_step if drawn else None, drawn[0].token_index if drawn else None, segment_ids,
        numerics, isa,
    )  # fmt: skip


def lora_linear(
    x: torch.Tensor, weight: torch.Tensor | NF4Tensor, adapter: Adapter, bias: torch.Tensor | None = None, *,
    dropout: Dropout | None = None, segment_ids: torch.Tensor | None = None, numerics: str = "auto", isa: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """y = g (x W^T + s drop(x) A^T B^T) + bias, differentiable in x, a, b, magnitude and bias; a row depends on itself alone
    (on CUDA with numerics="invariant").

    Args:
        x: (..., K), bf16, fp32 or fp64, any strides; zero rows are allowed.
        weight: (N, K), dtype and device of x, or an NF4Tensor (its values are bf16 whatever the dtype of x); frozen.
        adapter: a, b, scale; for DoRA also magnitude and weight_norm_sq.
        bias: (N,), dtype and device of x, or None.
        dropout: of A's input in training; None in evaluation.
        segment_ids: int32 or int64 (T,), with a stack of adapters: the adapter of each row of x, -1 for none.
        numerics: of the forward on CUDA, see `linear`.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable".
    Returns: (..., N) in x's dtype, contiguous; accumulated in fp32 (fp64 for fp64), rounded once. Gradients of a, b and
        magnitude come in their own dtype.
    Raises: ValueError for a wrong shape, dtype, device, range, numerics or isa, and for a weight that requires a gradient;
        NotImplementedError for the gradient of the gradient.
    """
    return _apply("lora_linear", x, [weight], [adapter], [bias], [dropout], segment_ids, numerics, isa)[0]


def lora_linear_group(
    x: torch.Tensor, weights: Sequence[torch.Tensor | NF4Tensor], adapters: Sequence[Adapter],
    biases: Sequence[torch.Tensor | None] | None = None, *, dropouts: Sequence[Dropout | None] | None = None,
    segment_ids: torch.Tensor | None = None, numerics: str = "auto", isa: str = "auto",
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """lora_linear of several weights on one x (q, k, v; gate, up): equal results; dx is one sum.

    x is read once for all A, and once more in the backward; with dropout each linear draws its own mask.

    Args: as of lora_linear, one weight, adapter, bias (or None) and dropout (or None) per linear; biases and dropouts may be
        left out. Dropouts share the tensors seed_step and token_index; all adapters have a magnitude or none.
    Returns: one (..., N_i) per weight.
    Raises: as lora_linear; ValueError where the lengths differ.
    """
    biases, dropouts = biases or [None] * len(weights), dropouts or [None] * len(weights)
    sizes = {"weights": len(weights), "adapters": len(adapters), "biases": len(biases), "dropouts": len(dropouts)}
    if len(set(sizes.values())) > 1 or not weights:
        raise ValueError(f"lora_linear_group: has {sizes}, wants equal lengths of at least 1")
    ys = _apply("lora_linear_group", x, weights, adapters, biases, dropouts, segment_ids, numerics, isa)
    return tuple(ys[: len(weights)])
