"""Attention over packed sequences: out = P v, P = exp(s - logaddexp(lse, sink)), lse = log sum exp(s) over the keys that a
query sees, s = x or softcap tanh(x / softcap), x = softmax_scale q k^T.

Sources: Milakov & Gimelshein 2018 (online softmax); Dao et al. 2022, Dao 2023 (tiling, the backward from out and lse);
softcap as in Gemma 2; sinks as in gpt-oss (Xiao et al. 2023): one logit per head that joins the sum and has no value.
A segment is a range of queries that meets a range of keys, each with its positions; documents are segments with
q_pos = k_len - q_len and k_pos = 0, which aligns causal and window masks to the bottom right:

    q_len 2, k_len 4, causal:    1 1 1 0        q_len 3, k_len 1, causal:    0
                                 1 1 1 1                                     0
                                                                             1
A query's out and lse depend on that query and the keys it sees alone, bit for bit: KV tiles of a fixed size (64 keys on the
CPU, by head_dim and chip on a GPU) start at its multiples in positions, and no sum depends on how many queries share a call,
on their neighbours, or on the thread count.
FLOPs: 4 d per query head and visible pair forward, 10 d backward (14 d on a GPU, which computes S and dP twice).
Bytes: q, k, v, out once; K and V once per 192 rows (128 on a GPU, of a group's heads together).
Not supported: dropout, ALiBi or another bias, head_dim of v unlike that of k, fp64 on CUDA (no such products in Triton).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from swiftk.kernels._checks import check_dtype, check_floating, check_isa, check_shape, refuse_double_backward
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import on_gpu, register_cuda
from swiftk.kernels.attention._foreign import BACKENDS, foreign_attention
from swiftk.kernels.attention._varlen_backward_triton import attention_backward_triton
from swiftk.kernels.attention._varlen_triton import attention_triton

REFERENCE = "swiftk.kernels.attention.varlen.varlen_attention_ref"


# --- reference ---------------------------------------------------------------------------------------------------


def attend_ref(q, k, v, q_pos: int, k_pos: int, causal: bool, scale: float, window_size, softcap: float, sinks):
    """One segment: q (m, heads, d), k, v (n, kv_heads, d), sinks (heads,) or None -> out (m, heads, d), lse (heads, m)."""
    group = q.shape[1] // k.shape[1]
    s = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    i = torch.arange(q.shape[0], device=q.device)[:, None] + q_pos
    j = torch.arange(k.shape[0], device=q.device)[None] + k_pos
    keep = (j <= i) if causal else torch.ones_like(j <= i)
    if window_size[0] >= 0:
        keep &= j >= i - window_size[0]
    if window_size[1] >= 0:
        keep &= j <= i + window_size[1]
    s = s.masked_fill(~keep, float("-inf"))
    lse = torch.logsumexp(s, -1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks[:, None])
    p = torch.exp(s - total.masked_fill(total == float("-inf"), 0.0)[..., None])
    return torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(group, 1)), lse


def varlen_attention_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor | None = None, *,
    causal: bool = False, softmax_scale: float | None = None, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The formula in at least fp32, document by document, rounded once. Shapes as in `varlen_attention` -> out, lse."""
    acc = acc_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    cu_q = cu_seqlens_q.tolist()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    extra = None if sinks is None else sinks.to(acc)
    outs, lses = [], []
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        qi, ki, vi = q[q0:q1].to(acc), k[k0:k1].to(acc), v[k0:k1].to(acc)
        out, lse = attend_ref(qi, ki, vi, len(ki) - len(qi), 0, causal, scale, window_size, softcap, extra)
        outs.append(out)
        lses.append(lse)
    tail = q.shape[0] - cu_q[-1]
    outs.append(q.new_zeros(tail, *q.shape[1:], dtype=acc))
    lses.append(q.new_full((q.shape[1], tail), float("-inf"), dtype=acc))
    return torch.cat(outs).to(q.dtype), torch.cat(lses, 1)


# --- launchers ---------------------------------------------------------------------------------------------------


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with a contiguous last dimension; tokens and heads may have any strides (a slice of a fused qkv is not copied)."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _table(table: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> tuple[int, int, int]:
    """Segments (S, 6), or (cu_seqlens_q, cu_seqlens_k), as the native calls take them."""
    if isinstance(table, tuple):
        return table[0].data_ptr(), table[1].data_ptr(), table[0].numel() - 1
    return table.data_ptr(), 0, table.shape[0]


def attention_out(q, k, v, table, sinks, softmax_scale, softcap, left, right, out, lse, resume=False, isa="auto") -> None:
    """Writes the rows of out and lse that a document or segment covers; the values of `table` are the only check, no autograd.

    q, k, v with a contiguous last dimension; the rest contiguous: out (total_q, heads, head_dim), q's or the accumulate dtype;
    lse (heads, total_q) and sinks in the accumulate dtype, table: segments (S, 6) or (cu_seqlens_q, cu_seqlens_k).
    left, right: the window, -1 for unlimited, right = 0 for causal. With resume, out (accumulate dtype) and lse are read first.
    """
    if on_gpu(q):
        attention_triton(q, k, v, table, sinks, softmax_scale, softcap, left, right, out, lse, resume)
        return
    options = (q.shape[1], k.shape[1], q.shape[2], softmax_scale, softcap, left, right)
    native().varlen_fwd(
        DTYPE_CODES[q.dtype], _strides(q), _strides(k), _strides(v), q.shape[0], k.shape[0], options, _table(table),
        out.data_ptr(), out.dtype != q.dtype, resume, lse.data_ptr(), _address(sinks), threads(), isa,
    )  # fmt: skip


def attention_backward_out(
    dout, dlse, q, k, v, out, lse, table, sinks, softmax_scale, softcap, left, right, dq, dk, dv, dsinks, isa="auto"
) -> None:
    """Adds to dq, dk, dv and dsinks (accumulate dtype, contiguous; dsinks and dlse may be None) what the table's pairs give."""
    if on_gpu(q):
        attention_backward_triton(
            dout, dlse, q, k, v, out, lse, table, sinks, softmax_scale, softcap, left, right, dq, dk, dv, dsinks
        )
        return
    options = (q.shape[1], k.shape[1], q.shape[2], softmax_scale, softcap, left, right)
    rows = torch.empty(2, *lse.shape, dtype=lse.dtype)  # two numbers a row, filled by the call
    native().varlen_bwd(
        DTYPE_CODES[q.dtype], _strides(dout), _strides(q), _strides(k), _strides(v), q.shape[0], k.shape[0], options,
        _table(table), out.data_ptr(), out.dtype != q.dtype, lse.data_ptr(), _address(dlse), _address(sinks), rows.data_ptr(),
        dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), _address(dsinks), threads(), isa,
    )  # fmt: skip


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define(
    "swiftk::varlen_attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? sinks, "
    "float softmax_scale, float softcap, int left, int right, str isa) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "swiftk::varlen_attention_bwd",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, Tensor? sinks, float softmax_scale, float softcap, int left, int right, str isa) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
)


@torch.library.register_kernel("swiftk::varlen_attention_fwd", ("cpu", "cuda"))
def _fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, softmax_scale, softcap, left, right, isa):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=acc_dtype(q.dtype))
    table = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    wide_sinks = None if sinks is None else sinks.to(lse.dtype).contiguous()
    attention_out(_rows(q), _rows(k), _rows(v), table, wide_sinks, softmax_scale, softcap, left, right, out, lse, isa=isa)
    if not on_gpu(q) and (end := int(cu_seqlens_q[-1])) < q.shape[0]:  # tokens that belong to no document
        out[end:] = 0.0
        lse[:, end:] = float("-inf")
    return out, lse


def _backward_into(f, dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks, options, grads):
    """f with contiguous last dimensions, and sinks in the accumulate dtype -> dsinks in sinks' dtype."""
    dsinks = lse.new_zeros(0 if sinks is None else q.shape[1])
    f(
        _rows(dout), None if dlse is None else dlse.contiguous(), _rows(q), _rows(k), _rows(v), out, lse,
        (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()), None if sinks is None else sinks.to(lse.dtype).contiguous(),
        *options, *grads, None if sinks is None else dsinks,
    )  # fmt: skip
    return dsinks if sinks is None else dsinks.to(sinks.dtype)


@torch.library.register_kernel("swiftk::varlen_attention_bwd", "cpu")
def _bwd_cpu(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks, softmax_scale, softcap, left, right, isa):
    grads = [torch.zeros(x.shape, dtype=lse.dtype) for x in (q, k, v)]
    options = (softmax_scale, softcap, left, right)
    add = functools.partial(attention_backward_out, isa=isa)
    dsinks = _backward_into(add, dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks, options, grads)
    return *(grad.to(q.dtype) for grad in grads), dsinks


@register_cuda("swiftk::varlen_attention_bwd")
def _bwd_cuda(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks, softmax_scale, softcap, left, right, isa):
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    options, write = (softmax_scale, softcap, left, right), attention_backward_triton
    dsinks = _backward_into(write, dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks, options, grads)
    return *grads, dsinks


@torch.library.register_fake("swiftk::varlen_attention_fwd")
def _fwd_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, softmax_scale, softcap, left, right, isa):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=acc_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.register_fake("swiftk::varlen_attention_bwd")
def _bwd_fake(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks, softmax_scale, softcap, left, right, isa):
    dsinks = lse.new_empty(0) if sinks is None else torch.empty_like(sinks, memory_format=torch.contiguous_format)
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), dsinks


# --- autograd ----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, sinks)


def _backward(ctx, dout, dlse):
    # with f = exp(lse - logaddexp(lse, sink)), D = rowsum(dout * out), p = exp(s - lse):
    #   dv = p^T (f dout),  ds = p (f dout v^T - f D + dlse),  dx = ds (1 - (s / softcap)^2),
    #   dq = scale dx k,  dk = scale dx^T q,  dsink = -sum over rows of (1 - f) D
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks = torch.ops.swiftk.varlen_attention_bwd(
        dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks, *ctx.options
    )
    return dq, dk, dv, None, None, None if sinks is None else dsinks, *(None for _ in ctx.options)


torch.library.register_autograd("swiftk::varlen_attention_fwd", _backward, setup_context=_setup_context)
refuse_double_backward("varlen_attention", "swiftk::varlen_attention_bwd", REFERENCE)


# --- public ------------------------------------------------------------------------------------------------------


def _check(op: str, q, k, v, window_size, softcap: float, sinks, isa: str) -> None:
    check_floating(op, q=q, k=k, v=v)
    if q.is_cuda and q.dtype == torch.float64:
        raise ValueError(f"{op}: q has dtype torch.float64, wants torch.bfloat16 or torch.float32 on CUDA; move it to the CPU")
    check_isa(op, isa)
    if q.dim() != 3 or not 1 <= q.shape[2] <= 512:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}, wants (total_q, heads, head_dim) with head_dim from 1 to 512")
    if k.dim() != 3 or k.shape[2] != q.shape[2]:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, q {tuple(q.shape)} needs (total_k, kv_heads, {q.shape[2]})")
    check_shape(op, "v", v, tuple(k.shape), f"k {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: q has {q.shape[1]} heads, wants a multiple of the {k.shape[1]} heads of k and v")
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(f"{op}: window_size has {window_size}, wants (left, right), each >= 0, or -1 for unlimited")
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"{op}: softcap has {softcap}, wants a finite number >= 0 (0 for none)")
    if sinks is not None:
        check_shape(op, "sinks", sinks, (q.shape[1],), f"q {tuple(q.shape)}")
        if sinks.dtype not in (q.dtype, acc_dtype(q.dtype)) or sinks.device != q.device:
            wants = " or ".join(map(str, dict.fromkeys((q.dtype, acc_dtype(q.dtype)))))
            raise ValueError(f"{op}: sinks has dtype {sinks.dtype} on {sinks.device}, wants {wants} on {q.device}")


def _check_int32(op: str, name: str, tensor: torch.Tensor, q: torch.Tensor, shape: str, fits: Callable[..., bool]) -> None:
    """fits: whether a shape is `shape`."""
    check_dtype(op, name, tensor, torch.int32, q.device, "q")
    if not fits(tuple(tensor.shape)):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, wants {shape}")


def _scale(op: str, q: torch.Tensor, softmax_scale: float | None) -> float:
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not -float("inf") < scale < float("inf"):
        raise ValueError(f"{op}: softmax_scale has {scale}, wants a finite number, or None for head_dim ** -0.5")
    return scale


def _window(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """(left, right) with causal folded in: it is a window that ends at the query. Positions are int32: 2^32 is everything, and
    sums with it do not overflow int64."""
    left, right = (min(int(size), 1 << 32) for size in window_size)
    return left, 0 if causal else right


def _check_segments(op: str, segments: torch.Tensor, q: torch.Tensor) -> None:
    _check_int32(op, "segments", segments, q, "(S, 6)", lambda shape: len(shape) == 2 and shape[1] == 6)


def _check_state(op: str, q: torch.Tensor, **tensors: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    """Tensors that are read and written in place: accumulate dtype, contiguous."""
    acc = acc_dtype(q.dtype)
    for name, (x, shape) in tensors.items():
        check_shape(op, name, x, shape, f"q {tuple(q.shape)}")
        if x.dtype != acc or x.device != q.device or not x.is_contiguous():
            have = f"dtype {x.dtype} on {x.device}, strides {x.stride()}"
            raise ValueError(f"{op}: {name} has {have}, wants {acc} on {q.device}, contiguous")


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor | None = None, *,
    causal: bool = False, softmax_scale: float | None = None, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    sinks: torch.Tensor | None = None, return_lse: bool = False, backend: str = "swiftk", isa: str = "auto",
):  # fmt: skip
    """Attention of each packed document to itself, differentiable in q, k, v and sinks, through out and lse.

    Args:
        q: (total_q, heads, head_dim), bf16, fp32 or fp64, head_dim 1 to 512; any strides (last one 1: no copy).
        k, v: (total_k, kv_heads, head_dim) like q; query head h reads KV head h // (heads / kv_heads).
        cu_seqlens_q: int32 (documents + 1,), from 0, not decreasing; document i is q[cu[i] : cu[i + 1]], possibly empty.
            Tokens past cu_seqlens[-1] belong to no document: out 0, lse -inf, gradients 0.
        cu_seqlens_k: the same for k and v; None for cu_seqlens_q. Document i of q sees document i of k.
        causal: query i of m sees keys up to i + n - m of n (aligned bottom-right).
        softmax_scale: None for head_dim ** -0.5.
        window_size: (left, right), keys before and after the query's position that it sees; -1 for unlimited.
        softcap: scores become softcap tanh(x / softcap); 0 for none.
        sinks: (heads,), a logit per head that joins the softmax without a value; q's or the accumulate dtype.
        return_lse: also return lse (heads, total_q): natural log, without the sink, in fp32 (fp64 for fp64), differentiable.
        backend: "swiftk", or "flash_attn" or "cudnn" for theirs (CUDA, bf16; no promise of ours holds for them, their calls are
            checked against stand-ins alone: no GPU has run them). What they lack is refused by name.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable".
    Returns: out like q, contiguous; with return_lse (out, lse). A query that sees no key has out 0 and lse -inf.
    Raises: ValueError for a wrong shape, dtype, device, option or cu_seqlens (whose values are checked on the CPU; on CUDA bad
        offsets are asserted under TRITON_DEBUG=1, cut to the tensors else), and for fp64 on CUDA; ImportError without the
        backend, on CUDA without Triton; NotImplementedError for a gradient of the gradient.
    """
    op = "varlen_attention"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend has {backend!r}, wants one of {', '.join(BACKENDS)}")
    _check(op, q, k, v, window_size, softcap, sinks, isa)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_int32(op, name, cu, q, "(documents + 1,)", lambda shape: len(shape) == 1 and shape[0] >= 1)
    check_shape(op, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), f"cu_seqlens_q {tuple(cu_seqlens_q.shape)}")
    scale = _scale(op, q, softmax_scale)
    if backend != "swiftk":
        if return_lse:
            raise ValueError(f"{op}: return_lse has True, backend {backend!r} wants False (its lse has no gradient)")
        options = (causal, scale, window_size, float(softcap), sinks)
        return foreign_attention(backend, q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    left, right = _window(causal, window_size)
    out, lse = torch.ops.swiftk.varlen_attention_fwd(
        q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, scale, float(softcap), left, right, isa
    )
    return (out, lse) if return_lse else out


def segment_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor, *, causal: bool = False,
    softmax_scale: float | None = None, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    sinks: torch.Tensor | None = None, out: torch.Tensor | None = None, lse: torch.Tensor | None = None,
    return_lse: bool = True, isa: str = "auto",
):  # fmt: skip
    """Attention of ranges of queries to ranges of keys, resumable: the step of a ring, of paged prefill. No autograd.

    Given out and lse of earlier calls, it updates them in place as if this call's keys had been among theirs. That is close to
    one pass, not bit-equal (each call normalises once more), with rounding in the accumulate dtype alone.

    Args:
        q, k, v, causal, softmax_scale, window_size, softcap, isa: as in `varlen_attention`.
        segments: int32 (S, 6) like q, rows (q_start, q_len, k_start, k_len, q_pos, k_pos): query i of the row has position
            q_pos + i, key j position k_pos + j >= 0; causal keeps k_pos + j <= q_pos + i, windows are in positions. Queries of
            two rows are disjoint within a call; keys may overlap.
        sinks: (heads,), applied to the queries that the segments cover, in this call. Pass them in the last call only: out with
            sinks cannot be resumed. Rows with k_len 0 apply them where no last call can be named.
        out, lse: None in the first call, else both: (total_q, heads, head_dim), (heads, total_q), accumulate dtype, contiguous.
        return_lse: False to return out alone.
    Returns: out, accumulate dtype (0 where no key has been seen), and lse (-inf there), without the sink.
    Raises: ValueError for a wrong shape, dtype, device, option or segment (its numbers are checked on the CPU; on CUDA asserted
        under TRITON_DEBUG=1, cut to the tensors else), for fp64 on CUDA, or where autograd would record; on CUDA ImportError
        without Triton.
    """
    op = "segment_attention"
    _check(op, q, k, v, window_size, softcap, sinks, isa)
    _check_segments(op, segments, q)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        raise ValueError(f"{op}: q, k, v or sinks has requires_grad, wants torch.no_grad(); use segment_attention_backward")
    if (out is None) != (lse is None):
        raise ValueError(f"{op}: {'out' if out is None else 'lse'} has None, wants both of the earlier calls, or neither")
    resume, acc = out is not None, acc_dtype(q.dtype)
    if out is None or lse is None:
        out = q.new_zeros(q.shape, dtype=acc)
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=acc)
    _check_state(op, q, out=(out, tuple(q.shape)), lse=(lse, (q.shape[1], q.shape[0])))
    scale = _scale(op, q, softmax_scale)
    wide_sinks = None if sinks is None else sinks.detach().to(acc).contiguous()
    left, right = _window(causal, window_size)
    rows = (_rows(q), _rows(k), _rows(v))
    attention_out(*rows, segments.contiguous(), wide_sinks, scale, float(softcap), left, right, out, lse, resume, isa)
    return (out, lse) if return_lse else out


def segment_attention_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    segments: torch.Tensor, *, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dsinks: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None, causal: bool = False, softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, sinks: torch.Tensor | None = None, isa: str = "auto",
) -> None:  # fmt: skip
    """Adds the gradients of one `segment_attention` call to dq, dk, dv, given the *final* out and lse of all of them.

    Args:
        dout: gradient of the final out, like q. dlse: of the final lse, (heads, total_q), or None.
        out, lse: as the last call returned them (with the sink in out, without it in lse), accumulate dtype.
        dq, dk, dv: like q, k, v in the accumulate dtype, contiguous; added to in a fixed order (bitwise repeatable).
        sinks: in every call, if they are in out. dsinks: (heads,), accumulate dtype, added to: pass it in one call per query,
            because each call has the sink's whole gradient for the queries that its segments cover.
        The rest: as in that call of `segment_attention`.
    Raises: as `segment_attention` does; autograd never records this call.
    """
    op = "segment_attention_backward"
    _check(op, q, k, v, window_size, softcap, sinks, isa)
    _check_segments(op, segments, q)
    check_floating(op, q=q, dout=dout)
    check_shape(op, "dout", dout, tuple(q.shape), f"q {tuple(q.shape)}")
    of_lse, of_k = (q.shape[1], q.shape[0]), tuple(k.shape)
    _check_state(op, q, out=(out, tuple(q.shape)), lse=(lse, of_lse), dq=(dq, tuple(q.shape)), dk=(dk, of_k), dv=(dv, of_k))
    if dlse is not None:
        _check_state(op, q, dlse=(dlse, of_lse))
    if dsinks is not None:
        _check_state(op, q, dsinks=(dsinks, (q.shape[1],)))
        if sinks is None:
            raise ValueError(f"{op}: sinks has None, wants the sinks that dsinks is the gradient of")
    scale = _scale(op, q, softmax_scale)
    wide_sinks = None if sinks is None else sinks.detach().to(lse.dtype).contiguous()
    left, right = _window(causal, window_size)
    attention_backward_out(
        _rows(dout), dlse, _rows(q), _rows(k), _rows(v), out, lse, segments.contiguous(), wide_sinks, scale, float(softcap),
        left, right, dq, dk, dv, dsinks, isa,
    )  # fmt: skip
