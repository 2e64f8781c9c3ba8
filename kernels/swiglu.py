"""SwiGLU: y = silu(gate) up with silu(g) = g s and s = 1 / (1 + exp(-g)).

Source: Shazeer 2020, "GLU Variants Improve Transformer"; as used by Llama, Mistral and Qwen.
Everything between the loads and the one rounding is in fp32 (fp64 for fp64).
Elements moved per element of y, forward: 2 reads, 1 write; backward: 3 reads (dy, gate, up), 2 writes. s is computed again
in the backward: gate and up are all that is saved.
Not supported: other activations (GELU), a clamp or a scale inside the gate.
"""

from __future__ import annotations

from typing import Any

import torch

from swiftk.kernels._checks import check_floating, check_isa, check_shape, refuse_double_backward
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import jit, launch, on_gpu, register_cuda, ship, tl, tl_acc

# --- reference ---------------------------------------------------------------------------------------------------


def swiglu_ref(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The formula in at least fp32, rounded once. gate, up (..., I) -> (..., I)."""
    g = gate.to(acc_dtype(gate.dtype))
    return (g * torch.sigmoid(g) * up.to(g.dtype)).to(gate.dtype)


# --- Triton ------------------------------------------------------------------------------------------------------

TILE = 1024  # elements of a row per program, four per thread and tensor: 8-byte loads of bf16; no GPU has measured it


@jit
def _tile(cols, TILE: tl.constexpr):
    """Row, columns and mask of this program: the tiles of a row follow each other."""
    tiles = tl.cdiv(cols, TILE)
    pid = tl.program_id(0).to(tl.int64)
    at = (pid % tiles) * TILE + tl.arange(0, TILE)
    return pid // tiles, at, at < cols


@jit
def _swiglu_fwd_kernel(gate, gate_stride, up, up_stride, y, cols, ACC: tl.constexpr, TILE: tl.constexpr):
    row, at, inside = _tile(cols, TILE)
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(ACC)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(ACC)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(y + row * cols + at, (g * s * u).to(y.dtype.element_ty), mask=inside)


@jit
def _swiglu_bwd_kernel(
    dy, dy_stride, gate, gate_stride, up, up_stride, dgate, dup, cols, ACC: tl.constexpr, TILE: tl.constexpr
):
    row, at, inside = _tile(cols, TILE)
    d = tl.load(dy + row * dy_stride + at, mask=inside, other=0.0).to(ACC)
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(ACC)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(ACC)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(dup + row * cols + at, (d * g * s).to(dup.dtype.element_ty), mask=inside)
    tl.store(dgate + row * cols + at, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=inside)


_META: dict[str, Any] = {"TILE": TILE, "num_warps": 4}
ship("swiglu_fwd bf16", _swiglu_fwd_kernel, "*bf16 i32:16 *bf16 i32:16 *bf16 i32:16", ACC=tl.float32, **_META)
ship(
    "swiglu_bwd bf16", _swiglu_bwd_kernel, "*bf16 i32:16 *bf16 i32:16 *bf16 i32:16 *bf16 *bf16 i32:16",
    ACC=tl.float32, **_META,
)  # fmt: skip


# --- launchers ---------------------------------------------------------------------------------------------------


def _rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each as (rows, cols) with contiguous columns; one long row where all are contiguous. Slices of a fused
    projection are rows with a stride and are not copied."""
    if all(t.is_contiguous() for t in tensors):
        return [t.reshape(1, -1) for t in tensors]
    cols = tensors[0].shape[-1]
    return [t2 if t2.stride(1) == 1 else t2.contiguous() for t2 in (t.reshape(-1, cols) for t in tensors)]


def swiglu_out(gate: torch.Tensor, up: torch.Tensor, y: torch.Tensor, isa: str = "auto") -> None:
    """Writes y; no checks, no autograd. gate, up (rows, cols) with contiguous columns, y (rows, cols) contiguous."""
    rows, cols = gate.shape
    if on_gpu(gate):
        launch(
            _swiglu_fwd_kernel, (rows * -(-cols // TILE),), gate, gate.stride(0), up, up.stride(0), y, cols,
            ACC=tl_acc(gate.dtype), **_META,
        )  # fmt: skip
        return
    native().swiglu_fwd(
        DTYPE_CODES[gate.dtype], gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), y.data_ptr(), rows, cols,
        threads(rows * cols), isa,
    )  # fmt: skip


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define("swiftk::swiglu_fwd", "(Tensor gate, Tensor up, str isa) -> Tensor")
torch.library.define("swiftk::swiglu_bwd", "(Tensor dy, Tensor gate, Tensor up, str isa) -> (Tensor dgate, Tensor dup)")


@torch.library.register_kernel("swiftk::swiglu_fwd", ("cpu", "cuda"))
def _swiglu_fwd(gate, up, isa):
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gate2, up2 = _rows(gate, up)
    swiglu_out(gate2, up2, y, isa)
    return y


@torch.library.register_kernel("swiftk::swiglu_bwd", "cpu")
def _swiglu_bwd_cpu(dy, gate, up, isa):
    dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
    dy2, gate2, up2 = _rows(dy, gate, up)
    native().swiglu_bwd(
        DTYPE_CODES[gate.dtype], dy2.data_ptr(), dy2.stride(0), gate2.data_ptr(), gate2.stride(0), up2.data_ptr(),
        up2.stride(0), dgate.data_ptr(), dup.data_ptr(), *gate2.shape, threads(gate.numel()), isa,
    )  # fmt: skip
    return dgate, dup


@register_cuda("swiftk::swiglu_bwd")
def _swiglu_bwd_cuda(dy, gate, up, isa):
    dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
    dy2, gate2, up2 = _rows(dy, gate, up)
    rows, cols = gate2.shape
    launch(
        _swiglu_bwd_kernel, (rows * -(-cols // TILE),), dy2, dy2.stride(0), gate2, gate2.stride(0), up2, up2.stride(0), dgate,
        dup, cols, ACC=tl_acc(gate.dtype), **_META,
    )  # fmt: skip
    return dgate, dup


@torch.library.register_fake("swiftk::swiglu_fwd")
def _swiglu_fwd_fake(gate, up, isa):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.register_fake("swiftk::swiglu_bwd")
def _swiglu_bwd_fake(dy, gate, up, isa):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))


# --- autograd ----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    gate, up, isa = inputs
    ctx.save_for_backward(gate, up)
    ctx.isa = isa


def _backward(ctx, dy):
    # with y = g s u:   dup = dy g s,   dgate = dy u s (1 + g (1 - s))   from   ds/dg = s (1 - s)
    gate, up = ctx.saved_tensors
    dgate, dup = torch.ops.swiftk.swiglu_bwd(dy, gate, up, ctx.isa)
    return dgate, dup, None


torch.library.register_autograd("swiftk::swiglu_fwd", _backward, setup_context=_setup_context)
refuse_double_backward("swiglu", "swiftk::swiglu_bwd")


# --- public ------------------------------------------------------------------------------------------------------


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, isa: str = "auto") -> torch.Tensor:
    """silu(gate) * up, differentiable in both; an element's result depends on its two inputs alone.

    Args:
        gate: (..., I), bf16, fp32 or fp64, any strides (slices of a fused projection are read in place); may be empty.
        up: shape, dtype and device of gate.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable".
    Returns: (..., I) in gate's dtype, contiguous. Where gate < -87.3 (-708 in fp64) silu(gate) is exactly 0; gate = -inf
        gives NaN, as g * sigmoid(g) does.
    Raises: ValueError for a wrong shape, dtype, device or isa; on CUDA ImportError without Triton; NotImplementedError for a
        gradient of the gradient.
    """
    check_floating("swiglu", gate=gate, up=up)
    if gate.dim() == 0:
        raise ValueError("swiglu: gate has shape (), wants (..., I)")
    check_shape("swiglu", "up", up, tuple(gate.shape), f"gate {tuple(gate.shape)}")
    check_isa("swiglu", isa)
    return torch.ops.swiftk.swiglu_fwd(gate, up, isa)
