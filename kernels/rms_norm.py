"""RMSNorm: y = x r w with r = 1 / sqrt(mean(x^2) + eps), the mean over the last dimension.

Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization"; as used by Llama, Mistral and Qwen.
Statistics and products are in fp32 (fp64 for fp64) and rounded once; transformers rounds x r to bf16 before it
multiplies by w, so bf16 results differ from it in the last bit.
Bytes per element of x, forward: 1 read, 1 write; backward: 2 reads (x, dy), 1 write (dx). rstd is 4 bytes a row.
Not supported: an added bias, a weight offset (Gemma's 1 + w: add it before the call).
"""

from __future__ import annotations

from typing import Any

import torch

from swiftk.kernels._checks import check_floating, check_isa, check_shape, refuse_double_backward, transformer_engine
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import jit, launch, next_power_of_2, on_gpu, register_cuda, ship, tl, tl_acc

BACKENDS = ("swiftk", "transformer_engine")
ROW_BLOCK = 64  # rows per partial sum of dw, kRows in csrc/cpu/rms_norm.inc


# --- reference ---------------------------------------------------------------------------------------------------


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """The formula in at least fp32, rounded once. x (..., H), weight (H,) -> (..., H)."""
    xf = x.to(acc_dtype(x.dtype))
    r = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (xf * r * weight.to(xf.dtype)).to(x.dtype)


# --- Triton ------------------------------------------------------------------------------------------------------
#
# A program holds whole rows in registers: x is read once. Its width is the next power of two. dw: a program adds up TRITON_ROWS
# rows in their order, the blocks' sums are then added in theirs, so that a result does not depend on the GPU's size.
# Warps: one per 512 elements, from registers and spills (`make compile-gpu`); no GPU has measured them.

TRITON_ROWS = 16  # rows per partial sum of dw: of bf16, 1/8 of x's bytes in fp32 partial sums


@jit
def _rms_norm_fwd_kernel(
    x, residual, weight, y, rstd, cols, eps, ACC: tl.constexpr, WIDTH: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < cols
    v = tl.load(x + row * cols + at, mask=inside, other=0.0).to(ACC)
    if HAS_RESIDUAL:
        sums = (v + tl.load(residual + row * cols + at, mask=inside, other=0.0).to(ACC)).to(x.dtype.element_ty)
        tl.store(x + row * cols + at, sums, mask=inside)
        v = sums.to(ACC)
    r = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / cols + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(ACC)
    tl.store(y + row * cols + at, (v * r * w).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r)


@jit(varies=("rows",))
def _rms_norm_bwd_kernel(
    dy, x, weight, rstd, dx, dw_blocks, rows, cols, ACC: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < cols
    w = tl.load(weight + at, mask=inside, other=0.0).to(ACC)
    dw = tl.zeros((WIDTH,), dtype=ACC)
    for i in range(ROWS):
        row = block * ROWS + i
        seen = at < tl.where(row < rows, cols, 0)
        v = tl.load(x + row * cols + at, mask=seen, other=0.0).to(ACC)
        g = tl.load(dy + row * cols + at, mask=seen, other=0.0).to(ACC)
        r = tl.load(rstd + tl.minimum(row, rows - 1))
        xhat = v * r
        mean = tl.sum(w * g * xhat, axis=0) / cols
        tl.store(dx + row * cols + at, (r * (w * g - xhat * mean)).to(dx.dtype.element_ty), mask=seen)
        dw += g * xhat
    tl.store(dw_blocks + block * cols + at, dw, mask=inside)


def _shape(cols: int) -> dict[str, Any]:
    width = next_power_of_2(cols)
    return {"WIDTH": width, "num_warps": max(1, min(16, width // 512))}


for _cols in (128, 1024, 4096, 8192):
    ship(
        f"rms_norm_fwd bf16 {_cols}", _rms_norm_fwd_kernel, "*bf16 *bf16 *bf16 *bf16 *fp32 i32:16 fp32", ACC=tl.float32,
        HAS_RESIDUAL=True, **_shape(_cols),
    )  # fmt: skip
    ship(
        f"rms_norm_bwd bf16 {_cols}", _rms_norm_bwd_kernel, "*bf16 *bf16 *bf16 *fp32 *bf16 *fp32 i32 i32:16", ACC=tl.float32,
        ROWS=TRITON_ROWS, **_shape(_cols),
    )  # fmt: skip


# --- launchers ---------------------------------------------------------------------------------------------------


def rms_norm_out(
    x: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor, rstd: torch.Tensor, isa: str = "auto", *,
    residual: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y and rstd; no checks, no autograd. x, y (rows, H) contiguous, weight (H,), rstd (rows,); y may be x itself.
    With a residual (rows, H), x += residual first, in place and rounded, as torch's sum of the two is."""
    rows, cols = x.shape
    if on_gpu(x):
        has = residual is not None
        launch(
            _rms_norm_fwd_kernel, (rows,), x, residual if has else x, weight, y, rstd, cols, eps, ACC=tl_acc(x.dtype),
            HAS_RESIDUAL=has, **_shape(cols),
        )  # fmt: skip
        return
    native().rms_norm_fwd(
        DTYPE_CODES[x.dtype], x.data_ptr(), 0 if residual is None else residual.data_ptr(), weight.data_ptr(), y.data_ptr(),
        rstd.data_ptr(), rows, cols, eps,
        threads(rows * cols), isa,
    )  # fmt: skip


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define("swiftk::rms_norm_fwd", "(Tensor x, Tensor weight, float eps, str isa) -> (Tensor y, Tensor rstd)")
torch.library.define(
    "swiftk::rms_norm_bwd", "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, str isa) -> (Tensor dx, Tensor dw)"
)


@torch.library.register_kernel("swiftk::rms_norm_fwd", ("cpu", "cuda"))
def _rms_norm_fwd(x, weight, eps, isa):
    x2 = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(x.shape)  # not a view, which autograd would not let be changed in place
    rstd = x2.new_empty(x2.shape[0], dtype=acc_dtype(x.dtype))
    rms_norm_out(x2, weight.contiguous(), eps, y.view(x2.shape), rstd, isa)
    return y, rstd


@torch.library.register_kernel("swiftk::rms_norm_bwd", "cpu")
def _rms_norm_bwd_cpu(dy, x, weight, rstd, isa):
    cols = x.shape[-1]
    x2, dy2, weight = x.reshape(-1, cols).contiguous(), dy.reshape(-1, cols).contiguous(), weight.contiguous()
    dx, dw = torch.empty_like(x2), torch.empty(cols, dtype=weight.dtype)
    blocks = x2.new_empty(-(-x2.shape[0] // ROW_BLOCK), cols, dtype=acc_dtype(x.dtype))
    native().rms_norm_bwd(
        DTYPE_CODES[x.dtype], dy2.data_ptr(), x2.data_ptr(), weight.data_ptr(), rstd.data_ptr(), dx.data_ptr(),
        dw.data_ptr(), blocks.data_ptr(), x2.shape[0], cols, threads(x2.numel()), isa,
    )  # fmt: skip
    return dx.view(x.shape), dw


@register_cuda("swiftk::rms_norm_bwd")
def _rms_norm_bwd_cuda(dy, x, weight, rstd, isa):
    cols = x.shape[-1]
    x2, dy2 = (t.reshape(-1, cols).contiguous() for t in (x, dy))
    rows = x2.shape[0]
    blocks = -(-rows // TRITON_ROWS)
    dx, dw_blocks = torch.empty_like(x2), x2.new_empty(blocks, cols, dtype=acc_dtype(x.dtype))
    launch(
        _rms_norm_bwd_kernel, (blocks,), dy2, x2, weight.contiguous(), rstd, dx, dw_blocks, rows, cols, ACC=tl_acc(x.dtype),
        ROWS=TRITON_ROWS, **_shape(cols),
    )  # fmt: skip
    return dx.view(x.shape), dw_blocks.sum(0).to(weight.dtype)


@torch.library.register_fake("swiftk::rms_norm_fwd")
def _rms_norm_fwd_fake(x, weight, eps, isa):
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(rows, dtype=acc_dtype(x.dtype))


@torch.library.register_fake("swiftk::rms_norm_bwd")
def _rms_norm_bwd_fake(dy, x, weight, rstd, isa):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


# --- autograd ----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, weight, _eps, isa = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.isa = isa


def _backward(ctx, dy, _drstd):
    # with xhat = x r:   dx = r (w dy - xhat mean(w dy xhat)),   dw = sum over rows of dy xhat
    x, weight, rstd = ctx.saved_tensors
    dx, dw = torch.ops.swiftk.rms_norm_bwd(dy, x, weight, rstd, ctx.isa)
    return dx, dw, None, None


torch.library.register_autograd("swiftk::rms_norm_fwd", _backward, setup_context=_setup_context)
refuse_double_backward("rms_norm", "swiftk::rms_norm_bwd")


# --- other people's kernels --------------------------------------------------------------------------------------


def _transformer_engine(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """NVIDIA's module around our weight; a module of its own for each call, since its backward reads the weight from it."""
    RMSNorm = transformer_engine("rms_norm", "RMSNorm", x, "1.11", ("eps", "device", "dtype"), ("eps", "kwargs"))
    norm = RMSNorm(x.shape[-1], eps=eps, device="meta", dtype=weight.dtype)
    norm._parameters["weight"] = weight
    return norm(x)


# --- public ------------------------------------------------------------------------------------------------------


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, backend: str = "swiftk", isa: str = "auto"
) -> torch.Tensor:
    """RMSNorm over the last dimension, differentiable in x and weight; a row's result depends on that row alone.

    Args:
        x: (..., H), bf16, fp32 or fp64, any strides; zero rows are allowed.
        weight: (H,), dtype and device of x.
        eps: added to the mean square, finite and >= 0.
        backend: "swiftk", or "transformer_engine" for NVIDIA's kernel (CUDA; no promise of ours holds for it; its call is
            tested against a stand-in, it has not run on a GPU).
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable".
    Returns: (..., H) in x's dtype, contiguous.
    Raises: ValueError for a wrong shape, dtype, device, eps, backend or isa; ImportError without the backend, on CUDA without
        Triton; NotImplementedError for a gradient of the gradient.
    """
    check_floating("rms_norm", x=x, weight=weight)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"rms_norm: x has shape {tuple(x.shape)}, wants (..., H) with H >= 1")
    check_shape("rms_norm", "weight", weight, (x.shape[-1],), f"x {tuple(x.shape)}")
    if not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        raise ValueError(f"rms_norm: eps has {eps!r}, wants a finite number >= 0")
    check_isa("rms_norm", isa)
    if backend not in BACKENDS:
        raise ValueError(f"rms_norm: backend has {backend!r}, wants one of {', '.join(BACKENDS)}")
    if backend == "transformer_engine":
        return _transformer_engine(x, weight, eps)
    return torch.ops.swiftk.rms_norm_fwd(x, weight, eps, isa)[0]
