"""Cross entropy of a linear head, and the log-probabilities it is made of, without the T x V logits.

    z = x W^T,  s = c tanh(z / c) with softcap c (s = z without),  lse = log sum_v exp s_v,  p_v = exp(s_v - lse)
    loss of a token = w [lse - (1 - eps) s_label - eps mean_v s_v + zeta lse^2]     weight w, smoothing eps, z-loss zeta
    d loss / d z_v  = w [(1 + 2 zeta lse) p_v - (1 - eps) 1(v = label) - eps / V] (1 - (s_v / c)^2)

Sources: z-loss, PaLM (2022), section 5; smoothing as in torch's cross_entropy; statistics, their row invariance, softcap
and what is skipped: swiftk.kernels.vocab_stats, on which this is built.

Two ways to the gradient, `mode`:
  fused      dX (and dW) are formed in the forward and scaled by the loss's gradient in the backward. Frozen head: two
             products and a T x 2048 buffer, W read once per 4096 rows. Trained head: three products and a buffer of
             1024 rows x V. The loss is one number, so its gradient is one number.
  recompute  `vocab_stats` and a formula: the backward forms the logits again from the saved lse. Three products (four with
             dW), a T x 2048 buffer, nothing saved beyond hidden. A gradient per token and per statistic: what vocabulary-
             parallel callers (`cross_entropy_from_stats`), preference losses and entropy bonuses (`token_logprobs`) need.
On CUDA 256 MiB of logits take the place of the T x 2048 buffer, and 2048 rows x V of the 1024.
Rows whose label is ignore_index are never multiplied (on CUDA: as zeros). A head that does not require a gradient costs no dW.
The head may be NF4 (frozen; a slice at a time is dequantised for dX) and adapted by LoRA or DoRA (swiftk.kernels._head): fused
then costs what a trained head costs, with dB in the place of dW (DoRA's dm: one product more).
Not supported: a bias of the head, several adapters of the head, class weights, soft labels, infinite logits (they give NaN).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch

from swiftk.kernels._checks import check_shape, refuse_double_backward
from swiftk.kernels._head import (
    HEAD_SCHEMA,
    STEP,
    AdapterGrad,
    Head,
    HeadArgs,
    KeptRows,
    add_product,
    buffer_bytes,
    grads_fake,
    head_args,
    head_grads,
    ranges,
)
from swiftk.kernels._native import DTYPE_CODES, acc_dtype, native, threads
from swiftk.kernels._triton import on_gpu
from swiftk.kernels.dropout import Dropout
from swiftk.kernels.linear import check_numerics
from swiftk.kernels.lora_linear import Adapter
from swiftk.kernels.nf4 import NF4Tensor
from swiftk.kernels.vocab_stats import (
    BLOCK_ROWS,
    RunningStats,
    StatsGrad,
    VocabStats,
    address,
    buffer_columns,
    check_head,
    even_blocks,
    logits_grad,
    logits_ref,
    product_dtype,
    update_stats,
    vocab_stats,
    vocab_stats_ref,
)

# rows of full logits where dW is formed in the forward: dW is read and written once per so many rows. CUDA's: 1.2 GB of logits
# and 9 % of the products' time for dW at V 151,936, H 4096 (arithmetic, 4.8 TB/s and 700 TFLOP/s)
TRAINED_ROWS, CUDA_TRAINED_ROWS = 1024, 2048
LABEL_ROWS, CUDA_LABEL_ROWS = 256, 4096  # rows of W that are gathered for their labels at a time


class CrossEntropyStats(NamedTuple):
    """Per token, fp32 (fp64 for fp64), shape (T,), not differentiable."""

    lse: torch.Tensor  # log sum exp of the logits; 0 where ignored
    label_logit: torch.Tensor  # logit of the label; 0 where ignored
    correct: torch.Tensor  # bool: the label is the argmax, the lowest id of equal ones (False where ignored)
    entropy: torch.Tensor | None = None  # -sum p log p in nats, where asked for; 0 where ignored


# --- reference ---------------------------------------------------------------------------------------------------


def linear_cross_entropy_ref(
    hidden: torch.Tensor, weight: torch.Tensor | NF4Tensor, labels: torch.Tensor, *, adapter: Adapter | None = None,
    dropout: Dropout | None = None, token_weights: torch.Tensor | None = None, ignore_index: int = -100, softcap: float = 0.0,
    z_loss: float = 0.0, label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, CrossEntropyStats]:  # fmt: skip
    """The formula on the whole T x V logits, all statistics included."""
    stats = vocab_stats_ref(
        hidden, weight, labels, adapter=adapter, dropout=dropout, ignore_index=ignore_index, softcap=softcap
    )
    lse, label_logit, _, logit_sum, entropy, _, argmax = stats
    assert logit_sum is not None and entropy is not None
    mean = logit_sum / weight.shape[0]
    loss = lse - (1 - label_smoothing) * label_logit - label_smoothing * mean + z_loss * lse.square()
    loss = loss.sum() if token_weights is None else (loss * token_weights).sum()
    correct = (argmax == labels) & (labels != ignore_index)
    return loss, CrossEntropyStats(lse.detach(), label_logit.detach(), correct, entropy.detach())


def token_logprobs_ref(
    hidden: torch.Tensor, weight: torch.Tensor | NF4Tensor, labels: torch.Tensor, *, adapter: Adapter | None = None,
    dropout: Dropout | None = None, softcap: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """log p(label), (T,), from the whole T x V logits."""
    log_p = torch.log_softmax(logits_ref(hidden, weight, softcap, adapter=adapter, dropout=dropout), -1)
    return log_p.gather(-1, labels[:, None])[:, 0]


# --- launchers ---------------------------------------------------------------------------------------------------


class _Loss(NamedTuple):
    """The constants of the loss."""

    vocab_size: int
    z_loss: float
    label_smoothing: float

    def tokens(self, lse: torch.Tensor, logprob: torch.Tensor, logit_sum: torch.Tensor | None) -> torch.Tensor:
        loss = (self.label_smoothing - 1) * logprob
        if logit_sum is not None:
            loss = loss + self.label_smoothing * (lse - logit_sum / self.vocab_size)
        return loss + self.z_loss * lse * lse if self.z_loss else loss

    def coefficients(self, lse: torch.Tensor, w: torch.Tensor) -> StatsGrad:
        """The derivative of w * tokens(...)."""
        dsum = w * (-self.label_smoothing / self.vocab_size) if self.label_smoothing else None
        return StatsGrad(w * (1 + 2 * self.z_loss * lse), w * (self.label_smoothing - 1), dsum, None)


def _fused_frozen(x, head: Head, labels, w, loss: _Loss, softcap, entropy, numerics, isa):
    """(running, dx): one pass over the vocabulary. With acc = sum over v of exp(s_v - m) w_v, the label's column left out,
    dx = w [(1 + 2 zeta lse) acc / l + ((1 + 2 zeta lse) p_label - (1 - eps)) w_label - eps / V sum_v w_v].
    """
    (rows, hidden), vocab = x.shape, head.vocab
    acc, product = acc_dtype(x.dtype), product_dtype(x, isa)
    running = RunningStats.start(x, entropy, loss.label_smoothing > 0)
    dx = torch.empty_like(x, dtype=acc)
    height = max((r.stop - r.start for r in even_blocks(rows, BLOCK_ROWS)), default=0)
    width = head.converted_columns(buffer_columns(x, height, vocab), product) if on_gpu(x) else min(vocab, STEP)
    buffer = x.new_empty(height * width, dtype=acc)
    copy = buffer if product == acc else x.new_empty(buffer.shape, dtype=product)
    for r in even_blocks(rows, BLOCK_ROWS):
        out = dx[r].zero_()
        here, y = running.rows(r), labels[r]
        for c in ranges(vocab, width):
            logits, g = (b[: len(out) * (c.stop - c.start)].view(len(out), -1) for b in (buffer, copy))
            head.logits(x, r, c, logits, isa, numerics=numerics)
            if on_gpu(x):
                update_stats(logits, y, c.start, softcap, here, isa, exp=(g, out))
            else:
                native().vocab_stats_exp(
                    DTYPE_CODES[acc], DTYPE_CODES[product], address(logits), logits.stride(0), address(y), *logits.shape,
                    c.start, softcap, *map(address, here), address(g), g.stride(0), address(out), hidden, threads(), isa,
                )  # fmt: skip
            add_product(out, g, head.rows(c, product))
        _, lse, logprob, _ = here.finish(y, 0, vocab)
        d = loss.coefficients(lse, w[r])
        at_label = d.dlse * torch.expm1(logprob) + (d.dlse + d.dlabel)  # dlse p + dlabel without the cancellation
        if softcap:
            at_label = at_label * ((softcap - here.label) * (softcap + here.label) / softcap**2)
        out.mul_((d.dlse / here.l)[:, None])
        y = y.clamp(0, vocab - 1)  # where a label outside is no error, its loss is NaN
        for k in ranges(len(out), CUDA_LABEL_ROWS if on_gpu(x) else LABEL_ROWS):  # the labels' rows of W, in a small buffer
            out[k].addcmul_(at_label[k, None], head.rows(y[k], acc))
        if d.dsum is not None:
            out.addcmul_(d.dsum[:, None], head.row_sum(acc))
    return running, dx


def _fused_trained(x, head: Head, labels, w, loss: _Loss, softcap, entropy, needs, numerics, isa):
    """(running, dx, dw, grad of the adapter): a block of rows keeps its full logits, so they are multiplied once; dW and dB
    are summed over the blocks."""
    (rows, hidden), vocab = x.shape, head.vocab
    acc, product = acc_dtype(x.dtype), product_dtype(x, isa)
    need_dx, need_dw, *needs_adapter = needs
    running = RunningStats.start(x, entropy, loss.label_smoothing > 0)
    fitting = buffer_bytes(x) // (vocab * acc.itemsize)
    blocks = list(even_blocks(rows, min(BLOCK_ROWS, max(CUDA_TRAINED_ROWS if on_gpu(x) else TRAINED_ROWS, fitting))))
    dx = torch.empty_like(x, dtype=acc) if need_dx else None
    dw = x.new_zeros(vocab, hidden, dtype=x.dtype if len(blocks) == 1 else acc) if need_dw else None
    grad = AdapterGrad.start(head, needs_adapter, acc)
    height = max((r.stop - r.start for r in blocks), default=0)
    buffer = x.new_empty(height * vocab, dtype=acc)
    for r in blocks:
        logits = buffer[: (r.stop - r.start) * vocab].view(-1, vocab)
        here, xp = running.rows(r), x[r].to(product)
        out = None if dx is None else dx[r].zero_()
        head.logits(x, r, slice(0, vocab), logits, isa, numerics=numerics)
        update_stats(logits, labels[r], 0, softcap, here, isa)
        log_l, lse, *_ = here.finish(labels[r], 0, vocab)
        d = loss.coefficients(lse, w[r])
        for c in ranges(vocab, head.converted_columns(buffer_columns(x, len(logits), vocab), product)):
            g = logits_grad(logits[:, c], labels[r], c.start, softcap, True, here.m, log_l, None, d, product, isa)
            sums = None
            if grad.dgain is not None:
                sums = x.new_empty(len(logits), c.stop - c.start, dtype=acc)
                head.sums(x, r, c, sums, isa)
            grad.add(head, r, c, g, sums)
            if out is not None:
                add_product(out, g, head.rows(c, product))
            if dw is not None:
                add_product(dw[c], g.t(), xp)
    return running, dx, None if dw is None else dw.to(x.dtype), grad


# --- operator ----------------------------------------------------------------------------------------------------

torch.library.define(
    "swiftk::linear_cross_entropy_fwd",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor token_weights, int ignore_index, float softcap, float z_loss, "
    f"float label_smoothing, bool with_entropy, bool[] needs, {HEAD_SCHEMA}, str numerics, str isa) -> "
    "(Tensor loss, Tensor token_loss, Tensor dx, Tensor dw, Tensor ds, Tensor db, Tensor dgain, Tensor lse, "
    "Tensor label_logit, Tensor entropy, Tensor argmax)",
)
torch.library.define(
    "swiftk::linear_cross_entropy_bwd",
    "(Tensor dloss, Tensor token_loss, Tensor[] grads, Tensor[] inputs) -> Tensor[]",
)


@torch.library.register_kernel("swiftk::linear_cross_entropy_fwd", ("cpu", "cuda"))
def _linear_cross_entropy_fwd(
    hidden, weight, labels, token_weights, ignore_index, softcap, z_loss, label_smoothing, with_entropy, needs, absmax,
    blocksize, s, b, gain, numerics, isa,
):  # fmt: skip
    kept = KeptRows("linear_cross_entropy", labels, ignore_index, weight.shape[0])
    x, y, w = (kept.take(t) for t in (hidden, labels, token_weights))
    args = HeadArgs(weight, absmax, blocksize, s, b, gain)
    head, loss = Head.of(args, x, kept), _Loss(weight.shape[0], z_loss, label_smoothing)
    # with softcap and smoothing, smoothing's part of dx is no longer a sum over W alone
    if needs[1] or head.tail is not None or (softcap and label_smoothing):
        running, *sums = _fused_trained(x, head, y, w, loss, softcap, with_entropy, needs, numerics, isa)
    else:
        running, dx = _fused_frozen(x, head, y, w, loss, softcap, with_entropy, numerics, isa)
        sums = [dx if needs[0] else None, None, AdapterGrad(None, None, None)]
    _, lse, logprob, entropy = running.finish(y, 0, head.vocab)
    token_loss = loss.tokens(lse, kept.poisoned(logprob), running.total)
    total = kept.put(token_loss * w, lse).sum()  # over all T, as in the recompute mode
    stats = (kept.put(t, lse) for t in (lse, running.label, entropy, running.argmax))
    return total, kept.put(token_loss, lse), *head_grads(kept, hidden, args, *sums), *stats


@torch.library.register_fake("swiftk::linear_cross_entropy_fwd")
def _linear_cross_entropy_fwd_fake(
    hidden, weight, labels, token_weights, ignore_index, softcap, z_loss, label_smoothing, with_entropy, needs, absmax,
    blocksize, s, b, gain, numerics, isa,
):  # fmt: skip
    def rows(present=True):
        return hidden.new_empty(hidden.shape[0] if present else 0, dtype=acc_dtype(hidden.dtype))

    loss = hidden.new_empty((), dtype=acc_dtype(hidden.dtype))
    dx, *grads = grads_fake(hidden, HeadArgs(weight, absmax, blocksize, s, b, gain), needs)
    dx = dx.to(loss.dtype) if needs[0] else dx  # not rounded before the loss's gradient has multiplied it
    return loss, rows(), dx, *grads, rows(), rows(), rows(with_entropy), torch.empty_like(labels)


@torch.library.register_kernel("swiftk::linear_cross_entropy_bwd", ("cpu", "cuda"))
def _linear_cross_entropy_bwd(dloss, token_loss, grads, inputs):
    return [dloss * token_loss, *(g * dloss for g in grads)]  # a 0-dimensional factor keeps its precision beside bf16


@torch.library.register_fake("swiftk::linear_cross_entropy_bwd")
def _linear_cross_entropy_bwd_fake(dloss, token_loss, grads, inputs):
    return [torch.empty_like(t) for t in (token_loss, *grads)]


# --- autograd ----------------------------------------------------------------------------------------------------


def _loss_setup_context(ctx, inputs, output):
    ctx.needs = inputs[9]
    given = [t for i in (0, 1, 12, 13, 14) if (t := inputs[i]) is not None and t.is_floating_point()]
    ctx.save_for_backward(*output[1:7], *given)
    ctx.mark_non_differentiable(*output[1:])


def _loss_backward(ctx, dloss, *_):
    # the inputs go along for the sake of the derivative of this derivative, which is refused
    token_loss, *tensors = ctx.saved_tensors
    needed = [g for g, need in zip(tensors[:5], ctx.needs, strict=True) if need]
    dtoken_weights, *scaled = torch.ops.swiftk.linear_cross_entropy_bwd(dloss, token_loss, needed, tensors[5:])
    rest = iter(scaled)
    dx, dw, ds, db, dgain = (next(rest) if need else None for need in ctx.needs)
    dtoken_weights = dtoken_weights if ctx.needs_input_grad[3] else None
    dx = None if dx is None else dx.to(tensors[5].dtype)
    return dx, dw, None, dtoken_weights, *[None] * 8, ds, db, dgain, None, None


torch.library.register_autograd("swiftk::linear_cross_entropy_fwd", _loss_backward, setup_context=_loss_setup_context)
refuse_double_backward("linear_cross_entropy", "swiftk::linear_cross_entropy_bwd")


# --- public ------------------------------------------------------------------------------------------------------


def cross_entropy_from_stats(
    stats: VocabStats, labels: torch.Tensor, vocab_size: int, *, token_weights: torch.Tensor | None = None,
    ignore_index: int = -100, z_loss: float = 0.0, label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, CrossEntropyStats]:  # fmt: skip
    """The loss of `linear_cross_entropy` from the statistics of the whole vocabulary; label_smoothing needs logit_sum."""
    if label_smoothing and stats.logit_sum is None:
        raise ValueError(
            "cross_entropy_from_stats: stats.logit_sum has None, label_smoothing needs vocab_stats(logit_sum=True)"
        )
    keep = labels != ignore_index
    loss = _Loss(vocab_size, z_loss, label_smoothing)
    tokens = loss.tokens(stats.lse, stats.logprob, stats.logit_sum if label_smoothing else None)
    if token_weights is not None:
        tokens = tokens * token_weights.to(tokens.dtype)
    entropy = None if stats.entropy is None else stats.entropy.detach().where(keep, 0)
    correct = (stats.argmax == labels) & keep
    return tokens.where(keep, 0).sum(), CrossEntropyStats(
        stats.lse.detach().where(keep, 0), stats.label_logit.detach(), correct, entropy
    )


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor | NF4Tensor, labels: torch.Tensor, *, adapter: Adapter | None = None,
    dropout: Dropout | None = None, token_weights: torch.Tensor | None = None, ignore_index: int = -100, softcap: float = 0.0,
    z_loss: float = 0.0, label_smoothing: float = 0.0, mode: str = "fused", return_entropy: bool = False,
    numerics: str = "auto", isa: str = "auto",
) -> tuple[torch.Tensor, CrossEntropyStats]:  # fmt: skip
    """Sum of the weighted token losses of the head `hidden @ weight.T`, and statistics per token.

    The sum, not a mean: divide it by the global count of tokens. Differentiable in hidden, weight, token_weights and the
    adapter's a, b and magnitude.

    Args:
        hidden: (T, H), bf16, fp32 or fp64; T may be 0. weight: (V, H), same dtype; frozen (no requires_grad): no dW is
            formed. Or an NF4Tensor (V, H), frozen.
        adapter: LoRA, rsLoRA or DoRA of the head, which is then frozen; one adapter, not a stack.
        dropout: of the adapter's input in training, one token index per row of hidden; None in evaluation.
        labels: (T,) int64 in [0, V), already shifted, or ignore_index: no loss, no gradient, and the row is not computed.
        token_weights: (T,), any floating dtype, a factor of each token's loss; None: 1.
        softcap: logits become softcap * tanh(logits / softcap); 0: they do not.
        z_loss: adds z_loss * lse^2 per token. label_smoothing: in [0, 1], as in torch's cross_entropy.
        mode: "fused" forms the gradients in the forward, "recompute" in the backward (see the head of the file); where no
            gradient is needed both are one product. Fused, a bf16 dW is rounded before the loss's gradient multiplies it
            and after; a constant factor goes better into token_weights.
        return_entropy: stats.entropy too.
        numerics: of the forward's products on CUDA, see `linear`.
        isa: instruction set of the CPU kernels: "auto", "avx512", "avx2" or "portable".
    Returns: (loss, stats): loss () in fp32 (fp64 for fp64), 0 where every label is ignored.
    Raises: ValueError for a wrong shape, dtype, device, option or isa, or on the CPU a label outside [0, V) (its position and
        id); on CUDA the loss is NaN then (asserted under TRITON_DEBUG=1). NotImplementedError for a gradient of the gradient.
        ImportError on CUDA without Triton.
    """
    op = "linear_cross_entropy"
    check_head(op, hidden, weight, labels, softcap, isa)
    check_numerics(op, numerics)
    if token_weights is not None:
        check_shape(op, "token_weights", token_weights, (hidden.shape[0],), f"hidden {tuple(hidden.shape)}")
        if not token_weights.is_floating_point() or token_weights.device != hidden.device:
            got = f"dtype {token_weights.dtype} on {token_weights.device}"
            raise ValueError(f"{op}: token_weights has {got}, wants a floating dtype on {hidden.device} like hidden")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing has {label_smoothing}, wants 0 to 1")
    if mode not in ("fused", "recompute"):
        raise ValueError(f"{op}: mode has {mode!r}, wants 'fused' or 'recompute'")
    inputs = [hidden] if isinstance(weight, NF4Tensor) else [hidden, weight]
    inputs += [] if adapter is None else [t for t in (adapter.a, adapter.b, adapter.magnitude) if t is not None]
    if mode == "recompute" or not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        stats = vocab_stats(
            hidden, weight, labels, adapter=adapter, dropout=dropout, ignore_index=ignore_index, softcap=softcap,
            logit_sum=label_smoothing > 0, entropy=return_entropy, numerics=numerics, isa=isa, caller=op,
        )  # fmt: skip
        return cross_entropy_from_stats(
            stats, labels, weight.shape[0], token_weights=token_weights, ignore_index=ignore_index, z_loss=z_loss,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    acc = acc_dtype(hidden.dtype)
    w = hidden.new_ones(hidden.shape[0], dtype=acc) if token_weights is None else token_weights.to(acc)
    head = head_args(op, hidden, weight, labels, ignore_index, adapter, dropout, numerics, isa)
    needs = [t is not None and t.requires_grad for t in (hidden, head.weight, head.s, head.b, head.gain)]
    loss, _, _, _, _, _, _, lse, label_logit, entropy, argmax = torch.ops.swiftk.linear_cross_entropy_fwd(
        hidden, head.weight, labels, w, ignore_index, softcap, z_loss, label_smoothing, return_entropy, needs, *head[1:],
        numerics, isa,
    )  # fmt: skip
    correct = (argmax == labels) & (labels != ignore_index)
    return loss, CrossEntropyStats(lse, label_logit, correct, entropy if return_entropy else None)


@overload
def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor | NF4Tensor, labels: torch.Tensor, *, adapter: Adapter | None = ...,
    dropout: Dropout | None = ..., ignore_index: int = ..., softcap: float = ...,
    return_entropy: Literal[False] = ..., numerics: str = ..., isa: str = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor | NF4Tensor, labels: torch.Tensor, *, adapter: Adapter | None = ...,
    dropout: Dropout | None = ..., ignore_index: int = ..., softcap: float = ...,
    return_entropy: Literal[True], numerics: str = ..., isa: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor | NF4Tensor, labels: torch.Tensor, *, adapter: Adapter | None = None,
    dropout: Dropout | None = None, ignore_index: int = -100, softcap: float = 0.0, return_entropy: bool = False,
    numerics: str = "auto", isa: str = "auto",
):  # fmt: skip
    """log p(label) of each token, differentiable per token in hidden, weight and the adapter; the backward recomputes.

    Bitwise the same for a row whether it comes alone or among others, on any number of threads (on CUDA with
    numerics="invariant").

    Args: as in `linear_cross_entropy`.
    Returns: (T,) in fp32 (fp64 for fp64), nats, 0 where ignored; with return_entropy (logprobs, entropy), both (T,) and
        both differentiable.
    Raises: as `linear_cross_entropy`; on CUDA a label outside [0, V) gives NaN for its token alone.
    """
    stats = vocab_stats(
        hidden, weight, labels, adapter=adapter, dropout=dropout, ignore_index=ignore_index, softcap=softcap,
        entropy=return_entropy, numerics=numerics, isa=isa, caller="token_logprobs",
    )  # fmt: skip
    return (stats.logprob, stats.entropy) if return_entropy else stats.logprob
