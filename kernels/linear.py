"""Linear: y = x W^T + b, and row m of y is a function of x[m], W and b alone.

The launcher computes more, for the ops built on it: y = scale (x W^T + s t^T) + b with a tail (s, t), the second segment of the
sum over K (LoRA's low-rank product), and a factor per column (DoRA's).

The order of every sum over K, per instruction set (csrc/cpu/linear.inc, `Dot` in csrc/cpu/vec.h). An accumulator has
`width` lanes: fp32 16 / 8 / 8, fp64 8 / 4 / 4 for avx512 / avx2 / portable.

- fp32, fp64: lane l adds x[k] w[k] for k = l, l + width, l + 2 width, ... in that order (fused multiply-add; portable: two
  roundings);
- bf16, avx2 and portable: fp32 lanes; lane l adds k = 2l, then 2l + 1, then 2 width + 2l, 2 width + 2l + 1, ...;
- bf16, avx512: vdpbf16ps on the same pairs, in the instruction's own order; it treats subnormal inputs and results as 0;
- the tail goes on in the same lanes: to the order above it is more elements, after K was filled up with zeros to a whole
  step (fp32, fp64: width; bf16: 2 width), so a tail of zeros changes nothing;
- the lanes are added by one tree (l and l + width/2 first), times the column's scale, plus the bias, each rounded in the
  accumulate dtype, then one rounding.

K is not split into blocks that are summed apart: accumulators that leave the registers keep their lanes. M, N, strides,
cache blocks and the thread count choose only which sums stand next to each other, so M = 1 equals M = 4096 bit for bit.

Bytes at M = 1: N K elements of W read once. FLOPs: 2 M N K forward, twice that backward.
Backward: dx = dy W, dW = dy^T x, db = sum of dy over rows, by torch.matmul, whose order is the vendor's; see `_matmul`.
Not supported: fp16, an activation in the epilogue, a CUDA kernel (not there yet). An NF4 weight: kernels/nf4_linear.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from swiftk.kernels._checks import check_floating, check_isa, check_shape
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, no_cuda_kernel, threads

# --- reference ---------------------------------------------------------------------------------------------------


def linear_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *,
    tail: tuple[torch.Tensor, torch.Tensor] | None = None, scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The formula in at least fp32, rounded once: x (..., K), weight (N, K), bias and scale (N,), tail ((..., R), (N, R))."""
    acc = acc_dtype(x.dtype)
    y = torch.matmul(x.to(acc), weight.to(acc).t())
    if tail is not None:
        y = y + torch.matmul(tail[0].to(acc), tail[1].to(acc).t())
    if scale is not None:
        y = y * scale.to(acc)
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


# --- launchers ---------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """One of several products of an x: y = scale (x W^T + s t^T) + bias, with the tail (s, t). Shapes as linear_out's."""

    weight: Any  # (N, K): a tensor, or an NF4Tensor
    bias: torch.Tensor | None
    y: torch.Tensor
    tail: tuple[torch.Tensor, torch.Tensor] | None = None
    scale: torch.Tensor | None = None


def linear_out(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, isa: str = "auto", *,
    tail: tuple[torch.Tensor, torch.Tensor] | None = None, scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y = scale (x W^T + s t^T) + bias; no checks, no autograd. The decoder, the loss and lora_linear call this.

    x (M, K), weight (N, K), tail (s (M, R), t (N, R)), y (M, N): any row stride, last dimension contiguous (a range of rows of
    the weight is a range of columns of y); bias (N,) and scale (N,) contiguous. y has x's dtype or the accumulate dtype (bf16 x
    and fp32 y: unrounded logits), scale the accumulate dtype, everything else x's.
    """
    linear_group_out(x, [Product(weight, bias, y, tail, scale)], isa)


def linear_group_out(x: torch.Tensor, products: Sequence[Product], isa: str = "auto") -> None:
    """linear_out for each of them, whose y have one dtype: the same bits, in one parallel region over all columns."""
    weights = [row_args(p.weight) for p in products]
    native().linear_fwd(*group_args(x, products, weights), *x.shape, threads(), isa)


def row_args(t: torch.Tensor) -> tuple[int, int]:
    """A 2-D tensor with contiguous rows as the native calls take it: address, row stride."""
    return t.data_ptr(), t.stride(0)


def group_args(x: torch.Tensor, products: Sequence[Product], weights: list) -> tuple:
    """What the native calls of linear and nf4_linear share: dtypes, x, weights as given, the rest of each product."""
    none = (0, 0)
    return (
        DTYPE_CODES[x.dtype], products[0].y.dtype == acc_dtype(x.dtype), row_args(x), weights,
        [
            (
                *((none, none, 0) if p.tail is None else (row_args(p.tail[0]), row_args(p.tail[1]), p.tail[0].shape[1])),
                0 if p.scale is None else p.scale.data_ptr(), 0 if p.bias is None else p.bias.data_ptr(), row_args(p.y),
                p.y.shape[1],
            )
            for p in products
        ],
    )  # fmt: skip


def with_rows(t: torch.Tensor) -> torch.Tensor:
    """The tensor with contiguous rows, copied only where its last dimension is strided."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """(..., K) as (M, K) with contiguous rows; -1 would be ambiguous where a size is 0."""
    return with_rows(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define("swiftk::linear_fwd", "(Tensor x, Tensor weight, Tensor? bias, str isa) -> Tensor")


@torch.library.register_kernel("swiftk::linear_fwd", "cpu")
def _linear_fwd_cpu(x, weight, bias, isa):
    x2 = as_matrix(x)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])  # not a view, which autograd would not let be changed in place
    out = y.view(x2.shape[0], weight.shape[0])
    linear_out(x2, with_rows(weight), None if bias is None else bias.contiguous(), out, isa)
    return y


@torch.library.register_kernel("swiftk::linear_fwd", "cuda")
def _linear_fwd_cuda(x, weight, bias, isa):
    no_cuda_kernel("linear")


@torch.library.register_fake("swiftk::linear_fwd")
def _linear_fwd_fake(x, weight, bias, isa):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# --- autograd ----------------------------------------------------------------------------------------------------


def matmul_dtype(t: torch.Tensor) -> torch.dtype:
    """What torch multiplies matrices like t in: t's dtype, but fp32 for bf16 on a CPU without bf16 instructions.

    Zen 3, 2 threads, M 512, N 1024, K 1024: dx 3321 ms as bf16, 80 ms through fp32; dW 118 and 40 ms; at M 2048, N 3072 dx
    takes 69 s and 0.6 s.
    """
    emulated = t.dtype == torch.bfloat16 and t.device.type == "cpu" and native().best_isa() != "avx512"
    return torch.float32 if emulated else t.dtype


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, accumulated in at least fp32 and rounded once."""
    operand = matmul_dtype(a)
    return a @ b if operand == a.dtype else (a.to(operand) @ b.to(operand)).to(a.dtype)


def _setup_context(ctx, inputs, output):
    x, weight, _bias, _isa = inputs
    # what no gradient needs is not kept: a frozen weight saves no x
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)


def _backward(ctx, dy):
    # dx = dy W,   dW = dy^T x,   db = sum over rows of dy; plain torch, so the gradient of the gradient is torch's
    x, weight = ctx.saved_tensors
    dx = dw = db = None
    rows = math.prod(dy.shape[:-1])  # not -1, which is ambiguous where a size is 0
    dy2 = dy.reshape(rows, dy.shape[-1])
    if weight is not None:
        dx = _matmul(dy2, weight).view(*dy.shape[:-1], weight.shape[1])
    if x is not None:
        dw = _matmul(dy2.t(), x.reshape(rows, x.shape[-1]))
    if ctx.needs_input_grad[2]:
        db = dy2.sum(0, dtype=acc_dtype(dy.dtype)).to(dy.dtype)
    return dx, dw, db, None


torch.library.register_autograd("swiftk::linear_fwd", _backward, setup_context=_setup_context)


# --- public ------------------------------------------------------------------------------------------------------


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, isa: str = "auto") -> torch.Tensor:
    """y = x W^T + b, differentiable in x, weight and bias; a row's result depends on that row, weight and bias alone.

    Args:
        x: (..., K), bf16, fp32 or fp64, any strides; zero rows are allowed.
        weight: (N, K), dtype and device of x.
        bias: (N,), dtype and device of x, or None.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable".
    Returns: (..., N) in x's dtype, contiguous; accumulated in fp32 (fp64 for fp64), rounded once.
    Raises: ValueError for a wrong shape, dtype, device or isa; NotImplementedError on CUDA (no kernel yet).
    """
    check_floating("linear", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    if x.dim() == 0:
        raise ValueError("linear: x has shape (), wants (..., K)")
    if weight.dim() != 2:
        raise ValueError(f"linear: weight has shape {tuple(weight.shape)}, wants (N, K)")
    check_shape("linear", "weight", weight, (weight.shape[0], x.shape[-1]), f"x {tuple(x.shape)}")
    if bias is not None:
        check_shape("linear", "bias", bias, (weight.shape[0],), f"weight {tuple(weight.shape)}")
    check_isa("linear", isa)
    return torch.ops.swiftk.linear_fwd(x, weight, bias, isa)
