"""Statistics per token of the logits of a linear head, without the T x V logits: what losses are made of.

    z = x W^T,  s = c tanh(z / c) with softcap c (s = z without),  lse = log sum_v exp s_v,  p_v = exp(s_v - lse)
    label_logit = s_label,  logprob = s_label - lse,  logit_sum = sum_v s_v,  entropy = -sum_v p_v log p_v,  max_logit, argmax
    g_v = [p_v (dlse - dentropy (log p_v + entropy)) + dsum + dlabel 1(v = label)] (1 - (s_v / c)^2);  dX = g W,  dW = g^T X
    (dlogprob is part of dlabel and of -dlse)

Sources: softcap, Gemma 2 (2024); the running log-sum-exp, Milakov & Gimelshein 2018, "Online normalizer calculation for
softmax". The logits are fp32 (fp64 for fp64), also for bf16 inputs, and come from the row-invariant product of
swiftk.kernels.linear; the log-sum-exp walks the vocabulary in fixed steps: what a row gives depends on that row and W
alone (on CUDA with numerics="invariant"). The backward forms the logits again; beyond hidden and weight only (T,) vectors
are saved.
Forward: one product, W read once per 4096 rows, 32 MiB of logits at a time (CUDA: 256); backward: two products, three with dW.
Rows whose label is ignore_index are never multiplied; on CUDA, where nobody may ask how many there are, they are multiplied
as zeros. A head that does not require a gradient costs no dW.
The head may be NF4 (frozen; a slice at a time is dequantised for dX) and adapted by LoRA or DoRA: swiftk.kernels._head.
On CUDA a label outside the vocabulary is no error but a NaN loss: finding it would wait for the device (TRITON_DEBUG=1: an
assertion on the device).
Not supported: a bias of the head, several adapters of the head, infinite logits (they give NaN).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from swiftk.kernels._checks import check_dtype, check_isa, check_shape, refuse_double_backward
from swiftk.kernels._head import (
    HEAD_SCHEMA,
    STEP,
    AdapterGrad,
    Head,
    HeadArgs,
    KeptRows,
    add_product,
    buffer_bytes,
    check_weight,
    grads_fake,
    head_args,
    head_grads,
    ranges,
)
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import on_gpu
from swiftk.kernels._vocab_stats_triton import grad_triton, stats_triton
from swiftk.kernels.dropout import Dropout
from swiftk.kernels.linear import check_numerics
from swiftk.kernels.lora_linear import Adapter, lora_linear_ref
from swiftk.kernels.nf4 import NF4Tensor, nf4_dequantize_ref

BLOCK_ROWS = 4096  # rows that share one reading of W


class VocabStats(NamedTuple):
    """What one shard of the vocabulary says about each token: (T,), fp32 (fp64 for fp64), 0 where ignored.

    All but the last two are differentiable. `merge_vocab_stats` says how shards add up.
    """

    lse: torch.Tensor  # over the shard's vocabulary
    label_logit: torch.Tensor  # 0 where the label belongs to another shard
    logprob: torch.Tensor  # label_logit - lse, formed without its cancellation; 0 where the label belongs to another shard
    logit_sum: torch.Tensor | None  # where asked for
    entropy: torch.Tensor | None  # of the shard's own softmax, nats, where asked for
    max_logit: torch.Tensor
    argmax: torch.Tensor  # int64, an id of the whole vocabulary, the lowest of equal ones


# --- reference ---------------------------------------------------------------------------------------------------


def logits_ref(
    hidden: torch.Tensor, weight: torch.Tensor | NF4Tensor, softcap: float = 0.0, *, adapter: Adapter | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:  # fmt: skip
    """s (T, V), in at least fp32."""
    acc = acc_dtype(hidden.dtype)
    w = (nf4_dequantize_ref(weight) if isinstance(weight, NF4Tensor) else weight).to(acc)
    if adapter is None:
        z = torch.nn.functional.linear(hidden.to(acc), w)
    else:
        z = lora_linear_ref(hidden.to(acc), w, adapter, dropout=dropout)
    return softcap * torch.tanh(z / softcap) if softcap else z


def vocab_stats_ref(
    hidden: torch.Tensor, weight: torch.Tensor | NF4Tensor, labels: torch.Tensor, *, adapter: Adapter | None = None,
    dropout: Dropout | None = None, vocab_start: int = 0, ignore_index: int = -100, softcap: float = 0.0,
) -> VocabStats:  # fmt: skip
    """The formulas on the whole logits, everything included."""
    s = logits_ref(hidden, weight, softcap, adapter=adapter, dropout=dropout)
    keep, at = labels != ignore_index, labels - vocab_start
    here = keep & (at >= 0) & (at < weight.shape[0])
    label_logit = s.gather(-1, at.where(here, 0)[:, None])[:, 0].where(here, 0)
    log_p = torch.log_softmax(s, -1)
    top, argmax = s.max(-1)
    lse, total, entropy = torch.logsumexp(s, -1), s.sum(-1), -(log_p.exp() * log_p).sum(-1)
    lse, total, entropy, top, argmax = (t.where(keep, 0) for t in (lse, total, entropy, top, argmax + vocab_start))
    logprob = log_p.gather(-1, at.where(here, 0)[:, None])[:, 0].where(here, 0)
    return VocabStats(lse, label_logit, logprob, total, entropy, top, argmax)


# --- launchers ---------------------------------------------------------------------------------------------------
# On x (T, H) and labels (T,) without ignored rows; the head's columns are the ids first_id, first_id + 1, ...


class RunningStats(NamedTuple):
    """The statistics of the columns seen so far, see csrc/cpu/vocab_stats.inc."""

    m: torch.Tensor
    l: torch.Tensor
    e: torch.Tensor | None
    total: torch.Tensor | None
    label: torch.Tensor
    argmax: torch.Tensor

    @staticmethod
    def start(x: torch.Tensor, entropy: bool, total: bool) -> RunningStats:
        rows, acc = len(x), acc_dtype(x.dtype)

        def zeros() -> torch.Tensor:
            return x.new_zeros(rows, dtype=acc)

        m = x.new_full((rows,), -torch.inf, dtype=acc)
        argmax = x.new_zeros(rows, dtype=torch.int64)
        return RunningStats(m, zeros(), zeros() if entropy else None, zeros() if total else None, zeros(), argmax)

    def rows(self, r: slice) -> RunningStats:
        return RunningStats._make(None if t is None else t[r] for t in self)

    def finish(self, labels: torch.Tensor, first_id: int, vocab: int) -> Finished:
        if on_gpu(labels):
            log_l, at = self.l.log(), labels - first_id
            logprob = (self.label - self.m - log_l).where((at >= 0) & (at < vocab), 0)
            entropy = None if self.e is None else log_l - self.e / self.l
            return Finished(log_l, self.m + log_l, logprob, entropy)
        entropy = None if self.e is None else torch.empty_like(self.m)
        done = Finished(torch.empty_like(self.m), torch.empty_like(self.m), torch.empty_like(self.m), entropy)
        native().vocab_finish(
            DTYPE_CODES[self.m.dtype], *map(address, self), address(labels), first_id, vocab, *map(address, done), len(labels)
        )
        return done


class Finished(NamedTuple):
    log_l: torch.Tensor  # lse - max_logit
    lse: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor | None


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def even_blocks(total: int, size: int) -> Iterator[slice]:
    """As few ranges as `size` allows, of about equal length."""
    return ranges(total, max(1, -(-total // max(1, -(-total // size)))))


def buffer_columns(x: torch.Tensor, rows: int, vocab: int) -> int:
    """Columns of logits of `rows` rows of x that fit the buffer, a multiple of STEP."""
    return min(vocab, STEP * max(1, buffer_bytes(x) // (STEP * max(1, rows) * acc_dtype(x.dtype).itemsize)))


def product_dtype(x: torch.Tensor, isa: str) -> torch.dtype:
    """What the products of the backward multiply in. bf16 only where the CPU does so natively: without AVX-512 BF16 torch's
    bf16 product ran at 18 GFLOP/s, its fp32 product at 132 (2 cores of a Zen 3), so there a block of W at a time is converted.
    """
    if x.dtype != torch.bfloat16 or on_gpu(x):
        return x.dtype
    return torch.bfloat16 if (native().best_isa() if isa == "auto" else isa) == "avx512" else torch.float32


def update_stats(logits, labels, first_id, softcap, running: RunningStats, isa, exp=None) -> None:
    """Merges the logits (rows, cols) of the ids from first_id on; with softcap the CPU replaces them by s. exp, on CUDA: the
    (g, out) of vocab_stats_exp in csrc/cpu/vocab_stats.inc."""
    if on_gpu(logits):
        stats_triton(logits, labels, first_id, softcap, running, exp)
        return
    native().vocab_stats(
        DTYPE_CODES[logits.dtype], address(logits), logits.stride(0), address(labels), *logits.shape, first_id, softcap,
        *map(address, running), threads(), isa,
    )  # fmt: skip


def _stats(x, head: Head, labels, first_id, softcap, entropy, total, numerics, isa) -> RunningStats:
    rows, vocab = len(x), head.vocab
    running = RunningStats.start(x, entropy, total)
    for r in even_blocks(rows, BLOCK_ROWS):
        height = r.stop - r.start
        width = buffer_columns(x, height, vocab)
        buffer = x.new_empty(height * width, dtype=acc_dtype(x.dtype))
        for c in ranges(vocab, width):
            logits = buffer[: height * (c.stop - c.start)].view(height, -1)
            head.logits(x, r, c, logits, isa, numerics=numerics)
            update_stats(logits, labels[r], first_id + c.start, softcap, running.rows(r), isa)
    return running


class StatsGrad(NamedTuple):
    """The gradient of the loss by each statistic of a token, (T,); the last two may be missing."""

    dlse: torch.Tensor
    dlabel: torch.Tensor
    dsum: torch.Tensor | None
    dentropy: torch.Tensor | None

    def rows(self, r: slice) -> StatsGrad:
        return StatsGrad._make(None if t is None else t[r] for t in self)


def logits_grad(logits, labels, first_id, softcap, capped, m, log_l, entropy, d: StatsGrad, dtype, isa) -> torch.Tensor:
    """The gradient by the logits, in their place where dtype is theirs. capped: update_stats has seen them."""
    g = logits if dtype == logits.dtype else logits.new_empty(logits.shape, dtype=dtype)
    if on_gpu(logits):
        grad_triton(logits, labels, first_id, softcap, m, log_l, entropy, d, g)
        return g
    native().vocab_grad(
        DTYPE_CODES[logits.dtype], DTYPE_CODES[dtype], address(logits), logits.stride(0), address(labels), *logits.shape,
        first_id, softcap, capped, *map(address, (m, log_l, entropy, *d, g)), g.stride(0), threads(), isa,
    )  # fmt: skip
    return g


def _recomputed(x, head: Head, labels, first_id, softcap, m, log_l, entropy, d, needs, isa):
    """(dx, dw, grad of the adapter) from the saved statistics; the vocabulary outside, the rows inside."""
    (rows, hidden), vocab = x.shape, head.vocab
    acc, product = acc_dtype(x.dtype), product_dtype(x, isa)
    need_dx, need_dw, *needs_adapter = needs
    dx = x.new_zeros(rows, hidden, dtype=acc) if need_dx else None
    dw = torch.empty_like(head.weight) if need_dw and isinstance(head.weight, torch.Tensor) else None
    grad = AdapterGrad.start(head, needs_adapter, acc)
    height = max((r.stop - r.start for r in even_blocks(rows, BLOCK_ROWS)), default=0)
    width = head.converted_columns(buffer_columns(x, height, vocab), product)
    buffer = x.new_empty(height * width, dtype=acc)
    spare = None if grad.dgain is None else torch.empty_like(buffer)
    xp = x.to(product) if need_dw else x
    for c in ranges(vocab, width):
        columns = c.stop - c.start
        w = head.rows(c, product) if need_dx else None
        dwc = x.new_zeros(columns, hidden, dtype=acc) if need_dw else None
        for r in even_blocks(rows, BLOCK_ROWS):
            logits, sums = (None if t is None else t[: (r.stop - r.start) * columns].view(-1, columns) for t in (buffer, spare))
            head.logits(x, r, c, logits, isa, sums)
            ent = None if entropy is None else entropy[r]
            g = logits_grad(logits, labels[r], first_id + c.start, softcap, False, m[r], log_l[r], ent, d.rows(r), product, isa)
            grad.add(head, r, c, g, sums)
            if dx is not None and w is not None:
                add_product(dx[r], g, w)
            if dwc is not None:
                add_product(dwc, g.t(), xp[r])
        if dw is not None and dwc is not None:
            dw[c] = dwc
    return None if dx is None else dx.to(x.dtype), dw, grad


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define(
    "swiftk::vocab_stats_fwd",
    "(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, int vocab_start, int vocab_size, float softcap, "
    f"bool with_sum, bool with_entropy, {HEAD_SCHEMA}, str caller, str numerics, str isa) -> "
    "(Tensor lse, Tensor label_logit, Tensor logprob, Tensor logit_sum, Tensor entropy, Tensor max_logit, Tensor argmax, "
    "Tensor log_l)",
)
torch.library.define(
    "swiftk::vocab_stats_bwd",
    "(Tensor dlse, Tensor dlabel, Tensor dsum, Tensor dentropy, Tensor hidden, Tensor weight, Tensor labels, Tensor max_logit, "
    f"Tensor log_l, Tensor entropy, int ignore_index, int vocab_start, float softcap, bool[] needs, {HEAD_SCHEMA}, str isa) -> "
    "(Tensor dx, Tensor dw, Tensor ds, Tensor db, Tensor dgain)",
)


@torch.library.register_kernel("swiftk::vocab_stats_fwd", ("cpu", "cuda"))
def _vocab_stats_fwd(
    hidden, weight, labels, ignore_index, vocab_start, vocab_size, softcap, with_sum, with_entropy, absmax, blocksize, s, b,
    gain, caller, numerics, isa,
):  # fmt: skip
    kept = KeptRows(caller, labels, ignore_index, vocab_size)
    x, y = kept.take(hidden), kept.take(labels)
    head = Head.of(HeadArgs(weight, absmax, blocksize, s, b, gain), x, kept)
    running = _stats(x, head, y, vocab_start, softcap, with_entropy, with_sum, numerics, isa)
    log_l, lse, logprob, entropy = running.finish(y, vocab_start, head.vocab)
    logprob = kept.poisoned(logprob)
    results = (lse, running.label, logprob, running.total, entropy, running.m, running.argmax, log_l)
    return tuple(kept.put(t, lse) for t in results)


@torch.library.register_fake("swiftk::vocab_stats_fwd")
def _vocab_stats_fwd_fake(
    hidden, weight, labels, ignore_index, vocab_start, vocab_size, softcap, with_sum, with_entropy, absmax, blocksize, s, b,
    gain, caller, numerics, isa,
):  # fmt: skip
    def rows(present=True):
        return hidden.new_empty(hidden.shape[0] if present else 0, dtype=acc_dtype(hidden.dtype))

    return rows(), rows(), rows(), rows(with_sum), rows(with_entropy), rows(), torch.empty_like(labels), rows()


@torch.library.register_kernel("swiftk::vocab_stats_bwd", ("cpu", "cuda"))
def _vocab_stats_bwd(
    dlse, dlabel, dsum, dentropy, hidden, weight, labels, max_logit, log_l, entropy, ignore_index, vocab_start, softcap,
    needs, absmax, blocksize, s, b, gain, isa,
):  # fmt: skip
    kept = KeptRows("vocab_stats", labels, ignore_index, None)  # the forward has checked them
    d = StatsGrad._make(kept.take(t) if t.numel() else None for t in (dlse, dlabel, dsum, dentropy))
    ent = kept.take(entropy) if entropy.numel() else None
    x, y, m, log_l = (kept.take(t) for t in (hidden, labels, max_logit, log_l))
    args = HeadArgs(weight, absmax, blocksize, s, b, gain)
    sums = _recomputed(x, Head.of(args, x, kept), y, vocab_start, softcap, m, log_l, ent, d, needs, isa)
    return head_grads(kept, hidden, args, *sums)


@torch.library.register_fake("swiftk::vocab_stats_bwd")
def _vocab_stats_bwd_fake(
    dlse, dlabel, dsum, dentropy, hidden, weight, labels, max_logit, log_l, entropy, ignore_index, vocab_start, softcap,
    needs, absmax, blocksize, s, b, gain, isa,
):  # fmt: skip
    return grads_fake(hidden, HeadArgs(weight, absmax, blocksize, s, b, gain), needs)


# --- autograd ----------------------------------------------------------------------------------------------------


def _stats_setup_context(ctx, inputs, output):
    (hidden, weight, labels, ctx.ignore_index, ctx.vocab_start, _, ctx.softcap, _, _, absmax, ctx.blocksize, s, b, gain, _, _,
     ctx.isa) = inputs  # fmt: skip
    _, _, _, _, entropy, max_logit, argmax, log_l = output
    ctx.save_for_backward(hidden, weight, labels, max_logit, log_l, entropy, absmax, s, b, gain)
    ctx.mark_non_differentiable(max_logit, argmax, log_l)


def _stats_backward(ctx, dlse, dlabel, dlogprob, dsum, dentropy, *_):
    # g_v = [p_v (dlse - dentropy (log p_v + entropy)) + dsum + dlabel 1(v = label)] (1 - (s_v / c)^2);  dX = g W, dW = g^T X
    # of an adapted head: _head.py
    hidden, weight, labels, max_logit, log_l, entropy, absmax, s, b, gain = ctx.saved_tensors
    at = labels - ctx.vocab_start
    dlogprob = dlogprob.where((at >= 0) & (at < weight.shape[0]), 0)
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 11, 12, 13)]
    grads = torch.ops.swiftk.vocab_stats_bwd(
        dlse - dlogprob, dlabel + dlogprob, dsum, dentropy, hidden, weight, labels, max_logit, log_l, entropy,
        ctx.ignore_index, ctx.vocab_start, ctx.softcap, needs, absmax, ctx.blocksize, s, b, gain, ctx.isa,
    )  # fmt: skip
    dx, dw, ds, db, dgain = (t if need else None for t, need in zip(grads, needs, strict=True))
    return dx, dw, *[None] * 9, ds, db, dgain, None, None, None


torch.library.register_autograd("swiftk::vocab_stats_fwd", _stats_backward, setup_context=_stats_setup_context)
refuse_double_backward("vocab_stats", "swiftk::vocab_stats_bwd")


# --- public ------------------------------------------------------------------------------------------------------


def check_head(
    op: str, hidden: torch.Tensor, weight: torch.Tensor | NF4Tensor, labels: torch.Tensor, softcap: float, isa: str
) -> None:
    check_weight(op, hidden, weight)
    if hidden.dim() != 2:
        raise ValueError(f"{op}: hidden has shape {tuple(hidden.shape)}, wants (T, H); flatten batch and sequence first")
    if len(weight.shape) != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        want = f"(V, {hidden.shape[1]}) with V >= 1"
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, hidden {tuple(hidden.shape)} needs {want}")
    check_shape(op, "labels", labels, (hidden.shape[0],), f"hidden {tuple(hidden.shape)}")
    check_dtype(op, "labels", labels, torch.int64, hidden.device, "hidden")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"{op}: softcap has {softcap}, wants a finite number >= 0 (0 for none)")
    check_isa(op, isa)


def vocab_stats(
    hidden: torch.Tensor, weight: torch.Tensor | NF4Tensor, labels: torch.Tensor, *, adapter: Adapter | None = None,
    dropout: Dropout | None = None, vocab_start: int = 0, vocab_size: int | None = None, ignore_index: int = -100,
    softcap: float = 0.0, logit_sum: bool = False, entropy: bool = False, numerics: str = "auto", isa: str = "auto",
    caller: str = "vocab_stats",
) -> VocabStats:  # fmt: skip
    """What the rows [vocab_start, vocab_start + V) of the head say about each token: all that a loss is made of.

    Differentiable per token in lse, label_logit, logprob, logit_sum and entropy, and through them in hidden, weight and the
    adapter's a, b, magnitude; the backward forms the logits again. Merge shards with `merge_vocab_stats`, then
    `cross_entropy_from_stats`; each shard's gradient by hidden and by a is its part of a sum over the shards.

    Args:
        hidden: (T, H), bf16, fp32 or fp64. weight: (V, H), same dtype, or an NF4Tensor: this shard's rows.
        adapter: LoRA or DoRA of the head, which is then frozen; b, magnitude and weight_norm_sq are the shard's rows.
        dropout: of the adapter's input in training, one token index per row of hidden.
        labels: (T,) int64, ids of the whole vocabulary, or ignore_index: the row is not computed, its results are 0.
        vocab_start: id of weight's first row. vocab_size: ids of the whole vocabulary; None: weight is all of it.
        softcap: logits become softcap * tanh(logits / softcap); 0: they do not.
        logit_sum, entropy: whether to return them too.
        numerics: of the forward's products on CUDA, see `linear`: with "invariant" a row's results do not depend on the others.
        isa: instruction set of the CPU kernels: "auto", "avx512", "avx2" or "portable".
        caller: the function that the errors name.
    Raises: ValueError for a wrong shape, dtype, device, numerics, isa, or on the CPU a label outside the vocabulary (its
        position and id); on CUDA its logprob is NaN. ImportError on CUDA without Triton. NotImplementedError for a gradient of
        the gradient.
    """
    check_head(caller, hidden, weight, labels, softcap, isa)
    check_numerics(caller, numerics)
    size = vocab_start + weight.shape[0] if vocab_size is None else vocab_size
    if vocab_start < 0 or vocab_start + weight.shape[0] > size or (vocab_size is None and vocab_start):
        raise ValueError(
            f"vocab_stats: vocab_size has {vocab_size}, vocab_start {vocab_start} and {weight.shape[0]} rows of weight need "
            f"the size of the whole vocabulary, at least {vocab_start + weight.shape[0]}"
        )
    base, *rest = head_args(caller, hidden, weight, labels, ignore_index, adapter, dropout, numerics, isa)
    lse, label, logprob, total, ent, top, argmax, _ = torch.ops.swiftk.vocab_stats_fwd(
        hidden, base, labels, ignore_index, vocab_start, size, softcap, logit_sum, entropy, *rest, caller, numerics, isa
    )
    return VocabStats(lse, label, logprob, total if logit_sum else None, ent if entropy else None, top, argmax)


def merge_vocab_stats(shards: Sequence[VocabStats]) -> VocabStats:
    """The statistics of the whole vocabulary from those of its shards, in the order of their ids; differentiable.

    With pi_r = exp(lse_r - lse), the probability that a token falls into shard r:
        lse = log sum_r exp(lse_r),   label_logit and logit_sum = sums,   logprob = label_logit - lse,
        entropy = sum_r pi_r (entropy_r + lse - lse_r),
        max_logit and argmax = those of the first shard with the largest max_logit.
    Across processes the same lines are all-reduces of (T,) vectors. Rows that are ignored give log(number of shards)
    for lse; their labels say so.
    """
    lse = torch.logsumexp(torch.stack([s.lse for s in shards]), 0)
    top, argmax = shards[0].max_logit, shards[0].argmax
    for shard in shards[1:]:
        argmax = torch.where(shard.max_logit > top, shard.argmax, argmax)
        top = torch.maximum(shard.max_logit, top)
    total = [s.logit_sum for s in shards if s.logit_sum is not None]
    entropy = [torch.exp(s.lse - lse) * (s.entropy + (lse - s.lse)) for s in shards if s.entropy is not None]
    label = torch.stack([s.label_logit for s in shards]).sum(0)
    return VocabStats(
        lse, label, label - lse, torch.stack(total).sum(0) if total else None,
        torch.stack(entropy).sum(0) if entropy else None, top, argmax,
    )  # fmt: skip
