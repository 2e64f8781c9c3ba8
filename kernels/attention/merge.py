"""Merging attention over disjoint keys: lse = logaddexp(lse_a, lse_b), w_x = exp(lse_x - lse), out = w_a out_a + w_b out_b.

Source: Rabe & Staats 2021 (partial softmax sums); Liu et al. 2023 (ring attention). Both lse without a sink, natural log: apply
sinks after the merge (`segment_attention` with k_len 0). Where one side has seen no key (lse -inf) the other is copied and the
first is not read, whatever it holds; where neither has, out is 0 and lse -inf. Each row depends on its own two rows alone.
Bytes per element of out: 2 reads, 1 write forward; 3 reads, 2 writes backward.
"""

from __future__ import annotations

from typing import Any

import torch

from swiftk.kernels._checks import check_dtype, check_floating, check_isa, check_shape, refuse_double_backward
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import jit, launch, next_power_of_2, on_gpu, register_cuda, ship, tl, tl_acc

REFERENCE = "swiftk.kernels.attention.merge.merge_attention_ref"


# --- reference ---------------------------------------------------------------------------------------------------


def merge_attention_ref(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in at least fp32, rounded once; shapes as in `merge_attention`."""
    empty = float("-inf")
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == empty, 0.0)
    out = torch.zeros_like(out_a, dtype=lse.dtype)
    for out_x, lse_x in ((out_a, lse_a), (out_b, lse_b)):
        w = torch.exp(lse_x - base).t()[..., None]
        out = out + torch.where(w > 0, w * out_x.to(lse.dtype), 0.0)
    return out.to(out_a.dtype), lse


# --- Triton ------------------------------------------------------------------------------------------------------
#
# A program holds whole rows (token, head), as many as have 4,096 elements (unmeasured). What has weight 0 is not read.


@jit
def _weights(lse_a, lse_b):
    """w_a, w_b and lse of rows: exp of the difference of the two is at most 1, nothing overflows."""
    no_a, no_b = lse_a == float("-inf"), lse_b == float("-inf")
    a_first = lse_a > lse_b
    top, low = tl.where(a_first, lse_a, lse_b), tl.where(a_first, lse_b, lse_a)
    e = tl.exp(tl.where(no_a | no_b, float("-inf"), low - top))
    large, small = 1.0 / (1.0 + e), e / (1.0 + e)
    w_a = tl.where(no_a, 0.0, tl.where(a_first, large, small))
    w_b = tl.where(no_b, 0.0, tl.where(a_first, small, large))
    return w_a, w_b, top + tl.log(1.0 + e)


@jit
def _row_of(tokens, heads, ROWS: tl.constexpr):
    """Rows of the program, where they are in lse, and which are there."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row % heads * tokens + row // heads, row < tl.cast(tokens, tl.int64) * heads


@jit
def _merge_fwd_kernel(
    out, lse, out_a, lse_a, out_b, lse_b, tokens, heads, dim, ACC: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    row, at, there = _row_of(tokens, heads, ROWS)
    empty = float("-inf")
    w_a, w_b, both = _weights(tl.load(lse_a + at, mask=there, other=empty), tl.load(lse_b + at, mask=there, other=empty))
    column = tl.arange(0, WIDTH)[None, :]
    place = (row * dim)[:, None] + column
    a = tl.load(out_a + place, mask=column < tl.where(w_a > 0.0, dim, 0)[:, None], other=0.0).to(ACC)
    b = tl.load(out_b + place, mask=column < tl.where(w_b > 0.0, dim, 0)[:, None], other=0.0).to(ACC)
    y = w_a[:, None] * a + w_b[:, None] * b
    tl.store(out + place, y.to(out.dtype.element_ty), mask=column < tl.where(there, dim, 0)[:, None])
    tl.store(lse + at, both, mask=there)


@jit
def _merge_bwd_kernel(
    dout_a, dlse_a, dout_b, dlse_b, dout, dlse, out_a, lse_a, out_b, lse_b, tokens, heads, dim, ACC: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, at, there = _row_of(tokens, heads, ROWS)
    empty = float("-inf")
    w_a, w_b, _ = _weights(tl.load(lse_a + at, mask=there, other=empty), tl.load(lse_b + at, mask=there, other=empty))
    column = tl.arange(0, WIDTH)[None, :]
    place, seen = (row * dim)[:, None] + column, column < tl.where(there, dim, 0)[:, None]
    both = column < tl.where((w_a > 0.0) & (w_b > 0.0), dim, 0)[:, None]  # else out_x - out is 0, or its factor w_x is
    g = tl.load(dout + place, mask=seen, other=0.0).to(ACC)
    apart = tl.load(out_a + place, mask=both, other=0.0).to(ACC) - tl.load(out_b + place, mask=both, other=0.0).to(ACC)
    change = tl.sum(tl.where(both, g * apart, 0.0), axis=1)  # dout . (out_a - out_b); out_a - out is w_b of it
    d = tl.load(dlse + at, mask=there, other=0.0)
    tl.store(dout_a + place, (w_a[:, None] * g).to(dout_a.dtype.element_ty), mask=seen)
    tl.store(dout_b + place, (w_b[:, None] * g).to(dout_b.dtype.element_ty), mask=seen)
    tl.store(dlse_a + at, w_a * (d + w_b * change), mask=there)
    tl.store(dlse_b + at, w_b * (d - w_a * change), mask=there)


def _shape(dim: int) -> dict[str, Any]:
    width = next_power_of_2(dim)
    return {"WIDTH": width, "ROWS": max(1, 4096 // width), "num_warps": 8}


for _dim in (64, 128):
    _of = _shape(_dim) | {"ACC": tl.float32}
    ship(f"merge_fwd fp32 {_dim}", _merge_fwd_kernel, " ".join(["*fp32"] * 6) + " i32 i32 i32:16", **_of)
    ship(f"merge_bwd fp32 {_dim}", _merge_bwd_kernel, " ".join(["*fp32"] * 10) + " i32 i32 i32:16", **_of)


def _launch(kernel, *tensors: torch.Tensor) -> None:
    tokens, heads, dim = tensors[0].shape
    shape = _shape(dim)
    launch(kernel, (-(-tokens * heads // shape["ROWS"]),), *tensors, tokens, heads, dim, ACC=tl_acc(tensors[0].dtype), **shape)


# --- launchers ---------------------------------------------------------------------------------------------------


def merge_attention_out(out_a, lse_a, out_b, lse_b, out, lse, isa: str = "auto") -> None:
    """Writes out and lse, which may be out_a and lse_a; no checks, no autograd, everything contiguous."""
    if on_gpu(out_a):
        _launch(_merge_fwd_kernel, out, lse, out_a, lse_a, out_b, lse_b)
        return
    native().merge_fwd(
        DTYPE_CODES[out_a.dtype], out_a.data_ptr(), lse_a.data_ptr(), out_b.data_ptr(), lse_b.data_ptr(), out.data_ptr(),
        lse.data_ptr(), *out_a.shape, threads(), isa,
    )  # fmt: skip


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define(
    "swiftk::merge_attention_fwd",
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str isa) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "swiftk::merge_attention_bwd",
    "(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str isa) "
    "-> (Tensor dout_a, Tensor dlse_a, Tensor dout_b, Tensor dlse_b)",
)


def _contiguous(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.contiguous() for x in tensors]


@torch.library.register_kernel("swiftk::merge_attention_fwd", ("cpu", "cuda"))
def _fwd(out_a, lse_a, out_b, lse_b, isa):
    out_a, lse_a, out_b, lse_b = _contiguous(out_a, lse_a, out_b, lse_b)
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    merge_attention_out(out_a, lse_a, out_b, lse_b, out, lse, isa)
    return out, lse


@torch.library.register_kernel("swiftk::merge_attention_bwd", "cpu")
def _bwd_cpu(dout, dlse, out_a, lse_a, out_b, lse_b, isa):
    inputs = _contiguous(dout, dlse, out_a, lse_a, out_b, lse_b)
    grads = [torch.empty_like(x) for x in inputs[2:]]
    native().merge_bwd(
        DTYPE_CODES[out_a.dtype], *(x.data_ptr() for x in inputs), *(x.data_ptr() for x in grads), *out_a.shape, threads(), isa
    )
    return tuple(grads)


@register_cuda("swiftk::merge_attention_bwd")
def _bwd_cuda(dout, dlse, out_a, lse_a, out_b, lse_b, isa):
    inputs = _contiguous(dout, dlse, out_a, lse_a, out_b, lse_b)
    grads = [torch.empty_like(x) for x in inputs[2:]]
    _launch(_merge_bwd_kernel, *grads, *inputs)
    return tuple(grads)


@torch.library.register_fake("swiftk::merge_attention_fwd")
def _fwd_fake(out_a, lse_a, out_b, lse_b, isa):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (out_a, lse_a))


@torch.library.register_fake("swiftk::merge_attention_bwd")
def _bwd_fake(dout, dlse, out_a, lse_a, out_b, lse_b, isa):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (out_a, lse_a, out_b, lse_b))


# --- autograd ----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    *tensors, ctx.isa = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout, dlse):
    # dout_x = w_x dout,  dlse_x = w_x (dlse + dout . (out_x - out))
    return *torch.ops.swiftk.merge_attention_bwd(dout, dlse, *ctx.saved_tensors, ctx.isa), None


torch.library.register_autograd("swiftk::merge_attention_fwd", _backward, setup_context=_setup_context)
refuse_double_backward("merge_attention", "swiftk::merge_attention_bwd", REFERENCE)


# --- public ------------------------------------------------------------------------------------------------------


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, *, isa: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over the union of two disjoint sets of keys from that over each, differentiable in all four.

    Args:
        out_a, out_b: (total_q, heads, head_dim), bf16, fp32 or fp64. Pass what `segment_attention` returns (fp32, fp64):
            merging partial results that were rounded to bf16 loses accuracy with every step.
        lse_a, lse_b: (heads, total_q), fp32 (fp64 for fp64), natural log, without sinks; -inf where no key was seen.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable".
    Returns: out like out_a, lse like lse_a, contiguous.
    Raises: ValueError for a wrong shape, dtype, device or isa; on CUDA ImportError without Triton; NotImplementedError for a
        gradient of the gradient.
    """
    op = "merge_attention"
    check_floating(op, out_a=out_a, out_b=out_b)
    check_isa(op, isa)
    if out_a.dim() != 3:
        raise ValueError(f"{op}: out_a has shape {tuple(out_a.shape)}, wants (total_q, heads, head_dim)")
    check_shape(op, "out_b", out_b, tuple(out_a.shape), f"out_a {tuple(out_a.shape)}")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_shape(op, name, lse, (out_a.shape[1], out_a.shape[0]), f"out_a {tuple(out_a.shape)}")
        check_dtype(op, name, lse, acc_dtype(out_a.dtype), out_a.device, "out_a")
    return torch.ops.swiftk.merge_attention_fwd(out_a, lse_a, out_b, lse_b, isa)
