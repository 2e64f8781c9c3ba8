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

On CUDA `numerics` chooses (on the CPU both are the above):
- "auto": torch's vendor GEMM under the settings of torch.backends.cuda.matmul (allow_tf32, false unless somebody sets it, and
  allow_bf16_reduced_precision_reduction, true: sums of a split K may be bf16). How it splits K depends on M. A tail is
  multiplied first, into y, and the large GEMM adds to it: what is rounded twice is the small term. (Up to 64 rows with a tail:
  as "invariant".)
- "invariant": a Triton GEMM in which an element adds k = 0, 1, ... in blocks of 16 (the tensor core orders them; fp32 and
  fp64: one by one, IEEE), then the tail after K was filled up with zeros, then scale and bias, and one rounding: again a
  function of x[m] and W alone.

Bytes at M = 1: N K elements of W read once. FLOPs: 2 M N K forward, twice that backward.
Backward: dx = dy W, dW = dy^T x, db = sum of dy over rows, by torch.matmul, whose order is the vendor's; see `_matmul`.
Not supported: fp16, an activation in the epilogue. An NF4 weight: kernels/nf4_linear.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from swiftk.kernels._checks import check_floating, check_isa, check_shape, transformer_engine
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import jit, launch, on_gpu, ship, tl, tl_acc

NUMERICS, BACKENDS = ("auto", "invariant"), ("swiftk", "transformer_engine")

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


class Product(NamedTuple):
    """One of several products of an x: y = scale (x W^T + s t^T) + bias, with the tail (s, t). Shapes as linear_out's."""

    weight: Any  # (N, K): a tensor, or an NF4Tensor
    bias: torch.Tensor | None
    y: torch.Tensor
    tail: tuple[torch.Tensor, torch.Tensor] | None = None
    scale: torch.Tensor | None = None


# --- Triton ------------------------------------------------------------------------------------------------------
#
# numerics="invariant". One accumulator per element walks K from its beginning to its end, then the tail; nothing is split.
# Two tiles of bf16: up to 64 rows (decoding, bound by W) 64 x 32, so that 4096 columns are 128 programs; above, 128 x 256, or
# less where `_tile` says so. All issue the same instruction along K (Hopper: wgmma m64nNk16 per warp group; Ampere: mma
# m16n8k16), so the tile is not in the sums: tests/triton/test_linear.py says so of the device. Scale and bias round apart
# (fuse=False), as they do where an op applies them. Sizes are from registers and shared memory (`make compile-gpu`); no GPU
# has measured them.

# Up to so many rows a product with a tail is one launch of this in "auto" too: a decoder's step is bound by W and by launches,
# of which torch needs two or three (2 us each, 7 us to read 4096 x 4096; reasoned, not measured).
SMALL_ROWS = 64


@jit
def _add_segment(acc, a, b, rows, cols, a_row, b_row, K, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):
    """acc + a b^T over K, a block of K after the other; rows beyond the matrices are clamped, and never stored."""
    at = tl.arange(0, BLOCK_K)
    a_at, b_at = a + rows[:, None] * a_row + at[None, :], b + cols[None, :] * b_row + at[:, None]
    a_k, b_k = rows[:, None] * 0 + at[None, :], cols[None, :] * 0 + at[:, None]
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        u = tl.load(a_at + k, mask=a_k < K - k, other=0.0)
        v = tl.load(b_at + k, mask=b_k < K - k, other=0.0)
        acc = tl.dot(u, v, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@jit(varies=("M",))
def _linear_kernel(
    x, w, s, t, scale, bias, y, M, N, K, R, x_row, w_row, s_row, t_row, y_row, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, HAS_TAIL: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    # GROUP tiles below each other run side by side in time, so that W comes from the L2 cache
    tile, below, beside = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * beside) * GROUP
    height = tl.minimum(below - first, GROUP)
    inner = tile % (GROUP * beside)
    row = (first + inner % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (inner // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = tl.minimum(row, M - 1), tl.minimum(col, N - 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    acc = _add_segment(acc, x, w, rows, cols, x_row, w_row, K, BLOCK_K, STAGES)
    if HAS_TAIL:
        acc = _add_segment(acc, s, t, rows, cols, s_row, t_row, R, BLOCK_K, 1)
    if HAS_SCALE:
        acc = acc * tl.load(scale + cols)[None, :]
    if HAS_BIAS:
        acc = acc + tl.load(bias + cols).to(ACC)[None, :]
    inside = (row[:, None] < M) & (col[None, :] < N)
    tl.store(y + row[:, None] * y_row + col[None, :], acc.to(y.dtype.element_ty), mask=inside)


def _tile(rows: int, dtype: torch.dtype, epilogue: bool, aligned: bool = True, shared: int = 1 << 18) -> dict[str, Any]:
    """aligned: K and the row strides of x and W are multiples of 16. shared: bytes of shared memory that a program may have."""
    if dtype in (torch.float32, torch.float64):  # no tensor core: the accumulators' registers bound the tile
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP": 8, "num_warps": 4, "STAGES": 3}
    if rows <= SMALL_ROWS:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP": 1, "num_warps": 4, "STAGES": 5}
    # 256 columns and their scale and bias are more than 255 registers, as are the addresses of loads of single elements; 144
    # KiB of shared memory are more than the 99 KiB of compute capability 8.6, 8.9 and 12
    high, wide = (128, 128 if epilogue or shared < 160 << 10 else 256) if aligned else (64, 64 if epilogue else 128)
    return {"BLOCK_M": high, "BLOCK_N": wide, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "STAGES": 3}


_SIZES = "i32 i32:16 i32:16 i32:16 i32:16 i32:16 i32:16 i32:16 i32:16"
for _rows, _has in ((1, False), (1, True), (4096, False), (4096, True)):
    ship(
        f"linear bf16 M={_rows}{' tail scale bias' if _has else ''}", _linear_kernel,
        f"*bf16 *bf16 *bf16 *bf16 *fp32 *bf16 *bf16 {_SIZES}", ACC=tl.float32, HAS_TAIL=_has, HAS_SCALE=_has, HAS_BIAS=_has,
        fuse=False, **_tile(_rows, torch.bfloat16, _has),
    )  # fmt: skip
ship(
    "linear bf16 logits", _linear_kernel, f"*bf16 *bf16 *bf16 *bf16 *fp32 *bf16 *fp32 {_SIZES}", ACC=tl.float32, HAS_TAIL=False,
    HAS_SCALE=False, HAS_BIAS=False, fuse=False, **_tile(4096, torch.bfloat16, False),
)  # fmt: skip
ship(
    "linear bf16 M=4096 tail r=8", _linear_kernel,
    "*bf16 *bf16 *bf16 *bf16 *fp32 *bf16 *bf16 i32 i32:16 i32:16 i32 i32:16 i32:16 i32 i32 i32:16", ACC=tl.float32,
    HAS_TAIL=True, HAS_SCALE=True, HAS_BIAS=True, fuse=False, **_tile(4096, torch.bfloat16, True),
)  # fmt: skip
for _has in (False, True):
    ship(
        f"linear bf16 M=4096 unaligned{' tail scale bias' if _has else ''}", _linear_kernel,
        "*bf16 *bf16 *bf16 *bf16 *fp32 *bf16 *bf16 i32 i32 i32 i32 i32 i32 i32 i32 i32", ACC=tl.float32, HAS_TAIL=_has,
        HAS_SCALE=_has, HAS_BIAS=_has, fuse=False, **_tile(4096, torch.bfloat16, _has, aligned=False),
    )  # fmt: skip
ship(
    "linear fp32", _linear_kernel, f"*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 {_SIZES}", ACC=tl.float32, HAS_TAIL=True,
    HAS_SCALE=True, HAS_BIAS=True, fuse=False, **_tile(1, torch.float32, True),
)  # fmt: skip


@functools.cache
def _shared(device: torch.device) -> int:
    if device.type == "cpu":
        return 1 << 18
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def _invariant(x: torch.Tensor, p: Product) -> None:
    (M, K), N, (s, t) = x.shape, p.weight.shape[0], p.tail or (x, p.weight)
    aligned = not any(n % 16 for n in (K, x.stride(0), p.weight.stride(0)))
    tile = _tile(M, x.dtype, any(e is not None for e in (p.tail, p.scale, p.bias)), aligned, _shared(x.device))
    launch(
        _linear_kernel, (-(-M // tile["BLOCK_M"]) * -(-N // tile["BLOCK_N"]),), x, p.weight, s, t,
        x if p.scale is None else p.scale, x if p.bias is None else p.bias, p.y, M, N, K, s.shape[1], x.stride(0),
        p.weight.stride(0), s.stride(0), t.stride(0), p.y.stride(0), fuse=False, ACC=tl_acc(x.dtype),
        HAS_TAIL=p.tail is not None, HAS_SCALE=p.scale is not None, HAS_BIAS=p.bias is not None, **tile,
    )  # fmt: skip


# --- the vendor's GEMM on CUDA ---------------------------------------------------------------------------------------


def vendor_mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, beta: float = 0.0) -> None:
    """out = a b + beta out by torch; out has a's dtype or the accumulate dtype (fp32 beside bf16: the sums as they are). For
    CUDA, and for the CPU under the interpreter."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:  # since torch 2.10 (pytorch#167931) the addend may have out's dtype
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:  # torch has no such product on the CPU
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def _vendor(x: torch.Tensor, p: Product) -> None:
    wt, y = p.weight.t(), p.y
    if p.scale is not None:  # applied to sums that are not rounded
        y = p.y.new_empty(p.y.shape, dtype=acc_dtype(x.dtype))
    bias = p.bias if y is p.y and y.dtype == x.dtype else None  # in a GEMM's own epilogue
    if p.tail is not None:
        s, tt = p.tail[0], p.tail[1].t()
        vendor_mm(s, tt, y) if bias is None else torch.addmm(bias, s, tt, out=y)
        vendor_mm(x, wt, y, 1.0)
    else:
        vendor_mm(x, wt, y) if bias is None else torch.addmm(bias, x, wt, out=y)
    if p.scale is not None:
        torch.mul(y, p.scale, out=p.y) if p.bias is None else torch.addcmul(p.bias, y, p.scale, out=p.y)
    elif p.bias is not None and bias is None:
        y.add_(p.bias)


# --- launchers ---------------------------------------------------------------------------------------------------


def linear_out(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, isa: str = "auto",
    numerics: str = "auto", *, tail: tuple[torch.Tensor, torch.Tensor] | None = None, scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y = scale (x W^T + s t^T) + bias; no checks, no autograd. The decoder, the loss and lora_linear call this.

    x (M, K), weight (N, K), tail (s (M, R), t (N, R)), y (M, N): any row stride, last dimension contiguous (a range of rows of
    the weight is a range of columns of y); bias (N,) and scale (N,) contiguous. y has x's dtype or the accumulate dtype (bf16 x
    and fp32 y: unrounded logits), scale the accumulate dtype, everything else x's.
    """
    linear_group_out(x, [Product(weight, bias, y, tail, scale)], isa, numerics)


@torch.no_grad()  # torch's out= refuses a weight that requires a gradient
def linear_group_out(x: torch.Tensor, products: Sequence[Product], isa: str = "auto", numerics: str = "auto") -> None:
    """linear_out for each of them, whose y have one dtype: the same bits. On the CPU one parallel region over all columns."""
    if on_gpu(x):
        few = x.shape[0] <= SMALL_ROWS and x.dtype not in (torch.float32, torch.float64)
        for p in products:
            (_invariant if numerics == "invariant" or (few and p.tail is not None) else _vendor)(x, p)
        return
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

torch.library.define("swiftk::linear_fwd", "(Tensor x, Tensor weight, Tensor? bias, str numerics, str isa) -> Tensor")


@torch.library.register_kernel("swiftk::linear_fwd", ("cpu", "cuda"))
def _linear_fwd(x, weight, bias, numerics, isa):
    x2 = as_matrix(x)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])  # not a view, which autograd would not let be changed in place
    out = y.view(x2.shape[0], weight.shape[0])
    linear_out(x2, with_rows(weight), None if bias is None else bias.contiguous(), out, isa, numerics)
    return y


@torch.library.register_fake("swiftk::linear_fwd")
def _linear_fwd_fake(x, weight, bias, numerics, isa):
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
    x, weight, _bias, _numerics, _isa = inputs
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
    return dx, dw, db, None, None


torch.library.register_autograd("swiftk::linear_fwd", _backward, setup_context=_setup_context)


# --- other people's kernels --------------------------------------------------------------------------------------


def _transformer_engine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """NVIDIA's module around our weight; a module of its own for each call, since its backward reads the weight from it."""
    wanted = ("in_features", "out_features", "bias", "params_dtype", "device")
    Linear = transformer_engine("linear", "Linear", x, "1.0", wanted)
    N, K = weight.shape
    module = Linear(in_features=K, out_features=N, bias=bias is not None, params_dtype=weight.dtype, device="meta")
    module._parameters["weight"] = weight
    if bias is not None:
        module._parameters["bias"] = bias
    return module(x)


# --- public ------------------------------------------------------------------------------------------------------


def check_numerics(op: str, numerics: str) -> None:
    if numerics not in NUMERICS:
        raise ValueError(f"{op}: numerics has {numerics!r}, wants one of {', '.join(NUMERICS)}")


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str = "swiftk", numerics: str = "auto",
    isa: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """y = x W^T + b, differentiable in x, weight and bias; a row's result depends on that row, weight and bias alone (on CUDA
    with numerics="invariant").

    Args:
        x: (..., K), bf16, fp32 or fp64, any strides; zero rows are allowed.
        weight: (N, K), dtype and device of x.
        bias: (N,), dtype and device of x, or None.
        backend: "swiftk", or "transformer_engine" for NVIDIA's module (CUDA; no promise of ours holds for it; its call is
            tested against a stand-in, it has not run on a GPU).
        numerics: of the forward on CUDA: "auto", the vendor's GEMM, or "invariant", a fixed order over K for any number of
            rows. The CPU is always invariant.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable".
    Returns: (..., N) in x's dtype, contiguous; accumulated in fp32 (fp64 for fp64; "auto" on CUDA: torch), rounded once.
    Raises: ValueError for a wrong shape, dtype, device, backend, numerics or isa; ImportError without the backend, and for
        "invariant" on CUDA without Triton.
    """
    check_floating("linear", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    if x.dim() == 0:
        raise ValueError("linear: x has shape (), wants (..., K)")
    if weight.dim() != 2:
        raise ValueError(f"linear: weight has shape {tuple(weight.shape)}, wants (N, K)")
    check_shape("linear", "weight", weight, (weight.shape[0], x.shape[-1]), f"x {tuple(x.shape)}")
    if bias is not None:
        check_shape("linear", "bias", bias, (weight.shape[0],), f"weight {tuple(weight.shape)}")
    check_numerics("linear", numerics)
    check_isa("linear", isa)
    if backend not in BACKENDS:
        raise ValueError(f"linear: backend has {backend!r}, wants one of {', '.join(BACKENDS)}")
    if backend == "transformer_engine":
        return _transformer_engine(x, weight, bias)
    return torch.ops.swiftk.linear_fwd(x, weight, bias, numerics, isa)
