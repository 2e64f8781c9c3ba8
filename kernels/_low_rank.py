"""What an adapter adds to a frozen linear, in the pieces that `lora_linear`, the adapted head (_head.py) and the decoder share,
without checks and without autograd. lora_linear.py has the formulas; D is the 0/1 mask of dropout, drawn where it is needed.

    low_rank  s' (D x) A^T      rank_gram  P^T (D Q)      rank_update  Q + D (P R)      adapted_norm  ||W + s B A|| per row
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import jit, launch, next_power_of_2, on_gpu, ship, tl, tl_acc
from swiftk.kernels.dropout import dropout_out, keep_tile
from swiftk.kernels.linear import Product, linear_group_out, row_args, vendor_mm
from swiftk.kernels.nf4 import NF4Tensor
from swiftk.kernels.nf4_linear import nf4_linear_group_out

ALIGN = 32  # columns of one of several adapters: a multiple of every Dot<T>::step, so lanes do not depend on the others
MASK_BYTES = 1 << 20  # rows of x that are masked at a time, so that the copy stays in the L2 cache

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


def column_dot(p: torch.Tensor, q: torch.Tensor, isa: str) -> torch.Tensor:
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


def keep_own(s: torch.Tensor, segment_ids: torch.Tensor, adapters: int) -> None:
    """Zero in the columns of other adapters than the row's own; s (M, R) of a stack; int64 ids, -1 keeps none."""
    columns = s.shape[1] // adapters
    if on_gpu(s):
        other = segment_ids[:, None] != torch.arange(adapters, device=s.device)
        s.unflatten(1, (adapters, columns)).masked_fill_(other[:, :, None], 0)
        return
    native().keep_own(DTYPE_CODES[s.dtype], *row_args(s), len(s), adapters, columns, segment_ids.data_ptr())


def adapted_norm(weight, a, b, s, norm_sq, isa):
    """||W + s B A|| per row, (N,) in the accumulate dtype; a (r, K), b (N, r) in x's dtype, s (r,)."""
    acc = acc_dtype(a.dtype)
    wa, aa, baa = (a.new_empty(size, dtype=acc) for size in ((len(a), len(b)), (len(a), len(a)), b.shape))
    bs = b.to(acc) * s
    base_product(a, weight, None, wa, isa)  # (r, N)
    base_product(a, a, None, aa, isa)
    base_product(bs, aa, None, baa, isa)  # A A^T is symmetric
    return (norm_sq + (bs * (2 * wa.t() + baa)).sum(1)).clamp_(min=0).sqrt_()


def gain_of(magnitude, norm):
    """g = m / norm, 0 where the norm is 0; a NaN stays one."""
    return torch.where(norm == 0, 0, magnitude.to(norm.dtype) / norm)
