"""LoRA linear: y = g (x W^T + s drop(x) A^T B^T) + bias, W frozen, g = 1 (LoRA) or m / ||W + s B A|| per row of W (DoRA).

Sources: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA: s = alpha / sqrt(r)); Liu et al. 2024 (DoRA, the norm detached).

Forward, with D the 0/1 mask of dropout (kernels/dropout.py) and s' = s / (1 - p):
    S = round(s' (D x) A^T)                       by the row-invariant linear; saved, never computed again
    y = round(g (x W^T + S B^T) + bias)           one GEMM: the r columns of S go on in the accumulators of K, g scales the sum
so row t of y depends on row t of x, its token index and the weights alone, for any number of rows, threads or adapters.
Several adapters (a, b with a leading dimension): S has r columns per adapter, rounded up to 32, zero except for the row's own.
Per row ||W + s B A||^2 = ||W||^2 + 2 s B . (W A^T) + s^2 B (A A^T) . B; ||W||^2 once, by row_norm_sq; W A^T reads W again.

Backward, dy' = g dy, all sums in at least fp32:
    dS = s' dy' B      dA = dS^T (D x)      dB = dy'^T S      dx = dy' W + D (dS A)
    dm = sum of dy (y - bias) / m over rows      dbias = sum of dy over rows
FLOPs beside the 4 M N K of a frozen linear: 4 M r (N + K) forward and twice that backward. Bytes beside it: x is read once more
forward; x and dy once (dm: y too), dx read and written once backward. Saved: x, S (M r), y for DoRA's dm.

On CUDA the dense products are the vendor's (forward with numerics="invariant": linear.py's) and the small term comes first:
S B^T is written to y, D (dS A) to dx, and the dense product adds to them, so what is rounded twice is small. dS is rounded to
x's dtype, as peft's is. dS and dB are two vendor products that read dy each: one kernel for both would save 16 us of 350 at
M 8192, N = K = 4096 (arithmetic) and writes as much in partial sums from r = 64 on. Triton does what meets the mask of dropout,
which is drawn in registers: S, dA and D (dS A) read or write x's shape once each. Saved for DoRA's dm: x W^T + S B^T, not y.

An NF4 base is `nf4_linear` (forward) and slices of dequantised columns (dx): the same numbers as its dequantised weight.

Unlike peft: dropout is drawn per adapted linear (peft too) and from (seed, step, layer, token, column) (peft: the global
generator); DoRA with dropout keeps x in the base product, where peft drops x there too (a second dense GEMM): equal to peft
at p = 0 and in evaluation. A row of W + s B A that is zero gives 0 and dm = 0 (peft: NaN); one below
about 3e-4 of its row of W may, since the expansion above cancels there.
Not supported: a trainable W, DoRA with several adapters, the gradient of the gradient. On CUDA the values of segment_ids and of
a stack are not checked, which would wait for the device: an id outside the stack is no adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from swiftk.kernels._checks import check_floating, check_isa, check_shape, check_tensor, refuse_double_backward
from swiftk.kernels._low_rank import (
    ALIGN,
    Mask,
    adapted_norm,
    base_product,
    column_dot,
    gain_of,
    keep_own,
    low_rank,
    mask_blocks,
    rank_gram,
    rank_update,
)
from swiftk.kernels._native import acc_dtype
from swiftk.kernels._triton import on_gpu
from swiftk.kernels.dropout import Dropout, check_dropout, dropout_keys, dropout_ref
from swiftk.kernels.linear import as_matrix, check_numerics, matmul_dtype, with_rows
from swiftk.kernels.nf4 import NF4Tensor, check_nf4, nf4_dequantize, nf4_dequantize_ref, plain_absmax, take_rows
from swiftk.kernels.nf4_linear import matmul_weight

NORM_ROWS = 1024  # rows of an NF4 weight that row_norm_sq dequantises at a time


class Adapter(NamedTuple):
    """What is trained beside W (N, K). a, b and magnitude in x's dtype or in the accumulate dtype (fp32 masters under bf16 x),
    weight_norm_sq in the accumulate dtype; all on x's device."""

    a: torch.Tensor  # (r, K), or (adapters, r, K)
    b: torch.Tensor  # (N, r), or (adapters, N, r)
    scale: float | tuple[float, ...]  # s; one per adapter where there are several (a float: for all)
    magnitude: torch.Tensor | None = None  # DoRA's m (N,); one adapter only
    weight_norm_sq: torch.Tensor | None = None  # row_norm_sq(W) (N,); needed with magnitude


def lora_scale(alpha: float, r: int, rslora: bool = False) -> float:
    """s of LoRA, alpha / r, or of rsLoRA, alpha / sqrt(r)."""
    return alpha / (math.sqrt(r) if rslora else r)


def row_norm_sq(weight: torch.Tensor | NF4Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """||W_n||^2, (N,), in dtype: the accumulate dtype of a plain weight where None, fp32 of an NF4 one."""
    if not isinstance(weight, NF4Tensor):
        return torch.linalg.vector_norm(weight, dim=1, dtype=dtype or acc_dtype(weight.dtype)).square()
    weight, norms = plain_absmax(weight), weight.absmax.new_empty(len(weight.codes), dtype=dtype or torch.float32)
    for n in range(0, len(norms), NORM_ROWS):
        rows = nf4_dequantize(take_rows(weight, slice(n, n + NORM_ROWS)))
        norms[n : n + NORM_ROWS] = torch.linalg.vector_norm(rows, dim=1, dtype=norms.dtype).square()
    return norms


# --- reference ---------------------------------------------------------------------------------------------------


def lora_linear_ref(
    x: torch.Tensor, weight: torch.Tensor | NF4Tensor, adapter: Adapter, bias: torch.Tensor | None = None, *,
    dropout: Dropout | None = None, segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The formula in at least fp32, rounded once; a and b are those of x's dtype. x (..., K) -> (..., N)."""
    acc = acc_dtype(x.dtype)
    xf, w = x.to(acc), (nf4_dequantize_ref(weight) if isinstance(weight, NF4Tensor) else weight).to(acc)
    a, b = (t.to(x.dtype).to(acc) for t in (adapter.a, adapter.b))
    a, b = (t if t.dim() == 3 else t[None] for t in (a, b))
    scales = scales_of(adapter, len(a))
    dx = xf if dropout is None else dropout_ref(xf, dropout)
    y = xf @ w.t()
    for e in range(len(a)):
        delta = scales[e] * (dx @ a[e].t()) @ b[e].t()
        y = y + (delta if segment_ids is None else torch.where((segment_ids == e).view(*x.shape[:-1], 1), delta, 0))
    if adapter.magnitude is not None:
        norm = (w + scales[0] * b[0] @ a[0]).norm(dim=1).detach()
        y = y * torch.where(norm == 0, 0, adapter.magnitude.to(acc) / norm)
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


# --- operator ----------------------------------------------------------------------------------------------------
# One operator for one linear and for a group that reads the same x. A list has one entry per linear, or none where no linear of
# the group has it; an empty tensor is a linear without (a bias, an absmax). Returns y per linear, S of all, then per linear
# (y - bias) where DoRA's dm needs it beside y, then the row norms of DoRA.

_ARGS = (
    "Tensor x, Tensor[] weights, Tensor[] absmax, int[] blocksizes, Tensor[] biases, Tensor[] a, Tensor[] b, float[] scales, "
    "Tensor[] magnitudes, Tensor[] norms_sq, int[] thresholds, SymInt[] layers, Tensor? seed_step, Tensor? token_index, "
    "Tensor? segment_ids, str numerics, str isa"
)
torch.library.define("swiftk::lora_linear_fwd", f"({_ARGS}) -> Tensor[]")
torch.library.define(
    "swiftk::lora_linear_bwd",
    "(Tensor[] dy, Tensor? x, Tensor[] weights, Tensor[] absmax, int[] blocksizes, Tensor[] a, Tensor[] b, float[] scales, "
    "Tensor[] magnitudes, Tensor[] norms, Tensor? s, Tensor[] unbiased, int[] thresholds, SymInt[] layers, Tensor? seed_step, "
    "Tensor? token_index, Tensor? segment_ids, bool needs_dx, bool needs_adapters, str isa) -> Tensor[]",
)


def _weights(weights, absmax, blocksizes, in_features: int) -> list[torch.Tensor | NF4Tensor]:
    """What the operator's lists stand for; blocksize 0 is a plain weight."""
    plain = [with_rows(w) for w in weights]
    scales = absmax or [None] * len(plain)
    return [
        NF4Tensor(w, with_rows(scale), in_features, size) if size else w
        for w, scale, size in zip(plain, scales, blocksizes, strict=True)
    ]


def _columns(a: torch.Tensor) -> int:
    """Columns of S that an adapter (r, K) or a stack (adapters, r, K) takes."""
    return a.shape[0] if a.dim() == 2 else a.shape[0] * (-(-a.shape[1] // ALIGN) * ALIGN)


def _flat(a: torch.Tensor, b: torch.Tensor, scales: Sequence[float], dtype: torch.dtype):
    """a (R, K), b (N, R) and s (R,) over the columns of S: a stack padded with zeros to ALIGN columns per adapter."""
    a, b = a.to(dtype), b.to(dtype)
    if a.dim() == 2:
        return a.contiguous(), b.contiguous(), a.new_full((len(a),), scales[0], dtype=acc_dtype(dtype))
    pad = -a.shape[1] % ALIGN
    a, b = torch.nn.functional.pad(a, (0, 0, 0, pad)), torch.nn.functional.pad(b, (0, pad))
    s = torch.cat([a.new_full((a.shape[1],), scale, dtype=acc_dtype(dtype)) for scale in scales])
    return a.flatten(0, 1).contiguous(), b.transpose(0, 1).flatten(1).contiguous(), s


def _check_values(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], segment_ids: torch.Tensor | None, dtype) -> None:
    """Of a stack: ids in range, values finite in x's dtype: 0 times infinity of one would be NaN in rows of the others."""
    if segment_ids is None or on_gpu(segment_ids):
        return
    for pair in zip(a, b, strict=True):
        adapters = len(pair[0])
        if len(segment_ids) and not (segment_ids.min() >= -1 and segment_ids.max() < adapters):
            worst = int(segment_ids.max() if segment_ids.max() >= adapters else segment_ids.min())
            raise ValueError(f"lora_linear: segment_ids has {worst}, wants -1 to {adapters - 1}")
        for name, t in zip("ab", pair, strict=True):
            if not (finite := t.detach().to(dtype).isfinite().flatten(1).all(1)).all():
                bad = int(finite.logical_not().nonzero()[0])
                raise ValueError(
                    f"lora_linear: adapter {bad} of {adapters} has values in {name} that are not finite in {dtype}"
                )


def _groups(a: Sequence[torch.Tensor], scales: Sequence[float]):
    """Per linear: its range of columns of S and its scales."""
    column = first = 0
    for t in a:
        adapters = 1 if t.dim() == 2 else t.shape[0]
        yield slice(column, column + _columns(t)), scales[first : first + adapters]
        column, first = column + _columns(t), first + adapters


@torch.library.register_kernel("swiftk::lora_linear_fwd", ("cpu", "cuda"))
def _lora_linear_fwd(
    x, weights, absmax, blocksizes, biases, a, b, scales, magnitudes, norms_sq, thresholds, layers, seed_step, token_index,
    segment_ids, numerics, isa,
):  # fmt: skip
    _check_values(a, b, segment_ids, x.dtype)
    seed_step, token_index = dropout_keys(seed_step, token_index)
    acc, x2 = acc_dtype(x.dtype), as_matrix(x)
    M, K = x2.shape
    columns, per_linear = zip(*_groups(a, scales), strict=True)
    flat = [_flat(*abs_, x.dtype) for abs_ in zip(a, b, per_linear, strict=True)]
    masks = [Mask(t, seed_step, layer, token_index) for t, layer in zip(thresholds, layers, strict=True)]
    factors = [s * (65536 / (65536 - t)) for (_, _, s), t in zip(flat, thresholds, strict=True)]
    s = x.new_empty(M, columns[-1].stop)
    if not any(thresholds):
        low_rank(x2, torch.cat([f[0] for f in flat]), torch.cat(factors), masks[0], s, isa, numerics)
    else:
        for m in mask_blocks(x2):
            for mask, cols, (A, _, _), factor in zip(masks, columns, flat, factors, strict=True):
                low_rank(x2[m], A, factor, mask.rows(m), s[m, cols], isa, numerics)
    ys, unbiased, norms = [], [], []
    for i, (weight, (A, B, scale)) in enumerate(zip(_weights(weights, absmax, blocksizes, K), flat, strict=True)):
        if a[i].dim() == 3:
            keep_own(s[:, columns[i]], segment_ids.to(torch.int64).contiguous(), a[i].shape[0])
        bias = biases[i].contiguous() if biases and len(biases[i]) else None
        ys.append(x.new_empty(*x.shape[:-1], len(B)))  # not a view, which autograd would not let be changed in place
        y, gain = ys[-1].view(M, len(B)), None
        if magnitudes:
            norms.append(adapted_norm(weight, A, B, scale, norms_sq[i], isa))
            gain = gain_of(magnitudes[i], norms[-1])
        tail = (s[:, columns[i]], B)
        if gain is not None and on_gpu(x):
            # x W^T + S B^T is what dm needs, for an m of 0 too; "invariant" rounds as one product with a factor does
            sums = x.new_empty(y.shape, dtype=acc if numerics == "invariant" else x.dtype)
            base_product(x2, weight, None, sums, isa, tail, numerics=numerics)
            unbiased.append(sums.to(x.dtype))
            if bias is None:
                torch.mul(sums, gain, out=y)
            elif numerics == "invariant":
                torch.add(sums * gain, bias, out=y)
            else:
                torch.addcmul(bias, sums, gain, out=y)
        elif gain is None or bias is None:
            base_product(x2, weight, bias, y, isa, tail, gain, numerics)
            if magnitudes:
                unbiased.append(x.new_empty(0))
        else:  # dm needs y - bias without the rounding of y, which is coarse where the bias is large
            sums = x.new_empty(y.shape, dtype=acc)
            base_product(x2, weight, None, sums, isa, tail, gain)
            torch.add(sums, bias, out=y)
            unbiased.append(sums.to(x.dtype))
    return [*ys, s, *unbiased, *norms]


def _unflat(grad: torch.Tensor, like: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The gradient (R, C) over the columns of S in the shape and dtype of a, or of b where transposed; a copy."""
    if like.dim() == 3:
        grad = grad.view(like.shape[0], -1, grad.shape[1])[:, : like.shape[2 if transposed else 1]]
    grad = grad.transpose(-1, -2) if transposed else grad
    return grad.to(like.dtype, copy=True, memory_format=torch.contiguous_format)


def _dm(dy, unbiased, magnitude, norm, x, weight, s, b, isa):
    """dm = sum over rows of dy (y - bias) / m, the second factor as x W^T + S B^T over the norm where m is 0."""
    if on_gpu(dy):  # unbiased is x W^T + S B^T there
        return torch.where(norm == 0, 0, column_dot(dy, unbiased, isa) / norm).to(magnitude.dtype)
    dm = torch.where(norm == 0, 0, column_dot(dy, unbiased, isa) / magnitude)
    zero = ((magnitude == 0) & (norm != 0)).nonzero()[:, 0]
    if len(zero):
        u = dy.new_empty(len(dy), len(zero))
        base_product(x, take_rows(weight, zero), None, u, isa, tail=(s, b[zero]))
        dm[zero] = column_dot(dy[:, zero], u, isa) / norm[zero]
    return dm.to(magnitude.dtype)


def _dense_dx(dys, weights, gains, dx=None):
    """dx plus the sum over the linears of g dy W, in the dtype that torch multiplies in (linear.py, `matmul_dtype`)."""
    dtype = matmul_dtype(dys[0])
    for dy, weight, gain in zip(dys, weights, gains, strict=True):
        d = dy.to(dtype) if gain is None else torch.mul(dy, gain, out=dy.new_empty(dy.shape, dtype=dtype))
        if isinstance(weight, NF4Tensor):
            part = matmul_weight(d, weight)
            dx = part if dx is None else dx.add_(part)
        else:
            dx = d @ weight.to(dtype) if dx is None else dx.addmm_(d, weight.to(dtype))
    return dx


def _dx(dys, weights, gains, ds, flat, columns, masks, isa):
    """Sum over the linears of g dy W + D (dS A): on CUDA the small term first, which the dense product adds to."""
    alone = masks if any(m.threshold for m in masks) else masks[:1]
    cuda = on_gpu(ds)
    dx = dys[0].new_empty(len(ds), flat[0][0].shape[1]) if cuda else _dense_dx(dys, weights, gains)
    for i, mask in enumerate(alone):
        p, A = (ds, torch.cat([f[0] for f in flat])) if len(alone) < len(masks) else (ds[:, columns[i]], flat[i][0])
        rank_update(p, A if cuda else A.to(ds.dtype), dx, mask, isa, *([float(i > 0)] if cuda else []))
    return _dense_dx(dys, weights, gains, dx) if cuda else dx.to(dys[0].dtype)


@torch.library.register_kernel("swiftk::lora_linear_bwd", ("cpu", "cuda"))
def _lora_linear_bwd(
    dy, x, weights, absmax, blocksizes, a, b, scales, magnitudes, norms, s, unbiased, thresholds, layers, seed_step,
    token_index, segment_ids, needs_dx, needs_adapters, isa,
):  # fmt: skip
    dtype, acc = dy[0].dtype, acc_dtype(dy[0].dtype)
    seed_step, token_index = dropout_keys(seed_step, token_index)
    dys = [as_matrix(d) for d in dy]
    M, K = len(dys[0]), a[0].shape[-1]
    weights = _weights(weights, absmax, blocksizes, K)
    columns, per_linear = zip(*_groups(a, scales), strict=True)
    flat = [_flat(*abs_, dtype) for abs_ in zip(a, b, per_linear, strict=True)]
    masks = [Mask(t, seed_step, layer, token_index) for t, layer in zip(thresholds, layers, strict=True)]
    gains = [gain_of(m, n) for m, n in zip(magnitudes, norms, strict=True)] or [None] * len(a)
    ds = dys[0].new_empty(M, columns[-1].stop, dtype=dtype if on_gpu(dys[0]) else acc)
    da, db, dm = [], [], []
    for i, ((_, B, scale), mask, gain) in enumerate(zip(flat, masks, gains, strict=True)):
        bt = (B if gain is None else B * gain[:, None]).t().to(dtype).contiguous()  # (R, N)
        base_product(dys[i], bt, None, ds[:, columns[i]], isa, scale=scale * (65536 / (65536 - mask.threshold)))
        if a[i].dim() == 3:
            keep_own(ds[:, columns[i]], segment_ids.to(torch.int64).contiguous(), a[i].shape[0])
        if needs_adapters:
            own, grad = s[:, columns[i]], dys[i].new_empty(bt.shape, dtype=acc)  # S, dB^T
            rank_gram(own if on_gpu(own) else own.to(acc), dys[i], Mask(0, None, 0, None), grad, isa)
            db.append(_unflat(grad if gain is None else grad * gain, b[i], True))
            if gain is not None:
                dm.append(_dm(dys[i], as_matrix(unbiased[i]), magnitudes[i], norms[i], as_matrix(x), weights[i], own, B, isa))
    if needs_adapters:
        x2 = as_matrix(x)
        if any(thresholds):
            for i, mask in enumerate(masks):
                grad = ds.new_empty(columns[i].stop - columns[i].start, K, dtype=acc)
                rank_gram(ds[:, columns[i]], x2, mask, grad, isa)
                da.append(_unflat(grad, a[i], False))
        else:
            grad = ds.new_empty(ds.shape[1], K, dtype=acc)
            rank_gram(ds, x2, Mask(0, None, 0, None), grad, isa)
            da = [_unflat(grad[cols], t, False) for cols, t in zip(columns, a, strict=True)]
    dx = _dx(dys, weights, gains, ds, flat, columns, masks, isa) if needs_dx else dys[0].new_empty(0)
    return [dx, *da, *db, *dm]


@torch.library.register_fake("swiftk::lora_linear_fwd")
def _lora_linear_fwd_fake(
    x, weights, absmax, blocksizes, biases, a, b, scales, magnitudes, norms_sq, thresholds, layers, seed_step, token_index,
    segment_ids, numerics, isa,
):  # fmt: skip
    M, acc = math.prod(x.shape[:-1]), acc_dtype(x.dtype)
    ys = [x.new_empty(*x.shape[:-1], t.shape[-2]) for t in b]
    wide = [on_gpu(x) or (len(biases) > 0 and biases[i].shape[0] > 0) for i in range(len(magnitudes))]
    unbiased = [x.new_empty(M, b[i].shape[-2]) if wide[i] else x.new_empty(0) for i in range(len(magnitudes))]
    norms = [x.new_empty(t.shape, dtype=acc) for t in magnitudes]
    return [*ys, x.new_empty(M, sum(_columns(t) for t in a)), *unbiased, *norms]


@torch.library.register_fake("swiftk::lora_linear_bwd")
def _lora_linear_bwd_fake(
    dy, x, weights, absmax, blocksizes, a, b, scales, magnitudes, norms, s, unbiased, thresholds, layers, seed_step,
    token_index, segment_ids, needs_dx, needs_adapters, isa,
):  # fmt: skip
    dx = dy[0].new_empty(math.prod(dy[0].shape[:-1]), a[0].shape[-1]) if needs_dx else dy[0].new_empty(0)
    return [dx, *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*a, *b, *magnitudes) if needs_adapters)]


# --- autograd ----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    (x, weights, absmax, ctx.blocksizes, biases, a, b, ctx.scales, magnitudes, norms_sq, ctx.thresholds, ctx.layers, seed_step,
     token_index, segment_ids, _, ctx.isa) = inputs  # fmt: skip
    n, dora = len(weights), len(magnitudes)
    ctx.needs_adapters = any(t.requires_grad for t in (*a, *b, *magnitudes))
    ctx.mark_non_differentiable(*output[n:])
    ctx.set_materialize_grads(False)
    # what no gradient needs is not kept; DoRA keeps y itself where there is no bias
    kept = [output[n + 1 + i] if output[n + 1 + i].numel() else output[i] for i in range(dora)] if ctx.needs_adapters else []
    ctx.lengths = len(absmax), len(biases), dora, len(norms_sq), len(kept)
    ctx.save_for_backward(
        x if ctx.needs_adapters else None, output[n] if ctx.needs_adapters else None, seed_step, token_index, segment_ids,
        *weights, *a, *b, *absmax, *magnitudes, *output[len(output) - dora :], *kept,
    )  # fmt: skip


def _backward(ctx, grads):
    x, s, seed_step, token_index, segment_ids, *rest = ctx.saved_tensors
    absmax_n, biases_n, dora, norms_sq_n, kept_n = ctx.lengths
    n, rest = len(ctx.layers), iter(rest)
    weights, a, b, absmax, magnitudes, norms, kept = (
        [next(rest) for _ in range(size)] for size in (n, n, n, absmax_n, dora, dora, kept_n)
    )
    given = next((dy for dy in grads[:n] if dy is not None), None)
    if given is None:
        sizes = (None, n, absmax_n, None, biases_n, n, n, None, dora, norms_sq_n, *[None] * 7)
        return tuple(None if size is None else [None] * size for size in sizes)
    shape = given.shape[:-1]
    dys = [given.new_zeros(*shape, t.shape[-2]) if dy is None else dy for dy, t in zip(grads, b, strict=False)]
    needs_dx, needs_bias, acc = ctx.needs_input_grad[0], ctx.needs_input_grad[4], acc_dtype(dys[0].dtype)
    dx, *rest = torch.ops.swiftk.lora_linear_bwd(
        dys, x, weights, absmax, ctx.blocksizes, a, b, ctx.scales, magnitudes, norms, s, kept, ctx.thresholds, ctx.layers,
        seed_step, token_index, segment_ids, needs_dx, ctx.needs_adapters, ctx.isa,
    )  # fmt: skip
    da, db, dm = (rest[:n], rest[n : 2 * n], rest[2 * n :]) if ctx.needs_adapters else ([None] * n, [None] * n, [None] * dora)
    dbias = [as_matrix(dys[i]).sum(0, dtype=acc).to(dys[i].dtype) if need else None for i, need in enumerate(needs_bias)]
    return (
        dx.view(*shape, a[0].shape[-1]) if needs_dx else None, [None] * n, [None] * absmax_n, None, dbias, da, db, None, dm,
        [None] * norms_sq_n, None, None, None, None, None, None, None,
    )  # fmt: skip


torch.library.register_autograd("swiftk::lora_linear_fwd", _backward, setup_context=_setup_context)
refuse_double_backward("lora_linear", "swiftk::lora_linear_bwd")


# --- public ------------------------------------------------------------------------------------------------------


def scales_of(adapter: Adapter, adapters: int) -> list[float]:
    scale = adapter.scale
    return [float(s) for s in scale] if isinstance(scale, (tuple, list)) else [float(scale)] * adapters


def check_lora(op, x, weight, adapter, bias, dropout, segment_ids) -> None:
    nf4 = isinstance(weight, NF4Tensor)
    check_floating(op, x=x, **({} if nf4 else {"weight": weight}), **({} if bias is None else {"bias": bias}))
    if nf4:
        check_nf4(op, weight, "weight")
        if weight.device != x.device:
            raise ValueError(f"{op}: weight has device {weight.device}, wants {x.device} like x")
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, wants (N, K)")
    if not nf4 and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: weight requires a gradient, but the base is frozen here; call weight.requires_grad_(False), "
            "or train it whole with swiftk.kernels.linear.linear"
        )
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(f"{op}: weight has shape {(N, K)}, x {tuple(x.shape)} needs {(N, x.shape[-1])}")
    if bias is not None:
        check_shape(op, "bias", bias, (N,), f"weight {tuple(weight.shape)}")
    if not isinstance(adapter, Adapter):
        raise ValueError(f"{op}: adapter has type {type(adapter).__name__}, wants an Adapter(a, b, scale)")
    a, b, _, magnitude, norm_sq = adapter
    acc = acc_dtype(x.dtype)
    for name, t in (("a", a), ("b", b), ("magnitude", magnitude)):
        if t is None and name == "magnitude":
            continue
        if not isinstance(t, torch.Tensor) or t.dtype not in (x.dtype, acc) or t.device != x.device:
            have = f"dtype {t.dtype} on {t.device}" if isinstance(t, torch.Tensor) else f"type {type(t).__name__}"
            wants = " or ".join(map(str, dict.fromkeys((x.dtype, acc))))
            raise ValueError(f"{op}: adapter.{name} has {have}, wants a tensor of {wants} on {x.device}")
    if a.dim() not in (2, 3):
        raise ValueError(f"{op}: adapter.a has shape {tuple(a.shape)}, wants (r, K) or (adapters, r, K)")
    check_shape(op, "adapter.a", a, (*a.shape[:-1], K), f"weight {tuple(weight.shape)}")
    check_shape(op, "adapter.b", b, (*a.shape[:-2], N, a.shape[-2]), f"adapter.a {tuple(a.shape)}")
    adapters = 1 if a.dim() == 2 else a.shape[0]
    if (given := len(scales_of(adapter, adapters))) != adapters:
        raise ValueError(f"{op}: adapter.scale has {given} entries, wants {adapters} like adapter.a")
    if (segment_ids is None) != (a.dim() == 2):
        want = "(adapters, r, K) with segment_ids" if a.dim() == 2 else "segment_ids (T,), the adapter of each row"
        raise ValueError(f"{op}: adapter.a has shape {tuple(a.shape)}, wants {want}")
    if segment_ids is not None:
        check_tensor(op, "segment_ids", segment_ids)
        if segment_ids.dtype not in (torch.int32, torch.int64) or segment_ids.device != x.device:
            have = f"dtype {segment_ids.dtype} on {segment_ids.device}"
            raise ValueError(f"{op}: segment_ids has {have}, wants torch.int32 or torch.int64 on {x.device}")
        check_shape(op, "segment_ids", segment_ids, (math.prod(x.shape[:-1]),), f"x {tuple(x.shape)}")
    if magnitude is not None:
        if a.dim() == 3:
            raise ValueError(f"{op}: adapter.magnitude with several adapters is not supported; call once per adapter")
        check_shape(op, "adapter.magnitude", magnitude, (N,), f"weight {tuple(weight.shape)}")
        if norm_sq is None or norm_sq.dtype != acc or norm_sq.device != x.device:
            have = "None" if norm_sq is None else f"dtype {norm_sq.dtype} on {norm_sq.device}"
            call = "row_norm_sq(weight, torch.float64)" if nf4 and acc == torch.float64 else "row_norm_sq(weight)"
            raise ValueError(f"{op}: adapter.weight_norm_sq has {have}, wants {acc} on {x.device}: {call}, once per base")
        check_shape(op, "adapter.weight_norm_sq", norm_sq, (N,), f"weight {tuple(weight.shape)}")
    if dropout is not None:
        check_dropout(op, dropout, x)


def _apply(op, x, weights, adapters, biases, dropouts, segment_ids, numerics, isa) -> list[torch.Tensor]:
    if not isinstance(x, torch.Tensor) or x.dim() == 0:
        raise ValueError(f"{op}: x has {tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__}, wants (..., K)")
    for args in zip(weights, adapters, biases, dropouts, strict=True):
        check_lora(op, x, *args, segment_ids)
    check_numerics(op, numerics)
    check_isa(op, isa)
    drawn = [d for d in dropouts if d is not None]
    if any(d.seed_step is not drawn[0].seed_step or d.token_index is not drawn[0].token_index for d in drawn):
        raise ValueError(f"{op}: dropouts of one group have several seed_step or token_index, wants the same tensors")
    dora = [a.magnitude for a in adapters if a.magnitude is not None]
    norms = [a.weight_norm_sq for a in adapters if a.magnitude is not None and a.weight_norm_sq is not None]
    if len(dora) not in (0, len(adapters)):
        raise ValueError(f"{op}: {len(dora)} of {len(adapters)} adapters have a magnitude, wants all or none")
    given = [x.new_empty(0) if t is None else t for t in biases] if any(t is not None for t in biases) else []
    scales = [s for t in adapters for s in scales_of(t, 1 if t.a.dim() == 2 else t.a.shape[0])]
    bases = [plain_absmax(w) if isinstance(w, NF4Tensor) else w for w in weights]
    packed = [isinstance(w, NF4Tensor) for w in bases]
    absmax = [w.absmax if nf4 else x.new_empty(0) for w, nf4 in zip(bases, packed, strict=True)] if any(packed) else []
    return torch.ops.swiftk.lora_linear_fwd(
        x, [w.codes if nf4 else w for w, nf4 in zip(bases, packed, strict=True)], absmax,
        [w.blocksize if nf4 else 0 for w, nf4 in zip(bases, packed, strict=True)], given,
        [t.a for t in adapters], [t.b for t in adapters], scales, dora, norms,
        [0 if d is None else d.threshold for d in dropouts], [0 if d is None else d.layer for d in dropouts],
        drawn[0].seed_step if drawn else None, drawn[0].token_index if drawn else None, segment_ids,
        numerics, isa,
    )  # fmt: skip


def lora_linear(
    x: torch.Tensor, weight: torch.Tensor | NF4Tensor, adapter: Adapter, bias: torch.Tensor | None = None, *,
    dropout: Dropout | None = None, segment_ids: torch.Tensor | None = None, numerics: str = "auto", isa: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """y = g (x W^T + s drop(x) A^T B^T) + bias, differentiable in x, a, b, magnitude and bias; a row depends on itself alone
    (on CUDA with numerics="invariant").

    Args:
        x: (..., K), bf16, fp32 or fp64, any strides; zero rows are allowed.
        weight: (N, K), dtype and device of x, or an NF4Tensor (its values are bf16 whatever the dtype of x); frozen.
        adapter: a, b, scale; for DoRA also magnitude and weight_norm_sq.
        bias: (N,), dtype and device of x, or None.
        dropout: of A's input in training; None in evaluation.
        segment_ids: int32 or int64 (T,), with a stack of adapters: the adapter of each row of x, -1 for none.
        numerics: of the forward on CUDA, see `linear`.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable".
    Returns: (..., N) in x's dtype, contiguous; accumulated in fp32 (fp64 for fp64), rounded once. Gradients of a, b and
        magnitude come in their own dtype.
    Raises: ValueError for a wrong shape, dtype, device, range, numerics or isa, and for a weight that requires a gradient;
        NotImplementedError for the gradient of the gradient; on CUDA ImportError where Triton, or for an NF4 weight swiftk's
        GPU build, is needed and missing.
    """
    return _apply("lora_linear", x, [weight], [adapter], [bias], [dropout], segment_ids, numerics, isa)[0]


def lora_linear_group(
    x: torch.Tensor, weights: Sequence[torch.Tensor | NF4Tensor], adapters: Sequence[Adapter],
    biases: Sequence[torch.Tensor | None] | None = None, *, dropouts: Sequence[Dropout | None] | None = None,
    segment_ids: torch.Tensor | None = None, numerics: str = "auto", isa: str = "auto",
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """lora_linear of several weights on one x (q, k, v; gate, up): equal results; dx is one sum.

    x is read once for all A, and once more in the backward; with dropout each linear draws its own mask.

    Args: as of lora_linear, one weight, adapter, bias (or None) and dropout (or None) per linear; biases and dropouts may be
        left out. Dropouts share the tensors seed_step and token_index; all adapters have a magnitude or none.
    Returns: one (..., N_i) per weight.
    Raises: as lora_linear; ValueError where the lengths differ.
    """
    biases, dropouts = biases or [None] * len(weights), dropouts or [None] * len(weights)
    sizes = {"weights": len(weights), "adapters": len(adapters), "biases": len(biases), "dropouts": len(dropouts)}
    if len(set(sizes.values())) > 1 or not weights:
        raise ValueError(f"lora_linear_group: has {sizes}, wants equal lengths of at least 1")
    ys = _apply("lora_linear_group", x, weights, adapters, biases, dropouts, segment_ids, numerics, isa)
    return tuple(ys[: len(weights)])
