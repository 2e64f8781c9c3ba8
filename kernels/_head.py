"""The head of the vocabulary as the losses see it: a plain or NF4 weight, adapted by LoRA or DoRA or not.

    z = g (x W^T + S B^T),  S = round(s' (D x) A^T):  the sums of kernels/lora_linear.py bit for bit, in the accumulate dtype
    with dz' = g dz:  dx = dz' W (and through S),  dS = dz' B,  dB = dz'^T S,  dg_v = sum_t dz_tv (x W^T + S B^T)_tv

S and DoRA's g = m / ||W + s B A|| are formed before the pass over the vocabulary and are arguments of it: the passes know
neither dropout nor norms, autograd brings dS to A and x and dg to m, and a shard takes its rows of W, B, m and ||W||^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from swiftk.kernels._checks import check_floating, refuse_double_backward
from swiftk.kernels._low_rank import Mask, adapted_norm, base_product, low_rank, mask_blocks, rank_gram, rank_update
from swiftk.kernels._native import acc_dtype
from swiftk.kernels._triton import debug, on_gpu
from swiftk.kernels.dropout import Dropout, dropout_keys
from swiftk.kernels.linear import vendor_mm, with_rows
from swiftk.kernels.lora_linear import Adapter, check_lora, scales_of
from swiftk.kernels.nf4 import NF4Tensor, check_nf4, nf4_dequantize_out, plain_absmax, take_rows

STEP = 2048  # columns per step of the running log-sum-exp, kStep in csrc/cpu/vocab_stats.inc
BUFFER_BYTES = 32 << 20  # of logits: 4096 rows x one step in fp32; of a converted weight too
# On CUDA 4096 x 16384: dX is read and written once per so many columns, 27 us beside two GEMMs of 800 us at H 4096 (arithmetic,
# 4.8 TB/s and 700 TFLOP/s).
CUDA_BUFFER_BYTES = 256 << 20


def buffer_bytes(t: torch.Tensor) -> int:
    return CUDA_BUFFER_BYTES if on_gpu(t) else BUFFER_BYTES


def ranges(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out += a b; on the CPU a bf16 product is rounded once and added in out's dtype."""
    if on_gpu(a):
        vendor_mm(a, b, out, 1.0)
    elif out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out.add_(torch.mm(a, b))


class KeptRows:
    """The rows whose label is not ignored: `take` gathers them, `put` spreads a result over all T rows, 0 elsewhere.

    On CUDA, where their number cannot be known without waiting, `take` puts zeros in the place of the others: their logits
    are 0 and so is each gradient by them, whatever hidden holds there.
    """

    def __init__(self, op: str, labels: torch.Tensor, ignore_index: int, vocab_size: int | None) -> None:
        """vocab_size None: the labels are checked elsewhere."""
        keep = labels != ignore_index
        bad = keep & ((labels < 0) | (labels >= vocab_size)) if vocab_size is not None else None
        self.rows, self.index, self.keep, self.bad = len(labels), None, None, None
        if on_gpu(labels):
            self.keep, self.bad = keep, bad
            if bad is not None and debug():  # here, since a kernel sees a shard or a buffer of the vocabulary, never its size
                torch._assert_async(~bad.any(), f"{op}: labels has an id outside of the vocabulary, whose size is {vocab_size}")
            return
        if bad is not None and bad.any():
            at = int(bad.nonzero()[0])
            raise ValueError(
                f"{op}: labels has id {int(labels[at])} at position {at}, wants 0 <= id < V = {vocab_size}, or ignore_index "
                f"{ignore_index}; is the tokenizer the model's own?"
            )
        self.index = None if keep.all() else keep.nonzero()[:, 0]

    def _zeroed(self, t: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return torch.where(keep.view(-1, *[1] * (t.dim() - 1)), t, 0)

    def take(self, t: torch.Tensor) -> torch.Tensor:
        if self.keep is not None:
            return self._zeroed(t, self.keep).contiguous()
        return t.contiguous() if self.index is None else t.index_select(0, self.index)

    def put(self, t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        if t is None:
            return like.new_empty(0)
        if self.keep is not None:
            return self._zeroed(t, self.keep)
        return t if self.index is None else t.new_zeros(self.rows, *t.shape[1:]).index_copy_(0, self.index, t)

    def poisoned(self, t: torch.Tensor) -> torch.Tensor:
        """NaN where a label is outside the vocabulary, which on CUDA is no error."""
        return t if self.bad is None else t.masked_fill(self.bad, torch.nan)


class HeadArgs(NamedTuple):
    """A head as the operators take it; the last three only where it is adapted, gain only for DoRA."""

    weight: torch.Tensor  # (V, H), or codes
    absmax: torch.Tensor | None
    blocksize: int  # 0: a plain weight
    s: torch.Tensor | None  # (T, r) in the accumulate dtype, its values those of hidden's dtype
    b: torch.Tensor | None  # (V, r), hidden's dtype or the accumulate dtype
    gain: torch.Tensor | None  # (V,) in the accumulate dtype


HEAD_SCHEMA = "Tensor? absmax, int blocksize, Tensor? s, Tensor? b, Tensor? gain"  # beside weight


class Head(NamedTuple):
    """A head and the rows of S that belong to the rows at hand."""

    weight: torch.Tensor | NF4Tensor
    tail: tuple[torch.Tensor, torch.Tensor] | None  # S (T, r), B (V, r), both in hidden's dtype
    gain: torch.Tensor | None

    @staticmethod
    def of(args: HeadArgs, x: torch.Tensor, kept: KeptRows) -> Head:
        weight, absmax, blocksize, s, b, gain = args
        if absmax is None:
            base: torch.Tensor | NF4Tensor = weight.contiguous()
        else:
            base = NF4Tensor(with_rows(weight), with_rows(absmax), x.shape[1], blocksize)
        tail = None if s is None or b is None else (kept.take(s).to(x.dtype), b.to(x.dtype).contiguous())
        return Head(base, tail, None if gain is None else gain.contiguous())

    @property
    def codes(self) -> torch.Tensor:
        return self.weight.codes if isinstance(self.weight, NF4Tensor) else self.weight

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def logits(self, x, r: slice, c: slice, out, isa, sums=None, numerics="auto") -> None:
        """Writes z of rows r and columns c, and z before DoRA's factor into sums where it is given."""
        tail = None if self.tail is None else (self.tail[0][r], self.tail[1][c])
        gain = None if self.gain is None else self.gain[c]
        if sums is None or gain is None:
            base_product(x[r], take_rows(self.weight, c), None, out, isa, tail, gain, numerics)
        else:  # a factor of its own rounds as the product's epilogue does
            self.sums(x, r, c, sums, isa)
            torch.mul(sums, gain, out=out)

    def sums(self, x, r: slice, c: slice, out, isa) -> None:
        tail = None if self.tail is None else (self.tail[0][r], self.tail[1][c])
        base_product(x[r], take_rows(self.weight, c), None, out, isa, tail)

    def rows(self, c: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows c of W in dtype."""
        w = take_rows(self.weight, c)
        if isinstance(w, NF4Tensor):
            out = w.absmax.new_empty(w.shape, dtype=torch.bfloat16)
            nf4_dequantize_out(w, out)
            return out.to(dtype)
        return w.to(dtype)

    def row_sum(self, dtype: torch.dtype) -> torch.Tensor:
        """The sum of all rows of W."""
        if not isinstance(self.weight, NF4Tensor):
            return self.weight.sum(0, dtype=dtype)
        total = self.weight.absmax.new_zeros(self.weight.in_features, dtype=dtype)
        for c in ranges(self.vocab, STEP):
            total += self.rows(c, dtype).sum(0)
        return total

    def converted_columns(self, width: int, dtype: torch.dtype) -> int:
        """width, or as many columns as buffer_bytes of W hold where `rows` makes a copy of W in dtype."""
        if isinstance(self.weight, NF4Tensor) or self.weight.dtype != dtype:
            return min(width, STEP * max(1, buffer_bytes(self.codes) // (STEP * max(1, self.weight.shape[1]) * dtype.itemsize)))
        return width


class AdapterGrad(NamedTuple):
    """Sums of what the gradient by the logits gives to S, B and DoRA's factor, in the accumulate dtype, where asked for."""

    ds: torch.Tensor | None
    db: torch.Tensor | None
    dgain: torch.Tensor | None

    @staticmethod
    def start(head: Head, needs: list[bool], acc: torch.dtype) -> AdapterGrad:
        """needs: of S, B, gain."""
        s, b = head.tail or (None, None)
        parts = (None if t is None or not need else t.new_zeros(t.shape, dtype=acc)
                 for t, need in zip((s, b, head.gain), needs, strict=True))  # fmt: skip
        return AdapterGrad(*parts)

    def add(self, head: Head, r: slice, c: slice, g: torch.Tensor, sums: torch.Tensor | None) -> None:
        """g: the gradient by z of rows r and columns c; becomes that by z before DoRA's factor. sums is overwritten."""
        if self.dgain is not None and sums is not None:
            self.dgain[c] += sums.mul_(g).sum(0)
        if head.gain is not None:
            g.mul_(head.gain[c])
        if self.ds is not None and head.tail is not None:
            add_product(self.ds[r], g, head.tail[1][c].to(g.dtype))
        if self.db is not None and head.tail is not None:
            add_product(self.db[c], g.t(), head.tail[0][r].to(g.dtype))


def head_grads(kept: KeptRows, hidden, args: HeadArgs, dx, dw, grad: AdapterGrad) -> tuple[torch.Tensor, ...]:
    """The results of an operator: dx, ds, dgain as given, dw, db in the dtypes of weight, b; empty where not asked for."""
    weight = args.weight
    db = None if grad.db is None or args.b is None else grad.db.to(args.b.dtype)
    rest = (weight.new_empty(0) if dw is None else dw, kept.put(grad.ds, hidden))
    return kept.put(dx, hidden), *rest, *(hidden.new_empty(0) if t is None else t for t in (db, grad.dgain))


def grads_fake(hidden, args: HeadArgs, needs: list[bool]) -> tuple[torch.Tensor, ...]:
    inputs = (hidden, args.weight, args.s, args.b, args.gain)
    empty = (hidden, args.weight, hidden, hidden, hidden)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need and t is not None else e.new_empty(0)
        for t, e, need in zip(inputs, empty, needs, strict=True)
    )


# --- S, the low-rank product below the head ------------------------------------------------------------------------

_LOW_RANK = (
    "Tensor hidden, Tensor a, Tensor labels, int ignore_index, float scale, int threshold, SymInt layer, Tensor? seed_step, "
    "Tensor? token_index, str numerics, str isa"
)
torch.library.define("swiftk::head_low_rank_fwd", f"({_LOW_RANK}) -> Tensor")
torch.library.define("swiftk::head_low_rank_bwd", f"(Tensor ds, {_LOW_RANK}, bool need_dx, bool need_da) -> (Tensor, Tensor)")
torch.library.define(
    "swiftk::head_norm", "(Tensor weight, Tensor? absmax, int blocksize, Tensor a, Tensor b, float scale, Tensor norm_sq, "
    "ScalarType dtype, str isa) -> Tensor",
)  # fmt: skip


def _factor(a: torch.Tensor, scale: float, threshold: int, acc: torch.dtype) -> torch.Tensor:
    return a.new_full((len(a),), scale, dtype=acc) * (65536 / (65536 - threshold))  # dropout's 1 / (1 - p) is folded into s


@torch.library.register_kernel("swiftk::head_low_rank_fwd", ("cpu", "cuda"))
def _head_low_rank_fwd(hidden, a, labels, ignore_index, scale, threshold, layer, seed_step, token_index, numerics, isa):
    kept, acc = KeptRows("", labels, ignore_index, None), acc_dtype(hidden.dtype)
    x, a, factor = kept.take(hidden), a.to(hidden.dtype).contiguous(), _factor(a, scale, threshold, acc)
    s = x.new_empty(len(x), len(a))
    seed_step, tokens = dropout_keys(seed_step, None if token_index is None else kept.take(token_index))
    mask = Mask(threshold, seed_step, layer, tokens)
    for m in mask_blocks(x) if threshold else (slice(0, len(x)),):
        low_rank(x[m], a, factor, mask.rows(m), s[m], isa, numerics)
    return kept.put(s.to(acc), hidden)


@torch.library.register_kernel("swiftk::head_low_rank_bwd", ("cpu", "cuda"))
def _head_low_rank_bwd(
    ds, hidden, a, labels, ignore_index, scale, threshold, layer, seed_step, token_index, numerics, isa, need_dx, need_da
):  # fmt: skip
    kept, acc = KeptRows("", labels, ignore_index, None), acc_dtype(hidden.dtype)
    x, ds = kept.take(hidden), kept.take(ds) * _factor(a, scale, threshold, acc)
    seed_step, tokens = dropout_keys(seed_step, None if token_index is None else kept.take(token_index))
    mask = Mask(threshold, seed_step, layer, tokens)
    dx, da = None, a.new_empty(0)
    if need_da:
        grad = ds.new_zeros(a.shape)
        rank_gram(ds, x, mask, grad, isa)
        da = grad.to(a.dtype)
    if need_dx:
        dx = ds.new_zeros(x.shape)
        rank_update(ds, a.to(x.dtype).to(acc).contiguous(), dx, mask, isa)
        dx = dx.to(x.dtype)
    return kept.put(dx, hidden), da


@torch.library.register_kernel("swiftk::head_norm", ("cpu", "cuda"))
def _head_norm(weight, absmax, blocksize, a, b, scale, norm_sq, dtype, isa):
    base = with_rows(weight) if absmax is None else NF4Tensor(with_rows(weight), with_rows(absmax), a.shape[1], blocksize)
    a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    return adapted_norm(base, a, b, a.new_full((len(a),), scale, dtype=acc_dtype(dtype)), norm_sq, isa)


@torch.library.register_fake("swiftk::head_low_rank_fwd")
def _head_low_rank_fwd_fake(hidden, a, labels, ignore_index, scale, threshold, layer, seed_step, token_index, numerics, isa):
    return hidden.new_empty(hidden.shape[0], a.shape[0], dtype=acc_dtype(hidden.dtype))


@torch.library.register_fake("swiftk::head_low_rank_bwd")
def _head_low_rank_bwd_fake(
    ds, hidden, a, labels, ignore_index, scale, threshold, layer, seed_step, token_index, numerics, isa, need_dx, need_da
):  # fmt: skip
    return hidden.new_empty(hidden.shape if need_dx else 0), a.new_empty(a.shape if need_da else 0)


@torch.library.register_fake("swiftk::head_norm")
def _head_norm_fake(weight, absmax, blocksize, a, b, scale, norm_sq, dtype, isa):
    return torch.empty_like(norm_sq)


def _low_rank_setup_context(ctx, inputs, output):
    hidden, a, labels, ctx.ignore_index, ctx.scale, ctx.threshold, ctx.layer, seed_step, token_index, _, ctx.isa = inputs
    ctx.save_for_backward(hidden, a, labels, seed_step, token_index)


def _low_rank_backward(ctx, ds):
    # dx = D (s' dS A),  dA = (s' dS)^T (D x)
    hidden, a, labels, seed_step, token_index = ctx.saved_tensors
    need_dx, need_da = ctx.needs_input_grad[:2]
    dx, da = torch.ops.swiftk.head_low_rank_bwd(
        ds, hidden, a, labels, ctx.ignore_index, ctx.scale, ctx.threshold, ctx.layer, seed_step, token_index, "auto",
        ctx.isa, need_dx, need_da,
    )  # fmt: skip
    return dx if need_dx else None, da if need_da else None, *[None] * 9


torch.library.register_autograd("swiftk::head_low_rank_fwd", _low_rank_backward, setup_context=_low_rank_setup_context)
refuse_double_backward("linear_cross_entropy", "swiftk::head_low_rank_bwd")


# --- for the public functions --------------------------------------------------------------------------------------


def check_weight(op: str, hidden: torch.Tensor, weight: torch.Tensor | NF4Tensor) -> None:
    if not isinstance(weight, NF4Tensor):
        check_floating(op, hidden=hidden, weight=weight)
        return
    check_floating(op, hidden=hidden)
    check_nf4(op, weight, "weight")
    if weight.device != hidden.device:
        raise ValueError(f"{op}: weight has device {weight.device}, wants {hidden.device} like hidden")


def head_args(
    op: str, hidden: torch.Tensor, weight: torch.Tensor | NF4Tensor, labels: torch.Tensor, ignore_index: int,
    adapter: Adapter | None, dropout: Dropout | None, numerics: str, isa: str,
) -> HeadArgs:  # fmt: skip
    """The head as the operators take it, S and DoRA's factor formed; differentiable. After check_weight."""
    base, absmax, blocksize = weight, None, 0
    if isinstance(weight, NF4Tensor):
        w = plain_absmax(weight)
        base, absmax, blocksize = w.codes, w.absmax, w.blocksize
    assert isinstance(base, torch.Tensor)
    if adapter is None:
        if dropout is not None:
            raise ValueError(f"{op}: dropout has a value without adapter, wants None; it drops the input of the adapter")
        return HeadArgs(base, absmax, blocksize, None, None, None)
    if adapter.a.dim() != 2:
        raise ValueError(f"{op}: adapter.a has shape {tuple(adapter.a.shape)}, wants (r, H): one adapter of the head")
    check_lora(op, hidden, weight, adapter, None, dropout, None)
    (scale,) = scales_of(adapter, 1)
    drop = (0, 0, None, None) if dropout is None else (dropout.threshold, dropout.layer, dropout.seed_step, dropout.token_index)
    s = torch.ops.swiftk.head_low_rank_fwd(hidden, adapter.a, labels, ignore_index, scale, *drop, numerics, isa)
    gain = None
    if adapter.magnitude is not None:
        norm = torch.ops.swiftk.head_norm(
            base, absmax, blocksize, adapter.a.detach(), adapter.b.detach(), scale, adapter.weight_norm_sq, hidden.dtype, isa
        )
        # a zero row of W + s B A gives 0 and dm = 0; over infinity, since where() would let 0 / 0 into dm
        gain = adapter.magnitude.to(norm.dtype) / norm.where(norm != 0, torch.inf)
    return HeadArgs(base, absmax, blocksize, s, adapter.b, gain)
