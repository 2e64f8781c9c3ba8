"""Linear with an NF4 weight: y = x D^T + b, D = bf16(value * absmax) as kernels/nf4.py specifies, widened for fp32 and fp64 x.

On the CPU equal to `linear(x, nf4_dequantize(w).to(x.dtype), b)` bit for bit, for every number of rows and on every instruction
set: it is the same kernel (csrc/cpu/linear.inc), whose weight comes from codes. A block's 16 values are scaled and rounded
to bf16 once and looked up per element; absmax never touches a partial sum. One or two rows meet the words of a few columns as
they are decoded; more rows meet each decoded panel while it lies in the L1 cache.

Bytes at M = 1: N K / 2 of codes and N K / blocksize scales read once, 0.53 a weight with blocks of 64 and bf16 scales, against
2 in bf16. FLOPs: 2 M N K forward, the same for dx.

On CUDA `numerics` chooses (the weights are the same bf16 values everywhere):
- bf16 and up to SMALL_ROWS rows, or "invariant" for any number: csrc/cuda/nf4_linear.cu, which decodes into the registers that
  the tensor cores read; row m of y is a function of x[m], W and b alone. Its order over K (nf4_linear_body.h) is no CPU's.
- else, and in fp32 and fp64: dequantised, SLICE_BYTES of D at a time, and `linear` with the same numerics.
dx of up to SMALL_DX_ROWS rows of bf16 has a kernel of the same kind; it is repeatable, and with "invariant" no more than that.

Backward: dx = dy D, by torch.matmul on slices of D's columns that are dequantised one after another (`matmul_weight`);
db = sum of dy over rows. The weight is frozen: codes and absmax get no gradient.
Not supported: fp16, stacks of experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swiftk.kernels._checks import check_floating, check_isa, check_shape
from swiftk.kernels._native import acc_dtype, native, native_cuda, on_stream, threads
from swiftk.kernels.linear import (
    Product,
    as_matrix,
    check_numerics,
    group_args,
    linear_group_out,
    linear_ref,
    matmul_dtype,
    row_args,
    with_rows,
)
from swiftk.kernels.nf4 import NF4Tensor, check_nf4, nf4_dequantize_out, nf4_dequantize_ref, plain_absmax, scale_args, take_rows

# --- reference ---------------------------------------------------------------------------------------------------


def nf4_linear_ref(x: torch.Tensor, w: NF4Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """linear_ref on the dequantised weight. x (..., K), w (N, K), bias (N,) -> (..., N)."""
    return linear_ref(x, nf4_dequantize_ref(w, torch.bfloat16).to(x.dtype), bias)


# --- tuning ------------------------------------------------------------------------------------------------------

# of dequantised weight at a time. On a GPU every linear of an 8B model in one piece, and a head in ten
SLICE_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
# Rows that are multiplied as the weight is decoded: 0.53 bytes a weight, where dequantising and a GEMM move 4.5; every further
# 64 rows decode it again. Reasoned: no GPU has measured the crossing.
SMALL_ROWS = 64
SMALL_DX_ROWS = 32  # the same of dx, whose kernel makes four times as many tables and decodes again every 16 rows
BLOCKS = 264  # of threads that dx is shared out to: two for each multiprocessor of an H200
MAX_PRODUCTS = 4  # of one launch, as in csrc/cuda/nf4_linear_body.h

# --- launchers ---------------------------------------------------------------------------------------------------


def nf4_linear_out(
    x: torch.Tensor, w: NF4Tensor, bias: torch.Tensor | None, y: torch.Tensor, isa: str = "auto", numerics: str = "auto", *,
    tail: tuple[torch.Tensor, torch.Tensor] | None = None, scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y = scale (x D^T + s t^T) + bias; no checks, no autograd. Arguments as linear_out's.

    w (N, K): rows of codes and absmax at any stride, so a range of its rows or, from block to block, of its columns is a view.
    Nested absmax are decoded first, on CUDA as they are read.
    """
    nf4_linear_group_out(x, [Product(w, bias, y, tail, scale)], isa, numerics)


def nf4_linear_group_out(x: torch.Tensor, products: Sequence[Product], isa: str = "auto", numerics: str = "auto") -> None:
    """nf4_linear_out for each of them; see linear_group_out. For few rows on CUDA one launch."""
    if x.is_cuda:
        _group_on_cuda(x, products, numerics)
        return
    absmax = [p.weight.absmax if p.weight.nested is None else p.weight.absmax_fp32() for p in products]
    weights = [
        (row_args(p.weight.codes), row_args(scales), scales.dtype == torch.float32, p.weight.blocksize)
        for p, scales in zip(products, absmax, strict=True)
    ]
    native().nf4_linear_fwd(*group_args(x, products, weights), *x.shape, threads(), isa)


def _in_words(x: torch.Tensor, size: int) -> torch.Tensor:
    """x (M, K) whose rows are whole words of `size` elements: itself, or a copy that goes on with zeros. The kernels read x
    word by word; a copy of few rows costs less than a branch at every word."""
    if x.shape[1] % size == 0 and x.stride(0) % size == 0 and x.data_ptr() % (size * x.element_size()) == 0:
        return x
    copy = x.new_zeros(x.shape[0], -(-x.shape[1] // size) * size)
    copy[:, : x.shape[1]] = x
    return copy


def few_rows_args(x: torch.Tensor, products: Sequence[Product]) -> tuple[tuple, list]:
    """The arguments of csrc/cuda's nf4_linear, and the tensors whose memory they name."""
    words = _in_words(x, 8)
    none, parts, alive = (0, 0), [], [words]
    for p in products:
        scales, tensors = scale_args(p.weight)
        s, t = (none, none) if p.tail is None else (row_args(p.tail[0]), row_args(p.tail[1]))
        parts.append((
            row_args(p.weight.codes), scales, p.weight.blocksize, s, t, 0 if p.tail is None else p.tail[0].shape[1],
            0 if p.scale is None else p.scale.data_ptr(), 0 if p.bias is None else p.bias.data_ptr(), row_args(p.y),
            p.y.shape[1],
        ))  # fmt: skip
        alive += tensors
    return (row_args(words), *x.shape, products[0].y.dtype == torch.float32, parts), alive


def _group_on_cuda(x: torch.Tensor, products: Sequence[Product], numerics: str) -> None:
    if x.dtype == torch.bfloat16 and (numerics == "invariant" or x.shape[0] <= SMALL_ROWS):
        for i in range(0, len(products), MAX_PRODUCTS):
            args, alive = few_rows_args(x, products[i : i + MAX_PRODUCTS])
            on_stream(native_cuda().nf4_linear, x.device, *args)
            del alive  # until here
        return
    for p in products:
        weight = plain_absmax(p.weight)  # rows of a nested one are no slice
        N, K = weight.shape
        step = max(SLICE_BYTES["cuda"] // max(K * (2 if x.dtype == torch.bfloat16 else 2 + x.itemsize), 1), 1)
        buffer = x.new_empty(min(step, N), K, dtype=torch.bfloat16)
        for n in range(0, N, step):
            rows = slice(n, min(n + step, N))
            d = buffer[: rows.stop - n]
            nf4_dequantize_out(take_rows(weight, rows), d)
            part = p._replace(
                weight=d.to(x.dtype), bias=None if p.bias is None else p.bias[rows], y=p.y[:, rows],
                tail=None if p.tail is None else (p.tail[0], p.tail[1][rows]), scale=None if p.scale is None else p.scale[rows],
            )  # fmt: skip
            linear_group_out(x, [part], numerics=numerics)


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define(
    "swiftk::nf4_linear_fwd",
    "(Tensor x, Tensor codes, Tensor absmax, Tensor? bias, int in_features, int blocksize, str numerics, str isa) -> Tensor",
)
torch.library.define(
    "swiftk::nf4_linear_bwd", "(Tensor dy, Tensor codes, Tensor absmax, int in_features, int blocksize) -> Tensor"
)


@torch.library.register_kernel("swiftk::nf4_linear_fwd", ("cpu", "cuda"))
def _nf4_linear_fwd(x, codes, absmax, bias, in_features, blocksize, numerics, isa):
    x2 = as_matrix(x)
    y = x.new_empty(*x.shape[:-1], codes.shape[0])
    w = NF4Tensor(with_rows(codes), with_rows(absmax), in_features, blocksize)
    out = y.view(x2.shape[0], codes.shape[0])
    nf4_linear_out(x2, w, None if bias is None else bias.contiguous(), out, isa, numerics)
    return y


def few_rows_dx_args(dy: torch.Tensor, w: NF4Tensor) -> tuple[tuple, torch.Tensor, list]:
    """The arguments of csrc/cuda's nf4_linear_dx, its result, partial sums fp32 (splits, M, K), and whose memory they name."""
    scales, alive = scale_args(w)
    (M, N), K = dy.shape, w.in_features
    splits = max(min(-(-BLOCKS // max(-(-K // 128), 1)), -(-N // 128)), 1)  # not by M; at least 16 rows for each of 8 warps
    partials = dy.new_empty(splits, M, K, dtype=torch.float32)
    words = _in_words(dy, 4)
    args = row_args(words), M, N, K, row_args(w.codes), scales, w.blocksize, splits, partials.data_ptr()
    return args, partials, [*alive, words]


@torch.library.register_kernel("swiftk::nf4_linear_bwd", "cuda")
def _nf4_linear_bwd_cuda(dy, codes, absmax, in_features, blocksize):
    if dy.dtype != torch.bfloat16 or dy.shape[0] > SMALL_DX_ROWS:
        return _nf4_linear_bwd(dy, codes, absmax, in_features, blocksize)
    w = NF4Tensor(with_rows(codes), with_rows(absmax), in_features, blocksize)
    args, partials, alive = few_rows_dx_args(with_rows(dy), w)
    on_stream(native_cuda().nf4_linear_dx, dy.device, *args)
    del alive  # until here
    return partials.sum(0).to(dy.dtype)


def _nf4_linear_bwd(dy, codes, absmax, in_features, blocksize):
    N, operand = codes.shape[0], matmul_dtype(dy)
    a, dx = dy.to(operand), dy.new_empty(dy.shape[0], in_features)
    per_column = N * (2 if operand == torch.bfloat16 else 2 + operand.itemsize)  # D in bf16, and widened beside it
    width = max(SLICE_BYTES[dy.device.type] // max(per_column, 1) // blocksize, 1) * blocksize
    buffer = dy.new_empty(N * min(width, in_features), dtype=torch.bfloat16)
    for k in range(0, in_features, width):
        stop = min(k + width, in_features)
        d = buffer[: N * (stop - k)].view(N, stop - k)
        columns = codes[:, k // 2 : (stop + 1) // 2], absmax[:, k // blocksize : -(-stop // blocksize)]
        nf4_dequantize_out(NF4Tensor(*columns, stop - k, blocksize), d)
        dx[:, k:stop] = a @ d.to(operand)
    return dx


torch.library.register_kernel("swiftk::nf4_linear_bwd", "cpu", _nf4_linear_bwd)


@torch.library.register_fake("swiftk::nf4_linear_fwd")
def _nf4_linear_fwd_fake(x, codes, absmax, bias, in_features, blocksize, numerics, isa):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.register_fake("swiftk::nf4_linear_bwd")
def _nf4_linear_bwd_fake(dy, codes, absmax, in_features, blocksize):
    return dy.new_empty(dy.shape[0], in_features)


# --- autograd ----------------------------------------------------------------------------------------------------


def matmul_weight(dy: torch.Tensor, w: NF4Tensor) -> torch.Tensor:
    """dy (M, N) @ D (N, K) -> (M, K) in dy's dtype, accumulated in at least fp32 and rounded once; differentiable in dy.

    The vendor's GEMM on slices of D's columns, so that no sum is split: at most SLICE_BYTES of D are there at a time. For few
    rows on CUDA a kernel that decodes D as it multiplies.
    """
    absmax = w.absmax if w.nested is None else w.absmax_fp32()
    return torch.ops.swiftk.nf4_linear_bwd(dy, w.codes, absmax, w.in_features, w.blocksize)


def _setup_context(ctx, inputs, output):
    _x, codes, absmax, _bias, in_features, blocksize, _numerics, _isa = inputs
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
    return dx, None, None, db, None, None, None, None


def _bwd_setup_context(ctx, inputs, output):
    _dy, codes, absmax, ctx.in_features, ctx.blocksize = inputs
    ctx.save_for_backward(codes, absmax)


def _bwd_backward(ctx, g):
    # dx = dy D is linear in dy: its gradient is g D^T
    ddy = torch.ops.swiftk.nf4_linear_fwd(g, *ctx.saved_tensors, None, ctx.in_features, ctx.blocksize, "auto", "auto")
    return ddy, None, None, None, None


torch.library.register_autograd("swiftk::nf4_linear_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("swiftk::nf4_linear_bwd", _bwd_backward, setup_context=_bwd_setup_context)


# --- public ------------------------------------------------------------------------------------------------------


def nf4_linear(
    x: torch.Tensor, w: NF4Tensor, bias: torch.Tensor | None = None, *, numerics: str = "auto", isa: str = "auto"
) -> torch.Tensor:
    """y = x D^T + b with the weight D that w stands for, differentiable in x and bias; each row by itself (on CUDA with
    numerics="invariant").

    Args:
        x: (..., K), bf16, fp32 or fp64, any strides; zero rows are allowed.
        w: NF4 weight (N, K), nested or not, finite absmax, device of x. Its values are bf16, whatever the dtype of x.
        bias: (N,), dtype and device of x, or None.
        numerics: of the forward on CUDA: "auto", the vendor's GEMM above SMALL_ROWS rows, or "invariant", a fixed order over K
            for any number of rows. The CPU is always invariant.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable".
    Returns: (..., N) in x's dtype, contiguous; accumulated in fp32 (fp64 for fp64), rounded once.
    Raises: ValueError for a wrong shape, dtype, device, numerics or isa, or a stack (E, N, K); ImportError on CUDA where
        swiftk has no GPU build.
    """
    check_floating("nf4_linear", x=x, **({} if bias is None else {"bias": bias}))
    check_nf4("nf4_linear", w)
    if w.codes.dim() != 2:
        raise ValueError(
            f"nf4_linear: w has shape {tuple(w.shape)}, wants (N, K); of a stack take one matrix e at a time: "
            "w._replace(codes=w.codes[e], absmax=w.absmax[e])"
        )
    if w.device != x.device:
        raise ValueError(f"nf4_linear: w has device {w.device}, wants {x.device} like x")
    if x.dim() == 0:
        raise ValueError("nf4_linear: x has shape (), wants (..., K)")
    if w.in_features != x.shape[-1]:
        raise ValueError(f"nf4_linear: w has shape {tuple(w.shape)}, x {tuple(x.shape)} needs (N, {x.shape[-1]})")
    if bias is not None:
        check_shape("nf4_linear", "bias", bias, (w.codes.shape[0],), f"w {tuple(w.shape)}")
    check_numerics("nf4_linear", numerics)
    check_isa("nf4_linear", isa)
    absmax = w.absmax if w.nested is None else w.absmax_fp32()
    return torch.ops.swiftk.nf4_linear_fwd(x, w.codes, absmax, bias, w.in_features, w.blocksize, numerics, isa)
