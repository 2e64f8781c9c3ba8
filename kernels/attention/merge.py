"""Merging attention over disjoint keys: lse = logaddexp(lse_a, lse_b), w_x = exp(lse_x - lse), out = w_a out_a + w_b out_b.

Source: Rabe & Staats 2021 (partial softmax sums); Liu et al. 2023 (ring attention). Both lse without a sink, natural log: apply
sinks after the merge (`segment_attention` with k_len 0). Where one side has seen no key (lse -inf) the other is copied and the
first is not read, whatever it holds; where neither has, out is 0 and lse -inf. Each row depends on its own two rows alone.
Bytes per element of out: 2 reads, 1 write forward; 4 reads, 2 writes backward.
Not supported: a CUDA kernel (not there yet).
"""

from __future__ import annotations

import torch

from swiftk.kernels._checks import check_floating, check_isa, check_shape, refuse_double_backward
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, no_cuda_kernel, threads

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


# --- launchers ---------------------------------------------------------------------------------------------------


def merge_attention_out(out_a, lse_a, out_b, lse_b, out, lse, isa: str = "auto") -> None:
    """Writes out and lse, which may be out_a and lse_a; no checks, no autograd, everything contiguous."""
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


@torch.library.register_kernel("swiftk::merge_attention_fwd", "cpu")
def _fwd_cpu(out_a, lse_a, out_b, lse_b, isa):
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


@torch.library.register_kernel("swiftk::merge_attention_fwd", "cuda")
def _fwd_cuda(out_a, lse_a, out_b, lse_b, isa):
    no_cuda_kernel("merge_attention", REFERENCE)


@torch.library.register_kernel("swiftk::merge_attention_bwd", "cuda")
def _bwd_cuda(*args):
    no_cuda_kernel("merge_attention", REFERENCE)


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
    Raises: ValueError for a wrong shape, dtype, device or isa; NotImplementedError on CUDA (no kernel yet).
    """
    op = "merge_attention"
    check_floating(op, out_a=out_a, out_b=out_b)
    check_isa(op, isa)
    if out_a.dim() != 3:
        raise ValueError(f"{op}: out_a has shape {tuple(out_a.shape)}, wants (total_q, heads, head_dim)")
    check_shape(op, "out_b", out_b, tuple(out_a.shape), f"out_a {tuple(out_a.shape)}")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_shape(op, name, lse, (out_a.shape[1], out_a.shape[0]), f"out_a {tuple(out_a.shape)}")
        if lse.dtype != acc_dtype(out_a.dtype) or lse.device != out_a.device:
            wants = f"{acc_dtype(out_a.dtype)} on {out_a.device}"
            raise ValueError(f"{op}: {name} has {lse.dtype} on {lse.device}, wants {wants}")
    return torch.ops.swiftk.merge_attention_fwd(out_a, lse_a, out_b, lse_b, isa)
