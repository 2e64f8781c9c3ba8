"""Linear with an NF4 weight: y = x D^T + b, D = bf16(value * absmax) as kernels/nf4.py specifies, widened for fp32 and fp64 x.

Equal to `linear(x, nf4_dequantize(w).to(x.dtype), b)` bit for bit, for every number of rows and on every instruction set: it
is the same kernel (csrc/cpu/linear.inc), whose weight comes from codes. A block's 16 values are scaled and rounded to bf16 once
and looked up per element; absmax never touches a partial sum. One or two rows meet the words of a few columns as they are
decoded; more rows meet each decoded panel while it lies in the L1 cache.

Bytes at M = 1: N K / 2 of codes and N K / blocksize scales read once, 0.53 a weight with blocks of 64 and bf16 scales, against
2 in bf16. FLOPs: 2 M N K forward, the same for dx.
Backward: dx = dy D, by torch.matmul on slices of D's columns that are dequantised one after another (`matmul_weight`);
db = sum of dy over rows. The weight is frozen: codes and absmax get no gradient.
Not supported: fp16, stacks of experts, a CUDA kernel (not there yet).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swiftk.kernels._checks import check_floating, check_isa, check_shape
from swiftk.kernels._native import acc_dtype, native, no_cuda_kernel, threads
from swiftk.kernels.linear import Product, as_matrix, group_args, linear_ref, matmul_dtype, row_args, with_rows
from swiftk.kernels.nf4 import NF4Tensor, check_nf4, nf4_dequantize_out, nf4_dequantize_ref

# --- reference ---------------------------------------------------------------------------------------------------


def nf4_linear_ref(x: torch.Tensor, w: NF4Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """linear_ref on the dequantised weight. x (..., K), w (N, K), bias (N,) -> (..., N)."""
    return linear_ref(x, nf4_dequantize_ref(w, torch.bfloat16).to(x.dtype), bias)


# --- launchers ---------------------------------------------------------------------------------------------------


def nf4_linear_out(
    x: torch.Tensor, w: NF4Tensor, bias: torch.Tensor | None, y: torch.Tensor, isa: str = "auto", *,
    tail: tuple[torch.Tensor, torch.Tensor] | None = None, scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y = scale (x D^T + s t^T) + bias; no checks, no autograd. Arguments as linear_out's.

    w (N, K): rows of codes and absmax at any stride, so a range of its rows or, from block to block, of its columns is a view.
    Nested absmax are decoded first.
    """
    nf4_linear_group_out(x, [Product(w, bias, y, tail, scale)], isa)


def nf4_linear_group_out(x: torch.Tensor, products: Sequence[Product], isa: str = "auto") -> None:
    """nf4_linear_out for each of them; see linear_group_out."""
    absmax = [p.weight.absmax if p.weight.nested is None else p.weight.absmax_fp32() for p in products]
    weights = [
        (row_args(p.weight.codes), row_args(scales), scales.dtype == torch.float32, p.weight.blocksize)
        for p, scales in zip(products, absmax, strict=True)
    ]
    native().nf4_linear_fwd(*group_args(x, products, weights), *x.shape, threads(), isa)


SLICE_BYTES = 32 << 20  # of dequantised weight at a time, in the backward


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define(
    "swiftk::nf4_linear_fwd",
    "(Tensor x, Tensor codes, Tensor absmax, Tensor? bias, int in_features, int blocksize, str isa) -> Tensor",
)
torch.library.define(
    "swiftk::nf4_linear_bwd", "(Tensor dy, Tensor codes, Tensor absmax, int in_features, int blocksize) -> Tensor"
)


@torch.library.register_kernel("swiftk::nf4_linear_fwd", "cpu")
def _nf4_linear_fwd_cpu(x, codes, absmax, bias, in_features, blocksize, isa):
    x2 = as_matrix(x)
    y = x.new_empty(*x.shape[:-1], codes.shape[0])
    w = NF4Tensor(with_rows(codes), with_rows(absmax), in_features, blocksize)
    nf4_linear_out(x2, w, None if bias is None else bias.contiguous(), y.view(x2.shape[0], codes.shape[0]), isa)
    return y


@torch.library.register_kernel("swiftk::nf4_linear_bwd", "cpu")
def _nf4_linear_bwd_cpu(dy, codes, absmax, in_features, blocksize):
    N, operand = codes.shape[0], matmul_dtype(dy)
    a, dx = dy.to(operand), dy.new_empty(dy.shape[0], in_features)
    per_column = N * (2 if operand == torch.bfloat16 else 2 + operand.itemsize)  # D in bf16, and widened beside it
    width = max(SLICE_BYTES // max(per_column, 1) // blocksize, 1) * blocksize
    buffer = dy.new_empty(N * min(width, in_features), dtype=torch.bfloat16)
    for k in range(0, in_features, width):
        stop = min(k + width, in_features)
        d = buffer[: N * (stop - k)].view(N, stop - k)
        columns = codes[:, k // 2 : (stop + 1) // 2], absmax[:, k // blocksize : -(-stop // blocksize)]
        nf4_dequantize_out(NF4Tensor(*columns, stop - k, blocksize), d)
        dx[:, k:stop] = a @ d.to(operand)
    return dx


@torch.library.register_kernel("swiftk::nf4_linear_fwd", "cuda")
def _nf4_linear_fwd_cuda(*args):
    no_cuda_kernel("nf4_linear")


@torch.library.register_kernel("swiftk::nf4_linear_bwd", "cuda")
def _nf4_linear_bwd_cuda(*args):
    no_cuda_kernel("nf4_linear")


@torch.library.register_fake("swiftk::nf4_linear_fwd")
def _nf4_linear_fwd_fake(x, codes, absmax, bias, in_features, blocksize, isa):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.register_fake("swiftk::nf4_linear_bwd")
def _nf4_linear_bwd_fake(dy, codes, absmax, in_features, blocksize):
    return dy.new_empty(dy.shape[0], in_features)


# --- autograd ----------------------------------------------------------------------------------------------------


def matmul_weight(dy: torch.Tensor, w: NF4Tensor) -> torch.Tensor:
    """dy (M, N) @ D (N, K) -> (M, K) in dy's dtype, accumulated in at least fp32 and rounded once; differentiable in dy.

    The vendor's GEMM on slices of D's columns, so that no sum is split: at most SLICE_BYTES of D are there at a time.
    """
    absmax = w.absmax if w.nested is None else w.absmax_fp32()
    return torch.ops.swiftk.nf4_linear_bwd(dy, w.codes, absmax, w.in_features, w.blocksize)


def _setup_context(ctx, inputs, output):
    _x, codes, absmax, _bias, in_features, blocksize, _isa = inputs
    keep = ctx.needs_input_grad[0]
    ctx.save_for_backward(codes if keep else None, absmax if keep else None)
    ctx.in_features, ctx.blocksize = in_features, blocksize


def _backward(ctx, dy):
    # dx = dy D,   db = sum over rows of dy; D is frozen
    codes, absmax = ctx.saved_tensors
    dx = db = None
    dy2 = as_matrix(dy)
    if codes is not None:
        dx = matmul_weight(dy2, NF4Tensor(codes, absmax, ctx.in_features, ctx.blocksize)).view(*dy.shape[:-1], ctx.in_features)
    if ctx.needs_input_grad[3]:
        db = dy2.sum(0, dtype=acc_dtype(dy.dtype)).to(dy.dtype)
    return dx, None, None, db, None, None, None


def _bwd_setup_context(ctx, inputs, output):
    _dy, codes, absmax, ctx.in_features, ctx.blocksize = inputs
    ctx.save_for_backward(codes, absmax)


def _bwd_backward(ctx, g):
    # dx = dy D is linear in dy: its gradient is g D^T
    ddy = torch.ops.swiftk.nf4_linear_fwd(g, *ctx.saved_tensors, None, ctx.in_features, ctx.blocksize, "auto")
    return ddy, None, None, None, None


torch.library.register_autograd("swiftk::nf4_linear_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("swiftk::nf4_linear_bwd", _bwd_backward, setup_context=_bwd_setup_context)


# --- public ------------------------------------------------------------------------------------------------------


def nf4_linear(x: torch.Tensor, w: NF4Tensor, bias: torch.Tensor | None = None, *, isa: str = "auto") -> torch.Tensor:
    """y = x D^T + b with the weight D that w stands for, differentiable in x and bias; each row by itself.

    Args:
        x: (..., K), bf16, fp32 or fp64, any strides; zero rows are allowed.
        w: NF4 weight (N, K), nested or not, finite absmax, device of x. Its values are bf16, whatever the dtype of x.
        bias: (N,), dtype and device of x, or None.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable".
    Returns: (..., N) in x's dtype, contiguous; accumulated in fp32 (fp64 for fp64), rounded once.
    Raises: ValueError for a wrong shape, dtype, device or isa, or a stack (E, N, K); NotImplementedError on CUDA (no kernel).
    """
    check_floating("nf4_linear", x=x, **({} if bias is None else {"bias": bias}))
    check_nf4("nf4_linear", w)
    if w.codes.dim() != 2:
        raise ValueError(
            f"nf4_linear: weight has shape {tuple(w.shape)}, wants (N, K); of a stack take one matrix e at a time: "
            "w._replace(codes=w.codes[e], absmax=w.absmax[e])"
        )
    if w.device != x.device:
        raise ValueError(f"nf4_linear: weight has device {w.device}, wants {x.device} like x")
    if x.dim() == 0:
        raise ValueError("nf4_linear: x has shape (), wants (..., K)")
    if w.in_features != x.shape[-1]:
        raise ValueError(f"nf4_linear: weight has shape {tuple(w.shape)}, x {tuple(x.shape)} needs (N, {x.shape[-1]})")
    if bias is not None:
        check_shape("nf4_linear", "bias", bias, (w.codes.shape[0],), f"weight {tuple(w.shape)}")
    check_isa("nf4_linear", isa)
    absmax = w.absmax if w.nested is None else w.absmax_fp32()
    return torch.ops.swiftk.nf4_linear_fwd(x, w.codes, absmax, bias, w.in_features, w.blocksize, isa)
